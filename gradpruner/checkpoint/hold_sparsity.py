"""A Trainer callback that keeps pruned weights at zero.

This module is slow to import, because transformers.Trainer is.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from gradpruner.checkpoint.masks import Masks


class HoldSparsity(TrainerCallback):
    """Zero the masked entries again after every optimizer step, while all weights train.

    Adapters on a frozen model do not need it: call `Masks.apply_` after they were merged. The callback works for
    `transformers.Trainer` and its subclasses.

    Args:
        masks: masks of the model that trains.

    Raises:
        ModelMismatch: when training begins, if the masks belong to another model.
    """

    def __init__(self, masks: Masks) -> None:
        self._masks = masks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Zero the masked entries, because the model may still be dense.

        Args:
            args: the Trainer's arguments. Not used.
            state: the Trainer's state. Not used.
            control: the Trainer's control. Not used.
            **kwargs: has the model.
        """
        self._masks.apply_(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Zero the masked entries after an optimizer step.

        Args:
            args: the Trainer's arguments. Not used.
            state: the Trainer's state. Not used.
            control: the Trainer's control. Not used.
            **kwargs: has the model.
        """
        self._masks.apply_(kwargs["model"])
