"""The recipe of a training: steps, batch size, learning rate, order of the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gradpruner.checks import check_bool, check_int, is_number
from gradpruner.errors import InvalidArgument


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune. The defaults are the paper's LoRA setting.

    Args:
        batch_size: examples of one forward pass. Default 16.
        accumulation: forward passes of one optimizer step. Default 1.
        learning_rate: the highest learning rate. Default 1e-4.
        weight_decay: of AdamW. Default 0.1.
        warmup: share of the steps in which the learning rate rises, or a whole number of steps, 1 or more. Afterwards
            it falls linearly, or as `lr_scheduler_type` of `trainer_arguments` says. Default 0.03.
        max_grad_norm: gradients are clipped to this norm. 0 does not clip. Default 1.
        rank: rank of the LoRA adapters. 0 trains all weights. Default 8.
        alpha: numerator of LoRA's scale, alpha / rank. Default 32.
        dropout: share of the inputs of an adapter that is set to zero in training. Default 0.
        target_modules: the linears of the decoder layers that get adapters: names such as ("q_proj", "v_proj"), or one
            regular expression for whole paths. Default: every linear, except routers.
        dora: whether the adapters are DoRA. Default False.
        rslora: whether LoRA's scale is alpha / sqrt(rank). Default False.
        seed: of the order of the rows and of the adapters. Default 0.
        group_by_length: whether the rows of a batch have about one length, which saves padding. Default False.
        trainer_arguments: fields of `transformers.TrainingArguments` by name, for example
            {"lr_scheduler_type": "cosine", "gradient_checkpointing": True}. Fields that the run decides itself are
            refused. Default: none.

    Raises:
        InvalidArgument: a value is not accepted.

    Source: docs/method.md, sections 1 and 6.
    """

    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    warmup: float = 0.03
    max_grad_norm: float = 1.0
    rank: int = 8
    alpha: int = 32
    seed: int = 0
    group_by_length: bool = False
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None
    dora: bool = False
    rslora: bool = False
    trainer_arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check every value by name."""
        for name, least in (("batch_size", 1), ("accumulation", 1), ("rank", 0), ("alpha", 1), ("seed", 0)):
            check_int(name, getattr(self, name), least)
        if not self.learning_rate > 0:
            raise InvalidArgument(f"learning_rate = {self.learning_rate!r}; expected a number above 0")
        if not is_number(self.warmup) or not (0 <= self.warmup < 1 or self.warmup == int(self.warmup) >= 1):
            raise InvalidArgument(
                f"warmup = {self.warmup!r}; accepted is a share from 0 to below 1, or a whole number of steps"
            )
        for name in ("weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise InvalidArgument(f"{name} = {getattr(self, name)!r}; expected 0 or more")
        self._check_adapters()
        if self.trainer_arguments:
            from gradpruner.training.trainer_fields import checked_arguments  # slow: transformers.Trainer

            object.__setattr__(self, "trainer_arguments", checked_arguments(self.trainer_arguments))

    def _check_adapters(self) -> None:
        check_bool("dora", self.dora)
        check_bool("rslora", self.rslora)
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise InvalidArgument(f"dropout = {self.dropout!r}; accepted is a share from 0 to below 1")
        if isinstance(self.target_modules, list):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if self.target_modules in ("all-linear", ("all-linear",)):  # PEFT's word for what is the default here
            object.__setattr__(self, "target_modules", None)
        if self.target_modules is not None and not self.target_modules:
            raise InvalidArgument(f"target_modules = {self.target_modules!r}; expected a name, or a regular expression")
        if not self.rank:
            for name in ("dropout", "target_modules", "dora", "rslora"):
                if getattr(self, name):
                    raise InvalidArgument(
                        f"{name} = {getattr(self, name)!r} belongs to adapters, and rank = 0 trains all weights"
                    )

    @property
    def rows_per_step(self) -> int:
        """Examples that one optimizer step sees."""
        return self.batch_size * self.accumulation

    def warmup_steps(self, steps: int) -> int:
        """Return in how many of the steps of a training the learning rate rises."""
        return round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)

    def widened(self, factor: int) -> Recipe:
        """Return the recipe with `factor` times the rank and sqrt(`factor`) times alpha.

        At equal alpha / rank, a wide adapter would need a lower learning rate. With `rslora`, alpha stays: the scale
        alpha / sqrt(rank) does the same.

        Source: rank-stabilised LoRA, Kalajdzievski 2023.
        """
        alpha = self.alpha if self.rslora else round(self.alpha * factor**0.5)
        return dataclasses.replace(self, rank=self.rank * factor, alpha=alpha)

    def to_dict(self) -> dict[str, Any]:
        """Return what changes the result of a training, as JSON holds it.

        Fields of `trainer_arguments` that only report, log or load are left out.
        """
        content = {name: value for name, value in vars(self).items() if name != "trainer_arguments"}
        if isinstance(self.target_modules, tuple):
            content["target_modules"] = list(self.target_modules)
        if self.trainer_arguments:
            from gradpruner.training.trainer_fields import changing  # slow: transformers.Trainer

            content["trainer_arguments"] = changing(self.trainer_arguments)
        return content | {"trainer_arguments": content.get("trainer_arguments", {})}
