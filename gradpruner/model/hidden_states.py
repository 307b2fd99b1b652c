"""Hidden states: what enters and leaves each decoder layer, and what leaves the last norm.

All forwards here run one batch at a time, in evaluation mode.
"""

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
LayerCallback = Callable[[int, Tensor, Tensor, Tensor], None]  # index, entering state, leaving state, mask


def batches_on_device(decoder: Decoder, batches: Sequence[Batch], name: str) -> Iterator[dict[str, Any]]:
    """Yield the batches on the model's device.

    Args:
        decoder: the model.
        batches: keyword arguments of the model.
        name: what the error calls them.

    Raises:
        InvalidArgument: there are no batches.
    """
    if not batches:
        raise InvalidArgument(f"{name} is empty; expected at least one batch")
    device = next(decoder.base.parameters()).device
    for batch in batches:
        yield to_device(batch, device)


def real_tokens(decoder: Decoder, inputs: dict[str, Any]) -> Tensor:
    """Find out which tokens are real, and which are padding.

    Args:
        decoder: the model.
        inputs: one batch.

    Returns:
        True for real tokens, boolean (rows, tokens).

    Raises:
        UnsupportedModel: the model is an encoder-decoder.
    """
    if getattr(decoder.config, "is_encoder_decoder", False):
        raise UnsupportedModel("an encoder-decoder: which tokens of its decoder are padding is not known")
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


# Layers as hooks and replaced forwards see them.


def entering_state(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden state among the arguments of a decoder layer.

    Args:
        args: the positional arguments of its forward.
        kwargs: the keyword arguments.
    """
    state: Tensor = args[0] if args else kwargs["hidden_states"]
    return state


def leaving_state(output: Any) -> Tensor:
    """Return the hidden state in the output of a decoder layer."""
    state: Tensor = output if isinstance(output, Tensor) else output[0]
    return state


def pass_input_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Make a layer return the hidden state that it was given. This is a forward hook.

    Args:
        module: the layer. It is not used.
        args: the positional arguments of its forward.
        kwargs: the keyword arguments.
        output: what it computed. The result has the same form.
    """
    state = entering_state(args, kwargs)
    return state if isinstance(output, Tensor) else (state, *output[1:])


# Forwards of a whole model.


def watch(decoder: Decoder, batches: Sequence[Batch], callback: LayerCallback) -> None:
    """Run all batches through a model, and call `callback` for each layer of each forward.

    Args:
        decoder: the model.
        batches: keyword arguments of the model. Labels are ignored.
        callback: is called with the index of the layer, the state that enters it, the state that leaves it, both
            (rows, tokens, width), and the mask of real tokens, boolean (rows, tokens).

    Raises:
        InvalidArgument: there are no batches.
        UnsupportedModel: the hidden states are not one vector per token.
    """
    mask = torch.empty(0)

    def hook(index: int) -> Callable[..., None]:
        def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entering = entering_state(args, kwargs)
            leaving = leaving_state(output)
            for state in (entering, leaving):
                _check_state(state, mask)
            callback(index, entering, leaving, mask)

        return show

    with _hooked(decoder, {j: hook(j) for j in range(len(decoder.layers))}):
        for inputs in batches_on_device(decoder, batches, "batches"):
            mask = real_tokens(decoder, inputs)
            _forward_without_head(decoder, inputs)


def final_states(decoder: Decoder, batches: Sequence[Batch]) -> Iterator[Tensor]:
    """Yield, for each batch, the states that the model's head would be given.

    Args:
        decoder: the model.
        batches: keyword arguments of the model. Labels are ignored.

    Yields:
        States (rows, tokens, width) in host memory, in the model's dtype. They are zero where there is padding.

    Raises:
        InvalidArgument: there are no batches.
        UnsupportedModel: the model does not return these states, or they are not one vector per token.
    """
    for inputs in batches_on_device(decoder, batches, "batches"):
        mask = real_tokens(decoder, inputs)
        final = getattr(_forward_without_head(decoder, inputs), "last_hidden_state", None)
        if final is None:
            raise UnsupportedModel(f"{type(decoder.base).__name__} does not return its last hidden state")
        _check_state(final, mask)
        yield final.masked_fill(~mask[..., None], 0).cpu()


def _forward_without_head(decoder: Decoder, inputs: dict[str, Any]) -> Any:
    """Run the model without its head, whose logits are not needed."""
    with evaluating(decoder.base):
        return decoder.body(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)


def _check_state(state: Tensor, mask: Tensor) -> None:
    if state.ndim != 3 or state.shape[:2] != mask.shape:
        shapes = f"{tuple(state.shape)} for tokens of shape {tuple(mask.shape)}"
        raise UnsupportedModel(f"hidden states of shape {shapes}; expected one vector per token")


# Forwards with layers left out, and forwards that begin in the middle.


def skipping(decoder: Decoder, layers: Iterable[int]) -> contextlib.AbstractContextManager[None]:
    """Inside, some layers return their input.

    They still compute, and the result is thrown away.

    Args:
        decoder: the model.
        layers: which layers.
    """
    return _hooked(decoder, dict.fromkeys(layers, pass_input_on))


def recording(decoder: Decoder, recorded: dict[int, Any]) -> contextlib.AbstractContextManager[None]:
    """Inside, a forward records for each layer what it would return if it returned its input.

    Args:
        decoder: the model.
        recorded: is filled in, by layer.
    """

    def hook(index: int) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            recorded[index] = pass_input_on(module, args, kwargs, output)

        return note

    return _hooked(decoder, {j: hook(j) for j in range(len(decoder.layers))})


def resume_behind(decoder: Decoder, layer: int, recorded: Mapping[int, Any]) -> contextlib.AbstractContextManager[None]:
    """Inside, a forward begins behind `layer`, from the state that was recorded in front of it.

    The layer and those before it compute nothing. So the model runs as if `layer` were removed.

    Args:
        decoder: the model.
        layer: the last layer that does not run.
        recorded: what `recording` recorded in a forward of the same batch.
    """

    def recorded_state(*args: Any, **kwargs: Any) -> Any:
        return recorded[layer]

    return _replaced(decoder, dict.fromkeys(range(layer + 1), recorded_state))


def leave_out(
    decoder: Decoder, layers: Iterable[int], recorded: Mapping[int, Any]
) -> contextlib.AbstractContextManager[None]:
    """Inside, some layers return their input and compute nothing.

    Args:
        decoder: the model.
        layers: which layers.
        recorded: what `recording` recorded. The outputs get the same form.
    """

    def forward(index: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: pass_input_on(decoder.layers[index], args, kwargs, recorded[index])

    return _replaced(decoder, {j: forward(j) for j in layers})


@contextlib.contextmanager
def _hooked(decoder: Decoder, hooks: Mapping[int, Callable[..., Any]]) -> Iterator[None]:
    handles = [decoder.layers[j].register_forward_hook(hook, with_kwargs=True) for j, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _replaced(decoder: Decoder, forwards: Mapping[int, Callable[..., Any]]) -> Iterator[None]:
    """Inside, some layers have other forwards. They get their own back afterwards."""
    before = {j: vars(decoder.layers[j]).get("forward") for j in forwards}
    try:
        for j, forward in forwards.items():
            decoder.layers[j].forward = forward
        yield
    finally:
        for j, own in before.items():
            if own is None:
                vars(decoder.layers[j]).pop("forward", None)
            else:
                decoder.layers[j].forward = own
