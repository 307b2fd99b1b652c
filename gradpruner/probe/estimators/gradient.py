"""The estimators "gradient" and "adam", for full fine-tuning.

"gradient" reads the gradient of each weight as the optimizer is about to use it. "adam" reads Adam's running mean of
the squared gradients.
"""

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
    """Sums W.grad ** 2 over the steps into the importance F, in host memory.

    This is equation 3 of the paper. F takes 4 bytes per entry. A device that trains all weights has no room for it. So
    with importance, every step waits for its norms and moves each gradient through two pinned buffers to the CPU, which
    squares it. The step takes longer by the copy or by the squaring, whichever is slower. Without importance, no step
    waits.

    Args:
        decoder: the model.
        importance: False keeps only the norms for layer scores.
        peers: the processes that train the model together. Each holds F of its own layers, or of its shards where the
            gradients are sharded.

    Raises:
        ProbeError: no linear weight of the decoder layers trains.
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
        """Compute the norms of this step. One that is not finite adds nothing to F."""
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
        """Yield gradients one after another: there may be no room for all of them at once."""
        for i in present:
            grad = gradient_of(parameters[i])
            if grad is not None and self._keeps(self.weights[i], grad):
                yield self.weights[i], local(grad.detach())

    def _keeps(self, weight: Weight, stored: Tensor) -> bool:
        return rows_of(stored) is not None or self._peers is None or self._peers.keeps(weight.layer)

    def settle(self, usable: list[Tensor | None]) -> None:
        """Do nothing: no step is ever pending."""

    def importance(self) -> Mapping[tuple[int, str], Factors | Dense]:
        """F of every weight that had a gradient."""
        return self._shared(self._f)

    def _shared(self, kept: dict[Weight, Tensor]) -> Mapping[tuple[int, str], Factors | Dense]:
        """Make one mapping of the parts of F that the processes hold."""
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
        """Go on adding to F."""
        for weight in self.weights:
            known = importance.get((weight.layer, weight.name))  # all processes ask: it may be a collective
            stored = self._decoder.parameter(weight)
            if known is None or not self._keeps(weight, stored):
                continue
            first, count = rows_of(stored) or (0, weight.shape[0])
            self._f[weight] = known.dense().f[first : first + count].clone()

    def close(self) -> None:
        """Nothing was changed in the model."""


class AdamReader(GradientReader):
    """Reads F from Adam's exp_avg_sq, without memory of its own.

    exp_avg_sq is F up to a constant if the optimizer starts without state, and while beta2 ** t is near 1.

    Args:
        decoder: the model.
        optimizer: torch's Adam or AdamW.
        steps: number of steps that will be watched.
        importance: False keeps only the norms for layer scores.
        begun: the state already holds the first steps of this probe, which was interrupted.
        peers: the processes that train the model together.

    Raises:
        ProbeError: exp_avg_sq would not be F, see `why_not_adam`; or no linear weight trains.
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
        """Read exp_avg_sq of every weight. Raises ProbeError if it is not finite."""
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
        """Do nothing: F is in the state of the optimizer, which the training loop restores."""


def why_not_adam(decoder: Decoder, optimizer: object, steps: int, *, begun: bool = False) -> str | None:
    """Return why the exp_avg_sq of an optimizer would not be F up to a constant factor.

    Args:
        decoder: the model.
        optimizer: the optimizer.
        steps: number of steps that will be watched.
        begun: its state holds the first steps of a probe that was interrupted, and no others.

    Returns:
        The reason, or None if it would be F.

    Source: docs/method.md, section 1.
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
    """Say what to do where only adapters of another kind train."""
    configs = getattr(peft_of(decoder.given), "peft_config", {}).values()
    kinds = ", ".join(sorted({getattr(config.peft_type, "value", "adapter") for config in configs}))
    return f"; the probe reads no adapter of kind {kinds}: estimator='exact' reads frozen weights" if kinds else ""


def _gathered(shard: Tensor, layout: Layout) -> Dense:
    return Dense(layout.gather(shard))


def _squared(lengths: list[Tensor | None], factor: Tensor | None) -> Tensor:
    """(factor * length) ** 2 of each, 0 for None, float64 in host memory."""
    parts = []
    for device, group in itertools.groupby(lengths, lambda length: None if length is None else length.device):
        neighbours = list(group)
        if device is None:
            parts.append(torch.zeros(len(neighbours), dtype=torch.float64))
            continue
        squares = torch.stack([length for length in neighbours if length is not None]).double().square()
        parts.append(squares if factor is None else squares * factor.to(device).double().square())
    return joined(parts)


def _wide(grad: Tensor) -> torch.dtype:
    return torch.float64 if grad.device.type == "cpu" or grad.dtype == torch.float64 else torch.float32
