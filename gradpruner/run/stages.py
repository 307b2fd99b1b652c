"""The three things that stages do with a loaded model: watch its gradients, fine-tune it, measure it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradpruner.checkpoint.masks import HoldSparsity, Masks
from gradpruner.errors import GradPrunerError
from gradpruner.probe.igia import Igia
from gradpruner.run.preflight import check_rows
from gradpruner.training.checkpoints import Checkpoints
from gradpruner.training.data import Collator, Example, tokenize
from gradpruner.training.divergence import explained
from gradpruner.training.evaluate import Evaluation, exact_match, perplexity, rouge_l, rouge_scorer
from gradpruner.training.finetune import Training, add_adapters, finish, train
from gradpruner.training.probe_callback import ProbeCallback
from gradpruner.training.recipe import Recipe, Row


def watch(
    model: Any,
    tokenizer: Any,
    ordered: Sequence[Row],
    recipe: Recipe,
    *,
    of_steps: int | None = None,
    quiet: bool = False,
    masks: Masks | None = None,
) -> tuple[Any, Igia]:
    """Train on `ordered`, on adapters unless rank is 0, with a probe watching every step: the trained model, the igia.

    of_steps: steps of the run that the probe is the beginning of; its learning rate is that run's (P). masks: see
    `tune`; a probe only looks, so adapters are left as they are.
    Raises InvalidArgument (tokens that the model has no embedding of), GradPrunerError if the loss rose, see
    `has_diverged`.
    """
    check_rows(model, tokenizer, ordered)
    watched = add_adapters(model, recipe) if recipe.rank else model
    probe = ProbeCallback(len(ordered) // recipe.rows_a_step)
    callbacks = [probe, *_holding(masks, recipe)]
    training = train(watched, ordered, Collator(tokenizer), recipe, of_steps=of_steps, callbacks=callbacks, quiet=quiet)
    if training.diverged:  # its gradients say nothing of the layers
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
) -> tuple[Any, Training]:
    """Fine-tune on `ordered`; the plain model, adapters folded in, and what the run did.

    masks: kept to in every step where all weights train, and by what adapters have become. checkpoints: see `train`.
    """
    check_rows(model, tokenizer, ordered)
    trained = add_adapters(model, recipe) if recipe.rank else model
    training = train(
        trained,
        ordered,
        Collator(tokenizer),
        recipe,
        quiet=quiet,
        callbacks=_holding(masks, recipe),
        checkpoints=checkpoints,
    )
    plain = finish(trained)
    if masks is not None:
        masks.apply_(plain)
    return plain, training


def _holding(masks: Masks | None, recipe: Recipe) -> list[HoldSparsity]:
    return [HoldSparsity(masks)] if masks is not None and not recipe.rank else []


def measure(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_length: int,
    train_on: str,
    batch_size: int,
    rouge_tokens: int | None = None,
) -> Evaluation:
    """Exact match and ROUGE-L of the answers (None for text without), perplexity of the tokens trained on."""
    if rouge_tokens is not None:
        rouge_scorer()  # what is missing is told before anything is measured
    collate = Collator(tokenizer)
    answered = tokenize([e for e in examples if e.answer], tokenizer, max_length=max_length)
    rows = tokenize(examples, tokenizer, max_length=max_length, train_on=train_on)  # type: ignore[arg-type]
    check_rows(model, tokenizer, rows)
    exact = rouge = None
    if answered:
        exact = exact_match(model, answered, collate=collate, batch_size=batch_size)
    if answered and rouge_tokens is not None:
        rouge = rouge_l(model, answered, tokenizer, max_new_tokens=rouge_tokens, batch_size=batch_size)
    return Evaluation(exact, perplexity(model, rows, collate=collate, batch_size=batch_size), rouge, len(examples))
