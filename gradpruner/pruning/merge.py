"""Merge layers: add the most important entries to a kept layer, where the signs agree.

Source: docs/method.md, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor

from gradpruner import ops
from gradpruner.distributed.sharding import local, rows_of
from gradpruner.errors import UnsupportedModel
from gradpruner.model.decoder import Decoder, Weight
from gradpruner.probe.igia import Igia
from gradpruner.probe.importance import Dense, Factors


def donors_of(kept: Weight, donors: tuple[int, ...], igia: Igia) -> list[int]:
    """Choose the donors whose weight of this name has an importance; others add nothing.

    Args:
        kept: the weight of the kept layer.
        donors: the layers that are merged into that layer, ascending.
        igia: the importance.

    Returns:
        Some of `donors`, in the same order.
    """
    return [donor for donor in donors if (donor, kept.name) in igia.importance]


def merge_into(
    decoder: Decoder,
    kept: Weight,
    donors: tuple[int, ...],
    igia: Igia,
    share: Fraction,
    scale: float,
    undo: list[tuple[Tensor, Tensor]],
) -> None:
    """Merge the donors' weights of one name into the kept layer's, in one pass.

    Args:
        decoder: the model.
        kept: the weight that is changed.
        donors: the layers whose weights are added, ascending.
        igia: the importance of the donors' entries.
        share: share of each donor's entries that is used.
        scale: factor of the added entries.
        undo: gets the parameter and a copy of its values.

    Raises:
        UnsupportedModel: the weights are not sharded alike.
    """
    stored = decoder.parameter(kept).data
    important = donors_of(kept, donors, igia)
    if not important:
        return
    by_layer = {weight.layer: weight for weight in decoder.weights if weight.name == kept.name}
    added = [decoder.parameter(by_layer[donor]).data for donor in important]
    rows = rows_of(stored)
    if any(rows_of(other) != rows for other in added):
        raise UnsupportedModel(f"layer {kept.layer} {kept.name} is sharded otherwise than in layers {important}")
    parameter = local(stored)
    undo.append((parameter, parameter.to("cpu", copy=True)))
    values = [local(other).to(parameter.device) for other in added]
    importance = [igia.importance[donor, kept.name] for donor in important]
    merge_weight_(parameter, values, importance, share, scale, first=0 if rows is None else rows[0])


def merge_weight_(
    weight: Tensor,
    donors: Sequence[Tensor],
    importance: Sequence[Factors | Dense],
    share: Fraction,
    scale: float,
    *,
    first: int = 0,
) -> None:
    """Merge donors into one weight, in place.

    `weight` and `donors` may be some of the rows of the whole weight, or some of the experts if it is 3-D. The
    importance is always that of the whole weight.

    Args:
        weight: shape (out, in), or (experts, out, in). It is changed.
        donors: tensors of the shape and dtype of `weight`, in ascending order of their layers.
        importance: of the entries of each donor, on any device.
        share: share of each donor's entries that is used; of a 3-D weight, of each expert's.
        scale: factor of the added entries.
        first: index of the first row (3-D: expert) of `weight` in the whole weight.

    Source: docs/method.md, section 3.
    """
    if weight.ndim == 2:
        _merge_matrix(weight, donors, importance, share, scale, first)
        return
    for expert in range(weight.shape[0]):
        slices = [Dense(f.dense().f[first + expert]) for f in importance]
        _merge_matrix(weight[expert], [donor[expert] for donor in donors], slices, share, scale, 0)


def _merge_matrix(
    weight: Tensor,
    donors: Sequence[Tensor],
    importance: Sequence[Factors | Dense],
    share: Fraction,
    scale: float,
    first: int,
) -> None:
    """Merge matrices. Thresholds are of the whole matrix, indices of these rows."""
    rows, columns = weight.shape
    scales = [float(scale)] * len(donors)
    factors = [f.to(weight.device) for f in importance if isinstance(f, Factors)]
    if len(factors) == len(importance):
        thresholds = [ops.factor_threshold(f.a, f.b, int(share * f.b.shape[1] * columns)) for f in factors]
        a, b = [f.a for f in factors], [f.b[:, first : first + rows] for f in factors]
        values, indices = [v for v, _ in thresholds], [i - first * columns for _, i in thresholds]
        ops.factor_sign_merge_(weight, list(donors), a, b, values, indices, scales)
        return
    parts, thresholds = [], []
    for whole in importance:
        f = whole.to(weight.device).dense().f
        thresholds.append(ops.threshold(f, int(share * f.numel())))
        parts.append(
            f if len(f) == rows else f[first : first + rows].clone()
        )  # the whole one is freed before the next comes
    # An index below zero: the last tie that is kept lies in rows before these.
    values, indices = [v for v, _ in thresholds], [i - first * columns for _, i in thresholds]
    ops.sign_merge_(weight, list(donors), parts, values, indices, scales)
