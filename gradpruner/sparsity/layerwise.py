"""One decoder layer after the other, on hidden states that wait in host memory: a device holds one layer, one batch.

What a layer is called with besides hidden states (masks, positions) depends on the batch and the layer, not on what
the layers before it compute: one forward in which the layers only pass on what they get shows it all.
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
from gradpruner.model.hidden_states import leaving_state
from gradpruner.model.modes import evaluating, to_device
from gradpruner.sparsity.checks import Batch, need_full


class Layerwise:
    """The hidden states of all batches before one layer, which `advance` takes behind it.

    batches: keyword arguments of the model, labels left out. device: where a layer runs; None: where it is.
    Raises InvalidArgument without batches or with padding, UnsupportedModel where something happens between the layers.
    """

    def __init__(self, decoder: Decoder, batches: Sequence[Batch], device: torch.device | None = None) -> None:
        need_full(batches, "calibration")
        self._decoder, self._device, self.next = decoder, device, 0
        layers = list(decoder.layers)
        if any("forward" in vars(layer) for layer in layers):
            raise UnsupportedModel("something else has replaced the forward of a decoder layer")
        if len({id(layer) for layer in layers}) < len(layers):
            raise UnsupportedModel("a decoder layer stands in the model more than once: it cannot run alone")
        self._hidden: list[Tensor] = []
        self._rows: list[int] = []  # of each batch; not every model's hidden states begin with them
        self._given: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []  # by batch, by layer
        self._known: dict[tuple[Any, ...], list[Tensor]] = {}
        for batch in batches:
            self._record(batch)

    def _record(self, batch: Batch) -> None:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        entering: list[Tensor] = []
        rest: tuple[Any, ...] | None = None  # what a layer returns behind its hidden states; None: these alone

        def passing(module: nn.Module) -> Callable[..., Any]:
            forward = module.forward

            def pass_on(*args: Any, **kwargs: Any) -> Any:
                nonlocal rest
                hidden, others = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
                if not entering:
                    again = {} if args else {"hidden_states": hidden}
                    output = forward(*args, **again, **kwargs)  # once for real: it shows what a layer returns
                    rest = None if isinstance(output, Tensor) else tuple(output[1:])
                elif hidden is not entering[-1]:
                    raise UnsupportedModel("the model changes hidden states between its layers: they cannot run alone")
                entering.append(hidden)
                calls.append((self._kept(others), self._kept(kwargs)))
                return hidden if rest is None else (hidden, *rest)

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
        self._given.append(calls)

    def _kept(self, value: Any) -> Any:
        """In host memory, and once: batches of one shape share masks and positions."""
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            same = self._known.setdefault((value.shape, value.dtype), [])
            for known in same:
                if torch.equal(known, value):
                    return known
            same.append(value)
            return value
        return _mapped(self._kept, value)

    @contextlib.contextmanager
    def on_device(self) -> Iterator[nn.Module]:
        """The next layer, on the device it runs on; back where it was on leaving."""
        layer = self._decoder.layers[self.next]
        home = next(layer.parameters()).device
        try:
            yield layer.to(self._device or home)
        finally:
            layer.to(home)

    def watch(self, linears: Mapping[str, nn.Module], seen: Callable[[str, Tensor, int], None]) -> None:
        """Run the next layer on all batches and show `seen` what enters each linear: its name, x, how many rows."""
        rows = 0

        def hook(name: str) -> Callable[..., None]:
            return lambda module, args: seen(name, args[0], rows)

        handles: list[RemovableHandle] = [m.register_forward_pre_hook(hook(name)) for name, m in linears.items()]
        try:
            for number in range(len(self._hidden)):
                rows = self._rows[number]
                self._run(number)
        finally:
            for handle in handles:
                handle.remove()

    def advance(self) -> None:
        """Take the hidden states through the next layer, as it is now."""
        for number in range(len(self._hidden)):
            self._hidden[number] = self._run(number).cpu()
        self.next += 1

    def _run(self, number: int) -> Tensor:
        layer = self._decoder.layers[self.next]
        device = next(layer.parameters()).device
        args, kwargs = _mapped(lambda value: _moved(value, device), self._given[number][self.next])
        with evaluating(layer):
            output = layer(self._hidden[number].to(device), *args, **kwargs)
        return leaving_state(output)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else _mapped(lambda part: _moved(part, device), value)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """A tuple, list or dict with every value changed; anything else as it is."""
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(change(part) for part in value)
    if type(value) is dict:
        return {key: change(part) for key, part in value.items()}
    return value
