"""What a probe watches of each layer, and whether the scores of the layers can be compared.

A score is a sum over the watched weights. A layer with fewer watched weights than others of its structure would have
the lowest score for that reason alone, and would be removed first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradpruner.errors import ProbeError
from gradpruner.model.decoder import Decoder, Weight
from gradpruner.model.parameter_counts import ParameterCounts

# A layer is comparable if its watched share is at least this part of the largest watched share. Layers of different
# structure differ by a few per cent (a convolution, decay rates). If experts are not watched, most of a layer is
# missing.
ALIKE = 0.9
EXACT = "estimator='exact' measures every linear weight of every layer, frozen or not"

Finding = tuple[list[int], str, str]  # the layers, the reason, and what to do about it


@dataclass(frozen=True)
class Coverage:
    """What a probe watches of each layer.

    Args:
        estimator: name of the estimator.
        weights: the watched weights.
        structures: one entry per layer; equal entries mean equal structure.
        layer_parameters: number of parameters per layer.
        adapters: rank and scale of the adapter of each watched weight; empty without adapters.
    """

    estimator: str
    weights: Sequence[Weight]
    structures: Sequence[str]
    layer_parameters: Sequence[int]
    adapters: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        weights: Sequence[Weight],
        estimator: str,
        adapters: Sequence[str] = (),
        *,
        counts: ParameterCounts,
    ) -> Coverage:
        """Make the coverage of a model before its first step.

        Args:
            decoder: the model.
            weights: the watched weights.
            estimator: name of the estimator.
            adapters: rank and scale of the adapter of each watched weight.
            counts: parameter counts of the model.

        Returns:
            The coverage.
        """
        structures = [decoder.structure(layer) for layer in range(len(decoder.layers))]
        return cls(estimator, weights, structures, counts["layer_parameters"], adapters)

    @property
    def shares(self) -> tuple[float, ...]:
        """For each layer, the number of watched entries divided by its parameters, 0 to 1."""
        entries = [0] * len(self.structures)
        for weight in self.weights:
            entries[weight.layer] += math.prod(weight.shape)
        # A watched weight that is also used outside the layer is not counted in `layer_parameters`. So the share could
        # exceed 1.
        return tuple(min(1.0, n / max(1, total)) for n, total in zip(entries, self.layer_parameters, strict=True))

    def check_comparable(self, protect: Iterable[int], square_norms: Tensor | None = None) -> None:
        """Check that the scores of the layers can be compared with each other.

        Every layer that may be removed must have a watched weight, and a gradient in as many steps as the others.
        Layers of one structure must be measured by the same weights, under adapters of the same rank and scale.
        Layers of different structure must be watched to about the same share.

        Args:
            protect: layers that no plan removes; they need no measurement.
            square_norms: of each watched weight in each step, see `Igia`. None before the first step.

        Raises:
            ProbeError: some layers cannot be compared. The message names them and says what to do.
        """
        protected = set(protect)
        candidates = [layer for layer in range(len(self.structures)) if layer not in protected]
        finding = (
            self._unwatched(candidates)
            or self._without_gradient(candidates, square_norms)
            or self._by_other_weights(candidates)
            or self._by_other_shares(candidates)
        )
        if finding is not None:
            odd, reason, ways = finding
            raise ProbeError(
                f"layers {odd} cannot be compared with the other layers by their scores: {reason}. {ways}; or, "
                f"in Python, protect them: with protect={sorted(protected | set(odd))} they stay, whatever they score"
            )

    def _unwatched(self, candidates: Sequence[int]) -> Finding | None:
        watched = {weight.layer for weight in self.weights}
        odd = [layer for layer in candidates if layer not in watched]
        return (odd, "the probe watches none of their weights", self._ways()) if odd else None

    def _without_gradient(self, candidates: Sequence[int], square_norms: Tensor | None) -> Finding | None:
        if not candidates or square_norms is None or not bool((square_norms > 0).any()):
            return None
        totals = torch.zeros(len(square_norms), len(self.structures), dtype=torch.float64)
        totals.index_add_(1, torch.tensor([weight.layer for weight in self.weights]), square_norms)
        steps = (totals > 0).sum(0).tolist()
        most = max(1, *(steps[layer] for layer in candidates))
        odd = [layer for layer in candidates if steps[layer] < most]
        if not odd:
            return None
        fewest, more = min(steps[layer] for layer in odd), max(steps[layer] for layer in odd)
        counts = f"{fewest}" if fewest == more else f"{fewest} to {more}"
        reason = f"they had a gradient in {counts} of {len(totals)} steps, other layers in {max(steps)}"
        return odd, reason, "Train every layer in every step of the probe"

    def _by_other_weights(self, candidates: Sequence[int]) -> Finding | None:
        measured: dict[int, set[tuple[str, str]]] = {layer: set() for layer in range(len(self.structures))}
        adapters = self.adapters or [""] * len(self.weights)
        for weight, adapter in zip(self.weights, adapters, strict=True):
            measured[weight.layer].add((weight.name, adapter))
        for structure in dict.fromkeys(self.structures[layer] for layer in candidates):
            alike = [layer for layer in candidates if self.structures[layer] == structure]
            sets = Counter(frozenset(measured[layer]) for layer in alike)
            usual = max(sets, key=lambda weights: (sets[weights], len(weights)))
            odd = [layer for layer in alike if measured[layer] != usual]
            if odd:
                return odd, _difference(odd[0], measured[odd[0]], usual), self._ways()
        return None

    def _by_other_shares(self, candidates: Sequence[int]) -> Finding | None:
        shares = self.shares
        most = max((shares[layer] for layer in candidates), default=0.0)
        low = [layer for layer in candidates if shares[layer] < ALIKE * most]
        if not low:
            return None
        high = [layer for layer in candidates if layer not in low]
        odd, usual = (low, high) if len(low) <= len(high) else (high, low)  # the fewer are easier to protect
        reason = (
            f"the probe watches {share_range([shares[layer] for layer in odd])} of their parameters, and "
            f"{share_range([shares[layer] for layer in usual])} of those of others (adapters and estimator='exact' do "
            "not reach fused experts)"
        )
        return odd, reason, "Train all weights in the probe's steps, without adapters"

    def _ways(self) -> str:
        exact = "" if self.estimator == "exact" else f"; {EXACT}"
        return f"Train the same weights of every layer, or put the same adapters on them{exact}"


def share_range(shares: Sequence[float]) -> str:
    """Write the range of some shares as text: "11.0%" or "97.0% to 99.1%"."""
    low, high = f"{min(shares):.1%}", f"{max(shares):.1%}"
    return low if low == high else f"{low} to {high}"


def _difference(layer: int, own: set[tuple[str, str]], usual: frozenset[tuple[str, str]]) -> str:
    """Say how the measured weights of a layer differ from the usual ones of its structure."""
    names, usual_names = {name for name, _ in own}, {name for name, _ in usual}
    parts = []
    for what, some in (("lacks", usual_names - names), ("has besides", names - usual_names)):
        if some:
            more = f" and {len(some) - 1} more" if len(some) > 1 else ""
            parts.append(f"{what} {min(some)}{more}")
    if parts:
        return f"other layers of their structure are measured by other weights (layer {layer} {', and '.join(parts)})"
    name = min(name for name, adapter in own if (name, adapter) not in usual)
    return (
        "their adapters differ in rank or scale from those of other layers of their structure "
        f"({name}: {dict(own)[name]} in layer {layer}, else {dict(usual)[name]})"
    )
