"""Settings: how layers are chosen and cut, by the name of a preset and by what differs from it. Pure data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from gradpruner.checks import check_bool, check_choice, check_int

ADAPTERS = ("keep", "discard")


@dataclass(frozen=True)
class Preset:
    """kind, merge: see `Igia.plan`. top, weight, adapters: see `apply`. patch: see `fit_patches`.

    rank_factor: how many times the recipe's rank the adapters of the cut model have, see `Recipe.widened`.

    The defaults are what won on this package's own trials (docs/evidence.md); "paper" is GradPruner as published.
    Raises InvalidArgument.
    """

    kind: str = "norm"
    merge: str | int = 0
    top: float = 0.2
    weight: float = 1.0
    patch: bool = True
    adapters: str = "keep"
    rank_factor: int = 4

    def __post_init__(self) -> None:
        """Check what no later stage checks before time is spent."""
        check_choice("adapters", self.adapters, ADAPTERS)
        check_bool("patch", self.patch)
        check_int("rank_factor", self.rank_factor, 1)

    @classmethod
    def of(cls, preset: str = "default", **changed: Any) -> Preset:
        """A preset with those of `changed` that are not None. Raises InvalidArgument."""
        check_choice("preset", preset, PRESETS)
        return dataclasses.replace(PRESETS[preset], **{k: v for k, v in changed.items() if v is not None})


PRESETS = {
    "default": Preset(),
    "paper": Preset("squared", "auto", 0.2, 1.0, patch=False, adapters="discard", rank_factor=1),
}
