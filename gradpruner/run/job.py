"""The settings of one run, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from gradpruner.checks import check_choice, check_int, is_number
from gradpruner.errors import InvalidArgument
from gradpruner.presets import Preset
from gradpruner.run.auto_ratio import AUTO, MAX_LOST
from gradpruner.training.recipe import Recipe

DTYPES = ("auto", "float32", "bfloat16", "float16")
OF_AUTO = ("max_lost", "check_steps", "check_rows")
PROBE_SHARE, PROBE_LEAST = 0.01, 20  # P: the first 1 % of the steps; below 20 the ranking has not settled (D)


@dataclass(frozen=True)
class Job:
    """One run. source: what `load_model` takes. steps: optimizer steps in all, the probe's included.

    preset, and what differs from it: see `Preset`. train_on: "answer" or "all" tokens. probe_steps: default
    1 % of the steps, at least 20 and at most half.
    ratio: "auto" tries cuts (see `gradpruner.run.auto_ratio`) and loses at most max_lost, 0 to 1, of the dense score
    (default 0.01) on check_rows training examples (default 10 %, at most 200) that nothing is trained on; every cut
    that is tried, and the dense model, is trained for check_steps extra steps (default: as many as the probe).
    save_steps: optimizer steps between two checkpoints of a stage that trains; default: see `Checkpoints`.
    Raises InvalidArgument.
    """

    source: str
    steps: int
    recipe: Recipe = field(default_factory=Recipe)
    ratio: float | str | None = 0.4
    count: int | None = None
    of: str = "layers"
    preset: str = "default"
    kind: str | None = None
    merge: str | int | None = None
    top: float | None = None
    weight: float | None = None
    patch: bool | None = None
    adapters: str | None = None
    rank_factor: int | None = None
    probe_steps: int | None = None
    max_length: int = 512
    train_on: str = "answer"
    dtype: str = "auto"
    attention: str | None = None
    trust_remote_code: bool = False
    max_lost: float | None = None
    check_steps: int | None = None
    check_rows: int | None = None
    save_steps: int | None = None

    def __post_init__(self) -> None:
        """Check what no later stage checks before time is spent."""
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 2:
            raise InvalidArgument(f"steps = {self.steps!r}; expected 2 or more: some to probe, the rest to train")
        if not 1 <= self.probing < self.steps:
            raise InvalidArgument(f"probe_steps = {self.probe_steps!r}; accepted are 1 to {self.steps - 1}")
        self._check_auto()
        if self.save_steps is not None:
            check_int("save_steps", self.save_steps, 1, "a number of optimizer steps")
        _ = self.settings

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
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if value is not None and not (whole and (most is None or value <= most)):
                accepted = "a whole number, 1 or more" if most is None else f"1 to {most}, the steps after the probe"
                raise InvalidArgument(f"{name} = {value!r}; accepted: {accepted}")

    @property
    def bound(self) -> float:
        """Share of the dense score that ratio = "auto" may lose."""
        return MAX_LOST if self.max_lost is None else self.max_lost

    @property
    def checking(self) -> int:
        """Extra steps that ratio = "auto" trains every model for."""
        return min(self.probing, self.steps - self.probing) if self.check_steps is None else self.check_steps

    @property
    def settings(self) -> Preset:
        """What preset and options come to."""
        return Preset.of(
            self.preset,
            kind=self.kind,
            merge=self.merge,
            top=self.top,
            weight=self.weight,
            patch=self.patch,
            adapters=self.adapters,
            rank_factor=self.rank_factor,
        )

    @property
    def probing(self) -> int:
        """Steps of the probe."""
        if self.probe_steps is not None:
            return self.probe_steps
        return max(1, min(self.steps // 2, max(PROBE_LEAST, round(PROBE_SHARE * self.steps))))

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; what a resumed run must agree with."""
        content = {**vars(self), **vars(self.settings), "recipe": self.recipe.to_dict(), "probe_steps": self.probing}
        del content["save_steps"]  # the result is the same
        if self.ratio == AUTO:
            return {**content, "max_lost": self.bound, "check_steps": self.checking}
        return {name: value for name, value in content.items() if name not in OF_AUTO}


def torch_dtype(name: str) -> Any:
    """Dtype of a name, "auto" as it is. Raises InvalidArgument."""
    check_choice("dtype", name, DTYPES)
    return name if name == "auto" else getattr(torch, name)
