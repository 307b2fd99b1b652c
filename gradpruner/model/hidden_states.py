"""What enters and leaves each decoder layer, and what leaves the last norm. One batch at a time, in evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.model.decoder import Decoder
from gradpruner.model.modes import evaluating, to_device

Batch = Mapping[str, Tensor]
Seen = Callable[[int, Tensor, Tensor, Tensor], None]


def moved(decoder: Decoder, batches: Sequence[Batch], name: str) -> Iterator[dict[str, Any]]:
    """The batches on the model's device. Raises InvalidArgument, with their `name`, if there are none."""
    if not batches:
        raise InvalidArgument(f"{name} is empty; expected at least one batch")
    device = next(decoder.base.parameters()).device
    for batch in batches:
        yield to_device(batch, device)


def watch(decoder: Decoder, batches: Sequence[Batch], seen: Seen) -> None:
    """Show `seen` each layer of each forward: its index, what enters, what leaves, and which tokens are real.

    Hidden states are (rows, tokens, width), the mask is boolean (rows, tokens). Raises InvalidArgument without
    batches, UnsupportedModel where hidden states are not one vector a token.
    """
    mask = torch.empty(0)

    def hook(index: int) -> Callable[..., None]:
        def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entering = entering_state(args, kwargs)
            leaving = leaving_state(output)
            for hidden in (entering, leaving):
                _check(hidden, mask)
            seen(index, entering, leaving, mask)

        return show

    with _hooked(decoder, {j: hook(j) for j in range(len(decoder.layers))}):
        for inputs in moved(decoder, batches, "batches"):
            mask = real(decoder, inputs)
            _without_head(decoder, inputs)


@contextlib.contextmanager
def _hooked(decoder: Decoder, hooks: Mapping[int, Callable[..., Any]]) -> Iterator[None]:
    handles = [decoder.layers[j].register_forward_hook(hook, with_kwargs=True) for j, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def skipping(decoder: Decoder, layers: Iterable[int]) -> contextlib.AbstractContextManager[None]:
    """Inside, these layers pass their input on as their output."""
    return _hooked(decoder, dict.fromkeys(layers, pass_input_on))


def noting(decoder: Decoder, entering: dict[int, Any]) -> contextlib.AbstractContextManager[None]:
    """Inside, a forward writes down for each layer what it would return if it passed its input on."""

    def hook(index: int) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entering[index] = pass_input_on(module, args, kwargs, output)

        return note

    return _hooked(decoder, {j: hook(j) for j in range(len(decoder.layers))})


@contextlib.contextmanager
def passing(decoder: Decoder, entering: dict[int, Any], layers: Iterable[int], last: int) -> Iterator[None]:
    """Inside, these layers compute nothing and pass on what was noted to enter `last` of them, or their own input.

    Behind `last` a layer passes its own input on; before it, it does not matter what.
    """
    replaced: dict[int, Any] = {}

    def instead(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if index <= last:
                return entering[last]
            return pass_input_on(decoder.layers[index], args, kwargs, entering[index])

        return forward

    try:
        for j in layers:
            layer = decoder.layers[j]
            replaced[j] = vars(layer).get("forward")
            layer.forward = instead(j)
        yield
    finally:
        for j, own in replaced.items():
            if own is None:
                del decoder.layers[j].forward
            else:
                decoder.layers[j].forward = own


def final_states(decoder: Decoder, batches: Sequence[Batch]) -> Iterator[Tensor]:
    """For each batch what the model's head would be given, (rows, tokens, width); zero where there is padding.

    In host memory, in the model's own dtype. Raises InvalidArgument, UnsupportedModel.
    """
    for inputs in moved(decoder, batches, "batches"):
        mask = real(decoder, inputs)
        final = getattr(_without_head(decoder, inputs), "last_hidden_state", None)
        if final is None:
            raise UnsupportedModel(f"{type(decoder.base).__name__} does not tell its last hidden state")
        _check(final, mask)
        yield final.masked_fill(~mask[..., None], 0).cpu()


def real(decoder: Decoder, inputs: dict[str, Any]) -> Tensor:
    """Which tokens are no padding, boolean (rows, tokens). Raises UnsupportedModel for an encoder-decoder."""
    if getattr(decoder.config, "is_encoder_decoder", False):
        raise UnsupportedModel("an encoder-decoder: which tokens of its decoder are padding is not known")
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _check(hidden: Tensor, mask: Tensor) -> None:
    if hidden.ndim != 3 or hidden.shape[:2] != mask.shape:
        shapes = f"{tuple(hidden.shape)} for tokens of shape {tuple(mask.shape)}"
        raise UnsupportedModel(f"hidden states of shape {shapes}; expected one vector a token")


def _without_head(decoder: Decoder, inputs: dict[str, Any]) -> Any:
    """A forward of the model without its head, whose logits nobody asked for."""
    with evaluating(decoder.base):
        return decoder.body(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)


def pass_input_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook that makes a layer return the hidden state it was given."""
    state = entering_state(args, kwargs)
    return state if isinstance(output, Tensor) else (state, *output[1:])


def entering_state(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden state among the arguments of a decoder layer."""
    state: Tensor = args[0] if args else kwargs["hidden_states"]
    return state


def leaving_state(output: Any) -> Tensor:
    """The hidden state in what a decoder layer returns."""
    state: Tensor = output if isinstance(output, Tensor) else output[0]
    return state
