"""What processes hold together: values of all, bytes of an importance, and whether two are the same."""

from __future__ import annotations

import torch
from distributed_equality import LAYERS
from torch import distributed

from gradpruner.probe.importance import Dense, Factors, SharedImportance


def all_of(value):
    """The value of every process."""
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def stored_bytes(importance):
    """What this process holds of an importance."""
    if not isinstance(importance, SharedImportance):
        return sum(t.nbytes for kept in importance.values() for t in kept.parts.values())
    total = 0
    for bring in importance._fetch.values():
        for held in bring.args:
            parts = held.parts.values() if isinstance(held, (Factors, Dense)) else [held]
            total += sum(t.nbytes for t in parts if isinstance(t, torch.Tensor) and not t.is_meta)
    return total


def assert_same_importance(some, other, rel=1e-6):
    assert sorted(some) == sorted(other) and len(some) == 7 * LAYERS
    for key in some:
        kept, wanted = some[key], other[key]
        assert type(kept) is type(wanted) and kept.exponents == wanted.exponents
        for name, tensor in kept.parts.items():
            torch.testing.assert_close(tensor, wanted.parts[name], rtol=rel, atol=0)
