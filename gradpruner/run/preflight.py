"""Try, before the first step, what would otherwise fail only at the end of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradpruner.checks import check_choice, exact_share
from gradpruner.data.collator import Collator
from gradpruner.data.examples import Example
from gradpruner.data.row_facts import fact
from gradpruner.errors import InvalidArgument
from gradpruner.model.decoder import Decoder
from gradpruner.model.full_precision import check_full_precision
from gradpruner.model.modes import evaluating
from gradpruner.probe.igia import SCORES
from gradpruner.pruning.preflight import check_plan, check_save
from gradpruner.report.plots import new_figure
from gradpruner.run.auto_ratio import AUTO, candidates
from gradpruner.training.evaluate import check_labels
from gradpruner.training.schedule import schedule

if TYPE_CHECKING:
    from gradpruner.data.rows import Rows as DiskRows
    from gradpruner.data.tokens import RowList
    from gradpruner.run.job import Job
    from gradpruner.training.recipe import Recipe

logger = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Any]]


def check_run(job: Job, model: Any, tokenizer: Any, folder: Path, examples: Mapping[str, Sequence[Example]]) -> None:
    """Check a whole run: its settings on this model, its data, and what it writes.

    Args:
        job: the settings.
        model: the model, as loaded from the job's source. It is left as it is.
        tokenizer: its tokenizer.
        folder: where everything is written.
        examples: all examples by their purpose, "training" or "test". The purpose is named in messages.

    Raises:
        InvalidArgument: a setting, an example or the folder is not accepted.
        UnsupportedModel: layers cannot be removed from the model.
        CheckpointError: the model could not be written.
    """
    check_full_precision(model, job.source)
    if job.harness is not None:
        job.harness.check_tokenizer(tokenizer)
    preset, decoder = job.preset, Decoder(model)
    exact_share("top", preset.top)
    check_choice("kind", preset.kind, SCORES)
    if job.ratio == AUTO:
        check_plan(decoder, count=1, merge=0)
        candidates([0.0] * len(decoder.layers), least=preset.merge if isinstance(preset.merge, int) else 1)
    else:
        check_plan(
            decoder,
            ratio=None if job.count is not None else job.ratio,
            count=job.count,
            of=job.of,
            merge=preset.merge,
        )
    check_examples(job, model, tokenizer, examples)
    check_save(model, tokenizer, folder)
    new_figure(1, 1)  # the report has plots: fails where matplotlib is missing


def check_comparison(job: Job, model: Any, tokenizer: Any, examples: Mapping[str, Sequence[Example]]) -> None:
    """Check the model and the data of a comparison. It checks ratios and methods itself.

    Args:
        job: the settings.
        model: the model, as loaded from the job's source.
        tokenizer: its tokenizer.
        examples: all examples by their purpose. The purpose is named in messages.

    Raises:
        InvalidArgument: an example is not accepted.
        UnsupportedModel: layers cannot be removed from the model.
    """
    check_full_precision(model, job.source)
    if job.harness is not None:
        job.harness.check_tokenizer(tokenizer)
    check_plan(Decoder(model), count=1, merge=0)
    check_examples(job, model, tokenizer, examples)
    new_figure(1, 1)  # the report has plots: fails where matplotlib is missing


def check_examples(job: Job, model: Any, tokenizer: Any, examples: Mapping[str, Sequence[Example]]) -> None:
    """Tokenise all examples as the run does, and check their rows.

    Args:
        job: the settings.
        model: the model.
        tokenizer: its tokenizer.
        examples: all examples by their purpose. The purpose is named in messages.

    Raises:
        InvalidArgument: an example is not accepted. The message says which.
    """
    for purpose, some in examples.items():
        try:
            rows = job.tokenize(some, tokenizer)
            check_labels(rows)
        except InvalidArgument as error:
            raise InvalidArgument(f"{purpose} examples: {error}") from None
        if not len(rows):
            raise InvalidArgument(f"{purpose} examples: none is left; {rows.counts.line()}")
        trained = purpose == "training"
        line = training_line(rows, job.steps, job.recipe) if trained else rows.counts.line()
        logger.log(rows.counts.level, f"{purpose}: {line}")
        check_rows(model, tokenizer, rows)


def training_line(rows: RowList | DiskRows, steps: int, recipe: Recipe) -> str:
    """Return one line on what is trained on: rows and tokens kept and lost, and the padding.

    Args:
        rows: what `tokenize` returned.
        steps: optimizer steps of the training.
        recipe: batch size and order of the rows.
    """
    share = schedule(rows, steps, recipe).padded(recipe.batch_size, Collator.multiple)
    return f"{rows.counts.line()}; {share:.1%} of what a step computes is padding"


def check_rows(model: Any, tokenizer: Any, rows: Rows) -> None:
    """Check that the model has an embedding and a position for every token of the rows.

    Args:
        model: the model.
        tokenizer: its tokenizer. The token that it pads with is checked too.
        rows: tokenised rows.

    Raises:
        InvalidArgument: a token, the padding or a position is outside the model's tables.
    """
    size = _vocabulary_size(model)
    if size is not None:
        padding = Collator(tokenizer).pad_id
        if padding >= size:
            raise InvalidArgument(
                f"tokenizer pads with token {padding}, but the model has embeddings for {size} tokens, 0 to "
                f"{size - 1}; expected a padding token that the model knows (for example tokenizer.pad_token = "
                "tokenizer.eos_token), or a model with more embeddings (model.resize_token_embeddings)"
            )
        highest = int(fact(rows, "highest").max(initial=0))
        if highest >= size:
            token = tokenizer.convert_ids_to_tokens(highest)
            raise InvalidArgument(
                f"data has the token {token!r} ({highest}), but the model has embeddings for {size} tokens, 0 to "
                f"{size - 1}; expected the tokenizer that the model was trained with"
            )
    _check_positions(model, rows)


def _vocabulary_size(model: nn.Module) -> int | None:
    """Return how many tokens have an embedding, or None if that is not known."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    weight = getattr(table, "weight", None)
    return len(weight) if isinstance(weight, torch.Tensor) else None


def _check_positions(model: nn.Module, rows: Rows) -> None:
    """Try the longest row. A learned table of positions ends; rotary positions (RoPE) do not."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    multiple = Collator.multiple
    longest = -(-int(fact(rows, "length").max(initial=0)) // multiple) * multiple
    first = next(model.parameters())
    if not isinstance(positions, int) or longest <= positions or first.device.type != "cpu":
        return
    try:
        with evaluating(model):
            model(input_ids=torch.zeros(1, longest, dtype=torch.int64), use_cache=False)
    except (IndexError, RuntimeError, ValueError) as error:
        raise InvalidArgument(
            f"max_length: the longest row has {longest} tokens with its padding to a multiple of {multiple}, but the "
            f"model has positions for {positions}; expected {positions // multiple * multiple} or less"
        ) from error
