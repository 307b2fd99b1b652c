"""gradpruner: layers are scored by the gradients of the first training steps (docs/method.md, sections 1 to 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from gradpruner.checks import check_int
from gradpruner.errors import InvalidArgument
from gradpruner.methods.base import Clues, Method, register
from gradpruner.methods.patched_gaps import KINDS, plan_gaps
from gradpruner.plan import Plan
from gradpruner.presets import PRESETS, Preset
from gradpruner.probe.igia import SCORES
from gradpruner.pruning.apply import apply
from gradpruner.pruning.patch import fit_patches


@register
@dataclass(frozen=True)
class GradPruner(Method):
    """This package's own method.

    preset, and what differs from it: see `Preset`. probe_steps, rank, share: of the probe, where they are not those
    of the comparison: its steps, its adapters' rank, the share of the data it sees. Raises InvalidArgument.
    """

    name: ClassVar[str] = "gradpruner"
    probed: ClassVar[bool] = True
    preset: str = "default"
    kind: str | None = None
    merge: str | int | None = None
    top: float | None = None
    weight: float | None = None
    patch: bool | None = None
    adapters: str | None = None  # type: ignore[assignment]
    rank_factor: int | None = None  # type: ignore[assignment]
    probe_steps: int | None = None
    rank: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        """Check by asking, before a probe takes its time."""
        if self.settings.kind not in (*SCORES, *KINDS):
            raise InvalidArgument(f"kind = {self.settings.kind!r}; accepted are {', '.join((*SCORES, *KINDS))}")
        for name, least in (("probe_steps", 1), ("rank", 0)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least)
        if self.share is not None and not 0 < self.share <= 1:
            raise InvalidArgument(f"share = {self.share!r}; accepted is above 0 and up to 1")

    @property
    def settings(self) -> Preset:
        """What the options come to."""
        return Preset.of(
            self.preset,
            kind=self.kind,
            merge=self.merge,
            top=self.top,
            weight=self.weight,
            patch=self.patch,
            adapters=self.adapters,
            rank_factor=self.rank_factor,
        )

    @property
    def options(self) -> dict[str, Any]:
        """The settings, not the preset that they came from."""
        return {**vars(self.settings), "probe_steps": self.probe_steps, "rank": self.rank, "share": self.share}

    @property
    def scored(self) -> bool:  # type: ignore[override]
        """Unless the gaps decide."""
        return self.settings.kind not in KINDS

    def settled(self, option: str) -> Any:
        """As the preset has it, unless it is given."""
        return getattr(self.settings, option)

    def canonical(self) -> GradPruner:
        """Named after the preset from which fewest settings differ."""
        ways = []
        for name, preset in PRESETS.items():
            changed = {k: v for k, v in vars(self.settings).items() if v != getattr(preset, k)}
            ways.append(GradPruner(name, **changed, probe_steps=self.probe_steps, rank=self.rank, share=self.share))
        return min(ways, key=lambda way: (sum(value is not None for value in vars(way).values()), way.preset))

    def plan(self, clues: Clues, count: int) -> Plan:
        """The lowest scores go; some of them are merged. For kind "residual" and "gap" see `plan_gaps`."""
        if self.settings.kind in KINDS:
            return plan_gaps(clues.model, clues.batches, count=count, kind=self.settings.kind)
        return clues.igia.plan(count=count, kind=self.settings.kind, merge=self.settings.merge)

    def cut(self, clues: Clues, plan: Plan) -> nn.Module:
        """Merge, patch, remove; `clues.model` is as the probe left it, with its adapters."""
        chosen = self.settings
        patches = fit_patches(clues.model, plan, clues.batches) if chosen.patch else ()
        igia = clues.igia if plan.merge else None
        return apply(
            clues.model, plan, igia, top=chosen.top, weight=chosen.weight, patches=patches, adapters=chosen.adapters
        )
