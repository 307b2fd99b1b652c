"""Zero single weights of every decoder layer, layer by layer.

Each layer is calibrated on the output of the layers that were pruned before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gradpruner.checkpoint.masks import Masks
from gradpruner.errors import InvalidArgument
from gradpruner.model.decoder import Decoder, Weight, linear_modules
from gradpruner.model.hidden_states import Batch
from gradpruner.probe.igia import Igia
from gradpruner.sparsity.allocation import allocate, check_allocation
from gradpruner.sparsity.checks import check_batches, prunable_weights
from gradpruner.sparsity.criteria import Criterion, parse_criterion
from gradpruner.sparsity.gradients import gradient_norms
from gradpruner.sparsity.layerwise import Layerwise
from gradpruner.sparsity.pattern import Pattern
from gradpruner.sparsity.statistics import ActivationStatistics, LinearStatistics


def criterion_and_pattern(method: str, pattern: str, ratio: float | None, allocation: str) -> tuple[Criterion, Pattern]:
    """Read the options of `sparsify`, and check them against each other.

    Args:
        method: as in `sparsify`.
        pattern: as in `sparsify`.
        ratio: as in `sparsify`.
        allocation: as in `sparsify`.

    Returns:
        The criterion, and the pattern before the allocation.

    Raises:
        InvalidArgument: an option is not known, or two of them do not fit together.
    """
    criterion, zeros = parse_criterion(method), Pattern.of(pattern, ratio)
    if zeros.within == "matrix" and not criterion.within_matrix:
        raise InvalidArgument(f"pattern = 'matrix'; {criterion.name} chooses within a row: expected row or N:M")
    check_allocation(allocation)
    if allocation != "uniform":
        zeros.with_ratio(float(zeros.share))  # refuses N:M, whose share is fixed
    return criterion, zeros


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
    """Zero weights of the linears of all decoder layers, in place.

    Embeddings, head, norms, biases and routers stay. "sparsegpt" also changes the weights that are not zeroed. A copy
    of the weights is held in host memory until all layers are done: if anything fails, the model is as it was.

    Args:
        model: a plain model, without adapters and not quantised. It may wait in host memory, see `device`.
        batches: input_ids int64 (rows, tokens) without padding, and what else the model takes. Criteria without
            calibration ("magnitude", "igia") need none: pass an empty list.
        method: the criterion, "name" or "name:option=value", see docs/sparsity.md. Default "wanda".
        pattern: "row", "matrix" or "N:M" such as "2:4", see `Pattern`. Default "row".
        ratio: share of the weights that is zeroed, from 0 to below 1. Default None: 0.5 for row and matrix, 1 - N / M
            for N:M.
        allocation: "uniform" zeroes the same share of every layer. "alphapruning" gives each layer its own share, for
            row and matrix. Default "uniform".
        device: where a layer runs while its inputs are recorded, such as "cuda". Default None: where it is.
        igia: the importance from a probe of this model, for method "igia".
        gradients: for method "gblm", what `gradient_norms` returned for these batches and the same p. Pass it to prune
            more than once with the same gradients. Default None: they are computed here, by the whole model where it
            is.

    Returns:
        The masks of the weights that stay.

    Raises:
        InvalidArgument: an argument is not accepted, two of them do not fit together, or the inputs or gradients of a
            weight are all zero or not finite.
        ModelMismatch: `igia` is of another model.
        UnsupportedModel: a weight cannot be pruned, or the layers cannot run one at a time.

    Example:
        masks = sparsify(model, batches, method="gblm:p=1", pattern="2:4")

    Source: docs/method.md, section 7.
    """
    # 1. check everything, before anything is computed
    criterion, zeros = criterion_and_pattern(method, pattern, ratio, allocation)
    runs_on = _usable(device)
    decoder = Decoder(model)
    weights = prunable_weights(decoder)
    for weight in weights:
        zeros.check(decoder.path_of(weight), _inputs(weight))
    if criterion.importance:
        _check_igia(igia, decoder, weights)
    if criterion.needs or (criterion.gradients and gradients is None):
        check_batches(batches, criterion.name)
    if gradients is not None:
        _check_gradients(gradients, criterion, decoder, weights)
    # 2. what is computed once, on the dense model
    patterns = _patterns(decoder, weights, zeros, allocation)
    if gradients is not None:
        norms = dict(gradients)
    else:
        norms = gradient_norms(model, batches, criterion.gradients) if criterion.gradients else {}
    walk = Layerwise(decoder, batches, runs_on) if criterion.needs else None
    # 3. layer by layer; the layers after it see the zeros
    pruner = _Pruner(decoder, criterion, norms, igia)
    masks: dict[str, Tensor] = {}
    try:
        for layer in range(len(decoder.layers)):
            of_layer = [weight for weight in weights if weight.layer == layer]
            masks |= pruner.prune_layer(of_layer, patterns.get(layer, zeros), walk)
    except BaseException:
        pruner.restore(weights)
        raise
    widths = {decoder.path_of(weight): _inputs(weight) for weight in weights}
    return Masks(masks, widths, {"method": str(criterion), "pattern": str(zeros), "allocation": allocation})


class _Pruner:
    """Zeroes weights, and can put back what was there.

    Args:
        decoder: the layers of the model.
        criterion: what decides.
        gradients: norms by path. Each is taken out when its weight is pruned, to free its memory.
        igia: the importance from a probe, for a criterion that asks for it.
    """

    def __init__(self, decoder: Decoder, criterion: Criterion, gradients: dict[str, Tensor], igia: Igia | None) -> None:
        self._decoder, self._criterion, self._gradients, self._igia = decoder, criterion, gradients, igia
        self._originals: dict[str, Tensor] = {}

    @torch.no_grad()
    def prune_layer(self, weights: Sequence[Weight], pattern: Pattern, walk: Layerwise | None) -> dict[str, Tensor]:
        """Prune the linears of one layer, and take the hidden states behind it.

        Args:
            weights: all prunable weights of the layer.
            pattern: the pattern, with the layer's own share.
            walk: the hidden states in front of the layer. None: the criterion needs no inputs.

        Returns:
            The masks by path, in host memory.
        """
        path_of = self._decoder.path_of
        if walk is None:
            return {path_of(weight): self._prune(weight, pattern, None) for weight in weights}
        modules = {weight.name: linear_modules(self._decoder, weight.layer)[weight.name] for weight in weights}
        with walk.on_device() as layer:
            device = next(layer.parameters()).device
            statistics = {
                weight.name: ActivationStatistics(path_of(weight), _inputs(weight), device, self._criterion.needs)
                for weight in weights
            }
            walk.watch(modules, lambda name, x, rows: statistics[name].add(x, rows))
            # popped, so that each weight's statistics are freed when it has been pruned
            masks = {path_of(weight): self._prune(weight, pattern, statistics.pop(weight.name)) for weight in weights}
            walk.advance()
        return masks

    def _prune(self, weight: Weight, pattern: Pattern, activations: ActivationStatistics | None) -> Tensor:
        """Zero entries of one weight. Returns its mask, in host memory."""
        path, stored = self._decoder.path_of(weight), self._decoder.parameter(weight).data
        self._originals[path] = stored.to("cpu", copy=True)
        gradient = self._gradients.pop(path, None)
        if self._criterion.importance and self._igia is not None:
            gradient = self._igia.importance[weight.layer, weight.name].dense().f
        if gradient is not None:
            gradient = gradient.to(stored.device)
            gradient = gradient.t() if weight.transposed else gradient
        if activations is None:
            statistics = LinearStatistics(gradients=gradient)
        else:
            statistics = activations.finished(gradient)
        return self._criterion.prune_(stored.t() if weight.transposed else stored, statistics, pattern).cpu()

    @torch.no_grad()
    def restore(self, weights: Sequence[Weight]) -> None:
        """Give the weights that were pruned their old values."""
        for weight in weights:
            original = self._originals.get(self._decoder.path_of(weight))
            if original is not None:
                self._decoder.parameter(weight).copy_(original)


def _inputs(weight: Weight) -> int:
    """The number of inputs of a linear."""
    return weight.shape[0 if weight.transposed else 1]


def _patterns(decoder: Decoder, weights: Sequence[Weight], pattern: Pattern, allocation: str) -> dict[int, Pattern]:
    """The pattern of each layer whose share is not that of `pattern`."""
    by_layer: dict[int, list[Tensor]] = {}
    for weight in weights:
        by_layer.setdefault(weight.layer, []).append(decoder.parameter(weight).data)
    shares = allocate(by_layer, pattern.share, allocation)
    return {} if allocation == "uniform" else {layer: pattern.with_ratio(share) for layer, share in shares.items()}


def _check_gradients(
    gradients: Mapping[str, Tensor], criterion: Criterion, decoder: Decoder, weights: Sequence[Weight]
) -> None:
    if not criterion.gradients:
        raise InvalidArgument(f"gradients given; {criterion.name} uses none: expected None, or method gblm")
    for weight in weights:
        path, shape = decoder.path_of(weight), tuple(decoder.parameter(weight).shape)
        norms = gradients.get(path)
        if norms is not None and not bool(norms.isfinite().all()):
            raise InvalidArgument(f"gradients of {path} hold a NaN or Inf; expected finite norms")
        if norms is None or tuple(norms.shape) != shape or norms.dtype != torch.float32:
            what = "nothing" if norms is None else f"{norms.dtype} of shape {tuple(norms.shape)}"
            raise InvalidArgument(f"gradients holds {what} for {path}; expected torch.float32 of shape {shape}")


def _usable(device: torch.device | str | None) -> torch.device | None:
    """The device, after a trial copy to it and back. Raises InvalidArgument if that fails."""
    if device is None:
        return None
    try:
        torch.zeros(1, device=device).cpu()
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidArgument(f"device = {str(device)!r}; expected one that can be used here ({reason})") from error


def _check_igia(igia: Igia | None, decoder: Decoder, weights: Sequence[Weight]) -> None:
    if igia is None:
        raise InvalidArgument("igia is None; method 'igia' expected the result of a probe of this model")
    decoder.check_fingerprint(igia.model, "the igia")
    for weight in weights:
        if (weight.layer, weight.name) not in igia.importance:
            raise InvalidArgument(f"igia has no importance of {decoder.path_of(weight)}; expected one of every weight")
