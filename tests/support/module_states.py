"""What a model holds, to see that nothing of it has changed."""

from __future__ import annotations

import torch


def same_state(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], v) for k, v in before.items())


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()


def everything(model):
    """Values, flags, gradients, modes, hooks: what a method must leave as it was."""
    return {
        "values": {n: v.clone() for n, v in model.state_dict().items()},
        "same": [id(p) for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.flatten().tolist() for p in model.parameters()],
        "grads": [id(p.grad) for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "config": model.config.to_dict(),
    }


def assert_same(now, before):
    values, was = now.pop("values"), before.pop("values")
    assert now == before and values.keys() == was.keys()
    assert all(torch.equal(values[name], was[name]) for name in was)
