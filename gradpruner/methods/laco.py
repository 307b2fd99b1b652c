"""Method "laco": merge layers while the last hidden states stay similar."""

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
from gradpruner.methods.base import Clues, Method, check_count, plan_lowest, register
from gradpruner.model.decoder import Decoder, base_parameters, is_packed
from gradpruner.model.hidden_states import Batch, final_states, skipping
from gradpruner.plan import Plan
from gradpruner.pruning.apply import apply, check_fits

SEQUENCES = 10  # sequences that the similarity is measured on, as in the paper's few-shot calibration
THRESHOLDS = tuple(k / 20 for k in range(19, -21, -1))  # tried in this order: 0.95, 0.90 and so on down to -1
Undo = list[tuple[nn.Parameter, Tensor]]  # changed parameters, each with a copy of its values before
Similarity = Callable[[dict[int, int]], float]  # of the model merged by {layer: target}; 1 is equal to the dense one


@register
@dataclass(frozen=True)
class Laco(Method):
    """Merge layers as LaCo does: add the differences of some layers to a layer before them.

    The search walks from the last layer down. At each place it merges the layers above into one, and accepts the
    merge if the last hidden states stay similar enough to those of the dense model.

    Two things differ from the paper:

    * The last merge takes fewer layers, so that exactly as many are removed as were asked for.
    * Where a merge takes a layer that others were merged into before, the paper adds the difference of the merged
      layer. Here, each of them is added as its own difference from the new target, so that a plan describes the
      result completely. This adds far more weight. Therefore the default interval is 4, not the paper's 2: with an
      interval of `combine` or more, no merge takes another.

    Args:
        threshold: a merge is accepted above this similarity, -1 to 1. Default None: the highest of 0.95, 0.90 and so
            on that removes enough layers.
        combine: how many layers become one in a merge, 2 or more (C in the paper). Default 4.
        interval: how many layers further down the search goes on after an accepted merge, 1 or more (I in the
            paper). Default 4.
        low: the lowest layer that others may be merged into (L in the paper). Default 1.

    Raises:
        InvalidArgument: an option is not one of these values.

    Source: docs/method.md, section 7 (Yang et al. 2024, LaCo: Large Language Model Pruning via Layer Collapse).
    """

    threshold: float | None = None
    combine: int = 4
    interval: int = 4
    low: int = 1
    name: ClassVar[str] = "laco"

    def __post_init__(self) -> None:
        """Check the options before time is spent."""
        for option, least in (("combine", 2), ("interval", 1), ("low", 0)):
            check_int(option, getattr(self, option), least)
        if self.threshold is not None and not (is_number(self.threshold) and -1 <= self.threshold <= 1):
            raise InvalidArgument(f"threshold = {self.threshold!r}; accepted are none and -1 to 1")

    def plan(self, clues: Clues, count: int) -> Plan:
        """Search which layers are merged into which.

        The weights change during the search and are put back. The dense model's last hidden states stay in host
        memory.

        Args:
            clues: the model, and batches. The first batches that hold ten sequences are used, without labels.
            count: how many layers are removed.

        Returns:
            A plan that merges `count` layers and drops none.

        Raises:
            InvalidArgument: so many layers cannot be merged, layers differ in structure, or there are no batches.
            UnsupportedModel: weights are quantised, or the model is an encoder-decoder or does not return its last
                hidden states.
        """
        decoder = Decoder(clues.model)
        check_count(decoder, count)
        similarity = similarity_to_dense(decoder, first_sequences(clues.batches))
        layers, most = len(decoder.layers), 0
        for threshold in THRESHOLDS if self.threshold is None else (self.threshold,):
            merge = self._search(layers, count, similarity, threshold)
            most = max(most, len(merge))
            if len(merge) == count:
                plan = plan_lowest(decoder, [float(j not in merge) for j in range(layers)], count)
                return dataclasses.replace(plan, drop=(), merge=merge)
        options = f"threshold {threshold}, combine {self.combine}, interval {self.interval}, low {self.low}"
        raise InvalidArgument(f"{count} of {layers} layers to remove; laco merges {most} at most ({options})")

    def cut(self, clues: Clues, plan: Plan) -> nn.Module:
        """Merge the layers of the plan into their targets, then remove them.

        If either fails, nothing is changed.

        Args:
            clues: only the model is used.
            plan: what `plan` returned.

        Returns:
            `clues.model` itself, now smaller.

        Raises:
            InvalidArgument: layers that are merged differ in structure.
            ModelMismatch: the plan was made for another model.
            UnsupportedModel: weights are quantised, or the layers of the model cannot be removed.
        """
        decoder = Decoder(clues.model)
        # `apply` merges in another way (docs/method.md, section 3), so it only removes the layers here
        removal = Plan(plan.layers, drop=plan.removed)
        check_fits(decoder, dataclasses.replace(removal, model=plan.model), None)  # before the weights change
        undo: Undo = []
        try:
            fold_(decoder, plan.donors, undo)
            return apply(clues.model, removal, adapters=self.adapters)
        except BaseException:
            _restore(undo)
            raise

    def _search(self, layers: int, count: int, similarity: Similarity, threshold: float) -> dict[int, int]:
        """The paper's algorithm 1: merged layer to target, for `count` layers or fewer."""
        merge: dict[int, int] = {}
        at = layers - self.combine
        while at >= self.low and len(merge) < count:
            most = min(self.combine - 1, count - len(merge))
            donors = [j for j in range(at + 1, layers) if j not in merge][:most]
            # layers that were merged into one of the donors move on to the new target
            moved_on = {j: at if target in donors else target for j, target in merge.items()}
            candidate = moved_on | dict.fromkeys(donors, at)
            accepted = similarity(candidate) > threshold
            merge = candidate if accepted else merge
            at -= self.interval if accepted else 1
        return merge


def first_sequences(batches: Sequence[Batch]) -> Sequence[Batch]:
    """The first batches that together hold `SEQUENCES` sequences or more."""
    rows = 0
    for number, batch in enumerate(batches, 1):
        rows += len(batch["input_ids"])
        if rows >= SEQUENCES:
            return batches[:number]
    return batches


def fold_(decoder: Decoder, donors: Mapping[int, Sequence[int]], undo: Undo) -> None:
    """Add the differences of the donors to every parameter of their targets, in place.

    The parameter W of a target becomes W + sum over its donors of (W_donor - W). The sum is taken in float32 or wider
    and rounded once. A parameter that layers share stays as it is.

    Args:
        decoder: the layers of the model.
        donors: for each target layer, the layers that are merged into it.
        undo: the old values are appended here before a parameter changes.

    Raises:
        InvalidArgument: a donor differs in structure from its target.
        UnsupportedModel: a weight is quantised.
    """
    for target, layers in donors.items():
        for donor in layers:
            if decoder.structure(donor) != decoder.structure(target):
                raise InvalidArgument(f"layer {donor} differs in structure from layer {target}: they cannot be merged")
        theirs = [dict(base_parameters(decoder.layers[donor])) for donor in layers]
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


def similarity_to_dense(decoder: Decoder, batches: Sequence[Batch]) -> Similarity:
    """Make a function that measures how similar a merged model is to the model as it is now.

    The similarity of a sequence is the cosine of its last hidden states, with all its real tokens as one vector. It is
    averaged over sequences, as in the authors' code.

    Args:
        decoder: the layers of the dense model.
        batches: what the models are run on.

    Returns:
        A function from {merged layer: target} to the similarity, -1 to 1. Its results are cached.
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
