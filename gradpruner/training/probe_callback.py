"""For people who have their own Trainer: a callback that probes its first steps."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback

from gradpruner.errors import ProbeError
from gradpruner.probe.igia import Igia
from gradpruner.probe.probe import Probe


class ProbeCallback(TrainerCallback):
    """Watches the first `steps` optimizer steps of a `transformers.Trainer` and changes nothing else.

    save_to: where igia.safetensors is written when training ends. Further arguments are `Probe`'s.
    """

    def __init__(self, steps: int = 40, *, save_to: str | os.PathLike[str] | None = None, **options: Any) -> None:
        self._steps, self._save_to, self._options = steps, save_to, options
        self._probe: Probe | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the model and the optimizer that the Trainer has just made."""
        self._probe = Probe(kwargs["model"], **self._options)
        self._probe.start(kwargs["optimizer"], self._steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the model; write the igia where asked to."""
        assert self._probe is not None
        self._probe.stop()
        if self._save_to is not None:  # on every process: each holds a part, and one writes
            self.igia.save(self._save_to)

    @property
    def igia(self) -> Igia:
        """What was seen. Raises ProbeError before the first optimizer step."""
        if self._probe is None:
            raise ProbeError("training has not begun")
        return self._probe.igia
