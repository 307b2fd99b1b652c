"""The settings of one run, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gradpruner.checks import check_choice, check_int, is_int, is_number
from gradpruner.data.examples import Example
from gradpruner.data.rows import Rows
from gradpruner.data.tokens import RowList, tokenize
from gradpruner.errors import InvalidArgument
from gradpruner.presets import Preset
from gradpruner.run.auto_ratio import AUTO, MAX_LOST
from gradpruner.run.four_bits import check_four_bits
from gradpruner.training.harness import Harness
from gradpruner.training.recipe import Recipe

DTYPES = ("auto", "float32", "bfloat16", "float16")
OF_AUTO = ("max_lost", "check_steps", "check_rows")  # settings that only ratio = "auto" uses
# Default length of a probe. The paper watches the first 1 % of the steps. Below 20 steps, this project measured that
# the ranking of the layers has not settled.
PROBE_SHARE, PROBE_LEAST = 0.01, 20


@dataclass(frozen=True)
class Job:
    """The settings of one run.

    Args:
        source: the model: a folder, a hub id, a .gguf file or "smollm2", see `load_model`.
        steps: optimizer steps in all. Those of the probe are included.
        recipe: how to fine-tune.
        ratio: share of the layers to remove, above 0 and below 1, or "auto". "auto" tries several cuts (see
            `gradpruner.run.auto_ratio`) and takes the largest that loses at most `max_lost` of the dense score.
            Default 0.4.
        count: how many layers to remove. Give it with `ratio=None`.
        of: what `ratio` is a share of, "layers" or "parameters".
        preset: how layers are chosen and cut, for example `Preset.of("paper", top=0.3)`. The name of a preset,
            "default" or "paper", is accepted too and becomes that `Preset`.
        probe_steps: optimizer steps of the probe. Default: 1 % of the steps, at least 20 and at most half.
        max_length: the longest example, in tokens.
        train_on: the tokens whose loss is trained: "answer", "assistant", "last" or "all", see
            `gradpruner.data.tokens.tokenize`.
        too_long: what becomes of examples that are longer: "cut", "skip", "error" or "split". Default: text without an
            answer is split, the rest is cut.
        chat_template: the content of a jinja file that writes messages as text. Default: the tokenizer's own.
        dtype: dtype to load the model in: "auto" (as stored), "float32", "bfloat16" or "float16".
        attention: transformers' attn_implementation. Default: transformers chooses.
        trust_remote_code: whether to run code that comes with the model.
        load_in_4bit: train adapters beside weights of 4 bits (QLoRA). The cut and the results are in full precision.
            Default False.
        max_lost: with ratio "auto", the share of the dense model's score that may be lost, 0 to 1. Default 0.01.
        check_steps: with ratio "auto", extra steps that the dense model and every cut that is tried are trained for.
            Default: as many as the probe.
        check_rows: with ratio "auto", training examples that are held out to try cuts on. Nothing is trained on them.
            Default: 10 %, at most 200.
        save_steps: optimizer steps between two checkpoints of a training. Default: see `Checkpoints`.
        harness: tasks of lm-evaluation-harness that the trained models are scored on too. Default: none.

    Raises:
        InvalidArgument: a setting is not accepted.
    """

    source: str
    steps: int
    recipe: Recipe = field(default_factory=Recipe)
    ratio: float | str | None = 0.4
    count: int | None = None
    of: str = "layers"
    preset: Preset = field(default_factory=Preset)
    probe_steps: int | None = None
    max_length: int = 512
    train_on: str = "answer"
    too_long: str | None = None
    chat_template: str | None = None
    dtype: str = "auto"
    attention: str | None = None
    trust_remote_code: bool = False
    load_in_4bit: bool = False
    max_lost: float | None = None
    check_steps: int | None = None
    check_rows: int | None = None
    save_steps: int | None = None
    harness: Harness | None = None

    def __post_init__(self) -> None:
        """Check what would otherwise be checked only after time was spent."""
        if not is_int(self.steps) or self.steps < 2:
            raise InvalidArgument(f"steps = {self.steps!r}; expected 2 or more: some to probe, the rest to train")
        if not 1 <= self.probing < self.steps:
            raise InvalidArgument(f"probe_steps = {self.probe_steps!r}; accepted are 1 to {self.steps - 1}")
        if not isinstance(self.preset, Preset):
            object.__setattr__(self, "preset", Preset.of(self.preset))
        self._check_auto()
        if self.load_in_4bit:
            check_four_bits(self.source, self.recipe, merge=self.preset.merge)
        if self.save_steps is not None:
            check_int("save_steps", self.save_steps, 1, "a number of optimizer steps")

    def _check_auto(self) -> None:
        if self.ratio != AUTO:
            if isinstance(self.ratio, str):
                raise InvalidArgument(f"ratio = {self.ratio!r}; accepted are a share and 'auto'")
            for name in OF_AUTO:
                if getattr(self, name) is not None:  # a bound that nobody checks would be worse than none
                    raise InvalidArgument(f"{name} = {getattr(self, name)!r} belongs to ratio = 'auto'")
            return
        if self.count is not None or self.of != "layers":
            name = "of" if self.count is None else "count"
            raise InvalidArgument(f"ratio = 'auto' counts layers itself; {name} = {getattr(self, name)!r} is too much")
        if not is_number(self.bound) or not 0 <= self.bound <= 1:
            raise InvalidArgument(f"max_lost = {self.max_lost!r}; accepted is a share from 0 to 1")
        for name, most in (("check_steps", self.steps - self.probing), ("check_rows", None)):
            value = getattr(self, name)
            if value is not None and (not is_int(value) or value < 1 or (most is not None and value > most)):
                accepted = "a whole number, 1 or more" if most is None else f"1 to {most}, the steps after the probe"
                raise InvalidArgument(f"{name} = {value!r}; accepted: {accepted}")

    @property
    def bound(self) -> float:
        """Share of the dense model's score that ratio = "auto" may lose."""
        return MAX_LOST if self.max_lost is None else self.max_lost

    @property
    def checking(self) -> int:
        """Extra steps that ratio = "auto" trains every model for."""
        return min(self.probing, self.steps - self.probing) if self.check_steps is None else self.check_steps

    @property
    def probing(self) -> int:
        """Optimizer steps of the probe."""
        if self.probe_steps is not None:
            return self.probe_steps
        return max(1, min(self.steps // 2, max(PROBE_LEAST, round(PROBE_SHARE * self.steps))))

    def tokenize(self, examples: Sequence[Example], tokenizer: Any) -> RowList | Rows:
        """Tokenise examples as the run trains on them.

        Args:
            examples: what to tokenise.
            tokenizer: the model's.

        Raises:
            InvalidArgument: see `gradpruner.data.tokens.tokenize`.
        """
        return tokenize(examples, tokenizer, max_length=self.max_length, train_on=self.train_on, too_long=self.too_long)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that a resumed run must agree with, as JSON holds them."""
        content = {
            **vars(self),
            "recipe": self.recipe.to_dict(),
            "preset": asdict(self.preset),
            "probe_steps": self.probing,
        }
        del content["save_steps"], content["harness"]  # they do not change the models
        if self.ratio == AUTO:
            return {**content, "max_lost": self.bound, "check_steps": self.checking}
        return {name: value for name, value in content.items() if name not in OF_AUTO}


def torch_dtype(name: str) -> Any:
    """Return the torch dtype of a name. "auto" stays as it is. Raises InvalidArgument."""
    check_choice("dtype", name, DTYPES)
    return name if name == "auto" else getattr(torch, name)
