"""One Trainer run that starts dense and is cut on the way: steps before and after, the pause, the memory."""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import gradpruner
from benchmarks.gpu.models import LLAMA_1B, TINY, adapted, llama
from benchmarks.gpu.session import Session


class _Clock(TrainerCallback):
    """Seconds of each step and the memory held after it; the last callback, so that a cut counts as its step's."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.seconds, self.held = list[float](), list[int]()
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._session.wait()
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._session.wait()
        self.seconds.append(time.perf_counter() - self._began)
        self.held.append(torch.cuda.memory_allocated(self._session.device) if self._session.on_cuda else 0)


def across_the_cut(session: Session) -> None:
    """`gradpruner.attach` in a Trainer: probe, patches, cut, and on to the end."""
    shape = TINY if session.tiny else LLAMA_1B
    probed, steps = (4, 8) if session.tiny else (10, 24)
    model = adapted(llama(session, shape))
    rows = torch.randint(3, shape.vocabulary, (steps * shape.rows, shape.length), generator=torch.Generator())
    clock = _Clock(session)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=shape.rows,
            bf16=True,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=not session.on_cuda,
        )
        dataset: Any = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
        attached = gradpruner.attach(trainer, steps=probed, ratio=0.4)
        trainer.add_callback(clock)
        session.begin_peak()
        trainer.train()
    plan = attached.plan
    if plan is None or not plan.removed or len(clock.seconds) != steps:
        raise RuntimeError(f"{len(clock.seconds)} of {steps} steps, plan {plan}")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    before, after = statistics.median(clock.seconds[2 : probed - 1]), statistics.median(clock.seconds[probed + 2 :])
    session.put(
        removed=list(plan.removed),
        layers=plan.layers,
        step_before_s=before,
        step_after_s=after,
        after_over_before=after / before,
        step_of_the_cut_s=clock.seconds[probed - 1],
        held_before_bytes=clock.held[probed - 2],
        held_after_bytes=clock.held[-1],
        peak_bytes=session.peak(),
        losses=[round(loss, 3) for loss in losses],
    )
