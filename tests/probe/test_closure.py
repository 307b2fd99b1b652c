"""optimizer.step(closure): what the closure computed is read, not what was there before."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from tiny_llama import batch, llama, lora, trainable

import gradpruner

STEPS = 3
ESTIMATORS = {
    "lora": lambda: lora(llama()),
    "gradient": llama,
    "adam": llama,
    "exact": llama,
}


def made(estimator):
    model = ESTIMATORS[estimator]()
    return model, torch.optim.AdamW(trainable(model), lr=1e-2)


def closure_for(model, optimizer, seed):
    """As Lightning makes one: it clears, computes and clips."""

    def closure():
        optimizer.zero_grad()
        ids = batch(seed)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable(model), 1.0)
        return loss

    return closure


def plain(estimator):
    model, optimizer = made(estimator)
    with gradpruner.Probe(model, estimator=estimator).watching(optimizer, STEPS) as probe:
        for i in range(STEPS):
            closure_for(model, optimizer, i)()
            optimizer.step()
    return probe.igia


WAYS = [*((estimator, "positional") for estimator in ESTIMATORS), ("gradient", "keyword"), ("gradient", "accelerate")]


@pytest.mark.parametrize(("estimator", "how"), WAYS)
def test_the_closures_gradients_are_read(estimator, how):
    expected = plain(estimator)
    model, optimizer = made(estimator)
    stepping = Accelerator(cpu=True).prepare(optimizer) if how == "accelerate" else optimizer
    with gradpruner.Probe(model, estimator=estimator).watching(stepping, STEPS) as probe:
        for i in range(STEPS + 1):  # one after the last that is watched
            closure = closure_for(model, optimizer, i)
            loss = stepping.step(closure=closure) if how == "keyword" else stepping.step(closure)
            assert how == "accelerate" or loss.requires_grad  # it gets through
    assert probe.igia.steps == STEPS
    torch.testing.assert_close(probe.igia.square_norms, expected.square_norms, rtol=1e-9, atol=0)
    assert probe.igia.importance.keys() == expected.importance.keys()


class Odd(torch.optim.SGD):
    """An optimizer that calls its closure so many times."""

    times = 1

    def step(self, closure=None):
        for _ in range(self.times):
            loss = closure()
        super().step()
        return loss if self.times else None


@pytest.mark.parametrize(("times", "message"), [(0, "did not call the closure"), (2, "its closure a second time")])
def test_a_step_without_one_gradient_is_refused(times, message):
    model = llama()
    optimizer = Odd(trainable(model), lr=0.1)
    optimizer.times = times
    with gradpruner.Probe(model).watching(optimizer, 2), pytest.raises(gradpruner.ProbeError, match=message):
        optimizer.step(closure_for(model, optimizer, 0))


def test_lbfgs_is_refused_before_the_first_step():
    model = llama()
    optimizer = torch.optim.LBFGS(trainable(model))
    with pytest.raises(gradpruner.InvalidArgument, match="LBFGS, which calls its closure several times"):
        gradpruner.Probe(model).start(optimizer, 2)


def test_a_closure_under_a_grad_scaler_is_refused():
    model = llama()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    with gradpruner.Probe(model, estimator="gradient").watching(optimizer, 2):
        ids = batch(0)
        scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
        with pytest.raises(gradpruner.ProbeError, match="closure under GradScaler"):
            scaler.step(optimizer, closure_for(model, optimizer, 0))
