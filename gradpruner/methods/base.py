"""What every way to remove decoder layers has in common: clues in, a plan out, a smaller model."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from gradpruner import named_options as spelling
from gradpruner.checkpoint.masks import Masks
from gradpruner.errors import InvalidArgument
from gradpruner.model.decoder import Decoder
from gradpruner.model.hidden_states import Batch
from gradpruner.model.parameter_counts import count_parameters
from gradpruner.plan import Plan
from gradpruner.probe.igia import Igia
from gradpruner.probe.selection import select
from gradpruner.pruning.apply import apply
from gradpruner.pruning.patch import fit_patches


@dataclass(frozen=True)
class Clues:
    """What a method may look at before it decides.

    model: the dense transformers model, plain, or for a method that keeps what the probe trained, with that; a method
    leaves it as it was. batches: collated training examples with
    labels, those that the probe's steps used. held_out: others, not trained on. seed: for what is random.
    igia: what a probe saw of the model, made when first asked for.
    """

    model: nn.Module
    batches: Sequence[Batch]
    held_out: Sequence[Batch]
    seed: int
    probe: Callable[[], Igia] | None = None

    @property
    def igia(self) -> Igia:
        """What the probe saw. Raises InvalidArgument where there was none."""
        if self.probe is None:
            raise InvalidArgument("igia is None; this method needs what a probe saw of the model")
        return self.probe()


class Method(abc.ABC):
    """A way to remove decoder layers; a subclass is a frozen dataclass whose fields are its options.

    A method scores the layers (`scores`: the lowest go), or makes the whole plan (`plan`), and may change the layers
    that stay (`cut`).
    """

    name: ClassVar[str]
    # of a method with a probe, where it differs from the job's: its steps, its rank, the share of the data it sees
    probe_steps: int | None = None
    rank: int | None = None
    share: float | None = None
    adapters: str = "discard"  # "keep": what the probe's steps trained stays in the model
    rank_factor: int = 1  # of the adapters that the cut model is trained with
    probed: ClassVar[bool] = False  # whether it asks what a probe saw
    scored: ClassVar[bool] = False  # whether it goes by the scores that a probe gives the layers

    def settled(self, option: str) -> Any:
        """An option as it comes out, of this package's own method as its preset has it."""
        return getattr(self, option)

    def masks(self, model: nn.Module) -> Masks | None:
        """Of the weights of the cut model that are to stay zero while it is trained, if there are such."""
        return None

    @property
    def options(self) -> dict[str, Any]:
        """All that decides what it does, spelled out: what defaults mean today is not what they may mean tomorrow."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def canonical(self) -> Method:
        """The same method with as few options as say it."""
        return self

    def scores(self, clues: Clues) -> Sequence[float]:
        """One finite number a decoder layer; the lowest are removed, of equals the one further back."""
        raise NotImplementedError

    def plan(self, clues: Clues, count: int) -> Plan:
        """Which `count` layers go. Raises InvalidArgument if so many cannot."""
        decoder = Decoder(clues.model)
        check_count(decoder, count)
        return lowest(decoder, self.scores(clues), count)

    def cut(self, clues: Clues, plan: Plan) -> nn.Module:
        """The smaller model: `clues.model` itself, cut."""
        raise NotImplementedError


def check_count(decoder: Decoder, count: int) -> None:
    """Before anything is computed: raises InvalidArgument unless `count` layers can go."""
    select([0.0] * len(decoder.layers), count=count, merge=0, protect=())


def lowest(decoder: Decoder, scores: Sequence[float], count: int) -> Plan:
    """The plan that drops the `count` lowest scores, of equals the one further back. Raises InvalidArgument."""
    return select(
        scores,
        count=count,
        merge=0,
        protect=(),
        **count_parameters(decoder),
        model=decoder.fingerprint(),
    )


@dataclass(frozen=True)
class Dropping(Method):
    """A method that only chooses which layers go; nothing is added to those that stay, unless it is asked for.

    patch, adapters, rank_factor: see `Preset`. As published, none of them has any.
    """

    patch: bool = False
    adapters: str = "discard"
    rank_factor: int = 1

    def cut(self, clues: Clues, plan: Plan) -> nn.Module:
        """Patch where asked to, and remove."""
        patches = fit_patches(clues.model, plan, clues.batches) if self.patch else ()
        return apply(clues.model, plan, patches=patches, adapters=self.adapters)


METHODS: dict[str, type[Method]] = {}


def register(method: type[Method]) -> type[Method]:
    """Make a method known by its name."""
    METHODS[method.name] = method
    return method


def parse_method(text: str) -> Method:
    """A method from "name" or "name:option=value,option=value". Raises InvalidArgument for what it does not know."""
    return spelling.parse(text, METHODS)


def spelled(method: Method) -> str:
    """The opposite of `parse_method`: the name and every option that is not as by default."""
    method = method.canonical()
    return spelling.spelled(method.name, method)
