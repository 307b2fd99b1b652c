"""LoRA: the simulated weight gradient G = gB gA of each adapter, kept as its two factors (P eq. 2)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradpruner import ops
from gradpruner.decoder import Decoder, Weight, base_name
from gradpruner.deepspeed import gradient_of
from gradpruner.distributed import Peers, whole
from gradpruner.errors import ProbeError
from gradpruner.igia import Dense, Factors, shared

INSTEAD = "estimator='exact' reads the frozen weights' own gradients, whatever adapts them"


@dataclass
class _Kept:
    """What is stored of one weight: pending raw pairs, then factors, or a matrix once that is smaller."""

    pending: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)
    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    dense: Tensor | None = None
    exponents: tuple[int, int] | None = None


class LoraReader:
    """Reads gA (r, in) and gB (out, r) of every adapter in the decoder layers, once an optimizer step.

    Norms come from Gram matrices; the factors go to host memory. A weight's factors are folded into one dense
    float32 matrix as soon as they would take more room than it (the crossover: t r (in + out) against in out,
    in elements weighted by their size), so host memory is bounded whatever t and r. Of several processes (`peers`)
    each reads all gradients, gathered where they are sharded, and keeps the factors of its own layers. Raises
    ProbeError if the decoder layers hold no LoRA adapter.
    """

    name = "lora"

    def __init__(
        self, decoder: Decoder, *, importance: bool, factor_dtype: torch.dtype, peers: Peers | None = None
    ) -> None:
        self._importance, self._dtype, self._peers = importance, factor_dtype, peers
        known = {(w.layer, w.name): w for w in decoder.weights}
        found = []
        for index, layer in enumerate(decoder.layers):
            for path, module in layer.named_modules():
                if not (hasattr(module, "lora_A") and hasattr(module, "lora_B") and hasattr(module, "base_layer")):
                    continue
                name = str(base_name(f"{path}.weight"))
                if hasattr(module, "parameter_name"):
                    raise ProbeError(
                        f"estimator 'lora': layer {index} {path} has adapters on {module.parameter_name!r} "
                        "(target_parameters), which it does not read; expected adapters on linear layers only"
                    )
                if (index, name) in known:
                    _check_factors(module, index, known[index, name])
                    found.append((index, name, module))
        if not found:
            raise ProbeError("estimator 'lora': the decoder layers hold no LoRA adapter on a linear layer")
        self._modules = [module for _, _, module in found]
        self.weights: tuple[Weight, ...] = tuple(known[index, name] for index, name, _ in found)
        self._kept = [_Kept() for _ in found]

    def read(self, inverse_scale: Tensor | None) -> Tensor:
        """Norms of this step's pairs; the pairs themselves are queued for `settle`."""
        pairs = [_pair(module, inverse_scale) for module in self._modules]
        norms = torch.zeros(len(pairs), dtype=torch.float64, pin_memory=any(p and p[0].is_cuda for p in pairs))
        first = 0
        # neighbours on one device share a launch
        for device, group in itertools.groupby(pairs, lambda pair: None if pair is None else pair[0].device):
            here = list(group)
            if device is not None:
                values = ops.gram_norm([pair[0] for pair in here if pair], [pair[1] for pair in here if pair])
                norms[first : first + len(here)].copy_(values, non_blocking=True)
            first += len(here)
        if self._importance:
            for kept, weight, pair in zip(self._kept, self.weights, pairs, strict=True):
                if not self._keeps(weight):
                    continue
                copy = None if pair is None else (_to_host(pair[0], self._dtype), _to_host(pair[1], self._dtype))
                kept.pending.append(copy)
        return norms

    def _keeps(self, weight: Weight) -> bool:
        return self._peers is None or self._peers.keeps(weight.layer)

    @property
    def full(self) -> bool:
        """Whether some weight's pending pairs outweigh its dense matrix."""
        return any(_weight_of(k.pending) >= 4 * _entries(w) for k, w in zip(self._kept, self.weights, strict=True))

    def settle(self, usable: list[Tensor | None]) -> None:
        """Scale the usable pairs by powers of two and store them, as factors or added into F."""
        if not self._importance:
            return
        for n, (kept, weight) in enumerate(zip(self._kept, self.weights, strict=True)):
            if not self._keeps(weight):
                continue
            for norms, pair in zip(usable, kept.pending, strict=True):
                # a zero pair (B = 0 before the first step) adds nothing to F
                if norms is not None and pair is not None and float(norms[n]) > 0:
                    kept.factors.append(_scaled(kept, *pair))
            kept.pending.clear()
            if kept.dense is None and _weight_of(kept.factors) >= 4 * _entries(weight):
                kept.dense = torch.zeros(weight.shape)
            if kept.dense is not None:
                for a, b in kept.factors:
                    ops.outer_square_accumulate_(kept.dense, *_oriented(a, b, weight))
                kept.factors.clear()

    def importance(self) -> Mapping[tuple[int, str], Factors | Dense]:
        """Factors or F of every weight that had a gradient."""
        found: dict[tuple[int, str], Factors | Dense] = {}
        for kept, weight in zip(self._kept, self.weights, strict=True):
            first, second = kept.exponents or (0, 0)
            exponents = (second, first) if weight.transposed else (first, second)
            if kept.dense is not None:
                found[weight.layer, weight.name] = Dense(kept.dense, exponents)
            elif kept.factors:
                rank = max(a.shape[0] for a, _ in kept.factors)  # another adapter may have become the active one
                pairs = [_oriented(*_padded(a, b, rank), weight) for a, b in kept.factors]
                a, b = torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
                kept.factors = _unstacked(a, b, weight)  # held once, should the probe go on
                found[weight.layer, weight.name] = Factors(a, b, exponents)
        return shared(found, {}, self._peers)

    def restore(self, importance: Mapping[tuple[int, str], Factors | Dense]) -> None:
        """Factors go on to be collected, matrices to be added to."""
        for kept, weight in zip(self._kept, self.weights, strict=True):
            known = importance.get((weight.layer, weight.name))  # by all processes alike: it may be a collective
            if known is None or not self._keeps(weight):
                continue
            first, second = known.exponents
            kept.exponents = (second, first) if weight.transposed else (first, second)
            if isinstance(known, Dense):
                kept.dense = known.f.clone()
            else:
                kept.factors = _unstacked(known.a, known.b, weight)

    def close(self) -> None:
        """Nothing was changed in the model."""


def _check_factors(module: Any, layer: int, weight: Weight) -> None:
    """Raises ProbeError unless the active adapters are pairs of factors (r, in) and (out, r) that both train."""
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        pair: list[Any] = [getattr(factors[adapter], "weight", None) for factors in (module.lora_A, module.lora_B)]
        where = f"estimator 'lora': layer {layer} {weight.name}, adapter {adapter!r}"
        if pair[0] is None or pair[1] is None:
            raise ProbeError(f"{where} has more factors than LoRA's two (AdaLoRA): {INSTEAD}")
        rows, columns = reversed(weight.shape) if weight.transposed else weight.shape
        shapes = [tuple(factor.shape) for factor in pair]
        if len(shapes[0]) == len(shapes[1]) == 2 and (shapes[0][1] != columns or shapes[1][0] != rows):
            raise ProbeError(f"{where} has factors of shapes {shapes}, no product of the weight's own: {INSTEAD}")
        if pair[0].requires_grad != pair[1].requires_grad:
            frozen = "A" if pair[1].requires_grad else "B"
            raise ProbeError(f"{where}: lora_{frozen} is frozen (LoRA-FA, MiCA), both gradients are needed: {INSTEAD}")


def _pair(module: Any, inverse_scale: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """This step's (gA, gB), several active adapters side by side along r; None without a gradient."""
    parts = []
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        grads = gradient_of(module.lora_A[adapter].weight), gradient_of(module.lora_B[adapter].weight)
        if grads[0] is None or grads[1] is None:
            continue
        parts.append((whole(grads[0]), whole(grads[1])))
    if not parts:
        return None
    a, b = parts[0] if len(parts) == 1 else (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts], 1))
    if inverse_scale is not None:
        scale = inverse_scale.to(a.device)
        a, b = a.float() * scale, b.float() * scale
    return a.detach(), b.detach()


def _to_host(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that is on its way: the device reads the gradient before anything launched later can change it."""
    host = torch.empty(gradient.shape, dtype=dtype, pin_memory=gradient.is_cuda)
    return host.copy_(gradient, non_blocking=True)


def _scaled(kept: _Kept, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """F is only ranked: bring the factors near 1 by powers of two, so that their fourth powers do not underflow."""
    if kept.exponents is None:
        kept.exponents = _exponent(a), _exponent(b)
    return _ldexp(a, -kept.exponents[0]), _ldexp(b, -kept.exponents[1])


def _exponent(tensor: Tensor) -> int:
    return int(torch.frexp(tensor.abs().max().double()).exponent)


def _ldexp(tensor: Tensor, exponent: int) -> Tensor:
    return (tensor.double() * 2.0**exponent).to(tensor.dtype)


def _oriented(a: Tensor, b: Tensor, weight: Weight) -> tuple[Tensor, Tensor]:
    """Factors of G in the layout the weight is stored in."""
    return (b.T.contiguous(), a.T.contiguous()) if weight.transposed else (a, b)


def _padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product with zeros up to a larger r."""
    more = rank - a.shape[0]
    return (F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))) if more else (a, b)


def _unstacked(a: Tensor, b: Tensor, weight: Weight) -> list[tuple[Tensor, Tensor]]:
    """The pairs of stacked, oriented factors, as the adapters have them: views."""
    pairs = zip(a, b, strict=True)
    return [(second.T, first.T) for first, second in pairs] if weight.transposed else list(pairs)


def _weight_of(pairs: list[tuple[Tensor, Tensor]] | list[tuple[Tensor, Tensor] | None]) -> int:
    return sum(t.numel() * t.element_size() for pair in pairs if pair is not None for t in pair)


def _entries(weight: Weight) -> int:
    return weight.shape[0] * weight.shape[1]


def has_lora(decoder: Decoder) -> bool:
    """Whether any decoder layer holds a LoRA adapter."""
    return any(hasattr(m, "lora_A") and hasattr(m, "lora_B") for m in decoder.layers.modules())
