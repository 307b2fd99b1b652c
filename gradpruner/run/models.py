"""The models of a run (dense, probed, cut), and the rows that they are trained on."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradpruner.checkpoint.companions import carry_processor, plan_of, refuse_masks
from gradpruner.checkpoint.save import save
from gradpruner.data.collator import Collator
from gradpruner.data.examples import Example
from gradpruner.model.accelerator import to_accelerator
from gradpruner.model.identity import Identity
from gradpruner.model.load import Loaded, load_model
from gradpruner.plan import Plan
from gradpruner.probe.igia import Igia
from gradpruner.pruning.apply import apply
from gradpruner.pruning.patch import Patch, fit_patches
from gradpruner.run.folder import RunFolder
from gradpruner.run.job import Job, torch_dtype
from gradpruner.run.preflight import check_run
from gradpruner.run.probe_folder import IGIA, load_probed_model
from gradpruner.run.stages import measure_sets
from gradpruner.training.evaluate import Evaluation
from gradpruner.training.schedule import Ordered, schedule

logger = logging.getLogger(__name__)


class RunModels:
    """Loads and cuts the models of one run, always in the same way.

    Args:
        job: the settings of the run.
        train_examples: what the models are trained on.
        stages: the folder of the run.
        identity: the content of the job's model that the run began with.
        all_examples: all examples by their purpose, "training", "held-out" or "test". They are checked before anything
            is trained.

    `earlier_plan` is the plan that the job's model was pruned by before, if any. It is known once `load_probed` or
    `cut` was called.
    """

    def __init__(
        self,
        job: Job,
        train_examples: Sequence[Example],
        stages: RunFolder,
        identity: Identity,
        all_examples: Mapping[str, Sequence[Example]],
    ) -> None:
        self.job = job
        self.earlier_plan: Plan | None = None
        self.patches: list[Patch] = []  # of the last cut
        self._train_examples, self._all_examples = train_examples, all_examples
        self._stages, self._identity = stages, identity
        self._probe_folder = stages.path / "probe"

    def load(self, source: str, revision: str | None = None, *, load_in_4bit: bool = False) -> Loaded:
        """Load a model as the job says.

        Args:
            source: the job's model, or a folder of the run.
            revision: the commit of a hub id. Default: the newest.
            load_in_4bit: whether its weights are quantised to 4 bits.
        """
        return load_model(
            source,
            dtype=torch_dtype(self.job.dtype),
            attention=self.job.attention,
            chat_template=self.job.chat_template,
            trust_remote_code=self.job.trust_remote_code,
            revision=revision,
            load_in_4bit=load_in_4bit,
        )

    def packed(self, loaded: Loaded, source: str | None = None) -> Loaded:
        """Return a model as it is trained: in 4 bits, if the job says so.

        Args:
            loaded: the model in full precision, and its tokenizer.
            source: the job's model, or the folder of the run that it was loaded from. Default: it was made in memory.
        """
        if not self.job.load_in_4bit:
            return loaded
        if source is not None:
            revision = self._identity.revision if source == self.job.source else None
            return self.load(source, revision, load_in_4bit=True)
        with tempfile.TemporaryDirectory(prefix=".gradpruner-", dir=self._stages.path) as place:
            save(loaded.model, Path(place) / "model", tokenizer=loaded.tokenizer)
            return self.load(str(Path(place) / "model"), load_in_4bit=True)

    def load_dense(self) -> Loaded:
        """Load the job's model. Before anything was trained, check the whole run on it."""
        self._identity.check_unchanged()
        loaded = self.load(self.job.source, self._identity.revision)
        refuse_masks(self.job.source, "run", self._identity.revision)
        if not self._stages.is_made("probe", self._stages.settings):  # nothing has been trained yet
            check_run(self.job, *loaded, self._stages.path, self._all_examples)
        return loaded

    def carry_processor(self, model: Any, folder: Path) -> None:
        """Copy what prepares images for a vision-language model beside a model.

        Args:
            model: the model.
            folder: the folder to copy into.
        """
        carry_processor(self.job.source, model, folder, self._identity.revision)

    def load_probed(self) -> Loaded:
        """Load the dense model, inside the adapters that the probe trained if these are kept."""
        model, tokenizer = self.load_dense()
        self.earlier_plan = plan_of(self.job.source, model, self._identity.revision)
        if self.job.preset.adapters == "keep":
            model = load_probed_model(model, self._probe_folder)
        return Loaded(model, tokenizer)

    def cut(self, plan: Plan) -> Loaded:
        """Return the model without the removed layers, merged and patched as the preset says.

        Patches are fitted on the rows of the probe.
        """
        preset = self.job.preset
        model, tokenizer = self.load_probed()
        to_accelerator(model, trains=True)
        self.patches = patches = list[Patch]()
        if preset.patch:
            collate, rows, size = Collator(tokenizer), self.rows_of_probe(tokenizer), self.job.recipe.batch_size
            self.patches = patches = fit_patches(
                model, plan, (collate(rows[i : i + size]) for i in range(0, len(rows), size))
            )
            shares = ", ".join(f"{patch.weight.layer}: {patch.unexplained:.2f} unexplained" for patch in patches)
            logger.info(f"patches: {shares or 'none'}")
        igia = Igia.load(self._probe_folder / IGIA) if plan.merge else None
        smaller = apply(
            model, plan, igia, top=preset.top, weight=preset.weight, patches=patches, adapters=preset.adapters
        )
        return Loaded(smaller, tokenizer)

    def rows(self, tokenizer: Any) -> Ordered:
        """Return the training rows of the whole run, in order."""
        return schedule(self.job.tokenize(self._train_examples, tokenizer), self.job.steps, self.job.recipe)

    def rows_of_probe(self, tokenizer: Any) -> Ordered:
        """Return the training rows of the probe, in order: the first of the run."""
        return self.rows(tokenizer)[: self.job.probing * self.job.recipe.rows_per_step]

    def score(self, model: Any, tokenizer: Any, examples: Sequence[Example]) -> tuple[Evaluation, list[dict[str, Any]]]:
        """Evaluate a model with the settings of the job.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            examples: what to evaluate on.

        Returns:
            The scores of all examples, and those of each set if there are several, see `measure_sets`.
        """
        return measure_sets(
            model,
            tokenizer,
            examples,
            max_length=self.job.max_length,
            train_on=self.job.train_on,
            too_long=self.job.too_long,
            batch_size=self.job.recipe.batch_size,
        )
