"""A linear that runs more than once in a backward pass: the square of a sum is not the sum of the squares."""

from __future__ import annotations

import pytest
import torch
from tiny_llama import batch, llama
from torch import nn

import gradpruner
from gradpruner.sparsity import gradient_norms


class Chunked(nn.Module):
    """Half of the tokens after the other, as models do that save memory."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.cat([self.inner(part) for part in x.split(5, dim=1)], 1)


class Twice(nn.Module):
    """A layer that runs two times, one after the other."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, *args, **kwargs):
        return self.inner(self.inner(hidden_states, *args, **kwargs), *args, **kwargs)


def chunked():
    model = llama()
    model.model.layers[3].mlp = Chunked(model.model.layers[3].mlp)
    return model


def twice():
    model = llama()
    model.model.layers[3] = Twice(model.model.layers[3])
    return model


def plain_model():
    return llama()


def prepared(make, frozen, checkpointing):
    model = make().train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    if frozen:
        model.requires_grad_(False)
        model.enable_input_require_grads()
        model.lm_head.weight.requires_grad_(True)
    return model


def loss_of(model, seed):
    ids = batch(seed)
    return model(input_ids=ids, labels=ids).loss


def probed(model, losses, estimator="exact"):
    """What one step whose backward passes are `losses` shows."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    probe = gradpruner.Probe(model, estimator=estimator, importance=False)
    with probe.watching(optimizer, 1):
        for loss in losses:
            loss(model).backward()
        optimizer.step()
    return probe.igia


CHECKPOINTING = {"none": None, "reentrant": True, "not reentrant": False}


@pytest.mark.parametrize(
    ("make", "frozen", "checkpointing"),
    [
        (chunked, True, None),
        (chunked, False, None),
        (chunked, True, True),
        (twice, True, None),
        (twice, False, False),
        (twice, True, True),
        (twice, True, False),
    ],
)
def test_exact_refuses_a_linear_that_runs_twice(make, frozen, checkpointing):
    model = prepared(make, frozen, checkpointing)
    first = "mlp.inner.gate_proj" if make is chunked else "inner.self_attn.q_proj"
    with pytest.raises(gradpruner.ProbeError, match=f"layer 3 {first}.weight runs more than once in one backward pass"):
        probed(model, [lambda m: loss_of(m, 0)])


def test_exact_refuses_two_forward_passes_in_one_backward():
    model = prepared(plain_model, True, None)
    with pytest.raises(gradpruner.ProbeError, match="runs more than once in one backward pass"):
        probed(model, [lambda m: loss_of(m, 0) + loss_of(m, 1)])


@pytest.mark.parametrize("checkpointing", CHECKPOINTING.values(), ids=CHECKPOINTING)
def test_recomputation_and_micro_batches_are_no_second_run(checkpointing):
    igia = probed(prepared(plain_model, True, checkpointing), [lambda m: loss_of(m, 0), lambda m: loss_of(m, 1)])
    reference = llama()
    for n, weight in enumerate(igia.weights):  # the unit of a frozen weight is the micro-batch
        if weight.layer not in (2, 5):
            continue
        parameter = reference.model.layers[weight.layer].get_parameter(weight.name)
        gradients = [torch.autograd.grad(loss_of(reference, seed), parameter)[0] for seed in (0, 1)]
        wanted = sum(float(g.double().square().sum()) for g in gradients)
        assert float(igia.square_norms[0, n]) == pytest.approx(wanted, rel=1e-4)


def test_the_gradient_estimator_sums_before_it_squares():
    one, many = (probed(make(), [lambda m: loss_of(m, 0)], "gradient") for make in (plain_model, chunked))
    torch.testing.assert_close(many.square_norms, one.square_norms, rtol=1e-4, atol=0)


@pytest.mark.parametrize("make", [chunked, twice])
def test_gradient_norms_refuse_a_linear_that_runs_twice(make):
    model = make()
    with pytest.raises(gradpruner.UnsupportedModel, match=r"inner.*weight runs more than once for one sample"):
        gradient_norms(model, [{"input_ids": batch(0)}])
    assert not any("forward" in vars(module) for module in model.modules())
