"""Method "sparse": remove layers by another method, then zero single weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from gradpruner.checkpoint.masks import Masks
from gradpruner.errors import InvalidArgument
from gradpruner.methods.base import METHODS, Clues, Method, register
from gradpruner.model.hidden_states import Batch
from gradpruner.plan import Plan
from gradpruner.sparsity.criteria import parse_criterion
from gradpruner.sparsity.zero_weights import criterion_and_pattern, sparsify


@register
@dataclass(frozen=True)
class Sparse(Method):
    """Remove layers by one of the other methods, then zero single weights of the rest.

    Weights are calibrated on the batches of the probe, without padding. Zeroed weights stay zero: training of all
    weights keeps to the masks, and adapters are merged and masked at the end.

    Args:
        layers: the name of the method that removes layers, without options. Default "gradpruner".
        weights: the criterion that zeroes weights, "name" or "name:option=value". Default "wanda". "igia" is refused,
            because a probe of the dense model says nothing about the smaller one.
        pattern: "row", "matrix" or "N:M", see `Pattern`. Default "row".
        ratio: share of the weights that is zeroed. Default None: 0.5 for row and matrix, 1 - N / M for N:M.
        allocation: "uniform" or "alphapruning", see `sparsify`. Default "uniform".

    Raises:
        InvalidArgument: an option is not accepted, or options do not fit together.
    """

    layers: str = "gradpruner"
    weights: str = "wanda"
    pattern: str = "row"
    ratio: float | None = None
    allocation: str = "uniform"
    name: ClassVar[str] = "sparse"

    def __post_init__(self) -> None:
        """Check the options before time is spent on a probe."""
        if self.layers not in METHODS or self.layers == self.name:
            accepted = ", ".join(sorted(set(METHODS) - {self.name}))
            raise InvalidArgument(f"layers = {self.layers!r}; accepted are {accepted}")
        criterion, _ = criterion_and_pattern(self.weights, self.pattern, self.ratio, self.allocation)
        if criterion.importance:
            raise InvalidArgument(
                f"weights = {self.weights!r}; a probe of the dense model says nothing about the smaller one: expected "
                "another criterion"
            )

    @property
    def _layers(self) -> Method:
        return METHODS[self.layers]()

    @property
    def options(self) -> dict[str, Any]:
        """The settings, with those of the method for layers and of the criterion for weights."""
        weights = parse_criterion(self.weights)
        layers = {"name": self.layers, **self._layers.options}
        return {**asdict(self), "layers": layers, "weights": {"name": weights.name, **asdict(weights)}}  # type: ignore[call-overload]

    @property
    def probed(self) -> bool:  # type: ignore[override]
        """Whether the method for layers needs a probe."""
        return self._layers.probed

    @property
    def scored(self) -> bool:  # type: ignore[override]
        """Whether the method for layers uses the probe's scores."""
        return self._layers.scored

    def settled(self, option: str) -> Any:
        """The value of an option of the method for layers.

        Args:
            option: the option's name, such as "adapters".

        Returns:
            The value that the method for layers works with.
        """
        return self._layers.settled(option)

    def plan(self, clues: Clues, count: int) -> Plan:
        """Choose the layers to remove, by the method for layers.

        Args:
            clues: the model, and data to run it on.
            count: how many layers are removed.

        Returns:
            The plan of the method for layers.
        """
        return self._layers.plan(clues, count)

    def cut(self, clues: Clues, plan: Plan) -> nn.Module:
        """Remove the layers, then zero weights of those that stay.

        Args:
            clues: what `plan` was given. The weights are calibrated on its batches.
            plan: what `plan` returned.

        Returns:
            `clues.model` itself, now smaller and sparse.
        """
        model = self._layers.cut(clues, plan)
        sparsify(
            model,
            unpadded(clues.batches),
            method=self.weights,
            pattern=self.pattern,
            ratio=self.ratio,
            allocation=self.allocation,
        )
        return model

    def masks(self, model: nn.Module) -> Masks:
        """The masks of all weights that are zero.

        Args:
            model: what `cut` returned.

        Returns:
            Masks of the linears of all decoder layers.
        """
        return Masks.of(model)


def unpadded(batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """The rows of all batches, each alone and without its padding: input_ids int64 (1, tokens)."""
    rows: list[dict[str, Tensor]] = []
    for batch in batches:
        ids = batch["input_ids"]
        masks = batch["attention_mask"].bool() if "attention_mask" in batch else [slice(None)] * len(ids)
        rows += [{"input_ids": row[mask][None]} for row, mask in zip(ids, masks, strict=True)]
    return rows
