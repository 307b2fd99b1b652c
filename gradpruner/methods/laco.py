"""laco: layers are folded into one before them, where the model's last hidden states stay similar."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from gradpruner.checks import check_int, is_number
from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.methods.base import Clues, Method, check_count, lowest, register
from gradpruner.model.decoder import Decoder, base_parameters, is_packed
from gradpruner.model.hidden_states import Batch, final_states, skipping
from gradpruner.plan import Plan
from gradpruner.pruning.apply import apply, check_fits

SEQUENCES = 10
FALLING = tuple(k / 20 for k in range(19, -21, -1))  # thresholds that are tried, 0.95 down to -1
Undo = list[tuple[nn.Parameter, Tensor]]
Similarity = Callable[[dict[int, int]], float]


@register
@dataclass(frozen=True)
class Laco(Method):
    """Merge layers as LaCo does (source: Yang et al. 2024, LaCo: Large Language Model Pruning via Layer Collapse).

    threshold: a merge is accepted above this similarity; None: the highest of 0.95, 0.90, ... that removes enough.
    combine: layers that become one in a merge (C). interval: how far down the next merge begins after one that was
    accepted (I). low: the lowest layer that others are folded into (L). Raises InvalidArgument.

    Two things are not as published. The last merge takes in fewer layers, so that as many go as were asked for. And
    where a merge takes in a layer that others were folded into, the paper adds the difference of the sum; here each of
    them counts from the new target, so that a plan says all there is to know. That is far more weight, hence the
    interval: at `combine` or more no merge takes in another. The paper's is 2.
    """

    threshold: float | None = None
    combine: int = 4
    interval: int = 4
    low: int = 1
    name: ClassVar[str] = "laco"

    def __post_init__(self) -> None:
        """Check the options."""
        for option, least in (("combine", 2), ("interval", 1), ("low", 0)):
            check_int(option, getattr(self, option), least)
        number = is_number(self.threshold)
        if self.threshold is not None and not (number and -1 <= self.threshold <= 1):
            raise InvalidArgument(f"threshold = {self.threshold!r}; accepted are none and -1 to 1")

    def plan(self, clues: Clues, count: int) -> Plan:
        """Which layers are folded into which, `count` in all. The dense model's last hidden states are held.

        Raises InvalidArgument if so many cannot be merged or layers differ in structure, UnsupportedModel.
        """
        decoder = Decoder(clues.model)
        check_count(decoder, count)
        similarity, layers, most = _similarity_to_dense(decoder, few(clues.batches)), len(decoder.layers), 0
        for threshold in FALLING if self.threshold is None else (self.threshold,):
            merge = self._walk(layers, count, similarity, threshold)
            most = max(most, len(merge))
            if len(merge) == count:
                plan = lowest(decoder, [float(j not in merge) for j in range(layers)], count)
                return dataclasses.replace(plan, drop=(), merge=merge)
        at = f"threshold {threshold}, combine {self.combine}, interval {self.interval}, low {self.low}"
        raise InvalidArgument(f"{count} of {layers} layers to remove; laco merges {most} at most ({at})")

    def cut(self, clues: Clues, plan: Plan) -> nn.Module:
        """Fold what the plan merges, then remove it; nothing is changed unless both succeed.

        Raises InvalidArgument, ModelMismatch, UnsupportedModel.
        """
        decoder = Decoder(clues.model)
        outright = Plan(plan.layers, drop=plan.removed)  # for `apply`, whose own way to merge is another
        check_fits(decoder, dataclasses.replace(outright, model=plan.model), None)  # before the weights change
        undo: Undo = []
        try:
            fold_(decoder, plan.donors, undo)
            return apply(clues.model, outright, None)
        except BaseException:
            _restore(undo)
            raise

    def _walk(self, layers: int, count: int, similarity: Similarity, threshold: float) -> dict[int, int]:
        """The paper's algorithm 1: layer to target, `count` or fewer."""
        merge: dict[int, int] = {}
        at = layers - self.combine
        while at >= self.low and len(merge) < count:
            most = min(self.combine - 1, count - len(merge))
            taken = [j for j in range(at + 1, layers) if j not in merge][:most]
            onward = {j: at if target in taken else target for j, target in merge.items()}
            tried = onward | dict.fromkeys(taken, at)
            accepted = similarity(tried) > threshold
            merge = tried if accepted else merge
            at -= self.interval if accepted else 1
        return merge


def few(batches: Sequence[Batch]) -> Sequence[Batch]:
    """The first batches, until they hold ten sequences: what the paper's few-shot calibration takes."""
    rows = 0
    for number, batch in enumerate(batches, 1):
        rows += len(batch["input_ids"])
        if rows >= SEQUENCES:
            return batches[:number]
    return batches


def fold_(decoder: Decoder, donors: Mapping[int, Sequence[int]], undo: Undo) -> None:
    """W_l + sum over its donors of (W_donor - W_l) into every parameter of each target l; `undo` gets what was there.

    In float32 or wider, stored once. A parameter that layers share stays: there is no difference. Raises
    InvalidArgument for layers that differ in structure, UnsupportedModel for packed weights.
    """
    for target, others in donors.items():
        for donor in others:
            if decoder.structure(donor) != decoder.structure(target):
                raise InvalidArgument(f"layer {donor} differs in structure from layer {target}: they cannot be merged")
        theirs = [dict(base_parameters(decoder.layers[donor])) for donor in others]
        own = {id(parameter): (name, parameter) for name, parameter in base_parameters(decoder.layers[target])}
        for name, parameter in own.values():
            if id(parameter) in decoder.shared:
                continue
            if any(is_packed(p) for p in (parameter, *(their[name] for their in theirs))):
                raise UnsupportedModel(f"layer {target} {name} or its donor's is quantised: it cannot be merged")
            with torch.no_grad():
                wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
                merged = wide.clone()
                for their in theirs:
                    merged += their[name].to(wide) - wide
                undo.append((parameter, parameter.detach().clone()))
                parameter.copy_(merged)


def _restore(undo: Undo) -> None:
    with torch.no_grad():
        for parameter, before in undo:
            parameter.copy_(before)


def _similarity_to_dense(decoder: Decoder, batches: Sequence[Batch]) -> Similarity:
    """What gives the similarity of a model merged so to the model as it is: 1 is the same.

    The cosine of the last hidden states of a sequence, its real tokens as one vector, averaged over sequences, as
    the authors' code has it. What was asked for once is not computed again.
    """
    dense = list(final_states(decoder, batches))
    known: dict[tuple[tuple[int, int], ...], float] = {}

    def similarity(merge: dict[int, int]) -> float:
        key = tuple(sorted(merge.items()))
        if key not in known:
            known[key] = _merged_similarity(decoder, batches, dense, Plan(len(decoder.layers), (), merge))
        return known[key]

    return similarity


def _merged_similarity(decoder: Decoder, batches: Sequence[Batch], dense: list[Tensor], plan: Plan) -> float:
    undo: Undo = []
    try:
        fold_(decoder, plan.donors, undo)
        with skipping(decoder, plan.removed):
            cosines: list[float] = []
            for before, after in zip(dense, final_states(decoder, batches), strict=True):
                cosine = cosine_similarity(before.double().flatten(1), after.double().flatten(1), dim=-1)
                cosines += cosine.tolist()
        return math.fsum(cosines) / len(cosines)
    finally:
        _restore(undo)
