"""Full fine-tuning: the gradient of each weight as the optimizer is about to use it, or Adam's memory of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradpruner import ops
from gradpruner.decoder import Decoder, Weight
from gradpruner.errors import ProbeError
from gradpruner.igia import Dense, Factors


class GradientReader:
    """F = sum over steps of W.grad ** 2, in host memory (P eq. 3). Raises ProbeError if no weight trains."""

    name = "gradient"

    def __init__(self, decoder: Decoder, *, importance: bool) -> None:
        self._decoder, self._importance = decoder, importance
        self.weights: tuple[Weight, ...] = tuple(w for w in decoder.weights if decoder.parameter(w).requires_grad)
        if not self.weights:
            raise ProbeError(f"estimator {self.name!r}: no linear weight of the decoder layers trains")
        self._f: dict[Weight, Tensor] = {}

    def read(self, inverse_scale: Tensor | None) -> Tensor:
        """Norms of this step; F only grows by a step whose gradients are all finite."""
        grads = [self._decoder.parameter(weight).grad for weight in self.weights]
        if any(hasattr(grad, "full_tensor") for grad in grads):
            raise ProbeError("the gradients are sharded DTensors (FSDP2); this version reads whole gradients only")
        norms = torch.zeros(len(grads), dtype=torch.float64)
        present = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
        scale = 1.0 if inverse_scale is None else float(inverse_scale)
        if present:
            wide = [torch.linalg.vector_norm(grad, dtype=_wide(grad)) for _, grad in present]
            norms[[i for i, _ in present]] = torch.stack([n.cpu().double() for n in wide]).square() * scale**2
        if self._importance and bool(norms.isfinite().all()):
            for i, grad in present:
                f = self._f.setdefault(self.weights[i], torch.zeros(grad.shape))
                host = grad.detach().to("cpu")
                ops.square_accumulate_(f, host if inverse_scale is None else host.float() * scale)
        return norms

    @property
    def full(self) -> bool:
        """Nothing is ever pending."""
        return False

    def settle(self, usable: list[Tensor | None]) -> None:
        """Nothing is ever pending."""

    def importance(self) -> dict[tuple[int, str], Factors | Dense]:
        """F of every weight that had a gradient."""
        return {(weight.layer, weight.name): Dense(f) for weight, f in self._f.items()}

    def restore(self, importance: Mapping[tuple[int, str], Factors | Dense]) -> None:
        """F goes on growing from what it was."""
        for weight in self.weights:
            if (weight.layer, weight.name) in importance:
                self._f[weight] = importance[weight.layer, weight.name].dense().f.clone()

    def close(self) -> None:
        """Nothing was changed in the model."""


class AdamReader(GradientReader):
    """F from Adam's exp_avg_sq: no memory of its own, valid from fresh state while beta2 ** t is near 1 (D).

    Raises ProbeError where exp_avg_sq would not be F: `why_not` says why.
    """

    name = "adam"

    def __init__(
        self, decoder: Decoder, optimizer: Optimizer, *, steps: int, importance: bool, begun: bool = False
    ) -> None:
        super().__init__(decoder, importance=False)
        self._optimizer, self._wanted = optimizer, importance
        reason = why_not_adam(decoder, optimizer, steps, begun=begun)
        if reason:
            raise ProbeError(f"estimator 'adam': {reason}; use estimator='gradient'")

    def importance(self) -> dict[tuple[int, str], Factors | Dense]:
        """exp_avg_sq of every weight. Raises ProbeError if a non-finite gradient has got into it."""
        found: dict[tuple[int, str], Factors | Dense] = {}
        for weight in self.weights if self._wanted else ():
            state = self._optimizer.state.get(self._decoder.parameter(weight), {})
            if "exp_avg_sq" not in state:
                continue
            f = state["exp_avg_sq"].detach().to("cpu", torch.float32, copy=True)
            if not bool(f.isfinite().all()):
                raise ProbeError(
                    f"Adam's state of layer {weight.layer} {weight.name} is not finite: use estimator='gradient', "
                    "which leaves such steps out"
                )
            found[weight.layer, weight.name] = Dense(f)
        return found

    def restore(self, importance: Mapping[tuple[int, str], Factors | Dense]) -> None:
        """Nothing to do: F is in the optimizer's state, which whoever resumes the training restores."""


def why_not_adam(decoder: Decoder, optimizer: object, steps: int, *, begun: bool = False) -> str | None:
    """Why this optimizer's exp_avg_sq is not F up to a constant, None if it is (METHOD section 1).

    begun: its state holds the first steps of a probe that was interrupted, and no others.
    """
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return f"the optimizer is {type(optimizer).__name__}, not torch's Adam or AdamW"
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


def _wide(grad: Tensor) -> torch.dtype:
    return torch.float64 if grad.device.type == "cpu" or grad.dtype == torch.float64 else torch.float32
