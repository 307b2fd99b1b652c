"""A Trainer callback that hands the logs of one training to transformers' own trackers.

This module is imported when a tracker is asked for, because transformers.Trainer is slow to import.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks


class Reporting(TrainerCallback):
    """One run in each tracker. It begins with a training, and stays open until `close`.

    The Trainer's own trackers end with its training. These take an evaluation that comes later too.

    Args:
        report_to: the trackers, as `TrainingArguments.report_to` names them.
        folder: for trackers that write files.
        run_name: name of the whole run.
        stage: name of this training in it.
        first_step: steps that were made before.
        arguments: further fields of TrainingArguments, of which trackers read `project` and the like.
    """

    def __init__(
        self,
        report_to: Sequence[str],
        folder: Path,
        *,
        run_name: str,
        stage: str,
        first_step: int,
        arguments: Mapping[str, Any],
    ) -> None:
        self._names, self._folder = list(report_to), folder
        self._run_name, self._stage, self._first_step = run_name, stage, first_step
        self._given = dict(arguments)
        self._trackers: list[Any] = []
        self._args: Any = None
        self._state, self._control = TrainerState(), TrainerControl()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the run in every tracker."""
        self._args = copy.copy(args)
        self._args.run_name, self._args.report_to = f"{self._run_name}/{self._stage}", self._names
        self._state, self._control = self._moved(state), control
        with self._environment():
            self._trackers = [of_one() for name in self._names for of_one in get_reporting_integration_callbacks(name)]
            for tracker in self._trackers:
                if hasattr(tracker, "tb_writer"):
                    shared = os.environ.get("TENSORBOARD_LOGGING_DIR")
                    tracker.logging_dir = str(Path(shared) / self._stage if shared else self._folder)
                tracker.on_train_begin(self._args, self._state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Hand on what the Trainer logs."""
        self._state = self._moved(state)
        self._hand_on(dict(logs or {}), **kwargs)

    def log(self, figures: Mapping[str, float]) -> None:
        """Report numbers that no Trainer logs. Without a training, the run begins here.

        Args:
            figures: numbers by name. `test_x` becomes `test/x`, as transformers writes it.
        """
        if self._args is None:
            arguments = TrainingArguments(output_dir=str(self._folder), **{**self._given, "report_to": "none"})
            self.on_train_begin(arguments, TrainerState(), self._control)
        self._hand_on(dict(figures))

    def close(self) -> None:
        """End the run in every tracker."""
        for tracker in self._trackers:
            tracker.on_train_end(self._args, self._state, self._control)
            # where a callback leaves its run open, the next training would go into it; some versions close trackio's
            wandb, trackio = getattr(tracker, "_wandb", None), getattr(tracker, "_trackio", None)
            if wandb is not None and wandb.run is not None:
                wandb.finish()
            if trackio is not None and tracker._initialized:
                trackio.finish()
        self._trackers = []

    def _hand_on(self, logs: dict[str, Any], **kwargs: Any) -> None:
        for tracker in self._trackers:
            tracker.on_log(self._args, self._state, self._control, logs=dict(logs), **kwargs)

    def _moved(self, state: Any) -> Any:
        moved = copy.copy(state)
        moved.global_step = state.global_step + self._first_step
        return moved

    @contextlib.contextmanager
    def _environment(self) -> Iterator[None]:
        """Inside, Weights & Biases groups the trainings of a run.

        Variables that the user has set stay.
        """
        wanted = {"WANDB_RUN_GROUP": self._run_name, "WANDB_JOB_TYPE": self._stage}
        added = {name: value for name, value in wanted.items() if name not in os.environ}
        os.environ.update(added)
        try:
            yield
        finally:
            for name in added:
                os.environ.pop(name, None)
