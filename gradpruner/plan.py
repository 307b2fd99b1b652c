"""Which decoder layers are kept, dropped or merged. Pure data.

This file knows no tensor, no model and no torch. A plan can be read, written, checked and edited by hand.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradpruner.checks import is_int, is_number
from gradpruner.errors import CheckpointError, InvalidArgument
from gradpruner.storage.files import read_json, write_json

FORMAT = "gradpruner.plan/1"
MOST_LAYERS = 100_000  # no model has more; a damaged file may hold any number
# Share of a layer's parameters. A probe that watches more misses only norms, a convolution and the like, and the
# summary does not mention it.
NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Plan:
    """The decoder layers that are kept, dropped and merged.

    Two plans are equal if they do the same to the same model: `kind`, `before` and `watched` are not compared.

    Args:
        layers: number of decoder layers of the model.
        drop: layers that are removed and leave nothing behind.
        merge: layers that are merged into a kept layer before them and then removed. Either a mapping from each layer
            to its target, or a list. With a list, the target is the nearest kept layer before.
        model: fingerprint of the model that the plan was made for. With None, any model of this depth is accepted.
        parameter_ratio: share of all parameters that the plan removes, 0 to 1, or None if not known.
        kind: name of the layer score that chose the layers, "norm" for example. None for a plan made by hand.
        before: the plan that the model had already been pruned by, or None. What that plan keeps are the `layers` of
            this one.
        watched: share of a layer's parameters that the probe watched, 0 to 1, or None if not known. It is the smallest
            share among the layers that could be removed.

    Raises:
        InvalidArgument: the fields do not fit together, or a layer index is out of range.

    Example:
        >>> plan = Plan(layers=12, drop=[4, 7], merge=[9])
        >>> plan.removed, plan.merge
        ((4, 7, 9), {9: 8})

    Source: docs/method.md, section 2.
    """

    layers: int
    drop: Sequence[int] = ()
    merge: Mapping[int, int] | Sequence[int] = field(default_factory=dict)
    model: str | None = None
    parameter_ratio: float | None = None
    kind: str | None = field(default=None, compare=False)  # plans that do the same are equal
    before: Plan | None = field(default=None, compare=False)
    watched: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check every field; make `drop` a sorted tuple and `merge` a sorted dict."""
        if not is_int(self.layers) or not 1 <= self.layers <= MOST_LAYERS:
            raise InvalidArgument(f"layers = {self.layers!r}; expected the number of layers, 1 to {MOST_LAYERS}")
        if not isinstance(self.model, (str, type(None))):
            raise InvalidArgument(f"model = {self.model!r}; expected a fingerprint, or None")
        _check_share_or_none("parameter_ratio", self.parameter_ratio)
        drop, merged = sorted_indices("drop", self.drop, self.layers), sorted_indices("merge", self.merge, self.layers)
        if self.kind is not None and not isinstance(self.kind, str):
            raise InvalidArgument(f"kind = {self.kind!r}; expected the name of a layer score, or None")
        if self.before is not None and len(self.before.kept) != self.layers:
            raise InvalidArgument(f"before keeps {len(self.before.kept)} layers; this plan expects {self.layers}")
        both = sorted(set(drop) & set(merged))
        if both:
            raise InvalidArgument(f"layers {both} are in both drop and merge; expected each in one")
        kept = sorted(set(range(self.layers)) - set(drop) - set(merged))
        if not kept:
            raise InvalidArgument(f"the plan removes all {self.layers} layers; expected at least one to be kept")
        if isinstance(self.merge, Mapping):
            targets = {layer: self.merge[layer] for layer in merged}
        else:
            targets = {layer: _kept_before(layer, kept) for layer in merged}
        for layer, target in targets.items():
            if not is_int(target) or target not in kept or target > layer:
                raise InvalidArgument(
                    f"merge target {target!r} of layer {layer}: expected a kept layer before it, one of "
                    f"{[i for i in kept if i < layer]}"
                )
        _check_share_or_none("watched", self.watched)
        object.__setattr__(self, "drop", tuple(drop))
        object.__setattr__(self, "merge", targets)

    @property
    def removed(self) -> tuple[int, ...]:
        """All removed layers, dropped or merged, ascending."""
        return tuple(sorted({*self.drop, *self.merge}))

    @property
    def kept(self) -> tuple[int, ...]:
        """All kept layers, ascending."""
        return tuple(sorted(set(range(self.layers)) - set(self.removed)))

    @property
    def dense_layers(self) -> int:
        """Number of decoder layers of the model before it was pruned for the first time."""
        return self.layers if self.before is None else self.before.dense_layers

    @property
    def layer_ratio(self) -> float:
        """Share of the decoder layers that is removed, 0 to 1."""
        return len(self.removed) / self.layers

    @property
    def donors(self) -> dict[int, tuple[int, ...]]:
        """For each kept layer that others are merged into: those layers, ascending."""
        assert isinstance(self.merge, dict)
        folded: dict[int, list[int]] = {}
        for layer, target in sorted(self.merge.items()):
            folded.setdefault(target, []).append(layer)
        return {target: tuple(layers) for target, layers in sorted(folded.items())}

    def summary(self) -> str:
        """Say in one line what is removed and how.

        Returns:
            For example "removes 3 of 12 decoder layers (25.0%): drops [4, 7], merges (9,)->8".
        """
        share = "" if self.parameter_ratio is None else f", {self.parameter_ratio:.1%} of all parameters"
        into = "".join(f" {donors}->{target}" for target, donors in self.donors.items())
        return (
            f"removes {len(self.removed)} of {self.layers} decoder layers ({self.layer_ratio:.1%}{share}): "
            f"drops {list(self.drop)}, merges{into or ' none'}{self._scored_on()}"
        )

    def _scored_on(self) -> str:
        """A warning for the summary if the probe watched only a part of a layer."""
        if self.watched is None or self.watched >= NEARLY_ALL:
            return ""
        return f"; scored on {self.watched:.1%} of a layer's parameters"

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON holds it.

        Returns:
            A dict of plain values; `Plan.from_dict` reads it.
        """
        assert isinstance(self.merge, dict)
        return {
            "format": FORMAT,
            "layers": self.layers,
            "kept": list(self.kept),
            "drop": list(self.drop),
            "merge": {str(layer): target for layer, target in self.merge.items()},
            "layer_ratio": self.layer_ratio,
            "parameter_ratio": self.parameter_ratio,
            "watched": self.watched,
            "model": self.model,
            "kind": self.kind,
            "before": None if self.before is None else self.before.to_dict(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Plan:
        """Make a plan from what `to_dict` returned.

        Args:
            content: the dict, as read from JSON.

        Returns:
            The plan.

        Raises:
            CheckpointError: `content` is not a plan.
            InvalidArgument: it is a plan whose fields do not fit together.
        """
        if content.get("format") != FORMAT:
            raise CheckpointError(f"not a plan: format is {content.get('format')!r}, expected {FORMAT!r}")
        try:
            merge = {int(layer): target for layer, target in content["merge"].items()}
            if [str(layer) for layer in merge] != list(content["merge"]):
                raise ValueError("merge names a layer that is not a number")
            plan = cls(
                content["layers"],
                content["drop"],
                merge,
                content.get("model"),
                content.get("parameter_ratio"),
                content.get("kind"),
                None if content.get("before") is None else cls.from_dict(content["before"]),
                content.get("watched"),
            )
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            if isinstance(error, InvalidArgument):
                raise
            raise CheckpointError(f"not a plan: {error!r}") from None
        if "kept" in content and content["kept"] != list(plan.kept):
            raise InvalidArgument(f"kept = {content['kept']}; drop and merge leave {list(plan.kept)}")
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a JSON file, atomically.

        Args:
            path: the file, usually plan.json.

        Raises:
            InvalidArgument: the folder of `path` does not exist, or `path` is a folder.
            CheckpointError: the file cannot be written, e.g. because the disk is full.
        """
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote.

        Args:
            path: the file, usually plan.json.

        Returns:
            The plan.

        Raises:
            InvalidArgument: there is no such file, or the fields of its plan do not fit together.
            CheckpointError: the file is damaged.
        """
        return cls.from_dict(read_json(path, "plan"))


def gaps(plan: Plan) -> dict[int, int]:
    """Map the kept layer before each gap to the last removed layer of the gap.

    A gap is one or more removed layers that stand directly after each other. A gap at the very start has no layer
    before it and no entry.
    """
    ends = {}
    for layer, following in zip(plan.kept, (*plan.kept[1:], plan.layers), strict=True):
        if following - 1 > layer:
            ends[layer] = following - 1
    return ends


def _check_share_or_none(name: str, value: object) -> None:
    if value is not None and (not is_number(value) or not 0 <= value <= 1):
        raise InvalidArgument(f"{name} = {value!r}; expected a share from 0 to 1, or None")


def sorted_indices(name: str, values: Iterable[int], layers: int) -> list[int]:
    """Sort layer indices after checking them.

    Args:
        name: the argument they were given as.
        values: the indices, in any order.
        layers: number of layers of the model.

    Returns:
        The indices, ascending.

    Raises:
        InvalidArgument: one is no index of a layer, or occurs twice.
    """
    indices = list(values)
    for index in indices:
        if not is_int(index) or not 0 <= index < layers:
            raise InvalidArgument(f"{name} names layer {index!r}; accepted are 0 to {layers - 1}")
    if len(set(indices)) != len(indices):
        raise InvalidArgument(f"{name} = {indices} names a layer twice")
    return sorted(indices)


def _kept_before(layer: int, kept: Sequence[int]) -> int:
    at = bisect.bisect_left(kept, layer)
    if at == 0:
        raise InvalidArgument(f"merge: layer {layer} has no kept layer before it to be merged into")
    return kept[at - 1]
