"""How a step's gradient is read, one estimator a file. All of them look like `Reader` to the probe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from gradpruner.model.decoder import Weight
from gradpruner.probe.importance import Dense, Factors


class Reader(Protocol):
    """What the probe needs of an estimator."""

    name: str
    weights: tuple[Weight, ...]
    adapters: tuple[str, ...]  # of each weight, rank and scale of what adapts it; () for gradients of the weights
    devices: set[torch.device]  # of the gradients of the last `read`, wherever the weights are

    def trained(self) -> list[tuple[int, Tensor]]:
        """The parameters whose .grad is read, or added to, each with its layer."""
        ...

    def read(self, inverse_scale: Tensor | None) -> Tensor:
        """||G||_F^2 of every weight for the step about to be taken, float64 (n,) in host memory.

        The copy may still be under way, as those of what is pending may: until the `devices` have come to where they
        were told to. inverse_scale: 1 / loss scale where gradients are still scaled.
        """
        ...

    def settle(self, usable: list[Tensor | None]) -> None:
        """Of the oldest pending steps keep those whose square norms are given, forget those that are None.

        Their copies have arrived. Steps that were read after them stay pending.
        """
        ...

    def importance(self) -> Mapping[tuple[int, str], Factors | Dense]:
        """What was kept so far, by layer and weight name; empty if only sums were asked for.

        In several processes a collective, as `read` and `restore` are.
        """
        ...

    def restore(self, importance: Mapping[tuple[int, str], Factors | Dense]) -> None:
        """Go on from what another reader of the same model had kept."""
        ...

    def close(self) -> None:
        """Leave the model as it was."""
        ...
