"""Choose the stretches of layers that linear patches replace best.

This method is this project's own. A gap is a stretch of removed layers. Write h for the hidden state that leaves the
last layer of a gap, and r for the part of h that the best linear patch of the gap (docs/method.md, section 4) gets
wrong. A gap costs a sum over tokens:

    kind          cost of a token
    "residual"    ‖r‖ / ‖h‖, the relative error of the hidden state
    "gap"         |∂L/∂h · r|, what the error changes in the loss L, to first order

Layers next to each other are judged together, and the plan with the smallest sum of costs is found exactly.

The second kind is called "gap" for the gap that it opens in the loss. Recorded comparisons name it so.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.checks import check_choice
from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.model.decoder import Decoder
from gradpruner.model.hidden_states import leaving_state
from gradpruner.model.modes import evaluating, to_device
from gradpruner.model.parameter_counts import count_parameters
from gradpruner.plan import Plan
from gradpruner.probe.selection import parameters_in, select
from gradpruner.pruning.residual_writer import find_writer

LONGEST = 10  # layers of one gap, at most
TOKENS = 4096  # tokens that patches are fitted on; as many others judge the patches
RIDGE = 0.1  # added to the normal equations, as a share of the mean square of an input
KINDS = ("residual", "gap")

Gap = tuple[int, int]  # the kept layer before the gap, and the last removed layer of the gap
Costs = Mapping[Gap, float]
Writers = Mapping[int, nn.Module | None]  # for each layer, the linear that a patch would change; None: there is none


def plan_gaps(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    count: int,
    kind: str = "residual",
    protect: Iterable[int] = (0,),
    layers: str | nn.ModuleList | None = None,
) -> Plan:
    """Choose the layers whose removal costs least once every gap is patched.

    Args:
        model: the dense model, as the probe left it. It is not changed, and .grad is left alone.
        batches: keyword arguments of the model, those of the probe for example, two rows or more in all. Each costs a
            forward pass. For kind "gap" they need labels, and each costs a backward pass too.
        count: how many layers are removed.
        kind: "residual" or "gap", see the module's docstring. Default "residual".
        protect: layers that are kept whatever they cost. Layer 0 always is.
        layers: the decoder layers or their path, if they cannot be found. Default None: they are found.

    Returns:
        A plan that drops `count` layers and merges none.

    Raises:
        InvalidArgument: an argument is not accepted, so many layers cannot be removed, the batches hold fewer than two
            rows, or the model returns no loss for them.
        UnsupportedModel: the model is an encoder-decoder.
    """
    check_choice("kind", kind, KINDS)
    decoder, protected = Decoder(model, layers), sorted(set(protect))
    total = len(decoder.layers)
    select([0.0] * total, count=count, merge=0, protect=protected)  # refuses a wrong count or protect
    if getattr(decoder.config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"kind = {kind!r} is for decoder-only models; accepted for this one are squared, norm, normalized"
        )
    removed = cheapest(gap_costs(decoder, batches, kind), total, count, protected)
    counts = count_parameters(decoder)
    parameters = parameters_in(removed, counts["layer_parameters"], counts["shared_parameters"])
    return Plan(total, removed, (), decoder.fingerprint(), parameters / counts["total_parameters"], kind=kind)


def cheapest(costs: Costs, layers: int, count: int, protect: Iterable[int] = (0,)) -> list[int]:
    """Find the layers to remove with the smallest sum of the costs of their gaps.

    The result is exact: it is found by dynamic programming over the layers. Of equal sums, the one whose last gaps are
    shorter is taken.

    Args:
        costs: the cost of each gap that is allowed. A gap without an entry is not allowed.
        layers: decoder layers of the model.
        count: how many layers are removed.
        protect: layers that are kept. Layer 0 always is.

    Returns:
        `count` layers, ascending.

    Raises:
        InvalidArgument: no allowed gaps of finite cost remove so many layers.
    """
    protected = {0, *protect}
    # least[i][c]: the least cost of the layers before i if c of them are removed and layer i is kept. i = layers is
    # the end of the model. came_from[i, c]: the kept layer before i in that solution.
    least = [[math.inf] * (count + 1) for _ in range(layers + 1)]
    came_from: dict[tuple[int, int], int] = {}
    least[0][0] = 0.0
    for i in range(1, layers + 1):
        for removed in range(count + 1):
            for length in range(min(removed, i - 1) + 1):
                start = i - 1 - length
                if length and ((start, i - 1) not in costs or protected & set(range(start + 1, i))):
                    continue
                cost = least[start][removed - length] + (costs[start, i - 1] if length else 0.0)
                if cost < least[i][removed]:
                    least[i][removed], came_from[i, removed] = cost, start
    if not math.isfinite(least[layers][count]):
        raise InvalidArgument(f"{count} of {layers} layers to remove; no allowed gaps of finite cost add up to that")
    # walk back from the end
    removed_layers, i = list[int](), layers
    while i > 0:
        start = came_from[i, count - len(removed_layers)]
        removed_layers += range(start + 1, i)
        i = start
    return sorted(removed_layers)


def gap_costs(decoder: Decoder, batches: Iterable[Mapping[str, Any]], kind: str) -> dict[Gap, float]:
    """Compute the cost of every gap of up to `LONGEST` layers.

    Rows are used in turn: one fits the patches, the next judges them. Batches are read until there are `TOKENS` tokens
    for each purpose.

    Args:
        decoder: the layers of the model.
        batches: keyword arguments of the model.
        kind: "residual" or "gap".

    Returns:
        The cost of each gap, summed over the tokens that judge.

    Raises:
        InvalidArgument: the batches hold fewer than two rows, or the model returns no loss for kind "gap".
    """
    fitting, judging = TokenSamples(), TokenSamples()
    device = next(decoder.base.parameters()).device
    writers: Writers = {}
    rows = 0
    with evaluating(decoder.given), torch.set_grad_enabled(kind == "gap"):
        for batch in batches:
            inputs = to_device(batch, device)
            writers = writers or _writers(decoder, inputs)
            forward = _run(decoder, writers, inputs, with_gradients=kind == "gap")
            tokens = _real_tokens(inputs, forward.states[0])
            judges = (torch.arange(rows, rows + len(tokens)) % 2).bool()[:, None]
            rows += len(tokens)
            fitting.add(forward, tokens & ~judges)
            judging.add(forward, tokens & judges)
            del forward  # free its states and their graph before the next pass
            if min(fitting.tokens, judging.tokens) >= TOKENS:
                break
    if not fitting.tokens or not judging.tokens:
        raise InvalidArgument("batches hold fewer than two rows; expected some to fit patches on and some to judge")
    costs: dict[Gap, float] = {}
    for layer in range(len(decoder.layers) - 1):
        costs |= _costs_after(layer, len(decoder.layers), writers[layer] is not None, fitting, judging, kind, device)
    return costs


@dataclass
class Forward:
    """What one forward pass showed. Every tensor is (rows, tokens, width).

    Args:
        inputs: for each layer with a writer, what its writer reads.
        states: for each layer, the hidden state that leaves it.
        gradients: for each layer, the gradient of the loss with respect to that state. Empty unless it was asked for.
    """

    inputs: dict[int, Tensor] = field(default_factory=dict)
    states: list[Tensor] = field(default_factory=list)
    gradients: Sequence[Tensor] = ()


class TokenSamples:
    """The tokens of some rows, in host memory, batch by batch."""

    def __init__(self) -> None:
        self.tokens = 0
        self._forwards: list[Forward] = []

    def add(self, forward: Forward, which: Tensor) -> None:
        """Keep some tokens of a forward pass.

        Args:
            forward: what the pass showed.
            which: the tokens to keep, boolean (rows, tokens), in host memory.
        """
        self.tokens += int(which.sum())
        self._forwards.append(
            Forward(
                {layer: inputs.cpu()[which] for layer, inputs in forward.inputs.items()},
                [state.detach().cpu()[which] for state in forward.states],
                [gradient.cpu()[which] for gradient in forward.gradients],
            )
        )

    def inputs(self, layer: int, device: torch.device) -> Tensor:
        """What the writer of a layer reads.

        Args:
            layer: a layer with a writer.
            device: where the result is.

        Returns:
            float32 (tokens, in), at most `TOKENS` tokens.
        """
        return _first_tokens([forward.inputs[layer] for forward in self._forwards], device)

    def states(self, layer: int, device: torch.device) -> Tensor:
        """The hidden states that leave a layer.

        Args:
            layer: the layer's index.
            device: where the result is.

        Returns:
            float32 (tokens, hidden), at most `TOKENS` tokens.
        """
        return _first_tokens([forward.states[layer] for forward in self._forwards], device)

    def gradients(self, layer: int, device: torch.device) -> Tensor:
        """The gradients of the loss with respect to the hidden states that leave a layer.

        Args:
            layer: the layer's index.
            device: where the result is.

        Returns:
            float32 (tokens, hidden), at most `TOKENS` tokens.
        """
        return _first_tokens([forward.gradients[layer] for forward in self._forwards], device)


def _first_tokens(parts: list[Tensor], device: torch.device) -> Tensor:
    return torch.cat(parts)[:TOKENS].to(device, torch.float32)


def _writers(decoder: Decoder, batch: Mapping[str, Any]) -> Writers:
    """For each layer the linear that a patch would change, found on the first row of a batch."""
    row = {k: v[:1] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items() if k != "labels"}
    writers: dict[int, nn.Module | None] = {}
    with torch.no_grad():
        for layer in range(len(decoder.layers)):
            writer = find_writer(decoder, layer, lambda: decoder.given(**row, use_cache=False))
            writers[layer] = None if writer is None else writer[1]
    return writers


def _run(decoder: Decoder, writers: Writers, batch: Mapping[str, Any], *, with_gradients: bool) -> Forward:
    """Run the model on a batch, and note what its layers read and return."""
    forward = Forward()
    with _noting(decoder, writers, forward, with_gradients=with_gradients):
        if not with_gradients:
            decoder.given(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
            return forward
        loss = getattr(decoder.given(**batch, use_cache=False), "loss", None)
        if loss is None:
            raise InvalidArgument("batches: the model returned no loss; expected batches with labels")
        forward.gradients = torch.autograd.grad(loss, forward.states)
    return forward


@contextlib.contextmanager
def _noting(decoder: Decoder, writers: Writers, forward: Forward, *, with_gradients: bool) -> Iterator[None]:
    """Inside, a forward pass of the model fills `forward`."""

    def note_input_of(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note_input(module: nn.Module, args: tuple[Any, ...]) -> None:
            forward.inputs[layer] = args[0].detach()

        return note_input

    def note_state(module: nn.Module, args: Any, output: Any) -> None:
        state = leaving_state(output)
        if with_gradients and not state.requires_grad:  # nothing before it trains
            state.requires_grad_(True)
        forward.states.append(state)

    handles = [
        writer.register_forward_pre_hook(note_input_of(layer))
        for layer, writer in writers.items()
        if writer is not None
    ]
    handles += [layer.register_forward_hook(note_state) for layer in decoder.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _real_tokens(batch: Mapping[str, Any], states: Tensor) -> Tensor:
    """Which tokens are no padding: boolean (rows, tokens), in host memory."""
    mask = batch.get("attention_mask")
    return torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()


def _costs_after(
    layer: int,
    layers: int,
    patched: bool,
    fitting: TokenSamples,
    judging: TokenSamples,
    kind: str,
    device: torch.device,
) -> dict[Gap, float]:
    """The costs of all gaps that begin after a layer. Unless `patched`, they get no patch."""
    ends = range(layer + 1, min(layers, layer + 1 + LONGEST))
    # without a patch, the state behind the gap is the state before it
    errors = [judging.states(end, device) - judging.states(layer, device) for end in ends]
    if patched:
        state = fitting.states(layer, device)
        targets = torch.cat([fitting.states(end, device) - state for end in ends], 1)
        predicted = _patched(fitting.inputs(layer, device), targets, state, judging.inputs(layer, device))
        parts = predicted.split(state.shape[1], 1)
        errors = [error - part for error, part in zip(errors, parts, strict=True)]
    costs: dict[Gap, float] = {}
    for end, error in zip(ends, errors, strict=True):
        if kind == "gap":
            cost = (judging.gradients(end, device) * error).sum(1).abs()
        else:
            cost = error.norm(dim=1) / judging.states(end, device).norm(dim=1).clamp_min(1e-12)
        costs[layer, end] = float(cost.double().sum())
    return costs


def _patched(x: Tensor, targets: Tensor, state: Tensor, other: Tensor) -> Tensor:
    """Fit a ridge regression, and predict with it for other tokens.

    It maps x (tokens, in) to targets (tokens, out), and predicts the targets of `other` (tokens, in). Each token is
    weighted by 1 / ‖state‖, as in a patch. float32 is enough, because the ridge is large.
    """
    scale = state.norm(dim=1, keepdim=True).clamp_min(1e-12).reciprocal()
    x, targets = x * scale, targets * scale
    # the Gram matrix of the inputs or of the tokens, whichever is smaller, gives the same solution
    by_input = x.shape[1] <= len(x)
    gram = x.T @ x if by_input else x @ x.T
    gram.diagonal().add_(RIDGE * float(x.square().sum()) / x.shape[1])
    solution = torch.cholesky_solve(x.T @ targets if by_input else targets, torch.linalg.cholesky(gram))
    return other @ solution if by_input else (other @ x.T) @ solution
