"""Gaps: which stretches of layers can go, by what is missing of them once they are patched (source: D).

h leaves the last layer of a gap, r is what the best linear patch of the gap (see `gradpruner.pruning.patch`) leaves of it. The
score of the gap, summed over tokens, is by kind

    residual   |r| / |h|
    gap        |dL/dh . r|, the first-order change of the loss

Layers next to each other are judged together, and the plan with the least sum is found exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
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

LONGEST = 10  # layers of one gap
TOKENS = 4096  # to fit the patches on, and as many others to judge them by
RIDGE = 0.1  # times the mean square of an input
KINDS = ("residual", "gap")

Costs = Mapping[tuple[int, int], float]  # by the layer before a gap and the gap's last layer


def plan_gaps(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    count: int,
    kind: str = "residual",
    protect: Iterable[int] = (0,),
    layers: str | nn.ModuleList | None = None,
) -> Plan:
    """The `count` layers of which least is missing when they are gone and every gap is patched; all are dropped.

    model: dense, as the probe left it. batches: keyword arguments of the model, those of the probe; each costs a
    forward. kind "gap" needs labels and a backward, too; .grad is left alone. Raises InvalidArgument, UnsupportedModel.
    """
    check_choice("kind", kind, KINDS)
    decoder, protected = Decoder(model, layers), sorted(set(protect))
    total = len(decoder.layers)
    select([0.0] * total, count=count, merge=0, protect=protected)  # for what it refuses
    if getattr(decoder.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"kind = {kind!r} looks at decoder-only models; accepted are squared, norm, normalized")
    removed = cheapest(gap_costs(decoder, batches, kind), total, count, protected)
    counts = count_parameters(decoder)
    gone = parameters_in(removed, counts["layer_parameters"], counts["shared_parameters"])
    return Plan(total, removed, (), decoder.fingerprint(), gone / counts["total_parameters"], kind=kind)


def cheapest(costs: Costs, layers: int, count: int, protect: Iterable[int] = (0,)) -> list[int]:
    """The layers to remove, `count` of them, with the least sum of the costs of their gaps; exact (dynamic program).

    Of equal sums, the one whose last gaps are shorter. Layer 0 stays, and no gap is longer than `costs` knows.
    Raises InvalidArgument where no such gaps remove so many.
    """
    kept = {0, *protect}
    # least[i][c]: of layers before i, c removed and i kept; i = layers is the end
    least = [[math.inf] * (count + 1) for _ in range(layers + 1)]
    before: dict[tuple[int, int], int] = {}
    least[0][0] = 0.0
    for i in range(1, layers + 1):
        for gone in range(count + 1):
            for length in range(min(gone, i - 1) + 1):
                start = i - 1 - length
                if length and ((start, i - 1) not in costs or kept & set(range(start + 1, i))):
                    continue
                cost = least[start][gone - length] + (costs[start, i - 1] if length else 0.0)
                if cost < least[i][gone]:
                    least[i][gone], before[i, gone] = cost, start
    if not math.isfinite(least[layers][count]):
        raise InvalidArgument(f"{count} of {layers} layers to remove; no gaps of known, finite cost come to that")
    removed, i, gone = list[int](), layers, count
    while i > 0:
        start = before[i, gone]
        removed += range(start + 1, i)
        i, gone = start, gone - (i - 1 - start)
    return sorted(removed)


def gap_costs(decoder: Decoder, batches: Iterable[Mapping[str, Any]], kind: str) -> dict[tuple[int, int], float]:
    """The cost of every gap of up to LONGEST layers, a sum over the tokens that judge."""
    seen = _Seen(decoder, graded=kind == "gap")
    device = next(decoder.base.parameters()).device
    with evaluating(decoder.given), torch.set_grad_enabled(seen.graded):
        for batch in batches:
            moved = to_device(batch, device)
            if not seen.writers:
                with torch.no_grad():
                    seen.find(moved)
            seen.add(moved)
            if seen.full:
                break
    return seen.costs()


@dataclass
class _Part:
    """Tokens of some rows: of every layer what its last linear reads, what leaves it, perhaps the gradient of that."""

    inputs: list[list[Tensor]] = field(default_factory=list)
    states: list[list[Tensor]] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)
    tokens: int = 0


class _Seen:
    def __init__(self, decoder: Decoder, *, graded: bool) -> None:
        self.decoder, self.graded = decoder, graded
        self.writers: dict[int, nn.Module | None] = {}
        self.parts = _Part(), _Part()  # rows in turn: the first fit, the second judge
        self._rows = 0

    @property
    def full(self) -> bool:
        return all(part.tokens >= TOKENS for part in self.parts)

    def find(self, batch: Mapping[str, Any]) -> None:
        """The linear of every layer that a patch would change."""
        one = {k: v[:1] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items() if k != "labels"}
        for layer in range(len(self.decoder.layers)):
            found = find_writer(self.decoder, layer, lambda: self.decoder.given(**one, use_cache=False))
            self.writers[layer] = None if found is None else found[1]

    def add(self, batch: Mapping[str, Any]) -> None:
        inputs: dict[int, Tensor] = {}
        states: list[Tensor] = []
        handles = [
            linear.register_forward_pre_hook(lambda _, args, j=j: inputs.__setitem__(j, args[0].detach()))
            for j, linear in self.writers.items()
            if linear is not None
        ]

        def on_layer(module: nn.Module, args: Any, output: Any) -> None:
            state = leaving_state(output)
            if self.graded and not state.requires_grad:  # nothing before it trains
                state.requires_grad_(True)
            states.append(state)

        handles += [layer.register_forward_hook(on_layer) for layer in self.decoder.layers]
        try:
            if self.graded:
                loss = getattr(self.decoder.given(**batch, use_cache=False), "loss", None)
                if loss is None:
                    raise InvalidArgument("batches: the model returned no loss; expected batches with labels")
                gradients = torch.autograd.grad(loss, states)
            else:
                self.decoder.given(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
                gradients = ()
        finally:
            for handle in handles:
                handle.remove()
        counts = batch.get("attention_mask")
        mask = torch.ones(states[0].shape[:2], dtype=torch.bool) if counts is None else counts.bool().cpu()
        rows = (torch.arange(self._rows, self._rows + len(mask)) % 2).bool()[:, None]
        self._rows += len(mask)
        for part, which in zip(self.parts, (mask & ~rows, mask & rows), strict=True):
            part.tokens += int(which.sum())
            part.inputs.append([inputs[j].cpu()[which] if j in inputs else torch.empty(0) for j in self.writers])
            part.states.append([state.detach().cpu()[which] for state in states])
            part.gradients.append([gradient.cpu()[which] for gradient in gradients])

    def costs(self) -> dict[tuple[int, int], float]:
        fitted, judging = self.parts
        if not fitted.tokens or not judging.tokens:
            raise InvalidArgument("batches hold fewer than two rows; expected some to fit patches on and some to judge")
        device = next(self.decoder.base.parameters()).device

        def tensor(part: list[list[Tensor]], layer: int) -> Tensor:
            return torch.cat([batch[layer] for batch in part])[:TOKENS].to(device, torch.float32)

        total, costs = len(self.decoder.layers), {}
        for layer in range(total - 1):
            ends = range(layer + 1, min(total, layer + 1 + LONGEST))
            left = [tensor(judging.states, end) - tensor(judging.states, layer) for end in ends]
            if self.writers[layer] is not None:
                state = tensor(fitted.states, layer)
                wanted = torch.cat([tensor(fitted.states, end) - state for end in ends], 1)
                said = _patched(tensor(fitted.inputs, layer), wanted, state, tensor(judging.inputs, layer))
                left = [rest - part for rest, part in zip(left, said.split(state.shape[1], 1), strict=True)]
            for end, rest in zip(ends, left, strict=True):
                if self.graded:
                    felt = (tensor(judging.gradients, end) * rest).sum(1).abs()
                else:
                    felt = rest.norm(dim=1) / tensor(judging.states, end).norm(dim=1).clamp_min(1e-12)
                costs[layer, end] = float(felt.double().sum())
        return costs


def _patched(x: Tensor, wanted: Tensor, state: Tensor, other: Tensor) -> Tensor:
    """What ridge regression from x (tokens, in) to wanted (tokens, out) says of other (tokens, in).

    Each token counts by the size of its state, as in a patch. The ridge is large, float32 will do. By the Gram matrix
    of the inputs or of the tokens, whichever are fewer.
    """
    scale = state.norm(dim=1, keepdim=True).clamp_min(1e-12).reciprocal()
    x, wanted = x * scale, wanted * scale
    few = x.shape[1] <= len(x)
    gram = x.T @ x if few else x @ x.T
    gram.diagonal().add_(RIDGE * float(x.square().sum()) / x.shape[1])
    solved = torch.cholesky_solve(x.T @ wanted if few else wanted, torch.linalg.cholesky(gram))
    return other @ solved if few else (other @ x.T) @ solved
