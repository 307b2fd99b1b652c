"""How the gradient of a step is read: one file per estimator, one protocol for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from gradpruner.model.decoder import Weight
from gradpruner.probe.importance import Dense, Factors


class Reader(Protocol):
    """What the probe needs of an estimator.

    In several processes, all methods but `trained` and `close` are collectives.

    Args:
        name: name of the estimator.
        weights: the watched weights.
        adapters: rank and scale of the adapter of each weight; empty for gradients of the weights themselves.
        devices: where the gradients of the last `read` were, wherever the weights are.
    """

    name: str
    weights: tuple[Weight, ...]
    adapters: tuple[str, ...]
    devices: set[torch.device]

    def trained(self) -> list[tuple[int, Tensor]]:
        """The parameters whose gradients are read, each with its layer."""
        ...

    def read(self, inverse_scale: Tensor | None) -> Tensor:
        """Read the gradients of the step that is about to be taken.

        `inverse_scale` is 1 / loss scale where gradients are still scaled. Returns the squared Frobenius norm of the
        gradient of every weight, float64 of shape (n,) in host memory. The copy may still be under way until the
        `devices` have finished their earlier work. The step is pending until `settle`.
        """
        ...

    def settle(self, usable: list[Tensor | None]) -> None:
        """Keep or forget the oldest pending steps: each has its square norms, or None.

        The copies of these steps have arrived. Later steps stay pending.
        """
        ...

    def importance(self) -> Mapping[tuple[int, str], Factors | Dense]:
        """The importance so far, by layer and weight name; empty if only scores were asked for."""
        ...

    def restore(self, importance: Mapping[tuple[int, str], Factors | Dense]) -> None:
        """Go on from the importance that another reader of the same model had collected."""
        ...

    def close(self) -> None:
        """Leave the model as it was."""
        ...
