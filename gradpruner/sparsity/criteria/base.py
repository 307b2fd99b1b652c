"""What all criteria have in common: a weight and its statistics in, zeros and a mask out.

To add a criterion, write a frozen dataclass and register it. Its fields are its options. This one ranks by
|W| · ‖x‖₂ to the power of an option, and is used as "tempered-wanda:power=0.5":

    from dataclasses import dataclass
    from typing import ClassVar

    from gradpruner.sparsity.criteria import ImportanceTerms, Metric, register
    from gradpruner.sparsity.statistics import NORMS, LinearStatistics

    @register
    @dataclass(frozen=True)
    class TemperedWanda(Metric):
        power: float = 1.0
        name: ClassVar[str] = "tempered-wanda"
        needs: ClassVar[frozenset[str]] = frozenset({NORMS})

        def terms(self, statistics: LinearStatistics) -> ImportanceTerms:
            return ImportanceTerms(norms=statistics.norms.pow(self.power))

Derive from `Metric` if every entry gets an importance of its own and the other entries stay as they are. Derive from
`Criterion` and override `prune_` otherwise, as SparseGPT and DSnoT do.

Code of your own must be imported before `sparsify` is called. A criterion that belongs to this package also gets a
line in `gradpruner/sparsity/names.py` and in `gradpruner/sparsity/criteria/__init__.py`.
"""

from __future__ import annotations

import abc
from typing import ClassVar, NamedTuple, TypeVar

from torch import Tensor

from gradpruner.named_options import Registry, format_options, parse_options
from gradpruner.sparsity.names import CRITERION_MODULES
from gradpruner.sparsity.pattern import Pattern
from gradpruner.sparsity.statistics import LinearStatistics


class ImportanceTerms(NamedTuple):
    """What the importance of an entry is made of.

    It is |W[i, j]| · (norms[j] + alpha · gradients[i, j]). Without norms it is |W[i, j]| · alpha · gradients[i, j],
    without gradients |W[i, j]| · norms[j], and |W[i, j]| without both.

    Args:
        norms: float32 (in,), or None.
        gradients: float32 (out, in), or None.
        alpha: factor of the gradients.
    """

    norms: Tensor | None = None
    gradients: Tensor | None = None
    alpha: float = 1.0


class Criterion(abc.ABC):
    """Decides which weights are zeroed.

    A subclass is a frozen dataclass whose fields are its options. These attributes tell `sparsify` what the criterion
    needs:

    * `name`: what users write.
    * `needs`: which statistics of a linear's inputs, any of `NORMS`, `MOMENTS` and `HESSIAN`. Without any, no batches
      are needed. Default: none.
    * `gradients`: the norm over samples of the weight's gradient, 1 or 2, see `gradient_norms`. Default 0: none.
    * `importance`: the importance from a probe takes the place of the gradient. Default False.
    * `within_matrix`: it can choose among all entries of a matrix, pattern "matrix". Default True.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    gradients: int = 0
    importance: ClassVar[bool] = False
    within_matrix: ClassVar[bool] = True

    @abc.abstractmethod
    def prune_(self, weight: Tensor, statistics: LinearStatistics, pattern: Pattern) -> Tensor:
        """Zero entries of a weight in place.

        Args:
            weight: (out, in), any float dtype. A criterion may change the entries that stay, too.
            statistics: what `needs`, `gradients` and `importance` asked for.
            pattern: how many entries are zeroed, and among which the choice is made.

        Returns:
            The mask of the entries that stay: uint8 (out, ceil(in / 8)), as `gradpruner.ops.prune_groups_` writes it.
        """

    def __str__(self) -> str:
        """The name and all options without their default value, as `parse_criterion` reads it."""
        return format_options(self.name, self)


class Metric(Criterion):
    """A criterion that gives every entry an importance.

    The most important entries stay as they are.
    """

    @abc.abstractmethod
    def terms(self, statistics: LinearStatistics) -> ImportanceTerms:
        """What the importance of the entries is made of.

        Args:
            statistics: what `needs`, `gradients` and `importance` asked for.

        Returns:
            The terms, on the device of the weight.
        """

    def prune_(self, weight: Tensor, statistics: LinearStatistics, pattern: Pattern) -> Tensor:
        """Zero the least important entries.

        Args:
            weight: (out, in), changed in place.
            statistics: what `terms` needs.
            pattern: how many entries are zeroed, and among which the choice is made.

        Returns:
            The mask of the entries that stay.
        """
        return pattern.prune_(weight, *self.terms(statistics))


CRITERIA: Registry[Criterion] = Registry(CRITERION_MODULES)
AnyCriterion = TypeVar("AnyCriterion", bound=type[Criterion])


def register(criterion: AnyCriterion) -> AnyCriterion:
    """Make a criterion known by its name. Use it as a class decorator.

    Args:
        criterion: a frozen dataclass derived from `Criterion`, with a `name`. It replaces one of the same name.

    Returns:
        The class itself.
    """
    CRITERIA.add(criterion.name, criterion)
    return criterion


def parse_criterion(text: str) -> Criterion:
    """Make a criterion from its name and options.

    Args:
        text: "name" or "name:option=value,option=value".

    Returns:
        The criterion.

    Raises:
        InvalidArgument: the name, an option or a value is not known.
    """
    return parse_options(text, CRITERIA)
