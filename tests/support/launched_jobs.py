"""What the processes of tests/distributed/test_launch.py do together."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn

from gradpruner.distributed import agreement
from gradpruner.distributed.processes import first, is_first, peers_of
from gradpruner.errors import GradPrunerError, InvalidArgument
from gradpruner.model.loss import IGNORED
from gradpruner.training.evaluate import exact_matches, perplexity


def decide_together(folder):
    rank = distributed.get_rank()
    assert is_first() == (rank == 0)
    # one process works, alone, and all have its result
    assert first(lambda: (rank, peers_of())) == (0, None) and peers_of() is not None
    # its error is everybody's
    for kind, seen in ((InvalidArgument, InvalidArgument), (ValueError, GradPrunerError)):
        with pytest.raises(kind if rank == 0 else seen, match="of the first"):
            first(lambda kind=kind: raising(kind))
    # what differs is named
    agreement.agree("the data", {"rows": 3})
    with pytest.raises(InvalidArgument, match=r"the data of process 1 on .* another than that of process 0"):
        agreement.agree("the data", {"rows": rank})
    # a folder that only the first machine sees
    agreement.need_shared(folder / "shared" / "run")
    distributed.barrier()  # the first process deletes what it wrote once all have seen it
    assert list((folder / "shared" / "run").iterdir()) == []
    agreement.PATIENCE = 0.5
    with pytest.raises(InvalidArgument, match="expected a folder that all machines share"):
        agreement.need_shared(folder / f"own-{rank}")
    # a model that came out otherwise
    torch.manual_seed(rank)
    model = nn.Linear(3, 2).to(torch.bfloat16)
    agreement.take_weights_of_first(model)
    agreement.agree("the weights", model.weight.tolist())
    evaluated_together()


def raising(kind):
    raise kind("of the first")


class Constant(nn.Module):
    """A model that predicts the token after each."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.device = torch.device("cpu")
        self.calls = 0

    def forward(self, input_ids, **unused):
        self.calls += 1
        logits = self.scale * nn.functional.one_hot((input_ids + 1) % 11, 11).float()
        return type("Output", (), {"logits": logits})()


def evaluated_together():
    """Each process evaluates its batches, and has the results of all, in order."""
    rows = [{"input_ids": [i, i + 1, i + 2 + (i % 2)], "labels": [IGNORED, i + 1, i + 2 + (i % 2)]} for i in range(7)]

    def collate(some):
        return {name: torch.tensor([row[name] for row in some]) for name in ("input_ids", "labels")}

    model = Constant()
    assert exact_matches(model, rows, collate=collate, batch_size=2) == [True, False] * 3 + [True]
    assert model.calls == 2  # of four batches
    together = perplexity(model, rows, collate=collate, batch_size=2)
    agreement.agree("the perplexity", together)
    assert together == first(lambda: perplexity(model, rows, collate=collate, batch_size=2))
