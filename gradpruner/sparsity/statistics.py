"""Seen: what a criterion may know of one linear weight, and how its inputs become that, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradpruner.errors import InvalidArgument

NORMS, MOMENTS, HESSIAN = "norms", "moments", "hessian"  # what a criterion may ask for


@dataclass(frozen=True)
class Seen:
    """Of the inputs x of one linear, and of its gradients; None where the criterion did not ask for it.

    norms: float32 (in,), root of the mean over sequences of the sum of squares. sums: float32 (in,), mean over
    sequences of the sum. variances: float32 (in,), over all tokens. hessian: float32 (in, in), x^T x over all tokens.
    grads: float32 (out, in), see the criterion. Source: docs/method.md, section 7.
    """

    norms: Tensor | None = None
    sums: Tensor | None = None
    variances: Tensor | None = None
    hessian: Tensor | None = None
    grads: Tensor | None = None


class Statistics:
    """Sums over the inputs of one linear, on their device. needs: of NORMS, MOMENTS, HESSIAN."""

    def __init__(self, name: str, width: int, device: torch.device, needs: Iterable[str]) -> None:
        self._name, self._needs = name, frozenset(needs)
        self._sequences = self._tokens = 0
        self._squares = torch.zeros(width, dtype=torch.float64, device=device)
        self._sums = torch.zeros(width, dtype=torch.float64, device=device)
        self._products = torch.zeros(width, width, device=device) if HESSIAN in self._needs else None

    def add(self, x: Tensor, sequences: int) -> None:
        """x: (..., in), of so many sequences."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        self._sequences += sequences
        self._tokens += len(flat)
        self._squares += flat.square().sum(0)
        self._sums += flat.sum(0)
        if self._products is not None:
            self._products.addmm_(flat.T, flat)

    def seen(self, grads: Tensor | None) -> Seen:
        """Raises InvalidArgument if the inputs were all zero, or not finite, or if there were none."""
        total = float(self._squares.sum())
        if not total < float("inf"):
            raise InvalidArgument(f"batches: the inputs of {self._name} hold a NaN or Inf; expected finite activations")
        if total == 0:
            what = "are all zero" if self._tokens else "have not been seen"
            raise InvalidArgument(f"batches: the inputs of {self._name} {what}; expected activations to go by")
        mean = self._sums / self._tokens
        wants = MOMENTS in self._needs
        return Seen(
            norms=(self._squares / self._sequences).sqrt().float() if NORMS in self._needs else None,
            sums=(self._sums / self._sequences).float() if wants else None,
            variances=(self._squares / self._tokens - mean.square()).clamp_min(0).float() if wants else None,
            hessian=self._products,
            grads=grads,
        )
