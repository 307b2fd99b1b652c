"""The estimator "exact": the true gradient of each linear, squared in the backward pass.

Source: docs/method.md, section 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradpruner.checks import check_int
from gradpruner.errors import ProbeError
from gradpruner.model.decoder import Decoder, Weight, linear_modules
from gradpruner.model.fused_linear import fuse, is_replaced, unfuse
from gradpruner.model.linears import is_transposed
from gradpruner.ops.linear import WeightSquares
from gradpruner.probe.host_copies import joined
from gradpruner.probe.importance import Dense, Factors


class ExactReader:
    """Replaces the forward of each linear in the decoder layers while the probe watches.

    What is squared is the gradient of one micro-batch of one process, before clipping. The gradient of a frozen weight
    is never stored. The importance F stays on the device of the weight and takes 4 bytes per entry. A frozen weight
    costs the product for its gradient, which training otherwise skips. A linear that runs more than once in one
    backward pass is refused in the first step.

    Args:
        decoder: the model.
        importance: False keeps only the sums for layer scores.
        micro_batches: backward calls per optimizer step.

    Raises:
        ProbeError: there is no plain linear, or something else has replaced the forward of one.
        InvalidArgument: `micro_batches` is not a whole number of 1 or more.
    """

    name = "exact"
    adapters: tuple[str, ...] = ()

    def __init__(self, decoder: Decoder, *, importance: bool, micro_batches: int) -> None:
        check_int("micro_batches", micro_batches, 1, "a number of backward calls per step")
        self._importance, self._micro_batches = importance, micro_batches
        linears: list[tuple[Weight, nn.Module]] = []
        for index in range(len(decoder.layers)):
            modules = linear_modules(decoder, index)
            for weight in decoder.weights:
                module = modules.get(weight.name) if weight.layer == index else None
                if type(module) is nn.Linear or (module is not None and is_transposed(module)):
                    linears.append((weight, module))
        if not linears:
            raise ProbeError("estimator 'exact': the decoder layers hold no plain linear layer")
        hooked = [weight.name for weight, module in linears if is_replaced(module)]
        if hooked:
            raise ProbeError(f"estimator 'exact': something else has replaced the forward of {hooked[0]}")
        self.weights: tuple[Weight, ...] = tuple(weight for weight, _ in linears)
        self._modules = [module for _, module in linears]
        self._totals: list[Tensor] = []  # one vector for neighbours on one device
        self._squares: list[WeightSquares] = []
        for device, group in itertools.groupby(self._modules, lambda module: module.weight.device):
            neighbours = list(group)
            totals = torch.zeros(len(neighbours), dtype=torch.float64, device=device)
            self._totals.append(totals)
            for module, total in zip(neighbours, totals.unbind(), strict=True):
                self._squares.append(self._new_squares(module, total))
        self.devices = {totals.device for totals in self._totals}
        for module, squares in zip(self._modules, self._squares, strict=True):
            fuse(module, squares)

    def _new_squares(self, module: nn.Module, total: Tensor) -> WeightSquares:
        weight = module.weight
        assert isinstance(weight, Tensor)
        igia = torch.zeros(weight.shape, device=weight.device) if self._importance else None
        return WeightSquares(total, igia, self._micro_batches)

    def trained(self) -> list[tuple[int, Tensor]]:
        """The weights that are not frozen."""
        pairs = zip(self.weights, self._modules, strict=True)
        return [(weight.layer, module.weight) for weight, module in pairs if module.weight.requires_grad]  # type: ignore[misc]

    def read(self, inverse_scale: Tensor | None) -> Tensor:
        """Copy the sums since the last step, one copy per device, and set them to zero."""
        if inverse_scale is not None:
            raise ProbeError("estimator 'exact' squares gradients before they are unscaled; use it without GradScaler")
        for squares, module, weight in zip(self._squares, self._modules, self.weights, strict=True):
            if squares.repeated:
                raise ProbeError(
                    f"estimator 'exact': layer {weight.layer} {weight.name} runs more than once in one backward pass; "
                    "it squares each run's part of the gradient, which is not the square of their sum: use "
                    "estimator='lora' with adapters, or 'gradient' where the weights train"
                )
            if module.weight.requires_grad and squares.calls % squares.micro_batches:
                raise ProbeError(
                    f"estimator 'exact': layer {weight.layer} {weight.name} saw {squares.calls} backward calls in a "
                    f"step; expected micro_batches = {squares.micro_batches}"
                )
            squares.calls = 0
        norms = joined(self._totals)
        for totals in self._totals:
            totals.zero_()
        return norms

    def settle(self, usable: list[Tensor | None]) -> None:
        """Do nothing: no step is ever pending, and the op itself leaves out what is not finite."""

    def importance(self) -> dict[tuple[int, str], Factors | Dense]:
        """Copy F of every weight to host memory."""
        return {
            (weight.layer, weight.name): Dense(squares.igia.to("cpu"))
            for weight, squares in zip(self.weights, self._squares, strict=True)
            if squares.igia is not None
        }

    def restore(self, importance: Mapping[tuple[int, str], Factors | Dense]) -> None:
        """Copy F back to the devices of its weights."""
        for weight, squares in zip(self.weights, self._squares, strict=True):
            if squares.igia is not None:
                squares.igia.copy_(importance[weight.layer, weight.name].dense().f)

    def close(self) -> None:
        """Give every linear its own forward back."""
        for module in self._modules:
            unfuse(module)
