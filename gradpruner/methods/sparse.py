"""sparse: layers go by another method, and single weights of those that stay by a criterion."""

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
from gradpruner.sparsity.sparsify import chosen, sparsify


@register
@dataclass(frozen=True)
class Sparse(Method):
    """Remove layers as `layers` does, then weights of the rest as `weights` does, on the batches of the probe.

    layers: a method's name. weights: a criterion's. pattern, ratio, allocation: see `sparsify`. What is zero stays
    zero: training all weights keeps to the masks, and adapters are merged and masked. Raises InvalidArgument.
    """

    layers: str = "gradpruner"
    weights: str = "wanda"
    pattern: str = "row"
    ratio: float | None = None
    allocation: str = "uniform"
    name: ClassVar[str] = "sparse"

    def __post_init__(self) -> None:
        """Check by asking, before a probe takes its time."""
        if self.layers not in METHODS or self.layers == self.name:
            accepted = ", ".join(sorted(set(METHODS) - {self.name}))
            raise InvalidArgument(f"layers = {self.layers!r}; accepted are {accepted}")
        criterion, _ = chosen(self.weights, self.pattern, self.ratio, self.allocation)
        if criterion.importance:
            raise InvalidArgument(f"weights = {self.weights!r}; what was seen of the dense model is not of the cut one")

    @property
    def _layers(self) -> Method:
        return METHODS[self.layers]()

    @property
    def options(self) -> dict[str, Any]:
        """All that decides what it does, the two methods' own options too."""
        weights = parse_criterion(self.weights)
        layers = {"name": self.layers, **self._layers.options}
        return {**asdict(self), "layers": layers, "weights": {"name": weights.name, **asdict(weights)}}  # type: ignore[call-overload]

    @property
    def probed(self) -> bool:  # type: ignore[override]
        """As the method for layers is."""
        return self._layers.probed

    @property
    def scored(self) -> bool:  # type: ignore[override]
        """As the method for layers is."""
        return self._layers.scored

    def settled(self, option: str) -> Any:
        """As the method for layers has it."""
        return self._layers.settled(option)

    def plan(self, clues: Clues, count: int) -> Plan:
        """The layers' plan."""
        return self._layers.plan(clues, count)

    def cut(self, clues: Clues, plan: Plan) -> nn.Module:
        """Layers, then weights."""
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
        """Of what is zero."""
        return Masks.of(model)


def unpadded(batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """Every row alone, without its padding: input_ids int64 (1, tokens)."""
    rows: list[dict[str, Tensor]] = []
    for batch in batches:
        ids = batch["input_ids"]
        masks = batch["attention_mask"].bool() if "attention_mask" in batch else [slice(None)] * len(ids)
        rows += [{"input_ids": row[mask][None]} for row, mask in zip(ids, masks, strict=True)]
    return rows
