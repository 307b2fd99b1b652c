"""A Trainer callback that probes the first steps and changes nothing else."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback

from gradpruner.errors import ProbeError
from gradpruner.probe.igia import Igia
from gradpruner.probe.probe import Probe


class ProbeCallback(TrainerCallback):
    """Watch the first optimizer steps of a `transformers.Trainer`, and change nothing.

    Wrong options are refused when training begins, as `Probe` and `Probe.start` refuse them.

    Args:
        steps: optimizer steps to watch. Default 40.
        save_to: where igia.safetensors is written when training ends. Default: nowhere.
        **options: further arguments of `Probe`.

    Example:
        probe = gradpruner.ProbeCallback(steps=40)
        trainer.add_callback(probe)
        trainer.train()
        plan = probe.igia.plan(ratio=0.4)
    """

    def __init__(self, steps: int = 40, *, save_to: str | os.PathLike[str] | None = None, **options: Any) -> None:
        self._steps, self._save_to, self._options = steps, save_to, options
        self._probe: Probe | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to watch the model and the optimizer that the Trainer has just made."""
        self._probe = Probe(kwargs["model"], **self._options)
        self._probe.start(kwargs["optimizer"], self._steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the model, and write the igia if asked to."""
        assert self._probe is not None
        self._probe.stop()
        if self._save_to is not None:  # on every process: each holds a part, and one writes
            self.igia.save(self._save_to)

    @property
    def igia(self) -> Igia:
        """The result of the probe. Reading it ends the probe.

        Raises:
            ProbeError: training has not begun, or no optimizer step was made.
        """
        if self._probe is None:
            raise ProbeError("training has not begun")
        return self._probe.igia
