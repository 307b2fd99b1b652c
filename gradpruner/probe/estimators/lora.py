"""The estimator "lora": the gradient G = gB gA of each adapter, kept as its two factors.

Source: docs/method.md, section 1 (equation 2 of the paper).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradpruner import ops
from gradpruner.distributed.deepspeed import gradient_of
from gradpruner.distributed.processes import Peers
from gradpruner.distributed.sharding import whole
from gradpruner.errors import ProbeError
from gradpruner.model.decoder import Decoder, Weight, base_name
from gradpruner.model.four_bits import check_gradients_pass
from gradpruner.probe.host_copies import joined, to_host
from gradpruner.probe.importance import Dense, Factors, shared

INSTEAD = "estimator='exact' reads the frozen weights' own gradients, whatever adapts them"


@dataclass
class _Kept:
    """The stored importance of one weight: factors, or a matrix once that is smaller."""

    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    size: int = 0  # bytes of the factors
    dense: Tensor | None = None
    exponents: tuple[int, int] | None = None  # see `Factors`


class LoraReader:
    """Reads gA (r, in) and gB (out, r) of every adapter, once per optimizer step.

    Norms come from Gram matrices. The factors are copied to host memory, all of a step in one block. As soon as the
    factors of a weight would take more room than one dense float32 matrix, they are summed into it: when t r (in + out)
    elements are larger than in out. So host memory is bounded whatever t and r.

    Args:
        decoder: the model.
        importance: False keeps only the norms for layer scores.
        factor_dtype: dtype of the stored factors.
        peers: the processes that train the model together. Each reads all gradients, gathered where they are sharded,
            and holds the factors of its own layers.

    Raises:
        ProbeError: the decoder layers hold no LoRA adapter that trains, or one of a kind that cannot be read.
        InvalidArgument: no gradient passes through a 4-bit weight, because it was used for inference on a CPU.
    """

    name = "lora"

    def __init__(
        self, decoder: Decoder, *, importance: bool, factor_dtype: torch.dtype, peers: Peers | None = None
    ) -> None:
        check_gradients_pass(decoder.base)
        self._importance, self._dtype, self._peers = importance, factor_dtype, peers
        known = {(w.layer, w.name): w for w in decoder.weights}
        adapted = []
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
                if (index, name) in known and _trained(module):
                    _check_factors(module, index, known[index, name])
                    adapted.append((index, name, module))
        if not adapted:
            raise ProbeError("estimator 'lora': the decoder layers hold no LoRA adapter on a linear layer that trains")
        self._modules = [module for _, _, module in adapted]
        self.weights: tuple[Weight, ...] = tuple(known[index, name] for index, name, _ in adapted)
        self.adapters: tuple[str, ...] = tuple(_rank_and_scale(module) for module in self._modules)
        self._kept = [_Kept() for _ in adapted]
        self._pending: list[list[tuple[Tensor, Tensor] | None]] = []  # per step: for each weight a pair, or None
        self.devices: set[torch.device] = set()

    def trained(self) -> list[tuple[int, Tensor]]:
        """A and B of every active adapter, each with its layer."""
        return [(w.layer, p) for w, m in zip(self.weights, self._modules, strict=True) for p in _trained(m)]

    def read(self, inverse_scale: Tensor | None) -> Tensor:
        """Compute the norms of this step's pairs, and queue the pairs for `settle`."""
        pairs = [_pair(module, inverse_scale) for module in self._modules]
        self.devices = {pair[0].device for pair in pairs if pair is not None}
        norms = []
        # neighbours on one device share a launch
        for device, group in itertools.groupby(pairs, lambda pair: None if pair is None else pair[0].device):
            if device is None:
                norms.append(torch.zeros(len(list(group)), dtype=torch.float64))
                continue
            present = [pair for pair in group if pair is not None]
            norms.append(ops.gram_norm([a for a, _ in present], [b for _, b in present]))
        if self._importance:
            own = [pair if self._keeps(weight) else None for pair, weight in zip(pairs, self.weights, strict=True)]
            copies = iter(to_host([factor for pair in own if pair is not None for factor in pair], self._dtype))
            self._pending.append([None if pair is None else (next(copies), next(copies)) for pair in own])
        return joined(norms)

    def _keeps(self, weight: Weight) -> bool:
        return self._peers is None or self._peers.keeps(weight.layer)

    def settle(self, usable: list[Tensor | None]) -> None:
        """Scale the usable pairs by powers of two and store them, as factors or added into F."""
        if not self._importance:
            return
        for norms, pairs in zip(usable, self._pending, strict=False):
            if norms is None:
                continue
            for kept, pair, norm in zip(self._kept, pairs, norms.tolist(), strict=True):
                # a zero pair (B = 0 before the first step) adds nothing to F
                if pair is not None and norm > 0:
                    kept.factors.append(_scaled(kept, *pair))
                    kept.size += _size_of(pair)
        del self._pending[: len(usable)]  # and with it the last views of their blocks
        for kept, weight in zip(self._kept, self.weights, strict=True):
            if kept.dense is None and kept.factors and kept.size >= 4 * weight.shape[0] * weight.shape[1]:
                kept.dense = torch.zeros(weight.shape)
            if kept.dense is not None:
                for a, b in kept.factors:
                    ops.outer_square_accumulate_(kept.dense, *_oriented(a, b, weight))
                kept.factors.clear()

    def importance(self) -> Mapping[tuple[int, str], Factors | Dense]:
        """Factors or F of every weight that had a gradient."""
        own: dict[tuple[int, str], Factors | Dense] = {}
        for kept, weight in zip(self._kept, self.weights, strict=True):
            first, second = kept.exponents or (0, 0)
            exponents = (second, first) if weight.transposed else (first, second)
            if kept.dense is not None:
                own[weight.layer, weight.name] = Dense(kept.dense, exponents)
            elif kept.factors:
                rank = max(a.shape[0] for a, _ in kept.factors)  # another adapter may have become the active one
                pairs = [_oriented(*_padded(a, b, rank), weight) for a, b in kept.factors]
                a, b = torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
                kept.factors = _unstacked(a, b, weight)  # the tensors are held once if the probe continues
                kept.size = _size_of((a, b))
                own[weight.layer, weight.name] = Factors(a, b, exponents)
        return shared(own, {}, self._peers)

    def restore(self, importance: Mapping[tuple[int, str], Factors | Dense]) -> None:
        """Go on collecting factors, and adding to matrices."""
        for kept, weight in zip(self._kept, self.weights, strict=True):
            known = importance.get((weight.layer, weight.name))  # all processes ask: it may be a collective
            if known is None or not self._keeps(weight):
                continue
            first, second = known.exponents
            kept.exponents = (second, first) if weight.transposed else (first, second)
            if isinstance(known, Dense):
                kept.dense = known.f.clone()
            else:
                kept.factors = _unstacked(known.a, known.b, weight)
                kept.size = _size_of((known.a, known.b))

    def close(self) -> None:
        """Nothing was changed in the model."""


def _active(module: Any) -> list[str]:
    """The names of the adapters of this linear that are in use."""
    return [adapter for adapter in module.active_adapters if adapter in module.lora_A]


def _trained(module: Any) -> list[Tensor]:
    """A and B of the adapters in use, where they train; no bias."""
    # AdaLoRA has bare parameters. It is refused later.
    factors = [factors[adapter] for adapter in _active(module) for factors in (module.lora_A, module.lora_B)]
    return [p for p in (getattr(factor, "weight", factor) for factor in factors) if p.requires_grad]


def _rank_and_scale(module: Any) -> str:
    """Rank and scale of the adapters in use: with others, G would be larger or smaller."""
    return ", ".join(f"r = {module.r[a]}, scale = {module.scaling[a]:.6g}" for a in _active(module))


def _check_factors(module: Any, layer: int, weight: Weight) -> None:
    """Refuse active adapters that are not pairs of factors (r, in) and (out, r) that train."""
    for adapter in _active(module):
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
    """This step's (gA, gB), or None. Several active adapters stand side by side."""
    parts = []
    for adapter in _active(module):
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


def _scaled(kept: _Kept, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Bring factors near 1 by powers of two, so that their fourth powers do not underflow."""
    # F is only ranked, so a constant factor does not matter.
    if kept.exponents is None:
        kept.exponents = _exponent(a), _exponent(b)
    return _ldexp(a, -kept.exponents[0]), _ldexp(b, -kept.exponents[1])


def _exponent(tensor: Tensor) -> int:
    return int(torch.frexp(tensor.abs().max().double()).exponent)


def _ldexp(tensor: Tensor, exponent: int) -> Tensor:
    """Compute tensor * 2 ** exponent, exactly unless the result is too large or too small."""
    if -126 <= exponent <= 127:  # float32 has such a factor, and the product is rounded at most once
        return tensor * 2.0**exponent
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


def _size_of(pair: tuple[Tensor, Tensor]) -> int:
    return sum(factor.numel() * factor.element_size() for factor in pair)


def has_lora(decoder: Decoder) -> bool:
    """Whether any decoder layer holds a LoRA adapter."""
    return any(hasattr(m, "lora_A") and hasattr(m, "lora_B") for m in decoder.layers.modules())
