"""gradpruner: layers are scored by the gradients of the first training steps (METHOD sections 1 to 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from gradpruner.merge import apply
from gradpruner.methods.base import Clues, Method, register
from gradpruner.patch import fit_patches
from gradpruner.plan import Plan


@register
@dataclass(frozen=True)
class GradPruner(Method):
    """This package's own method, with its defaults.

    kind, merge: see `Igia.plan`. top, weight: see `apply`. patch: see `fit_patches`. probe_steps, rank, share: of the
    probe, where they are not those of the comparison: its steps, its adapters' rank, the share of the data it sees.
    """

    name: ClassVar[str] = "gradpruner"
    kind: str = "squared"
    merge: str | int = "auto"
    top: float = 0.2
    weight: float = 1.0
    patch: bool = True
    probe_steps: int | None = None
    rank: int | None = None
    share: float | None = None

    def plan(self, clues: Clues, count: int) -> Plan:
        """The lowest scores go; some of them are merged."""
        return clues.igia.plan(count=count, kind=self.kind, merge=self.merge)

    def cut(self, clues: Clues, plan: Plan) -> nn.Module:
        """Merge, patch, remove."""
        patches = fit_patches(clues.model, plan, clues.batches) if self.patch else ()
        igia = clues.igia if plan.merge else None
        return apply(clues.model, plan, igia, top=self.top, weight=self.weight, patches=patches)
