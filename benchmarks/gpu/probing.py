"""What the probe costs a training step, in pairs of steps with and without it, and whether the host ever waits."""

from __future__ import annotations

import statistics
import time
import warnings

import torch
from torch import nn
from torch.optim import Optimizer

import gradpruner
from benchmarks.gpu.models import LLAMA_1B, LLAMA_8B, TINY, Shape, Steps, adapted, llama
from benchmarks.gpu.session import Session


def lora(session: Session) -> None:
    """Scores only, and with what merging needs, on two sizes of model."""
    for shape in (TINY,) if session.tiny else (LLAMA_1B, LLAMA_8B):
        session.begin_peak()
        model = adapted(llama(session, shape))
        Steps(session, model, shape).run(2)  # warms up
        for importance in (False, True):
            _pairs(session, model, shape, importance)
        del model


def _pairs(session: Session, model: nn.Module, shape: Shape, importance: bool) -> None:
    """Steps in turn with and without `record`: whatever drifts, drifts for both."""
    probe, host = gradpruner.Probe(model, importance=importance), list[float]()

    def every_other(number: int, optimizer: Optimizer) -> None:
        if number % 2:
            began = time.perf_counter()
            probe.record(optimizer)
            host.append(time.perf_counter() - began)

    run = Steps(session, model, shape, every_other)
    run.run(2)  # makes the optimizer's state, so that what is held afterwards is the probe's alone
    host.clear()
    before = session.begin_peak()
    seconds = run.run(6 if session.tiny else 24)
    held = torch.cuda.memory_allocated(session.device) - before if session.on_cuda else 0
    waits = None
    if session.on_cuda:
        waits = _waits(run, probe)
    began = time.perf_counter()
    steps = probe.igia.steps
    finish = time.perf_counter() - began
    with_probe, without = seconds[3::2], seconds[2::2]
    overhead = [a / b for a, b in zip(with_probe, without, strict=True)]
    session.put(
        shape=f"hidden {shape.hidden}, {shape.layers} layers, {shape.rows} x {shape.length} tokens",
        importance=importance,
        steps=steps,
        step_s=statistics.median(without),
        with_probe_over_without=statistics.median(overhead),
        least=min(overhead),
        most=max(overhead),
        record_s=statistics.median(host),
        record_most_s=max(host),
        waits_per_record=waits,
        device_bytes_held=held,
        finish_s=finish,
    )


def _waits(run: Steps, probe: gradpruner.Probe) -> int:
    """How many times the host waits for the device inside one `record`, as torch counts them."""

    def watched(number: int, optimizer: Optimizer) -> None:
        torch.cuda.set_sync_debug_mode("warn")
        probe.record(optimizer)
        torch.cuda.set_sync_debug_mode("default")

    run.before_step = watched
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.run(1)
    found = [str(each.message) for each in seen if "called a synchronizing" in str(each.message)]
    for message in found[:3]:
        print(message, flush=True)
    return len(found)


def exact(session: Session) -> None:
    """A step with the true weight gradient squared in the backward pass, beside a plain one."""
    shape = TINY if session.tiny else LLAMA_1B
    model = adapted(llama(session, shape))
    run = Steps(session, model, shape)
    plain = run.run(6)[2:]
    session.begin_peak()
    run.run(1)
    plain_peak = session.peak()
    for importance in (False, True):
        probe = gradpruner.Probe(model, estimator="exact", importance=importance)
        run.before_step = lambda number, optimizer, probe=probe: probe.record(optimizer)  # type: ignore[misc]
        session.begin_peak()
        seconds = run.run(6)[2:]
        session.put(
            importance=importance,
            plain_step_s=statistics.median(plain),
            step_s=statistics.median(seconds),
            ratio=statistics.median(seconds) / statistics.median(plain),
            extra_peak_bytes=session.peak() - plain_peak,
            steps=probe.igia.steps,
        )
