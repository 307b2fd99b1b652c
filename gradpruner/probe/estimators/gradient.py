"""Full fine-tuning: the gradient of each weight as the optimizer is about to use it, or Adam's memory of it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradpruner import ops
from gradpruner.distributed.deepspeed import gradient_of
from gradpruner.distributed.processes import Peers, summed, together
from gradpruner.distributed.sharding import Layout, local, rows_of, shard_group
from gradpruner.errors import ProbeError
from gradpruner.model.decoder import Decoder, Weight
from gradpruner.model.wrappers import peft_of
from gradpruner.probe.host_copies import Arrival, joined, one_ahead
from gradpruner.probe.importance import Dense, Factors, shared


class GradientReader:
    """F = sum over steps of W.grad ** 2, in host memory (P eq. 3). Raises ProbeError if no weight trains.

    F takes 4 bytes per entry, for which a device that trains all weights has no room to promise. So with importance
    every step waits for its norms, and moves each gradient through two pinned buffers to be squared by the CPU: the
    step takes longer by that copy or by that squaring, whichever is slower. Without importance nothing is waited for.
    Of several processes (`peers`) each keeps F of its own layers, or, where the gradients are sharded, of its shards.
    """

    name = "gradient"
    adapters: tuple[str, ...] = ()

    def __init__(self, decoder: Decoder, *, importance: bool, peers: Peers | None = None) -> None:
        self._decoder, self._importance, self._peers = decoder, importance, peers
        self.weights: tuple[Weight, ...] = tuple(w for w in decoder.weights if decoder.parameter(w).requires_grad)
        if not self.weights:
            raise ProbeError(f"estimator {self.name!r}: no linear weight of the decoder layers trains{_other(decoder)}")
        self._f: dict[Weight, Tensor] = {}
        self.devices: set[torch.device] = set()

    def trained(self) -> list[tuple[int, Tensor]]:
        """The weights themselves."""
        return [(weight.layer, self._decoder.parameter(weight)) for weight in self.weights]

    def read(self, inverse_scale: Tensor | None) -> Tensor:
        """Norms of this step; F only grows by a step whose gradients are all finite."""
        parameters = [self._decoder.parameter(weight) for weight in self.weights]
        lengths: list[Tensor | None] = []
        by_group: dict[Any, list[int]] = {}
        for i, parameter in enumerate(parameters):
            grad = gradient_of(parameter)
            lengths.append(None if grad is None else torch.linalg.vector_norm(local(grad.detach()), dtype=_wide(grad)))
            if grad is not None and rows_of(grad) is not None:
                by_group.setdefault(shard_group(grad), []).append(i)
        self.devices = {length.device for length in lengths if length is not None}
        norms = _squared(lengths, inverse_scale)
        if by_group or self._importance:
            Arrival(self.devices).wait()
        for group, cut in by_group.items():  # one for a model under FSDP2
            norms[cut] = summed(norms[cut], group)
        if self._importance and bool(norms.isfinite().all()):
            scale = None if inverse_scale is None else float(inverse_scale)
            present = [i for i, length in enumerate(lengths) if length is not None]
            for weight, host in one_ahead(self._gradients(parameters, present)):
                if weight not in self._f:
                    self._f[weight] = torch.zeros(host.shape)
                ops.square_accumulate_(self._f[weight], host if scale is None else host.float() * scale)
        return norms

    def _gradients(self, parameters: Sequence[Tensor], present: list[int]) -> Iterator[tuple[Weight, Tensor]]:
        """One after another, asked for again: of all at once there may be no room."""
        for i in present:
            grad = gradient_of(parameters[i])
            if grad is not None and self._keeps(self.weights[i], grad):
                yield self.weights[i], local(grad.detach())

    def _keeps(self, weight: Weight, stored: Tensor) -> bool:
        return rows_of(stored) is not None or self._peers is None or self._peers.keeps(weight.layer)

    def settle(self, usable: list[Tensor | None]) -> None:
        """Nothing is ever pending."""

    def importance(self) -> Mapping[tuple[int, str], Factors | Dense]:
        """F of every weight that had a gradient."""
        return self._shared(self._f)

    def _shared(self, kept: dict[Weight, Tensor]) -> Mapping[tuple[int, str], Factors | Dense]:
        """What this process keeps of F, and what the others do."""
        own: dict[tuple[int, str], Factors | Dense] = {}
        sharded: dict[tuple[int, str], Callable[[], Factors | Dense]] = {}
        for weight, f in kept.items():
            stored = self._decoder.parameter(weight)
            if rows_of(stored) is None:
                own[weight.layer, weight.name] = Dense(f)
            else:
                sharded[weight.layer, weight.name] = functools.partial(_gathered, f, Layout.of(stored))
        return shared(own, sharded, self._peers)

    def restore(self, importance: Mapping[tuple[int, str], Factors | Dense]) -> None:
        """F goes on growing from what it was."""
        for weight in self.weights:
            known = importance.get((weight.layer, weight.name))  # by all processes alike: it may be a collective
            stored = self._decoder.parameter(weight)
            if known is None or not self._keeps(weight, stored):
                continue
            first, count = rows_of(stored) or (0, weight.shape[0])
            self._f[weight] = known.dense().f[first : first + count].clone()

    def close(self) -> None:
        """Nothing was changed in the model."""


class AdamReader(GradientReader):
    """F from Adam's exp_avg_sq: no memory of its own, valid from fresh state while beta2 ** t is near 1 (D).

    Raises ProbeError where exp_avg_sq would not be F: `why_not` says why.
    """

    name = "adam"

    def __init__(
        self,
        decoder: Decoder,
        optimizer: Optimizer,
        *,
        steps: int,
        importance: bool,
        begun: bool = False,
        peers: Peers | None = None,
    ) -> None:
        super().__init__(decoder, importance=False, peers=peers)
        self._optimizer, self._wanted = optimizer, importance
        reason = why_not_adam(decoder, optimizer, steps, begun=begun)
        if reason:
            raise ProbeError(f"estimator 'adam': {reason}; use estimator='gradient'")

    def importance(self) -> Mapping[tuple[int, str], Factors | Dense]:
        """exp_avg_sq of every weight. Raises ProbeError if a non-finite gradient has got into it."""
        kept: dict[Weight, Tensor] = {}
        with together(self._peers):
            for weight in self.weights if self._wanted else ():
                stored = self._decoder.parameter(weight)
                state = self._optimizer.state.get(stored, {})
                if "exp_avg_sq" not in state or not self._keeps(weight, stored):
                    continue
                f = local(state["exp_avg_sq"].detach()).to("cpu", torch.float32, copy=True)
                if not bool(f.isfinite().all()):
                    raise ProbeError(
                        f"Adam's state of layer {weight.layer} {weight.name} is not finite: use estimator='gradient', "
                        "which leaves such steps out"
                    )
                kept[weight] = f
        return self._shared(kept)

    def restore(self, importance: Mapping[tuple[int, str], Factors | Dense]) -> None:
        """Nothing to do: F is in the optimizer's state, which whoever resumes the training restores."""


def why_not_adam(decoder: Decoder, optimizer: object, steps: int, *, begun: bool = False) -> str | None:
    """Why this optimizer's exp_avg_sq is not F up to a constant, None if it is (docs/method.md, section 1).

    begun: its state holds the first steps of a probe that was interrupted, and no others.
    """
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return f"the optimizer is {type(optimizer).__name__}, not torch's Adam or AdamW"
    if begun and not optimizer.state:
        return "its state is lost, and with it the steps before the interruption (save_only_model?)"
    if optimizer.state and not begun:
        return "the optimizer has stepped before, its state holds older gradients"
    for group in optimizer.param_groups:
        if group["betas"][1] ** steps < 0.9:
            return f"beta2 = {group['betas'][1]} forgets within {steps} steps"
        coupled = type(optimizer) is torch.optim.Adam and not group.get("decoupled_weight_decay", False)
        if group["weight_decay"] and coupled:
            return "Adam's coupled weight decay is part of exp_avg_sq"
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(decoder.parameter(w)) not in held for w in decoder.weights if decoder.parameter(w).requires_grad):
        return "the optimizer does not hold every trainable weight of the decoder layers"
    return None


def _other(decoder: Decoder) -> str:
    """What to do where only adapters of another kind train."""
    configs = getattr(peft_of(decoder.given), "peft_config", {}).values()
    kinds = ", ".join(sorted({getattr(config.peft_type, "value", "adapter") for config in configs}))
    return f"; the probe reads no adapter of kind {kinds}: estimator='exact' reads frozen weights" if kinds else ""


def _gathered(shard: Tensor, layout: Layout) -> Dense:
    return Dense(layout.gather(shard))


def _squared(lengths: list[Tensor | None], factor: Tensor | None) -> Tensor:
    """(factor * length) ** 2 of each, zero for none: float64 in host memory, one copy for neighbours on one device."""
    parts = []
    for device, group in itertools.groupby(lengths, lambda length: None if length is None else length.device):
        here = list(group)
        if device is None:
            parts.append(torch.zeros(len(here), dtype=torch.float64))
            continue
        squares = torch.stack([length for length in here if length is not None]).double().square()
        parts.append(squares if factor is None else squares * factor.to(device).double().square())
    return joined(parts)


def _wide(grad: Tensor) -> torch.dtype:
    return torch.float64 if grad.device.type == "cpu" or grad.dtype == torch.float64 else torch.float32
