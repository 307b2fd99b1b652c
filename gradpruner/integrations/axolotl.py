"""The plugin for Axolotl: its runs are probed, cut and go on, as `attach` does it.

Put `plugins: [gradpruner.integrations.axolotl.GradPrunerPlugin]` into the YAML file of a run.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field
from transformers import Trainer

from gradpruner.errors import InvalidArgument
from gradpruner.training.attach import PruneCallback, attach

logger = logging.getLogger(__name__)

PREFIX = "gradpruner_"
# Axolotl switches this on for LoRA by itself. It computes the products of an MLP without calling its linears, so the
# linear that a patch is added to cannot be found.
FUSED_MLP = "lora_mlp_kernel"


class GradPrunerArgs(BaseModel):
    """The options that the plugin adds to Axolotl's YAML files. `attach` says what each means.

    Args:
        gradpruner_steps: optimizer steps of the probe. Default 40.
        gradpruner_ratio: share of the layers to remove. Default 0.4.
        gradpruner_count: how many layers to remove, instead of a share.
        gradpruner_of: what the share is of.
        gradpruner_protect: layers that are never removed. Default: the first.
        gradpruner_preset: how layers are scored and cut.
        gradpruner_kind: the layer score, if not the preset's.
        gradpruner_merge: how many layers are merged, if not the preset's.
        gradpruner_top: share of a merged weight's entries that is used, if not the preset's.
        gradpruner_weight: factor of the merged entries, if not the preset's.
        gradpruner_patch: whether gaps are patched, if not the preset's.
        gradpruner_adapters: whether adapters go on or start anew, if not the preset's.
        gradpruner_estimator: how gradients are read.
        gradpruner_micro_batches: see `Probe`.
    """

    gradpruner_steps: int | None = Field(default=None, ge=1)
    gradpruner_ratio: float | None = Field(default=None, gt=0, lt=1)
    gradpruner_count: int | None = Field(default=None, ge=1)
    gradpruner_of: Literal["layers", "parameters"] | None = None
    gradpruner_protect: list[int] | None = None
    gradpruner_preset: Literal["default", "paper"] | None = None
    gradpruner_kind: Literal["norm", "squared", "normalized"] | None = None
    gradpruner_merge: Literal["auto"] | int | None = None
    gradpruner_top: float | None = Field(default=None, gt=0, le=1)
    gradpruner_weight: float | None = None
    gradpruner_patch: bool | None = None
    gradpruner_adapters: Literal["keep", "discard"] | None = None
    gradpruner_estimator: Literal["auto", "lora", "gradient", "adam", "exact"] | None = None
    gradpruner_micro_batches: int | None = Field(default=None, ge=1)


NAMES = tuple(GradPrunerArgs.model_fields)


class GradPrunerPlugin(BasePlugin):
    """Attach gradpruner to the Trainer that Axolotl makes.

    Example:
        plugins:
          - gradpruner.integrations.axolotl.GradPrunerPlugin
        gradpruner_steps: 40
        gradpruner_ratio: 0.4
    """

    def __init__(self) -> None:
        super().__init__()
        self._attached: PruneCallback | None = None

    def register(self, cfg: Any) -> None:
        """Refuse options that do not exist, and leave the fused MLP off.

        Axolotl would ignore such options.

        Args:
            cfg: Axolotl's configuration as it was read, before it is checked.

        Raises:
            InvalidArgument: an option does not exist.
        """
        unknown = sorted(name for name in cfg if str(name).startswith(PREFIX) and name not in NAMES)
        if unknown:
            raise InvalidArgument(f"{', '.join(unknown)}: no such option; accepted are {', '.join(NAMES)}")
        if not cfg.get("adapter") or cfg.get("gradpruner_patch") is False:
            return
        if cfg.get(FUSED_MLP):
            logger.warning(f"{FUSED_MLP}: true, so gaps stay without a patch; false gives a better smaller model")
        elif cfg.get(FUSED_MLP) is None:
            logger.warning(f"{FUSED_MLP} is set to false, because gaps could not be patched otherwise")
            cfg[FUSED_MLP] = False

    def get_input_args(self) -> str:
        """Return the name of the class with the plugin's options."""
        return f"{GradPrunerArgs.__module__}.{GradPrunerArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        """Attach to the Trainer.

        Args:
            cfg: Axolotl's configuration of the run.
            trainer: the Trainer, which is complete.
        """
        options = {name.removeprefix(PREFIX): cfg[name] for name in NAMES if cfg.get(name) is not None}
        self._attached = attach(trainer, **options)

    def post_train(self, cfg: Any, model: Any) -> None:
        """Log what was removed, and what merging the adapters needs.

        Args:
            cfg: Axolotl's configuration of the run.
            model: the trained model.
        """
        pruning = self._attached
        if pruning is None or pruning.plan is None:
            logger.warning("nothing was cut")
            return
        logger.warning(pruning.plan.summary())
        if pruning.base is not None:
            logger.warning(
                f"the adapters belong to the smaller base model: for `axolotl merge-lora` and `axolotl inference`, set "
                f"base_model: {pruning.base}"
            )
