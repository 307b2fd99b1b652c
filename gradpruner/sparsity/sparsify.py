"""sparsify: single weights of every decoder layer become zero, layer by layer, each on what the pruned ones pass on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.checkpoint.masks import Masks
from gradpruner.errors import InvalidArgument
from gradpruner.model.decoder import Decoder, Weight, linear_modules
from gradpruner.probe.igia import Igia
from gradpruner.sparsity.allocation import allocate, check_allocation
from gradpruner.sparsity.checks import Batch, need_full, prunable
from gradpruner.sparsity.criteria import Criterion, parse_criterion
from gradpruner.sparsity.gradients import gradient_norms
from gradpruner.sparsity.layerwise import Layerwise
from gradpruner.sparsity.pattern import Pattern
from gradpruner.sparsity.statistics import Seen, Statistics


def chosen(method: str, pattern: str, ratio: float | None, allocation: str) -> tuple[Criterion, Pattern]:
    """What these options of `sparsify` say, checked against each other. Raises InvalidArgument."""
    criterion, wanted = parse_criterion(method), Pattern.of(pattern, ratio)
    if wanted.within == "matrix" and not criterion.within_matrix:
        raise InvalidArgument(f"pattern = 'matrix'; {criterion.name} chooses within a row: expected row or N:M")
    check_allocation(allocation)
    if allocation != "uniform":
        wanted.with_ratio(float(wanted.share))  # N:M has a share of its own
    return criterion, wanted


def sparsify(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    method: str = "wanda",
    pattern: str = "row",
    ratio: float | None = None,
    allocation: str = "uniform",
    device: torch.device | str | None = None,
    igia: Igia | None = None,
    gradients: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Zero weights of the linears of all decoder layers, in place; returns the masks.

    batches: input_ids (rows, tokens) and what else the model takes, no padding; none are needed for magnitude. method:
    a criterion, see `gradpruner.sparsity.criteria`, "gblm:p=1" with options. pattern, ratio: see `Pattern`; row and
    matrix take 0.5 unless told otherwise. allocation: "uniform" or "alphapruning", which gives every layer its own
    share. device: where a layer runs while its inputs are seen (default: where it is); the model may wait in host
    memory. igia: for method igia. gradients: for gblm, what `gradient_norms` gave for these batches and its p, to prune
    more than once by; None: the whole model takes them here, where it is. Embeddings, head, norms, biases and routers
    stay. A copy of the weights is held in host memory until all layers are done: a model that cannot be pruned is left
    as it was.
    Raises InvalidArgument, UnsupportedModel, ModelMismatch.
    """
    criterion, wanted = chosen(method, pattern, ratio, allocation)
    place = _usable(device)
    decoder = Decoder(model)
    weights = prunable(decoder)
    for weight in weights:
        wanted.check(decoder.path_of(weight), weight.shape[0 if weight.transposed else 1])
    if criterion.importance:
        _check_igia(igia, decoder, weights)
    if criterion.needs or (criterion.gradients and gradients is None):
        need_full(batches, criterion.name)
    if gradients is not None:
        _check_gradients(gradients, criterion, decoder, weights)
    patterns = _patterns(decoder, weights, wanted, allocation)
    if gradients is None:
        grads = gradient_norms(model, batches, criterion.gradients) if criterion.gradients else {}
    else:
        grads = dict(gradients)
    walk = Layerwise(decoder, batches, place) if criterion.needs else None
    before: dict[str, Tensor] = {}
    bits: dict[str, Tensor] = {}
    try:
        for layer in range(len(decoder.layers)):
            of_layer = [w for w in weights if w.layer == layer]
            masks = _prune_layer(decoder, of_layer, criterion, patterns.get(layer, wanted), walk, grads, igia, before)
            bits |= masks
    except BaseException:
        with torch.no_grad():
            for weight in weights:
                if decoder.path_of(weight) in before:
                    decoder.parameter(weight).copy_(before[decoder.path_of(weight)])
        raise
    widths = {decoder.path_of(w): w.shape[0 if w.transposed else 1] for w in weights}
    return Masks(bits, widths, {"method": str(criterion), "pattern": str(wanted), "allocation": allocation})


@torch.no_grad()
def _prune_layer(
    decoder: Decoder,
    weights: Sequence[Weight],
    criterion: Criterion,
    pattern: Pattern,
    walk: Layerwise | None,
    grads: dict[str, Tensor],
    igia: Igia | None,
    before: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Prune the linears of one layer; their masks, by path, in host memory."""
    if walk is None:
        return {decoder.path_of(w): _prune(decoder, w, criterion, pattern, None, grads, igia, before) for w in weights}
    linears = {w.name: linear_modules(decoder, w.layer)[w.name] for w in weights}
    with walk.on_device() as layer:
        device = next(layer.parameters()).device
        statistics = {
            w.name: Statistics(decoder.path_of(w), w.shape[0 if w.transposed else 1], device, criterion.needs)
            for w in weights
        }
        walk.watch(linears, lambda name, x, rows: statistics[name].add(x, rows))
        masks = {}
        for weight in weights:
            found = statistics.pop(weight.name)
            masks[decoder.path_of(weight)] = _prune(decoder, weight, criterion, pattern, found, grads, igia, before)
        walk.advance()
    return masks


def _prune(
    decoder: Decoder,
    weight: Weight,
    criterion: Criterion,
    pattern: Pattern,
    statistics: Statistics | None,
    grads: dict[str, Tensor],
    igia: Igia | None,
    before: dict[str, Tensor],
) -> Tensor:
    path, stored = decoder.path_of(weight), decoder.parameter(weight).data
    before[path] = stored.to("cpu", copy=True)
    grad = grads.pop(path, None)  # its memory is needed
    if criterion.importance and igia is not None:
        grad = igia.importance[weight.layer, weight.name].dense().f
    if grad is not None:
        grad = grad.to(stored.device)
        grad = grad.t() if weight.transposed else grad
    seen = Seen(grads=grad) if statistics is None else statistics.seen(grad)
    return criterion.prune_(stored.t() if weight.transposed else stored, seen, pattern).cpu()


def _patterns(decoder: Decoder, weights: Sequence[Weight], pattern: Pattern, allocation: str) -> dict[int, Pattern]:
    by_layer: dict[int, list[Any]] = {}
    for weight in weights:
        by_layer.setdefault(weight.layer, []).append(decoder.parameter(weight).data)
    shares = allocate(by_layer, pattern.share, allocation)
    return {} if allocation == "uniform" else {layer: pattern.with_ratio(share) for layer, share in shares.items()}


def _check_gradients(
    gradients: Mapping[str, Tensor], criterion: Criterion, decoder: Decoder, weights: Sequence[Weight]
) -> None:
    if not criterion.gradients:
        raise InvalidArgument(f"gradients given; {criterion.name} goes by none: accepted with gblm alone")
    for weight in weights:
        path, shape = decoder.path_of(weight), tuple(decoder.parameter(weight).shape)
        found = gradients.get(path)
        if found is not None and not bool(found.isfinite().all()):
            raise InvalidArgument(f"gradients of {path} hold a NaN or Inf; expected finite norms")
        if found is None or tuple(found.shape) != shape or found.dtype != torch.float32:
            what = "nothing" if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
            raise InvalidArgument(f"gradients holds {what} for {path}; expected torch.float32 of shape {shape}")


def _usable(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        torch.zeros(1, device=device).cpu()
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise InvalidArgument(f"device = {str(device)!r}; expected one that can be used here ({said})") from error


def _check_igia(igia: Igia | None, decoder: Decoder, weights: Sequence[Weight]) -> None:
    if igia is None:
        raise InvalidArgument("igia is None; method 'igia' expected what a probe saw of this model")
    decoder.check_fingerprint(igia.model, "the igia")
    for weight in weights:
        if (weight.layer, weight.name) not in igia.importance:
            raise InvalidArgument(f"igia has no importance of {decoder.path_of(weight)}; expected one of every weight")
