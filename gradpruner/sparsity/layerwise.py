"""Run one decoder layer at a time on hidden states that wait in host memory.

A device then holds one layer and one batch at a time. Besides hidden states, a layer is called with masks, positions
and the like. These depend on the batch and the layer, not on what the layers before it compute. So one forward pass,
in which the layers only pass on what they get, shows all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradpruner.errors import UnsupportedModel
from gradpruner.model.decoder import Decoder
from gradpruner.model.hidden_states import Batch, leaving_state
from gradpruner.model.modes import evaluating, to_device
from gradpruner.sparsity.checks import check_batches

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a layer, besides hidden states: positional, by keyword


class Layerwise:
    """The hidden states of all batches in front of one layer. `advance` takes them to the next.

    `next` is the index of the layer that they are about to enter. It begins at 0.

    Args:
        decoder: the layers of the model.
        batches: keyword arguments of the model. Labels are ignored.
        device: where a layer runs. Default None: where it is.

    Raises:
        InvalidArgument: there are no batches, or they hold padding.
        UnsupportedModel: the model changes hidden states between its layers, a layer stands in it more than once or is
            not always called, or its forward was replaced.
    """

    def __init__(self, decoder: Decoder, batches: Sequence[Batch], device: torch.device | None = None) -> None:
        check_batches(batches, "calibration")
        self._decoder, self._device, self.next = decoder, device, 0
        layers = list(decoder.layers)
        if any("forward" in vars(layer) for layer in layers):
            raise UnsupportedModel("something else has replaced the forward of a decoder layer")
        if len({id(layer) for layer in layers}) < len(layers):
            raise UnsupportedModel("a decoder layer stands in the model more than once: it cannot run alone")
        self._hidden: list[Tensor] = []  # of each batch
        self._rows: list[int] = []  # of each batch; not every model's hidden states have the rows as first dimension
        self._arguments: list[list[Arguments]] = []  # by batch, then by layer
        self._tensors: dict[tuple[Any, ...], list[Tensor]] = {}  # the tensors among them, by shape and dtype
        for batch in batches:
            self._record(batch)

    def _record(self, batch: Batch) -> None:
        """Note the arguments of every layer, and what enters the first, for one batch."""
        calls: list[Arguments] = []
        entering: list[Tensor] = []
        others_returned: tuple[Any, ...] | None = None  # besides hidden states; None: a layer returns these alone

        def passing(module: nn.Module) -> Callable[..., Any]:
            forward = module.forward

            def pass_on(*args: Any, **kwargs: Any) -> Any:
                nonlocal others_returned
                hidden, others = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
                if not entering:  # run the first layer for real: it shows what a layer returns
                    again = {} if args else {"hidden_states": hidden}
                    output = forward(*args, **again, **kwargs)
                    others_returned = None if isinstance(output, Tensor) else tuple(output[1:])
                elif hidden is not entering[-1]:
                    raise UnsupportedModel("the model changes hidden states between its layers: they cannot run alone")
                entering.append(hidden)
                calls.append((self._kept(others), self._kept(kwargs)))
                return hidden if others_returned is None else (hidden, *others_returned)

            return pass_on

        layers, device = self._decoder.layers, next(self._decoder.base.parameters()).device
        inputs = to_device(batch, device, labels=False)
        try:
            for layer in layers:
                layer.forward = passing(layer)
            with evaluating(self._decoder.base):
                self._decoder.body(**inputs, use_cache=False)
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)
        if len(calls) != len(layers):
            raise UnsupportedModel(f"a forward called {len(calls)} of {len(layers)} decoder layers")
        self._rows.append(len(batch["input_ids"]))
        self._hidden.append(entering[0].cpu())
        self._arguments.append(calls)

    def _kept(self, value: Any) -> Any:
        """The value in host memory. Equal tensors, such as masks, are kept once."""
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            same_shape = self._tensors.setdefault((value.shape, value.dtype), [])
            for tensor in same_shape:
                if torch.equal(tensor, value):
                    return tensor
            same_shape.append(value)
            return value
        return _mapped(self._kept, value)

    @contextlib.contextmanager
    def on_device(self) -> Iterator[nn.Module]:
        """The next layer, on the device where it runs. Afterwards, it is moved back."""
        layer = self._decoder.layers[self.next]
        home = next(layer.parameters()).device
        try:
            yield layer.to(self._device or home)
        finally:
            layer.to(home)

    def watch(self, linears: Mapping[str, nn.Module], on_input: Callable[[str, Tensor, int], None]) -> None:
        """Run the next layer on all batches, and show what enters some of its linears.

        The hidden states stay in front of the layer.

        Args:
            linears: linears of that layer, by name.
            on_input: called with the name of a linear, its input (..., in), and the number of rows of the batch.
        """
        rows = 0

        def hook_for(name: str) -> Callable[..., None]:
            return lambda module, args: on_input(name, args[0], rows)

        handles: list[RemovableHandle] = [m.register_forward_pre_hook(hook_for(name)) for name, m in linears.items()]
        try:
            for number in range(len(self._hidden)):
                rows = self._rows[number]
                self._run(number)
        finally:
            for handle in handles:
                handle.remove()

    def advance(self) -> None:
        """Take the hidden states through the next layer, with the weights that it has now."""
        for number in range(len(self._hidden)):
            self._hidden[number] = self._run(number).cpu()
        self.next += 1

    def _run(self, number: int) -> Tensor:
        """What leaves the next layer for one batch."""
        layer = self._decoder.layers[self.next]
        device = next(layer.parameters()).device
        args, kwargs = _mapped(lambda value: _moved(value, device), self._arguments[number][self.next])
        with evaluating(layer):
            output = layer(self._hidden[number].to(device), *args, **kwargs)
        return leaving_state(output)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else _mapped(lambda part: _moved(part, device), value)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """A tuple, list or dict with every value changed. Anything else is returned as it is."""
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(change(part) for part in value)
    if type(value) is dict:
        return {key: change(part) for key, part in value.items()}
    return value
