"""Choose layers by their scores: from one number per layer to a plan.

Like plans themselves, this file knows no tensor and no model.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from fractions import Fraction

from gradpruner.checks import check_choice, is_int, is_number
from gradpruner.errors import InvalidArgument
from gradpruner.plan import Plan, sorted_indices

# Share of all layers. The paper found that beyond it accuracy collapses unless layers are merged.
DROPPED_OUTRIGHT = Fraction(3, 10)


def select(
    scores: Sequence[float],
    *,
    ratio: float | None = None,
    count: int | None = None,
    of: str = "layers",
    merge: str | int = 0,
    protect: Iterable[int] = (0,),
    structures: Sequence[Hashable] | None = None,
    layer_parameters: Sequence[int] | None = None,
    shared_parameters: Sequence[tuple[Sequence[int], int]] = (),
    total_parameters: int | None = None,
    model: str | None = None,
    kind: str | None = None,
) -> Plan:
    """Make the plan that removes the layers with the lowest scores.

    Give either `ratio` or `count`. Of two equal scores, the layer with the lower index is kept.

    Args:
        scores: one finite number per decoder layer.
        ratio: share to remove, above 0 and below 1.
        count: number of layers to remove.
        of: what `ratio` is a share of. "layers" is the default. With "parameters", layers are removed in ascending
            order of their scores, until they hold this share of all parameters.
        merge: how many of the removed layers are merged instead of dropped: those with the highest scores. Default 0.
            "auto" drops the lowest round(0.3 L) layers, and merges the other removed layers if a kept layer of the same
            structure comes before them.
        protect: layers that are kept whatever they score.
        structures: one value per layer. Layers with equal values can be merged. None: all can.
        layer_parameters: number of parameters per layer, as `count_parameters` counts them.
        shared_parameters: parameters that several layers share: pairs of these layers and a count.
        total_parameters: number of parameters of the whole model.
        model: fingerprint that the plan gets.
        kind: name of the scores that the plan gets.

    Returns:
        The plan.

    Raises:
        InvalidArgument: an argument is not accepted, or so many layers cannot be removed.

    Source: docs/method.md, section 2.
    """
    total = len(scores)
    if total == 0 or not all(math.isfinite(s) for s in scores):
        raise InvalidArgument(f"scores = {list(scores)}; expected one finite number for every decoder layer")
    protected = set(sorted_indices("protect", list(protect), total))
    order = lowest_first(scores, protected)
    number = _number_to_remove(total, order, ratio, count, of, layer_parameters, shared_parameters, total_parameters)
    if number > len(order) or number >= total:
        most = min(len(order), total - 1)
        raise InvalidArgument(
            f"{number} of {total} layers to remove; accepted are 1 to {most} (protected: {sorted(protected)})"
        )
    removed = order[:number]
    merged = removed[number - number_to_merge(merge, number, total) :]
    kept = sorted(set(range(total)) - set(removed))
    targets: dict[int, int] = {}
    for layer in merged:
        fitting = [i for i in kept if i < layer and (structures is None or structures[i] == structures[layer])]
        if fitting:
            targets[layer] = fitting[-1]
        elif merge != "auto":
            raise InvalidArgument(f"merge = {merge!r}: layer {layer} has no kept layer of its structure before it")
    parameter_ratio = None
    if layer_parameters is not None and total_parameters:
        parameter_ratio = parameters_in(removed, layer_parameters, shared_parameters) / total_parameters
    return Plan(total, sorted(set(removed) - set(targets)), targets, model, parameter_ratio, kind)


def lowest_first(scores: Sequence[float], protect: Iterable[int] = (0,)) -> list[int]:
    """Order the layers that may be removed, from the first to be removed to the last.

    Args:
        scores: one number per decoder layer.
        protect: layers that are left out.

    Returns:
        The other layers by ascending score; among equal scores, the higher index is first.
    """
    return sorted(set(range(len(scores))) - set(protect), key=lambda layer: (scores[layer], -layer))


def margin(scores: Sequence[float], removed: Iterable[int], protect: Iterable[int] = (0,)) -> float:
    """Compare the two scores on both sides of a cut: 1 - (highest removed / lowest kept).

    Args:
        scores: one number per decoder layer, 0 or more.
        removed: the removed layers.
        protect: layers that are kept whatever they score; they are not compared.

    Returns:
        0 where the two scores are equal, near 1 where the cut is clear, below 0 where a kept layer scores lower than
        a removed one. Also 0 where the lowest kept score is 0, or where one side has no layer.

    Source: docs/method.md, section 1.
    """
    gone, protected = set(removed), set(protect)
    kept = [scores[layer] for layer in range(len(scores)) if layer not in gone | protected]
    if not gone or not kept or min(kept) == 0:
        return 0.0
    return 1.0 - max(scores[layer] for layer in gone) / min(kept)


def parameters_in(
    removed: Iterable[int], layer_parameters: Sequence[int], shared_parameters: Iterable[tuple[Iterable[int], int]] = ()
) -> int:
    """Count the parameters that removing some layers saves.

    Args:
        removed: the removed layers.
        layer_parameters: number of parameters that belong to each layer alone.
        shared_parameters: pairs of layers and a count. These parameters are removed only if all their layers are.

    Returns:
        The number of parameters.
    """
    gone = set(removed)
    shared = sum(parameters for layers, parameters in shared_parameters if gone.issuperset(layers))
    return sum(layer_parameters[j] for j in gone) + shared


def how_many(layers: int, ratio: float) -> int:
    """Turn a share of the layers into a number of layers.

    Args:
        layers: number of decoder layers.
        ratio: share to remove, above 0 and below 1.

    Returns:
        `ratio` times `layers`, rounded to the nearest number; 1 or more.

    Raises:
        InvalidArgument: the share is not accepted, or rounds to no layer.
    """
    _check_ratio(ratio)
    number = round(Fraction(str(ratio)) * layers)
    if number == 0:
        raise InvalidArgument(f"ratio = {ratio} of {layers} layers rounds to none; expected {0.5 / layers:.2f} or more")
    return number


def _number_to_remove(
    total: int,
    order: Sequence[int],
    ratio: float | None,
    count: int | None,
    of: str,
    layer_parameters: Sequence[int] | None,
    shared_parameters: Sequence[tuple[Sequence[int], int]],
    total_parameters: int | None,
) -> int:
    """Turn `ratio` or `count` of `select` into a number of layers."""
    if (ratio is None) == (count is None):
        raise InvalidArgument(f"ratio = {ratio!r}, count = {count!r}; expected exactly one of them")
    check_choice("of", of, ("layers", "parameters"))
    if count is not None:
        if not is_int(count) or count < 1:
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
    for number in range(1, len(order) + 1):
        gone = parameters_in(order[:number], layer_parameters, shared_parameters)
        if gone >= Fraction(str(ratio)) * total_parameters:
            return number
    raise InvalidArgument(
        f"ratio = {ratio} of all parameters; the layers that may be removed hold {gone / total_parameters:.3f}"
    )


def number_to_merge(merge: str | int, removed: int, total: int) -> int:
    """Turn `merge` of `select` into a number of layers.

    Args:
        merge: "auto" or a number of layers.
        removed: how many layers are removed.
        total: decoder layers of the model.

    Raises:
        InvalidArgument: more would be merged than are removed.
    """
    if merge == "auto":
        return removed - min(removed, round(DROPPED_OUTRIGHT * total))
    if not is_int(merge) or not 0 <= merge <= removed:
        raise InvalidArgument(f"merge = {merge!r}; accepted are 'auto' and 0 to {removed}, the layers removed")
    return merge


def _check_ratio(ratio: object) -> None:
    if not is_number(ratio) or not 0 < ratio < 1:
        raise InvalidArgument(f"ratio = {ratio!r}; accepted is a share above 0 and below 1")
