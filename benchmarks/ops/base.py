"""What an implementation of an op is, for the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

Tensors = list[Tensor]


KINDS = ("reference", "released", "torch", "ours", "floor", "other")


class Implementation:
    """One way of computing the ops; a method it lacks, or one that returns NotImplemented, leaves its cell empty.

    Methods have the names, arguments and results of `gradpruner.ops`, with three liberties: `threshold` may return
    the value alone or a mask, `prune_groups_` a mask of one byte an entry, and one op joins two:
    `factor_merge(weight, donor, a, b, k)` merges `donor` (out, in) into `weight` by its k most important entries and
    returns the threshold's value, or None.

    name: heads the column. kind: "reference" (checked against, run once), "released", "torch" (these two compete for
    the best torch way), "ours", "floor" (does part of the op only: never checked) or "other". device: what the
    tensors will be on. One object is made for each row.
    """

    name = ""
    kind = "other"

    def __init__(self, device: torch.device) -> None:
        self.device = device
