"""`AttachCallback`: `attach` for programs that only accept callbacks."""

from __future__ import annotations

import sys
from typing import Any

from transformers import Trainer, TrainerCallback

from gradpruner.errors import InvalidArgument
from gradpruner.plan import Plan
from gradpruner.probe.igia import Igia
from gradpruner.training.attach import PruneCallback, attach


class AttachCallback(TrainerCallback):
    """Do what `attach` does, as a callback that is passed to a Trainer.

    It is for programs such as LLaMA-Factory, which make the Trainer themselves. Where you have the Trainer, call
    `attach`. A Trainer does not pass itself to its callbacks. So this one finds the Trainer that calls it among the
    callers of its first event: the end of the Trainer's constructor, or else the beginning of training.

    Most faults of the options or of the model are raised in the Trainer's constructor, the others when training begins.
    If the callback is added to a finished Trainer, it cannot resume, and a run that resumes is refused. Each Trainer
    needs a callback of its own: a second Trainer that gets the same one is refused.

    Args:
        steps: optimizer steps of the probe. Default 40.
        ratio: share of the layers to remove, above 0 and below 1. Default 0.4.
        **options: further arguments of `attach`.

    Example:
        pruning = gradpruner.AttachCallback(steps=40, ratio=0.4)
        run_exp(args, callbacks=[pruning])  # LLaMA-Factory's
        print(pruning.plan.summary())
    """

    def __init__(self, steps: int = 40, ratio: float | None = 0.4, **options: Any) -> None:
        self._steps, self._ratio, self._options = steps, ratio, options
        self._attached: PruneCallback | None = None
        self._trainer: Trainer | None = None

    @property
    def plan(self) -> Plan | None:
        """The plan of the cut, None before it."""
        return None if self._attached is None else self._attached.plan

    @property
    def igia(self) -> Igia | None:
        """What the probe saw, None before the cut."""
        return None if self._attached is None else self._attached.igia

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the Trainer whose constructor ends."""
        self._attach()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the Trainer that begins, if this callback came after its constructor."""
        if self._is_attached(_calling_trainer(self)):
            return
        if state.global_step:
            raise InvalidArgument(
                f"training resumes at step {state.global_step}, but AttachCallback was added to a finished Trainer, "
                "which has loaded the checkpoint already: pass the callback to the Trainer's constructor, or use "
                "gradpruner.attach"
            )
        self._attach()

    def _attach(self) -> None:
        trainer = _calling_trainer(self)
        if not self._is_attached(trainer):
            self._attached = attach(trainer, self._steps, self._ratio, **self._options)
            self._trainer = trainer

    def _is_attached(self, trainer: Trainer) -> bool:
        """Return whether this callback is attached to a Trainer.

        Raises InvalidArgument if it is attached to another one.
        """
        if self._trainer is not None and self._trainer is not trainer:
            raise InvalidArgument(
                "AttachCallback belongs to another Trainer already, whose plan it holds; expected a new AttachCallback "
                "for each Trainer"
            )
        return self._trainer is not None


def _calling_trainer(callback: TrainerCallback) -> Trainer:
    """Return the Trainer that is calling a callback.

    It is the `self` of a caller, and it has the callback.

    Raises InvalidArgument if there is none.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):  # one that is still being made may have no callbacks yet
            handler = getattr(caller, "callback_handler", None)
            if handler is not None and any(c is callback for c in handler.callbacks):
                return caller
        frame = frame.f_back  # type: ignore[assignment]
    raise InvalidArgument(
        "AttachCallback found no transformers.Trainer among its callers; expected to be one of a Trainer's callbacks "
        "(in a loop of your own, use Probe and cut)"
    )
