"""Reading a DeepSpeed engine: by its accessors with stand-ins for them, and against the package where it is there."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import distributed_equality
import pytest
import torch
from distributed_equality import make, plan_of

import gradpruner


@pytest.fixture
def accessors(monkeypatch):
    """A `deepspeed` whose engine hides each gradient in the parameter's own mapping, times a loss scale of 8."""
    module, utils = ModuleType("deepspeed"), ModuleType("deepspeed.utils")
    module.DeepSpeedEngine = Engine
    utils.safe_get_full_grad = lambda parameter: parameter._hp_mapping
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)


class Engine(torch.nn.Module):
    def __init__(self, model, clip_grad):
        super().__init__()
        self.module = model
        self.optimizer = SimpleNamespace(loss_scale=8.0, clip_grad=clip_grad)
        for parameter in model.parameters():
            parameter._hp_mapping = None

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def backward(self, seed):
        ids = torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(seed))
        (8 * self.module(input_ids=ids, labels=ids).loss).backward()
        for parameter in self.module.parameters():
            parameter._hp_mapping, parameter.grad = parameter.grad, None

    def step(self, optimizer):
        trained = [p for p in self.module.parameters() if p._hp_mapping is not None]
        for parameter in trained:
            parameter.grad, parameter._hp_mapping = parameter._hp_mapping / 8, None
        if self.optimizer.clip_grad:
            torch.nn.utils.clip_grad_norm_(trained, self.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("estimator", ["lora", "gradient"])
def test_scaled_and_not_yet_clipped_gradients_are_read_as_they_will_be_stepped(accessors, estimator, clip):
    plain, optimizer = make(estimator)
    with gradpruner.Probe(plain, estimator=estimator).watching(optimizer, 3) as expected:
        for i in range(3):
            ids = torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(i))
            plain(input_ids=ids, labels=ids).loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], clip)
            optimizer.step()
            optimizer.zero_grad()
    model, optimizer = make(estimator)
    engine = Engine(model, clip)
    probe = gradpruner.Probe(engine, estimator=estimator)
    for i in range(3):
        engine.backward(i)
        probe.record(engine.optimizer)
        engine.step(optimizer)
    assert probe.igia.model == expected.igia.model
    torch.testing.assert_close(probe.igia.square_norms, expected.igia.square_norms, rtol=1e-4, atol=0)
    plan = plan_of(probe.igia)
    assert plan == plan_of(expected.igia)
    with pytest.raises(gradpruner.UnsupportedModel, match="a DeepSpeed engine holds the model"):
        gradpruner.apply(engine, plan, probe.igia)


def test_an_engine_is_not_watched_by_hooks(accessors):
    model, optimizer = make("lora")
    engine = Engine(model, 0.0)
    probe = gradpruner.Probe(engine)
    with pytest.raises(gradpruner.InvalidArgument, match=r"probe.record\(engine.optimizer\)"):
        probe.start(optimizer, 3)
    engine.backward(0)
    with pytest.raises(gradpruner.InvalidArgument, match="optimizer is a AdamW; expected the DeepSpeed engine's"):
        probe.record(optimizer)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero_1_to_3_in_two_processes(tmp_path):
    import deepspeed_jobs

    distributed_equality.check(deepspeed_jobs.deepspeed_stages, 2, tmp_path)
