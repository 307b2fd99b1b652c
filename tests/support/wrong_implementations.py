"""Implementations of ops as somebody else might write them: one that is right, and several that are wrong or fail."""

from __future__ import annotations

import torch
from benchmark_results import CPU

from benchmarks.ops.base import Implementation
from benchmarks.ops.cases import TOLERANCE
from benchmarks.ops.implementations import Ours


class Mine(Implementation):
    """What somebody else's class looks like."""

    name = "mine"

    def threshold(self, igia, k):
        return igia.flatten().topk(k).values[-1]


class OwnSums(Implementation):
    name = "wrong"

    def gram_norm(self, a, b):
        return torch.stack([(bi @ ai).square().sum() for ai, bi in zip(a, b, strict=True)]) * (1 + 3 * TOLERANCE)

    def square_accumulate_(self, igia, grad):
        igia.copy_(grad.float().square())

    def outer_square_accumulate_(self, igia, a, b):
        igia += b @ a

    def wgrad_square_accumulate_(self, igia, x, dy, grad):
        g = dy.float().T @ x.float()
        igia += g.square()
        return g.sum()

    def threshold(self, igia, k):
        return igia.flatten().topk(k + 1).values[-1]

    def sign_merge_(self, weight, donors, igias, values, indices, scales):
        for donor, f, value in zip(donors, igias, values, strict=True):
            weight += (f > value) * donor  # signs not looked at

    def factor_merge(self, weight, donor, a, b, k):
        Ours(CPU).factor_merge(weight, donor, a, b, k + k // 100 + 2)

    def weight_importance(self, weight, norms, grads, alpha):
        return weight.float().abs() * (norms if grads is None else norms + grads) * (1 + 3 * TOLERANCE)

    def prune_groups_(self, weight, norms, grads, alpha, kept, group):
        return Ours(CPU).prune_groups_(weight, None, grads, alpha, kept, group)  # norms not looked at

    def apply_mask_(self, weight, mask):
        Ours(CPU).apply_mask_(weight, mask ^ 128)

    def wgrad_abs_accumulate_(self, total, x, dy):
        total += dy.float().T @ x.float()


class WrongMask(Implementation):
    name = "wrong"

    def threshold(self, igia, k):
        return (igia < igia.flatten().kthvalue(k + 1).values).float()  # as many, but the smallest

    def prune_groups_(self, weight, norms, grads, alpha, kept, group):
        return ~Ours(CPU).prune_groups_(weight, norms, grads, alpha, kept, group)


class WrongTie(Implementation):
    name = "wrong"

    def threshold(self, igia, k):
        value, index = Ours(CPU).threshold(igia, k)
        return value, index - 1  # without ties the value's own place: nothing equal is kept


class Raising(Implementation):
    name = "raising"

    def threshold(self, igia, k):
        raise RuntimeError("\nat 7:3:\n  tl.dot(a, b)\nK >= 16\n")


class Tiring(Mine):
    name = "tiring"
    calls = 0

    def threshold(self, igia, k):
        Tiring.calls += 1
        if Tiring.calls == 4:  # the first call, the one for the memory, a round, and then
            raise MemoryError("no more")
        return super().threshold(igia, k)
