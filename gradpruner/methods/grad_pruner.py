"""Method "gradpruner": score layers by the gradients of the first training steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from gradpruner.checks import check_choice, check_int, exact_share
from gradpruner.methods.base import Clues, Method, register
from gradpruner.methods.patched_gaps import KINDS, plan_gaps
from gradpruner.plan import Plan
from gradpruner.presets import PRESETS, Preset
from gradpruner.probe.igia import SCORES
from gradpruner.probe.selection import number_to_merge
from gradpruner.pruning.apply import apply
from gradpruner.pruning.patch import fit_patches


@register
@dataclass(frozen=True)
class GradPruner(Method):
    """The method of this package.

    The gradients of a probe choose the layers. Patches or merges make up for the removed layers.

    Args:
        preset: where the settings below come from if they are None. "default" or "paper". Default "default".
        kind: what layers are scored by: "squared", "norm" or "normalized" (docs/method.md, section 1), or "residual"
            or "gap", which judge stretches of layers together (see `gradpruner.methods.patched_gaps`).
        merge: how many of the removed layers are merged into a kept one: "auto" or a number, see `Igia.plan`.
        top: share of a weight's entries that a merge adds, above 0 and up to 1.
        weight: what these entries are multiplied by.
        patch: whether gaps are closed with linear patches.
        adapters: "keep" cuts the model that the probe trained, "discard" the dense model.
        rank_factor: rank of the adapters of the smaller model, as a multiple of the recipe's rank.
        probe_steps: optimizer steps of the probe. Default None: as many as in the rest of the comparison.
        rank: rank of the probe's adapters, 0 for none. Default None: that of the recipe.
        share: share of the training data that the probe sees, above 0 and up to 1. Default None: all of it.

    Raises:
        InvalidArgument: an option is not one of these values.

    Source: docs/method.md, sections 1 to 4.
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
        """Check the options before time is spent on a probe."""
        check_choice("kind", self.settings.kind, (*SCORES, *KINDS))
        for name, least in (("probe_steps", 1), ("rank", 0)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least)
        if self.share is not None:
            exact_share("share", self.share)

    @property
    def settings(self) -> Preset:
        """The preset with the options that were given."""
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
        """The settings in full. The preset they came from is left out, because a preset may change."""
        return {**vars(self.settings), "probe_steps": self.probe_steps, "rank": self.rank, "share": self.share}

    @property
    def scored(self) -> bool:  # type: ignore[override]
        """True, unless stretches of layers are judged together."""
        return self.settings.kind not in KINDS

    def settled(self, option: str) -> Any:
        """The value of an option: as given, or as the preset has it.

        Args:
            option: the name of a field of `Preset`.

        Returns:
            The value that the method works with.
        """
        return getattr(self.settings, option)

    def canonical(self) -> GradPruner:
        """The same method, named after the preset from which the fewest settings differ.

        Returns:
            A method with the same settings.
        """
        spellings = []
        for name, preset in PRESETS.items():
            changed = {k: v for k, v in vars(self.settings).items() if v != getattr(preset, k)}
            options = {**changed, "probe_steps": self.probe_steps, "rank": self.rank, "share": self.share}
            spellings.append(GradPruner(name, **options))

        def length(method: GradPruner) -> int:
            return sum(value is not None for value in vars(method).values())

        return min(spellings, key=lambda method: (length(method), method.preset))

    def check_count(self, layers: int, count: int) -> None:
        """Refuse to merge more layers than are removed.

        Args:
            layers: decoder layers of the model.
            count: how many are removed.

        Raises:
            InvalidArgument: more would be merged.
        """
        number_to_merge(self.settings.merge, count, layers)

    def plan(self, clues: Clues, count: int) -> Plan:
        """Choose the layers with the lowest scores, or the stretches that patches replace best.

        Args:
            clues: the probe's scores, or the model and batches for kind "residual" and "gap".
            count: how many layers are removed.

        Returns:
            A plan that removes `count` layers. Layer 0 is kept.

        Raises:
            InvalidArgument: so many layers cannot be removed, or there was no probe.
            ProbeError: as `Igia.plan`.
            UnsupportedModel: kind "residual" or "gap", and the model is an encoder-decoder.
        """
        if self.settings.kind in KINDS:
            return plan_gaps(clues.model, clues.batches, count=count, kind=self.settings.kind)
        return clues.igia.plan(count=count, kind=self.settings.kind, merge=self.settings.merge)

    def cut(self, clues: Clues, plan: Plan) -> nn.Module:
        """Merge, patch and remove.

        Args:
            clues: what `plan` was given. Its model has the probe's adapters if they are kept.
            plan: what `plan` returned.

        Returns:
            `clues.model` itself, now smaller.
        """
        settings = self.settings
        patches = fit_patches(clues.model, plan, clues.batches) if settings.patch else ()
        return apply(
            clues.model,
            plan,
            clues.igia if plan.merge else None,
            top=settings.top,
            weight=settings.weight,
            patches=patches,
            adapters=settings.adapters,
        )
