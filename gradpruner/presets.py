"""Settings that choose and cut layers, under the name of a preset. Pure data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from gradpruner.checks import check_bool, check_choice, check_int

ADAPTERS = ("keep", "discard")


@dataclass(frozen=True)
class Preset:
    """All settings that choose layers and cut them.

    The defaults are the preset "default", which won in this package's own trials (docs/evidence.md). Every function
    that is given no preset and no setting uses them. "paper" is GradPruner as published.

    Args:
        kind: the layer score that chooses the layers, see `Igia.layer_scores`. Default "norm".
        merge: how many of the removed layers are merged, or "auto", see `Igia.plan`. Default 0.
        top: share of the entries of a merged weight that is used, above 0 and up to 1. Default 0.2.
        weight: factor of the merged entries. Default 1.
        patch: whether each gap gets a linear patch, see `fit_patches`. Default True. A function that is given no
            batches to fit patches on (`Igia.plan`, `apply`, `apply_folder`, `cut`) ignores it; it takes the patches
            that are given.
        adapters: "keep" what the probe trained, or "discard" it. Default "keep".
        rank_factor: rank of the adapters that the cut model is trained with, as a multiple of the recipe's rank, see
            `Recipe.widened`. Default 4.

    Raises:
        InvalidArgument: a setting is not accepted.
    """

    kind: str = "norm"
    merge: str | int = 0
    top: float = 0.2
    weight: float = 1.0
    patch: bool = True
    adapters: str = "keep"
    rank_factor: int = 4

    def __post_init__(self) -> None:
        """Check the settings that would otherwise be checked only after time was spent."""
        check_choice("adapters", self.adapters, ADAPTERS)
        check_bool("patch", self.patch)
        check_int("rank_factor", self.rank_factor, 1)

    @classmethod
    def of(cls, preset: str = "default", **changes: Any) -> Preset:
        """Look up a preset and change some of its settings.

        Args:
            preset: "default" or "paper".
            **changes: settings by name; those that are None stay as the preset has them.

        Returns:
            The settings.

        Raises:
            InvalidArgument: there is no such preset, or a setting is not accepted.
        """
        check_choice("preset", preset, PRESETS)
        return dataclasses.replace(PRESETS[preset], **{k: v for k, v in changes.items() if v is not None})


PRESETS = {
    "default": Preset(),
    "paper": Preset("squared", "auto", 0.2, 1.0, patch=False, adapters="discard", rank_factor=1),
}
