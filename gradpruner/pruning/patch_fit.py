"""The least-squares fit of one gap: sums over tokens, and their solution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.distributed.processes import Peers, summed, together
from gradpruner.model.decoder import Decoder, Weight
from gradpruner.model.hidden_states import leaving_state
from gradpruner.pruning.token_rows import tokens_and_sequences

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean square of an input
HELD_OUT = 5  # every fifth sequence chooses the ridge, and is fitted with it afterwards


@dataclass
class Sums:
    """Sums over tokens of a least-squares problem, float32, on the device where the states are.

    Args:
        gram: sum of x xᵀ, shape (w, w), where w is the width of what enters the linear.
        cross: sum of x eᵀ, shape (w, h), where e is the error to be corrected and h the width of the model.
        square: sum of ‖e‖², a scalar.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor

    @classmethod
    def zeros(cls, like: Tensor, width: int, outputs: int) -> Sums:
        """Start with no token.

        Args:
            like: a tensor of the dtype and on the device of the sums.
            width: width of what enters the linear.
            outputs: width of the model.

        Returns:
            Sums of zeros.
        """
        return cls(like.new_zeros(width, width), like.new_zeros(width, outputs), like.new_zeros(()))

    def add(self, x: Tensor, error: Tensor) -> None:
        """Add tokens, in place: there may be no room for a second gram matrix.

        Args:
            x: what entered the linear, shape (tokens, w).
            error: what is to be corrected, shape (tokens, h).
        """
        self.gram.addmm_(x.T, x)
        self.cross.addmm_(x.T, error)
        self.square.add_(error.square().sum())

    def include(self, other: Sums) -> None:
        """Add the tokens of other sums, in place."""
        self.gram.add_(other.gram)
        self.cross.add_(other.cross)
        self.square.add_(other.square)

    def over(self, peers: Peers) -> Sums:
        """Add the sums of all processes. This is a collective."""
        parts = (summed(part, peers.group).to(part.device) for part in (self.gram, self.cross, self.square))
        return Sums(*parts)

    def solve(self, ridge: float) -> Tensor:
        """Solve for the change with the least error; the ridge is relative to an input's size.

        Returns float64 of shape (w, h).
        """
        gram = self.gram.double()
        gram.diagonal().add_(ridge * float(gram.diagonal().mean()))
        return torch.linalg.solve(gram, self.cross.double())

    def unexplained(self, change: Tensor) -> float:
        """Share of the squared error of these tokens that remains after a change of shape (w, h)."""
        gram, cross, square = self.gram.double(), self.cross.double(), float(self.square)
        return float((square - 2 * (change * cross).sum() + (change * (gram @ change)).sum()) / square)


class GapFit:
    """Hooks that collect the sums of one gap while the model runs, and the solution.

    Args:
        decoder: the dense model.
        weight: the weight of the linear that gets the change, in the layer before the gap.
        linear: its module.
        end: the last layer of the gap.
    """

    def __init__(self, decoder: Decoder, weight: Weight, linear: nn.Module, end: int) -> None:
        self.weight, self.end = weight, end
        self.fitted: Sums | None = None
        self.held_out: Sums | None = None  # the sequences that choose the ridge
        self._sequences = 0
        self._batch: Mapping[str, Any] = {}
        self._input = self._output = torch.empty(0)  # of the linear; of the layer before the gap
        layer, last = decoder.layers[weight.layer], decoder.layers[end]
        self._handles = [
            linear.register_forward_pre_hook(self._on_input),
            layer.register_forward_hook(self._on_layer),
            last.register_forward_hook(self._on_end),
        ]

    def begin(self, batch: Mapping[str, Any]) -> None:
        """Set, before each forward, the batch: it tells which tokens count."""
        self._batch = batch

    def stop(self) -> None:
        """Remove the hooks. The sums stay."""
        for handle in self._handles:
            handle.remove()

    def _on_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._input = args[0].detach()

    def _on_layer(self, module: nn.Module, args: Any, output: Any) -> None:
        self._output = leaving_state(output).detach()

    def _on_end(self, module: nn.Module, args: Any, output: Any) -> None:
        target = leaving_state(output).detach().float()
        with torch.autocast(target.device.type, enabled=False):  # the sums need their precision
            self.add(target)
        self._input = self._output = torch.empty(0)

    def add(self, target: Tensor) -> None:
        """Add a batch: `target` is the state at the gap's end, shape (rows, tokens, h)."""
        counts, sequence = tokens_and_sequences(self._batch, target)
        is_held_out = (self._sequences + sequence) % HELD_OUT == HELD_OUT - 1
        self._sequences += int(sequence[-1, -1]) + 1
        entering, leaving = (state.to(target.device) for state in (self._input, self._output))  # layers may be spread
        if self.fitted is None or self.held_out is None:
            width, outputs = entering.shape[-1], target.shape[-1]
            self.fitted, self.held_out = (Sums.zeros(target, width, outputs) for _ in range(2))
        for sums, tokens in ((self.fitted, counts & ~is_held_out), (self.held_out, counts & is_held_out)):
            state = target[tokens]
            # What follows a gap normalises its input: an error counts relative to the size of the state.
            scale = state.norm(dim=1, keepdim=True).clamp_min(1e-12).reciprocal()
            sums.add(entering[tokens].float() * scale, (state - leaving[tokens].float()) * scale)

    def solve(self, peers: Peers | None) -> tuple[Tensor, float] | None:
        """Solve for the best change of the weight.

        With peers it is a collective: the sums of all processes are added, and the first process solves.

        Args:
            peers: the processes that train the model together, or None.

        Returns:
            The change, float32 in the layout of the weight in host memory, and the share of the error that it leaves
            on held-out rows. None where no change helps there, or where there were too few rows to tell.
        """
        if peers is None:
            return self._solve()
        assert self.fitted is not None and self.held_out is not None
        self.fitted, self.held_out = self.fitted.over(peers), self.held_out.over(peers)
        with together(peers):  # the solvers of other processes may round otherwise
            solution = self._solve() if peers.rank == 0 else None
        unexplained = peers.gather(None if solution is None else solution[1])[0]
        if unexplained is None:
            return None
        like = torch.empty(self.weight.shape)
        return peers.broadcast(None if solution is None else solution[0], like, 0), unexplained

    def _solve(self) -> tuple[Tensor, float] | None:
        fitted, held_out = self.fitted, self.held_out
        if fitted is None or held_out is None or not float(held_out.square) > 0 or not float(fitted.square) > 0:
            return None
        shares = {ridge: held_out.unexplained(fitted.solve(ridge)) for ridge in RIDGES}
        best = min(shares, key=lambda ridge: shares[ridge])
        if not shares[best] < 1:
            return None
        fitted.include(held_out)
        change = fitted.solve(best).float()  # (in, out)
        stored = change if self.weight.transposed else change.T
        return stored.contiguous().cpu(), shares[best]
