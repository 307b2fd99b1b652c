"""Find by trying which linear of a decoder layer writes to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.model.decoder import Decoder, Weight, is_linear, is_packed, linear_modules
from gradpruner.model.hidden_states import leaving_state

NEARLY = 0.02  # relative error with which a shift of the linear must come out of its layer; half precision rounds it


def find_writer(decoder: Decoder, layer: int, forward: Callable[[], None]) -> tuple[Weight, nn.Module] | None:
    """Find the linear whose output is added to the output of its layer unchanged.

    The last linear to run is tried: a known shift of its output must appear in the output of the layer.

    Args:
        decoder: the model, in evaluation mode.
        layer: index of the layer.
        forward: runs the model on some batch, always the same. It is called twice.

    Returns:
        The weight of the linear and its module, or None where there is no such linear: a norm or a router follows it,
        it is quantised, or it runs more than once.
    """
    linears = {name: module for name, module in linear_modules(decoder, layer).items() if is_linear(module)}
    order: list[str] = []  # of the linears that ran
    states: list[Tensor] = []  # that left the layer, by forward
    shifts: list[Tensor] = []
    handles = [m.register_forward_hook(lambda *_, name=n: order.append(name)) for n, m in linears.items()]
    handles.append(decoder.layers[layer].register_forward_hook(lambda *a: states.append(leaving_state(a[2]).detach())))

    def shift(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        shifts.append(states[0].float().square().mean().sqrt() * noise.float())
        return output + shifts[0].to(output.dtype)

    try:
        forward()
        if not order:
            return None
        name = order[-1]
        handles.append(linears[name].register_forward_hook(shift))
        forward()
    finally:
        for handle in handles:
            handle.remove()
    weight = next(w for w in decoder.weights if (w.layer, w.name) == (layer, name))
    if is_packed(decoder.parameter(weight)) or shifts[0].shape != states[0].shape or len(shifts) != 1:
        return None
    error = states[1].float() - states[0].float() - shifts[0]
    return (weight, linears[name]) if float(error.norm()) < NEARLY * float(shifts[0].norm()) else None
