"""The models of a comparison, one cell each, and the results of those that are done."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradpruner.compare.analysis import DENSE
from gradpruner.methods import METHODS, GradPruner, format_method, parse_method
from gradpruner.storage.files import read_json, reading

OURS = format_method(GradPruner())


@dataclass(frozen=True)
class Cell:
    """One model of a comparison.

    Args:
        method: what removes the layers, as `parse_method` reads it, or "dense".
        count: the number of removed layers, 0 for the dense model.
        seed: the training seed.
    """

    method: str
    count: int
    seed: int

    @property
    def name(self) -> str:
        """The name of the cell's file.

        It holds a digest of all options of the method, so that it stays right when a default changes.
        """
        return f"{self.method.partition(':')[0]}-{digest_of(self.options)[:8]}-{self.count}-{self.seed}"

    @property
    def title(self) -> str:
        """The cell as a person reads it."""
        return f"{self.method}{f', {self.count} layers less' if self.count else ''}, seed {self.seed}"

    @property
    def options(self) -> dict[str, Any]:
        """All options of the method, the defaults among them."""
        return {} if self.method == DENSE else parse_method(self.method).options


def finished(folder: Path) -> list[dict[str, Any]]:
    """Return every model of a comparison that is done.

    Dense models come first, then models by count, method and seed.

    Raises:
        CheckpointError: a file in the folder is damaged.
    """
    order = [DENSE, OURS]
    with reading(str(folder)):
        cells = [read_json(path, "cell") for path in sorted((folder / "cells").glob("*.json"))]
        for cell in cells:  # what "gradpruner" meant then may have another name now
            if cell["method"] != DENSE:
                cell["method"] = format_method(METHODS[cell["method"].partition(":")[0]](**cell["options"]))
        cells.sort(key=lambda c: (c["count"], c["method"] not in order, c["method"], c["seed"]))
        return [{**read_json(folder / "trained" / f"{c['trained']}.json", "training"), **c} for c in cells]


def digest_of(content: Any) -> str:
    """Return 16 hexadecimal digits that stand for the `repr` of anything."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def content_of(model: nn.Module) -> str:
    """Return a digest of every parameter. Two plans that make the same model are trained once."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
