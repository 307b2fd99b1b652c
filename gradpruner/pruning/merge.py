"""Merge: add the most important entries of removed layers to a kept one, where signs agree (docs/method.md, section 3)."""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor

from gradpruner import ops
from gradpruner.distributed.sharding import local, rows_of
from gradpruner.errors import UnsupportedModel
from gradpruner.model.decoder import Decoder, Weight
from gradpruner.probe.igia import Igia
from gradpruner.probe.importance import Dense, Factors


def donors_of(kept: Weight, donors: tuple[int, ...], igia: Igia) -> list[int]:
    """The donor layers whose weight of this name has an importance, ascending; the others add nothing."""
    return [donor for donor in donors if (donor, kept.name) in igia.importance]


def _fold(
    decoder: Decoder,
    kept: Weight,
    donors: tuple[int, ...],
    igia: Igia,
    share: Fraction,
    scale: float,
    undo: list[tuple[Tensor, Tensor]],
) -> None:
    """Merge one weight of the donors into that of the kept layer, all donors in one pass."""
    stored = decoder.parameter(kept).data
    found = donors_of(kept, donors, igia)
    if not found:
        return
    own = {w.layer: w for w in decoder.weights if w.name == kept.name}
    theirs = [decoder.parameter(own[donor]).data for donor in found]
    rows = rows_of(stored)
    if any(rows_of(their) != rows for their in theirs):
        raise UnsupportedModel(f"layer {kept.layer} {kept.name} is sharded otherwise than in layers {found}")
    parameter = local(stored)
    undo.append((parameter, parameter.to("cpu", copy=True)))
    values = [local(their).to(parameter.device) for their in theirs]
    importance = [igia.importance[donor, kept.name] for donor in found]
    merge_weight_(parameter, values, importance, share, scale, first=0 if rows is None else rows[0])


def merge_weight_(
    weight: Tensor,
    donors: list[Tensor],
    importance: list[Factors | Dense],
    share: Fraction,
    scale: float,
    *,
    first: int = 0,
) -> None:
    """Merge donors, ascending, into one stored weight, 2-D or 3-D, in place (docs/method.md, section 3).

    weight and donors may be some of the rows (3-D: of the experts) of the whole, from row `first` on; importance is
    always of the whole, on any device.
    """
    if weight.ndim == 2:
        _merge_matrix(weight, donors, importance, share, scale, first)
        return
    for expert in range(weight.shape[0]):  # 3-D: the top share of each expert
        slices = [Dense(f.dense().f[first + expert]) for f in importance]
        _merge_matrix(weight[expert], [v[expert] for v in donors], list(slices), share, scale, 0)


def _merge_matrix(
    weight: Tensor,
    donors: list[Tensor],
    importance: list[Factors | Dense],
    share: Fraction,
    scale: float,
    first: int,
) -> None:
    rows, columns = weight.shape
    scales = [float(scale)] * len(donors)
    factors = [f.to(weight.device) for f in importance if isinstance(f, Factors)]
    if len(factors) == len(importance):
        edges = [ops.factor_threshold(f.a, f.b, int(share * f.b.shape[1] * columns)) for f in factors]
        a, b = [f.a for f in factors], [f.b[:, first : first + rows] for f in factors]
        values, indices = [v for v, _ in edges], [i - first * columns for _, i in edges]
        ops.factor_sign_merge_(weight, donors, a, b, values, indices, scales)
        return
    parts, edges = [], []
    for given in importance:
        f = given.to(weight.device).dense().f
        edges.append(ops.threshold(f, int(share * f.numel())))
        parts.append(f if len(f) == rows else f[first : first + rows].clone())  # of the whole, one at a time
    # an index below zero: the last tie that is kept lies in rows before these
    values, indices = [v for v, _ in edges], [i - first * columns for _, i in edges]
    ops.sign_merge_(weight, donors, parts, values, indices, scales)
