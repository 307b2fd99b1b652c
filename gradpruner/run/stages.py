"""What a run does with a loaded model: watch its gradients, fine-tune it, measure it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gradpruner.checkpoint.masks import Masks
from gradpruner.data.collator import Collator
from gradpruner.data.examples import Example
from gradpruner.data.parts import with_answer
from gradpruner.data.tokens import tokenize
from gradpruner.distributed.launch import wants_shards
from gradpruner.errors import GradPrunerError, InvalidArgument
from gradpruner.probe.igia import Igia
from gradpruner.run.preflight import check_rows
from gradpruner.training.checkpoints import Checkpoints
from gradpruner.training.divergence import explained
from gradpruner.training.evaluate import Evaluation, exact_match, perplexity, perplexity_of, rouge_l, rouge_scorer
from gradpruner.training.finetune import Training, add_adapters, finish, train
from gradpruner.training.probe_length import check_probe_length
from gradpruner.training.recipe import Recipe
from gradpruner.training.schedule import Row

if TYPE_CHECKING:
    from transformers import TrainerCallback

logger = logging.getLogger(__name__)


def watch(
    model: Any,
    tokenizer: Any,
    ordered: Sequence[Row],
    recipe: Recipe,
    *,
    of_steps: int | None = None,
    quiet: bool = False,
    masks: Masks | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Any, Igia]:
    """Train on `ordered` while a probe watches every step.

    Args:
        model: the plain model. Adapters are put on it, unless the recipe's rank is 0.
        tokenizer: its tokenizer.
        ordered: the rows in the order of their use, as `schedule` returns them.
        recipe: how to train.
        of_steps: steps of the run that the probe is the beginning of. Its learning rate is that run's. Default: the
            steps of the rows.
        quiet: whether to show no progress bar.
        masks: weights that stay zero in every step, if all weights train. Adapters are left as they are.
        callbacks: more callbacks for the Trainer.

    Returns:
        The trained model, inside its adapters if there are any, and the accumulated gradients.

    Raises:
        InvalidArgument: a row has a token that the model has no embedding of, or the steps are too few, see
            `check_probe_length`.
        GradPrunerError: the loss rose, see `has_diverged`.
    """
    from gradpruner.training.probe_callback import ProbeCallback

    steps = len(ordered) // recipe.rows_per_step
    check_rows(model, tokenizer, ordered)
    check_probe_length(recipe, steps, of_steps or steps)
    watched = add_adapters(model, recipe) if recipe.rank else model
    probe = ProbeCallback(steps)
    training = train(
        watched,
        ordered,
        Collator(tokenizer),
        recipe,
        of_steps=of_steps,
        callbacks=[probe, *_mask_callbacks(masks, recipe), *callbacks],
        quiet=quiet,
    )
    if training.diverged:  # the gradients of such a training say nothing about the layers
        raise GradPrunerError(explained("the probe", training.losses))
    return watched, probe.igia


def tune(
    model: Any,
    tokenizer: Any,
    ordered: Sequence[Row],
    recipe: Recipe,
    *,
    quiet: bool = False,
    masks: Masks | None = None,
    checkpoints: Checkpoints | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    base: Any = None,
) -> tuple[Any, Training]:
    """Fine-tune on `ordered`.

    Args:
        model: the plain model, or a PEFT model whose adapters go on if the recipe's rank is 0.
        tokenizer: its tokenizer.
        ordered: the rows in the order of their use, as `schedule` returns them.
        recipe: how to train.
        quiet: whether to show no progress bar.
        masks: weights that stay zero: in every step if all weights train, and after adapters were added to the weights.
        checkpoints: where the training is saved while it runs, see `train`.
        callbacks: more callbacks for the Trainer.
        base: the same model in full precision, if `model` is in 4 bits. The adapters are added to its weights.

    Returns:
        The plain model, with its adapters added to the weights, and the record of the training.
    """
    check_rows(model, tokenizer, ordered)
    trained = add_adapters(model, recipe) if recipe.rank else model
    training = train(
        trained,
        ordered,
        Collator(tokenizer),
        recipe,
        quiet=quiet,
        callbacks=[*_mask_callbacks(masks, recipe), *callbacks],
        checkpoints=checkpoints,
    )
    plain = finish(trained, base)
    if masks is not None:
        masks.apply_(plain)
    return plain, training


def _mask_callbacks(masks: Masks | None, recipe: Recipe) -> list[TrainerCallback]:
    """Return what holds the masks in every step, if a step can change a masked weight."""
    if masks is None or recipe.rank:
        return []
    if wants_shards():
        raise InvalidArgument(
            "masks are held at zero in every step of all weights, which FSDP2 shards; expected DDP (torchrun), or "
            "adapters (--rank above 0), after which the masks are applied once"
        )
    from gradpruner.checkpoint.hold_sparsity import HoldSparsity

    return [HoldSparsity(masks)]


def measure(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_length: int,
    train_on: str,
    batch_size: int,
    too_long: str | None = None,
    rouge_tokens: int | None = None,
) -> Evaluation:
    """Evaluate a model on examples.

    Args:
        model: a transformers model or a PEFT model.
        tokenizer: its tokenizer.
        examples: what to evaluate on. Those without an answer count for perplexity alone.
        max_length: the longest row, in tokens.
        train_on: the tokens that perplexity is taken of, see `gradpruner.data.tokens.tokenize`. The exact match is
            taken of the answer, and of a conversation's last turn of the assistant.
        batch_size: rows of one forward pass.
        too_long: what becomes of examples that are longer. Default: text without an answer is split, the rest is cut.
        rouge_tokens: generate up to this many tokens per example and score ROUGE-L. Default: no ROUGE-L.

    Raises:
        InvalidArgument: an example does not fit, or the rouge-score package is missing.
    """
    settings: dict[str, Any] = dict(max_length=max_length, train_on=train_on, batch_size=batch_size, too_long=too_long)
    return _measured(model, tokenizer, examples, **settings, rouge_tokens=rouge_tokens).evaluation


def measure_sets(
    model: Any, tokenizer: Any, examples: Sequence[Example], **settings: Any
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """Evaluate a model on examples that may be joined from several sets.

    Args:
        model: a transformers model or a PEFT model.
        tokenizer: its tokenizer.
        examples: what to evaluate on. Those of `load_examples` say which sets they are joined from.
        settings: see `measure`.

    Returns:
        The scores of all examples together, and those of each set with its name and source. Of a single set, there are
        no scores of sets.

    Raises:
        InvalidArgument: see `measure`.
    """
    sets: Sequence[tuple[str, int]] = getattr(examples, "sets", ())
    if len(sets) < 2:
        return measure(model, tokenizer, examples, **settings), []
    names, start, parts = short_names([source for source, _ in sets]), 0, []
    for _, size in sets:
        parts.append(_measured(model, tokenizer, examples[start : start + size], **settings, of_several=True))
        start += size
    found = [
        {"name": name, "source": source, **part.evaluation.to_dict()}
        for name, (source, _), part in zip(names, sets, parts, strict=True)
    ]
    return _joint(parts), found


def short_names(sources: Sequence[str]) -> list[str]:
    """Return a short name of each source.

    It is the last part of the source if that tells them apart, else all of it, numbered if it is there twice.
    """
    last = [Path(source).name or source for source in sources]
    names = last if len(set(last)) == len(last) else list(sources)
    return [
        name if names.count(name) == 1 else f"{name} ({names[:place].count(name) + 1})"
        for place, name in enumerate(names)
    ]


class _Measured(NamedTuple):
    """The evaluation of a set, with the numbers of what its means are taken of."""

    evaluation: Evaluation
    answers: int
    tokens: int


def _measured(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_length: int,
    train_on: str,
    batch_size: int,
    too_long: str | None = None,
    rouge_tokens: int | None = None,
    of_several: bool = False,
) -> _Measured:
    if rouge_tokens is not None:
        rouge_scorer()  # a missing package is reported before anything is measured
    collate = Collator(tokenizer)
    answered = tokenize(with_answer(examples), tokenizer, max_length=max_length, train_on="last", too_long=too_long)
    rows = tokenize(examples, tokenizer, max_length=max_length, train_on=train_on, too_long=too_long)
    if rows.counts.cut or rows.counts.skipped:
        logger.warning(f"evaluated: {rows.counts.line()}")
    check_rows(model, tokenizer, rows)
    exact = rouge = None
    if len(answered):
        exact = exact_match(model, answered, collate=collate, batch_size=batch_size)
    if len(answered) and rouge_tokens is not None:
        rouge = rouge_l(model, answered, tokenizer, max_new_tokens=rouge_tokens, batch_size=batch_size)
    evaluated = rows.counts.examples - rows.counts.skipped
    if not len(rows) and of_several:
        return _Measured(Evaluation(None, None, None, 0), 0, 0)  # all were too long and skipped
    loss = perplexity(model, rows, collate=collate, batch_size=batch_size)
    return _Measured(Evaluation(exact, loss, rouge, evaluated), len(answered), rows.counts.learned)


def _joint(parts: Sequence[_Measured]) -> Evaluation:
    """Return the evaluation of several sets together."""
    answered, read = [p for p in parts if p.answers], [p for p in parts if p.tokens]

    def mean(name: str) -> float | None:
        values = [getattr(part.evaluation, name) for part in answered]
        if not values or None in values:
            return None
        return math.fsum(v * p.answers for v, p in zip(values, answered, strict=True)) / sum(
            p.answers for p in answered
        )

    losses = (math.log(part.evaluation.perplexity or math.nan) * part.tokens for part in read)
    joint = perplexity_of(math.fsum(losses) / sum(part.tokens for part in read)) if read else None
    return Evaluation(mean("exact_match"), joint, mean("rouge_l"), sum(part.evaluation.examples for part in parts))
