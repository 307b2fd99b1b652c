"""What a probe says if no step could be used."""

from __future__ import annotations

import pytest
import torch
from probing import run, step
from tiny_llama import llama, lora, trainable

import gradpruner


def test_no_usable_step_refuses_to_score():
    model = lora(llama())
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    with gradpruner.Probe(model).watching(optimizer, 2) as probe:
        for i in range(2):
            step(model, optimizer, i, scale=float("nan"))
    with pytest.raises(gradpruner.ProbeError, match=r"no usable step \(0 steps, 2 skipped as not finite\): no scores$"):
        probe.igia.layer_scores()
    with pytest.raises(gradpruner.ProbeError):
        probe.igia.plan(0.4)
    with pytest.raises(gradpruner.ProbeError, match="has seen no optimizer step"):
        _ = gradpruner.Probe(lora(llama())).igia


def test_first_lora_step_alone_is_not_usable():
    with pytest.raises(gradpruner.ProbeError, match=r"no usable step.*every gradient was zero.*still as they began"):
        run(lora(llama()), steps=1).plan(0.4)


def test_a_loss_without_gradients_is_named_as_the_reason():
    model = llama()
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    with gradpruner.Probe(model).watching(optimizer, 2) as probe:
        for i in range(2):
            step(model, optimizer, i, scale=0.0)
    expected = r"no usable step \(2 steps.*every gradient was zero: look at the loss"
    with pytest.raises(gradpruner.ProbeError, match=expected):
        probe.igia.plan(0.4)
