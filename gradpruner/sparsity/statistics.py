"""What a criterion may know about one linear, and how it is gathered batch by batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradpruner.errors import InvalidArgument

NORMS, MOMENTS, HESSIAN = "norms", "moments", "hessian"  # what a criterion may ask for


@dataclass(frozen=True)
class LinearStatistics:
    """What a criterion knows about one linear: its inputs x and the gradient of its weight.

    Everything is on the device of the weight. A field is None if the criterion did not ask for it.

    Args:
        norms: float32 (in,), ‖x‖₂ of each input feature: the root of the mean over sequences of the sum of squares.
            Asked for by `NORMS`.
        sums: float32 (in,), the mean over sequences of the sum of each input feature. Asked for by `MOMENTS`.
        variances: float32 (in,), the variance of each input feature over all tokens. Asked for by `MOMENTS`.
        hessian: float32 (in, in), xᵀ x summed over all tokens. Asked for by `HESSIAN`.
        gradients: float32 (out, in), what stands for the gradient of the weight. See `Criterion.gradients` and
            `Criterion.importance`.

    Source: docs/method.md, section 7.
    """

    norms: Tensor | None = None
    sums: Tensor | None = None
    variances: Tensor | None = None
    hessian: Tensor | None = None
    gradients: Tensor | None = None


class ActivationStatistics:
    """Sums over the inputs of one linear, kept on their device.

    Args:
        name: the weight's path, for messages.
        width: number of input features.
        device: where the inputs are.
        needs: any of `NORMS`, `MOMENTS` and `HESSIAN`.
    """

    def __init__(self, name: str, width: int, device: torch.device, needs: Iterable[str]) -> None:
        self._name, self._needs = name, frozenset(needs)
        self._sequences = self._tokens = 0
        self._squares = torch.zeros(width, dtype=torch.float64, device=device)
        self._sums = torch.zeros(width, dtype=torch.float64, device=device)
        self._products = torch.zeros(width, width, device=device) if HESSIAN in self._needs else None

    def add(self, x: Tensor, sequences: int) -> None:
        """Add the inputs of one call of the linear.

        Args:
            x: float (..., in).
            sequences: how many sequences they come from.
        """
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        self._sequences += sequences
        self._tokens += len(flat)
        self._squares += flat.square().sum(0)
        self._sums += flat.sum(0)
        if self._products is not None:
            self._products.addmm_(flat.T, flat)

    def finished(self, gradients: Tensor | None) -> LinearStatistics:
        """The statistics of all inputs that were added.

        Raises InvalidArgument if the inputs are all zero or not finite.
        """
        total = float(self._squares.sum())
        if not total < float("inf"):
            raise InvalidArgument(f"batches: the inputs of {self._name} hold a NaN or Inf; expected finite activations")
        if total == 0:
            what = "are all zero" if self._tokens else "have not been seen"
            raise InvalidArgument(f"batches: the inputs of {self._name} {what}; expected activations to go by")
        mean = self._sums / self._tokens
        moments = MOMENTS in self._needs
        return LinearStatistics(
            norms=(self._squares / self._sequences).sqrt().float() if NORMS in self._needs else None,
            sums=(self._sums / self._sequences).float() if moments else None,
            variances=(self._squares / self._tokens - mean.square()).clamp_min(0).float() if moments else None,
            hessian=self._products,
            gradients=gradients,
        )
