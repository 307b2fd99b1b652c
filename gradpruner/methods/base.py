"""What all methods have in common: clues in, a plan and a smaller model out.

To add a method, write a frozen dataclass and register it. Its fields are its options. This one removes the layers
with the smallest attention output weights, and is used as "small-attention", or with an option as
"small-attention:order=1":

    from collections.abc import Sequence
    from dataclasses import dataclass
    from typing import ClassVar

    from gradpruner.methods import Clues, Dropping, register
    from gradpruner.model.decoder import Decoder

    @register
    @dataclass(frozen=True)
    class SmallAttention(Dropping):
        order: int = 2
        name: ClassVar[str] = "small-attention"

        def scores(self, clues: Clues) -> Sequence[float]:
            return [layer.self_attn.o_proj.weight.norm(self.order).item() for layer in Decoder(clues.model).layers]

What to override:

* `scores`, if the method gives each layer a number of its own. The lowest are removed.
* `plan`, if layers are judged together.
* `cut`, if the layers that stay are changed. Derive from `Method` then. `Dropping` changes none of them.

`compare` finds every registered method by its name. Code of your own must be imported before the comparison starts.
A method that belongs to this package also gets a line in `gradpruner/methods/names.py`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import nn

from gradpruner.errors import InvalidArgument
from gradpruner.methods.names import METHOD_MODULES
from gradpruner.model.decoder import Decoder
from gradpruner.model.hidden_states import Batch
from gradpruner.model.parameter_counts import count_parameters
from gradpruner.named_options import Registry, format_options, parse_options
from gradpruner.plan import Plan
from gradpruner.probe.igia import Igia
from gradpruner.probe.selection import select
from gradpruner.pruning.apply import apply
from gradpruner.pruning.patch import fit_patches

if TYPE_CHECKING:  # it would load peft
    from gradpruner.checkpoint.masks import Masks


@dataclass(frozen=True)
class Clues:
    """What a method may look at before it decides.

    Args:
        model: the dense transformers model. It has the probe's adapters if the method's option `adapters` is "keep",
            and none otherwise. `scores` and `plan` must leave it as it was.
        batches: the training examples of the probe's steps, collated, with labels. Keyword arguments of the model:
            input_ids int64 (rows, tokens), attention_mask, labels.
        held_out: other collated examples with labels. Nothing is trained on them.
        seed: the seed of a method that draws at random.
        probe: a function that returns the result of a probe of the model. It is called whenever `igia` is read, and not
            before, because a probe takes time. It should keep its result. Default None: there was no probe.
    """

    model: nn.Module
    batches: Sequence[Batch]
    held_out: Sequence[Batch]
    seed: int
    probe: Callable[[], Igia] | None = None

    @property
    def igia(self) -> Igia:
        """The scores and importances from the probe. Raises InvalidArgument if there was no probe."""
        if self.probe is None:
            raise InvalidArgument("igia is None; this method needs the result of a probe of the model")
        return self.probe()


class Method(abc.ABC):
    """A way to remove decoder layers.

    A subclass is a frozen dataclass whose fields are its options. It overrides `scores` or `plan`, which choose the
    layers, and `cut`, which removes them. The module's docstring shows a complete one.

    These attributes tell a comparison what the method needs. A subclass sets them, or has options of these names:

    * `name`: what users write.
    * `probed`: the method reads `Clues.igia`, so a probe has to run first. Default False.
    * `scored`: the probe's layer scores decide. A model whose layers a probe cannot compare is then refused.
      Default False.
    * `probe_steps`, `rank`, `share`: the probe's optimizer steps, the rank of its adapters, and the share of the
      training data that it sees (above 0 and up to 1). Default None: as the comparison has them.
    * `adapters`: "keep" cuts the model that the probe trained, "discard" the dense model. Default "discard".
    * `rank_factor`: rank of the adapters that the smaller model is trained with, as a multiple of the recipe's rank.
      Default 1.
    """

    name: ClassVar[str]
    probed: ClassVar[bool] = False
    scored: ClassVar[bool] = False
    probe_steps: int | None = None
    rank: int | None = None
    share: float | None = None
    adapters: str = "discard"
    rank_factor: int = 1

    def settled(self, option: str) -> Any:
        """The value of an option after presets have filled in what was not given.

        Args:
            option: the option's name, such as "adapters".

        Returns:
            The value that the method works with.
        """
        return getattr(self, option)

    def check_count(self, layers: int, count: int) -> None:  # noqa: B027 (most methods fit any number)
        """Refuse options that do not fit a number of removed layers, before anything is trained.

        Args:
            layers: decoder layers of the model.
            count: how many are removed.

        Raises:
            InvalidArgument: an option does not fit.
        """

    def masks(self, model: nn.Module) -> Masks | None:
        """Which weights of the smaller model stay zero while it is trained.

        Args:
            model: what `cut` returned.

        Returns:
            The masks, or None if all weights train. The default is None.
        """
        return None

    @property
    def options(self) -> dict[str, Any]:
        """All settings that decide what the method does, as JSON can hold them.

        A comparison records them. Defaults are written out, because another version may have other defaults.
        """
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def canonical(self) -> Method:
        """The same method, written with the fewest options.

        Returns:
            A method that does the same. `format_method` writes this one, so that one method has one name.
        """
        return self

    def scores(self, clues: Clues) -> Sequence[float]:
        """Give each decoder layer a number. The layers with the lowest are removed.

        Args:
            clues: the model, and data to run it on.

        Returns:
            One finite number per decoder layer. Of equal scores, the layer further back is removed first.

        Raises:
            NotImplementedError: the method chooses in `plan`.
        """
        raise NotImplementedError(f"method {self.name!r} gives no score to a single layer; use its plan")

    def plan(self, clues: Clues, count: int) -> Plan:
        """Choose the layers to remove.

        Args:
            clues: the model, and data to run it on.
            count: how many layers are removed, 1 or more.

        Returns:
            A plan that removes `count` layers.

        Raises:
            InvalidArgument: the model has too few layers for `count`, or a score is not finite.
        """
        decoder = Decoder(clues.model)
        check_count(decoder, count)
        return plan_lowest(decoder, self.scores(clues), count)

    @abc.abstractmethod
    def cut(self, clues: Clues, plan: Plan) -> nn.Module:
        """Remove the layers.

        Args:
            clues: what `plan` was given.
            plan: what `plan` returned.

        Returns:
            `clues.model` itself, now smaller.
        """


@dataclass(frozen=True)
class Dropping(Method):
    """A method that only chooses layers.

    The layers that stay keep their weights, unless options say otherwise.

    Args:
        patch: True closes each gap with a linear patch, see `fit_patches`. Default False, as these methods were
            published.
        adapters: "keep" cuts the model that the probe trained, "discard" the dense model. Default "discard".
        rank_factor: rank of the adapters of the smaller model, as a multiple of the recipe's rank. Default 1.
    """

    patch: bool = False
    adapters: str = "discard"
    rank_factor: int = 1

    def cut(self, clues: Clues, plan: Plan) -> nn.Module:
        """Fit patches if they were asked for, then remove the layers.

        Args:
            clues: what `plan` was given. Patches are fitted on its batches.
            plan: what `plan` returned.

        Returns:
            `clues.model` itself, now smaller.
        """
        patches = fit_patches(clues.model, plan, clues.batches) if self.patch else ()
        return apply(clues.model, plan, patches=patches, adapters=self.adapters)


def check_count(decoder: Decoder, count: int) -> None:
    """Check, before anything is computed, that so many layers can be removed.

    Args:
        decoder: the layers of the model.
        count: how many are to be removed.

    Raises:
        InvalidArgument: `count` is no whole number of 1 or more, or would leave no layer.
    """
    select([0.0] * len(decoder.layers), count=count, merge=0, protect=())


def plan_lowest(decoder: Decoder, scores: Sequence[float], count: int) -> Plan:
    """Make the plan that drops the layers with the lowest scores.

    Args:
        decoder: the layers of the model.
        scores: one finite number per layer. Of equal scores, the layer further back is dropped first.
        count: how many layers are dropped.

    Returns:
        The plan. No layer is protected and none is merged.

    Raises:
        InvalidArgument: a score is not finite, or so many layers cannot be removed.
    """
    return select(
        scores,
        count=count,
        merge=0,
        protect=(),
        **count_parameters(decoder),
        model=decoder.fingerprint(),
    )


METHODS: Registry[Method] = Registry(METHOD_MODULES)
AnyMethod = TypeVar("AnyMethod", bound=type[Method])


def register(method: AnyMethod) -> AnyMethod:
    """Make a method known by its name. Use it as a class decorator.

    Args:
        method: a frozen dataclass derived from `Method`, with a `name`. It replaces a method of the same name.

    Returns:
        The class itself.
    """
    METHODS.add(method.name, method)
    return method


def parse_method(text: str) -> Method:
    """Make a method from its name and options.

    Args:
        text: "name" or "name:option=value,option=value".

    Returns:
        The method.

    Raises:
        InvalidArgument: the name, an option or a value is not known.

    Example:
        parse_method("laco:combine=2,interval=1")
    """
    return parse_options(text, METHODS)


def format_method(method: Method) -> str:
    """Write a method as text. This is the opposite of `parse_method`.

    Args:
        method: any method.

    Returns:
        The name, and every option that does not have its default value.
    """
    method = method.canonical()
    return format_options(method.name, method)
