"""Plan: which decoder layers stay, which are dropped, which are folded into a layer before. Pure data.

No tensor, no model, no torch: a plan can be read, written, checked and edited by hand.
"""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from gradpruner.checks import is_number
from gradpruner.errors import CheckpointError, InvalidArgument
from gradpruner.storage.files import read_json, write_json

FORMAT = "gradpruner.plan/1"
MOST_LAYERS = 100_000  # more than any model has: a damaged file may say any number
NEARLY_ALL = 0.9  # watched of a layer: what is missing is norms, a convolution and the like, and goes without saying
DROPPED_OUTRIGHT = Fraction(3, 10)  # of all layers; past that accuracy falls off a cliff unless merged (P)


@dataclass(frozen=True)
class Plan:
    """Kept, dropped and merged decoder layers of a model with `layers` of them (docs/method.md, section 2).

    drop: layers removed outright. merge: layers removed after being folded into a kept layer before them:
    either a list (target: the nearest kept layer before) or a mapping from layer to target.
    model: fingerprint of the model the plan was made for, if known. parameter_ratio: share of all
    parameters that the plan removes, if known. kind: the layer score that chose the layers ("norm", say), if one of
    this package's did. before: the plan that the model had been pruned by already, if one had been; its kept layers
    are the `layers` of this one. watched: the share of its parameters that the probe watched of the layer that it
    watched least of those that could go, if known. Raises InvalidArgument if the lists do not fit together.
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
        """Normalise to a sorted tuple and a sorted dict, then check everything."""
        if not _is_int(self.layers) or not 1 <= self.layers <= MOST_LAYERS:
            raise InvalidArgument(f"layers = {self.layers!r}; expected the number of layers, 1 to {MOST_LAYERS}")
        if not isinstance(self.model, (str, type(None))):
            raise InvalidArgument(f"model = {self.model!r}; expected a fingerprint, or None")
        ratio = self.parameter_ratio
        if ratio is not None and (type(ratio) not in (int, float) or not 0 <= ratio <= 1):
            raise InvalidArgument(f"parameter_ratio = {ratio!r}; expected a share from 0 to 1, or None")
        drop, merged = _indices("drop", self.drop, self.layers), _indices("merge", self.merge, self.layers)
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
            if not _is_int(target) or target not in kept or target > layer:
                raise InvalidArgument(
                    f"merge target {target!r} of layer {layer}: expected a kept layer before it, one of "
                    f"{[i for i in kept if i < layer]}"
                )
        if self.watched is not None and (type(self.watched) not in (int, float) or not 0 <= self.watched <= 1):
            raise InvalidArgument(f"watched = {self.watched!r}; expected a share from 0 to 1, or None")
        object.__setattr__(self, "drop", tuple(drop))
        object.__setattr__(self, "merge", targets)

    @property
    def removed(self) -> tuple[int, ...]:
        """Every layer that goes, dropped or merged, ascending."""
        return tuple(sorted({*self.drop, *self.merge}))

    @property
    def kept(self) -> tuple[int, ...]:
        """Every layer that stays, ascending."""
        return tuple(sorted(set(range(self.layers)) - set(self.removed)))

    @property
    def dense_layers(self) -> int:
        """Decoder layers of the model that had not been pruned yet."""
        return self.layers if self.before is None else self.before.dense_layers

    @property
    def layer_ratio(self) -> float:
        """Share of decoder layers removed."""
        return len(self.removed) / self.layers

    @property
    def donors(self) -> dict[int, tuple[int, ...]]:
        """Kept layer to the layers folded into it, ascending."""
        assert isinstance(self.merge, dict)
        folded: dict[int, list[int]] = {}
        for layer, target in sorted(self.merge.items()):
            folded.setdefault(target, []).append(layer)
        return {target: tuple(layers) for target, layers in sorted(folded.items())}

    def summary(self) -> str:
        """One line a person can read."""
        share = "" if self.parameter_ratio is None else f", {self.parameter_ratio:.1%} of all parameters"
        into = "".join(f" {donors}->{target}" for target, donors in self.donors.items())
        return (
            f"removes {len(self.removed)} of {self.layers} decoder layers ({self.layer_ratio:.1%}{share}): "
            f"drops {list(self.drop)}, merges{into or ' none'}{self._scored_on()}"
        )

    def _scored_on(self) -> str:
        if self.watched is None or self.watched >= NEARLY_ALL:
            return ""
        return f"; scored on {self.watched:.1%} of a layer's parameters"

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
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
        """The opposite of `to_dict`. Raises CheckpointError if it is not a plan, InvalidArgument if a bad one."""
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
        """Write plan.json atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read plan.json. Raises InvalidArgument if there is none, CheckpointError if it is damaged."""
        return cls.from_dict(read_json(path, "plan"))


def select(
    scores: Sequence[float],
    *,
    ratio: float | None = None,
    count: int | None = None,
    of: str = "layers",
    merge: str | int = "auto",
    protect: Iterable[int] = (0,),
    structures: Sequence[Hashable] | None = None,
    layer_parameters: Sequence[int] | None = None,
    shared_parameters: Sequence[tuple[Sequence[int], int]] = (),
    total_parameters: int | None = None,
    model: str | None = None,
    kind: str | None = None,
) -> Plan:
    """Turn layer scores into a plan: the lowest go first (source: P; ties: the lower index is kept, D).

    ratio: share to remove, of decoder layers, or with of="parameters" of all parameters (then the fewest lowest
    layers that reach it); or count: how many layers. merge: "auto" drops the lowest round(0.3 L) and folds the
    rest of the removed into the nearest kept layer of the same structure before (docs/method.md, section 2); a number
    folds that many, the highest-scored of the removed; 0 none. protect: layers that stay whatever they score.
    structures: one value a layer, equal where layers can be merged. layer_parameters, shared_parameters,
    total_parameters: as `gradpruner.model.parameter_counts.count_parameters` counts them. kind: what the scores are called,
    for the plan to remember. Raises InvalidArgument.
    """
    total = len(scores)
    if total == 0 or not all(math.isfinite(s) for s in scores):
        raise InvalidArgument(f"scores = {list(scores)}; expected one finite number for every decoder layer")
    protected = set(_indices("protect", list(protect), total))
    # ascending by score; among equals the higher index goes first
    order = sorted(set(range(total)) - protected, key=lambda j: (scores[j], -j))
    wanted = _how_many(total, order, ratio, count, of, layer_parameters, shared_parameters, total_parameters)
    if wanted > len(order) or wanted >= total:
        most = min(len(order), total - 1)
        raise InvalidArgument(
            f"{wanted} of {total} layers to remove; accepted are 1 to {most} (protected: {sorted(protected)})"
        )
    removed = order[:wanted]
    folded = removed[wanted - _how_many_fold(merge, wanted, total) :]
    kept = sorted(set(range(total)) - set(removed))
    targets: dict[int, int] = {}
    for layer in folded:
        same = [i for i in kept if i < layer and (structures is None or structures[i] == structures[layer])]
        if same:
            targets[layer] = same[-1]
        elif merge != "auto":
            raise InvalidArgument(f"merge = {merge!r}: layer {layer} has no kept layer of its structure before it")
    parameter_ratio = None
    if layer_parameters is not None and total_parameters:
        parameter_ratio = parameters_in(removed, layer_parameters, shared_parameters) / total_parameters
    return Plan(total, sorted(set(removed) - set(targets)), targets, model, parameter_ratio, kind)


def parameters_in(
    removed: Iterable[int], layer_parameters: Sequence[int], shared_parameters: Iterable[tuple[Iterable[int], int]] = ()
) -> int:
    """How many parameters go with these layers: their own, and those that only some of them share."""
    gone = set(removed)
    shared = sum(parameters for layers, parameters in shared_parameters if gone.issuperset(layers))
    return sum(layer_parameters[j] for j in gone) + shared


def how_many(layers: int, ratio: float) -> int:
    """How many of `layers` layers the share `ratio` is. Raises InvalidArgument if none, or no such share."""
    _check_ratio(ratio)
    wanted = round(Fraction(str(ratio)) * layers)
    if wanted == 0:
        raise InvalidArgument(f"ratio = {ratio} of {layers} layers rounds to none; expected {0.5 / layers:.2f} or more")
    return wanted


def _check_ratio(ratio: object) -> None:
    if not is_number(ratio) or not 0 < ratio < 1:
        raise InvalidArgument(f"ratio = {ratio!r}; accepted is a share above 0 and below 1")


def _how_many(
    total: int,
    order: Sequence[int],
    ratio: float | None,
    count: int | None,
    of: str,
    layer_parameters: Sequence[int] | None,
    shared_parameters: Sequence[tuple[Sequence[int], int]],
    total_parameters: int | None,
) -> int:
    if (ratio is None) == (count is None):
        raise InvalidArgument(f"ratio = {ratio!r}, count = {count!r}; expected exactly one of them")
    if of not in ("layers", "parameters"):
        raise InvalidArgument(f"of = {of!r}; accepted are 'layers' and 'parameters'")
    if count is not None:
        if not _is_int(count) or count < 1:
            raise InvalidArgument(f"count = {count!r}; expected a number of layers, 1 or more")
        return count
    assert ratio is not None
    if of == "layers":
        return how_many(total, ratio)
    _check_ratio(ratio)
    if layer_parameters is None or not total_parameters:
        raise InvalidArgument(
            "of = 'parameters' needs layer_parameters and total_parameters; an igia file of an earlier version does "
            "not say what layers share: probe again, or use of = 'layers'"
        )
    gone = 0
    for n in range(1, len(order) + 1):
        gone = parameters_in(order[:n], layer_parameters, shared_parameters)
        if gone >= Fraction(str(ratio)) * total_parameters:
            return n
    raise InvalidArgument(
        f"ratio = {ratio} of all parameters; the layers that may go hold {gone / total_parameters:.3f}"
    )


def _how_many_fold(merge: str | int, wanted: int, total: int) -> int:
    if merge == "auto":
        return wanted - min(wanted, round(DROPPED_OUTRIGHT * total))
    if not _is_int(merge) or not 0 <= int(merge) <= wanted:
        raise InvalidArgument(f"merge = {merge!r}; accepted are 'auto' and 0 to {wanted}, the layers removed")
    return int(merge)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _indices(name: str, values: Iterable[int], layers: int) -> list[int]:
    indices = list(values)
    for index in indices:
        if not _is_int(index) or not 0 <= index < layers:
            raise InvalidArgument(f"{name} names layer {index!r}; accepted are 0 to {layers - 1}")
    if len(set(indices)) != len(indices):
        raise InvalidArgument(f"{name} = {indices} names a layer twice")
    return sorted(indices)


def _kept_before(layer: int, kept: Sequence[int]) -> int:
    at = bisect.bisect_left(kept, layer)
    if at == 0:
        raise InvalidArgument(f"merge: layer {layer} has no kept layer before it to be folded into")
    return kept[at - 1]


def gaps(plan: Plan) -> dict[int, int]:
    """Kept layer before each gap to the last removed layer of the gap; a gap without a layer before has no entry."""
    ends = {}
    for layer, following in zip(plan.kept, (*plan.kept[1:], plan.layers), strict=True):
        if following - 1 > layer:
            ends[layer] = following - 1
    return ends
