"""How good and how fast a model is on the user's own data.

Rows are what `gradpruner.data.tokens.tokenize` returns. Labels other than -100 mark the tokens that count. The
functions below share some arguments: `model` is a transformers model or a PEFT model; `rows` are the rows to evaluate,
in any order; `collate` makes one batch of tensors of a list of rows, as `Collator` does; `batch_size` is the number of
rows of one forward pass and changes only speed and memory.

Several processes share the batches, and each returns the result of all. All of them call the function.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gradpruner.data.row_facts import fact
from gradpruner.distributed.processes import peers_of
from gradpruner.errors import InvalidArgument
from gradpruner.model.loss import IGNORED, answer_logits, cross_entropy_sum
from gradpruner.model.modes import evaluating, to_device

Rows = Sequence[Mapping[str, list[int]]]
Collate = Callable[[Any], Mapping[str, Tensor]]
T = TypeVar("T")
WARM_UP = 8  # tokens generated before any are timed


@dataclass(frozen=True)
class Evaluation:
    """The quality of one model on a set of examples. A measure that was not taken is None.

    Args:
        exact_match: share of the answers that greedy generation reproduces in full, 0 to 1.
        perplexity: exponential of the mean loss per labelled token.
        rouge_l: mean ROUGE-L F-measure of the generated answers, 0 to 1.
        examples: how many examples were evaluated.
    """

    exact_match: float | None
    perplexity: float | None
    rouge_l: float | None
    examples: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """One row's result.

    Args:
        right: whether greedy generation would reproduce the answer, see `exact_matches`.
        loss: sum of the cross entropy over the labelled tokens, in nats.
        tokens: how many tokens are labelled.
        predicted: the argmax token at each labelled position, with the true prefix before it (teacher forcing).
    """

    right: bool
    loss: float
    tokens: int
    predicted: tuple[int, ...]


def answers(model: Any, rows: Rows, *, collate: Collate, batch_size: int) -> list[Answer]:
    """Evaluate every row in one pass: exact match, loss and predicted tokens.

    Args:
        model: see the module.
        rows: see the module.
        collate: see the module.
        batch_size: see the module.

    Returns:
        One result per row, in the order of `rows`.

    Raises:
        InvalidArgument: there are no rows, or a row has no answer.
    """
    result: dict[int, Answer] = {}
    for indices, logits, labels in _batches_of_logits(model, rows, collate, batch_size):
        best = logits.argmax(-1)
        for index, row_logits, row_best, row_labels in zip(indices, logits, best, labels, strict=True):
            labelled = row_labels != IGNORED
            right = bool((row_best == row_labels)[labelled].all())
            predicted = tuple(row_best[labelled].tolist())
            result[index] = Answer(right, cross_entropy_sum(row_logits, row_labels), len(predicted), predicted)
    return _of_all(result)


def macro_f1(predicted: Sequence[Hashable], truth: Sequence[Hashable]) -> float:
    """Compute the mean F1 measure over the classes of `truth`, 0 to 1.

    Args:
        predicted: the predicted class of each example. A class that `truth` does not have lowers only the recall.
        truth: the true class of each example.
    """
    pairs = list(zip(predicted, truth, strict=True))
    scores = []
    for label in sorted(set(truth), key=repr):
        hits = sum(p == label == t for p, t in pairs)
        scores.append(2 * hits / sum((p == label) + (t == label) for p, t in pairs))
    return statistics.fmean(scores)


def exact_match(model: Any, rows: Rows, *, collate: Collate, batch_size: int) -> float:
    """Return the share of rows whose answer greedy generation would reproduce, 0 to 1.

    The end token counts too.

    Args:
        model: see the module.
        rows: see the module.
        collate: see the module.
        batch_size: see the module.

    Raises:
        InvalidArgument: there are no rows, or a row has no answer.
    """
    return statistics.fmean(exact_matches(model, rows, collate=collate, batch_size=batch_size))


def exact_matches(model: Any, rows: Rows, *, collate: Collate, batch_size: int) -> list[bool]:
    """Find out for each row whether greedy generation would reproduce its answer.

    No token is generated. Greedy generation yields exactly the answer if and only if, given the prompt and the answer
    so far, every answer token (and the end token) is the most likely one. One forward pass shows all of them.

    Args:
        model: see the module.
        rows: see the module.
        collate: see the module.
        batch_size: see the module.

    Returns:
        One value per row, in the order of `rows`.

    Raises:
        InvalidArgument: there are no rows, or a row has no answer.
    """
    result: dict[int, bool] = {}
    for indices, logits, labels in _batches_of_logits(model, rows, collate, batch_size):
        right = (logits.argmax(-1) == labels) | (labels == IGNORED)
        for index, row_is_right in zip(indices, right.all(-1).tolist(), strict=True):
            result[index] = row_is_right
    return _of_all(result)


def perplexity_of(loss: float) -> float:
    """Return the perplexity of a mean loss per token in nats.

    It is infinite if it overflows a float, and NaN of a NaN.
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def perplexity(model: Any, rows: Rows, *, collate: Collate, batch_size: int) -> float:
    """Compute the exponential of the mean cross entropy over all labelled tokens.

    Losses are summed in float64.

    Args:
        model: see the module.
        rows: see the module.
        collate: see the module.
        batch_size: see the module.

    Raises:
        InvalidArgument: there are no rows, or a row has no labels.
    """
    sums: dict[int, tuple[float, int]] = {}  # by the first row of each batch
    for indices, logits, labels in _batches_of_logits(model, rows, collate, batch_size):
        loss = cross_entropy_sum(logits.flatten(0, 1), labels.flatten())
        sums[indices[0]] = loss, int((labels != IGNORED).sum())
    losses, tokens = zip(*_of_all(sums), strict=True)
    return perplexity_of(math.fsum(losses) / sum(tokens))


def rouge_l(model: Any, rows: Rows, tokenizer: Any, *, max_new_tokens: int, batch_size: int) -> float:
    """Compute the mean ROUGE-L F-measure of greedily generated answers, 0 to 1.

    Args:
        model: see the module.
        rows: see the module.
        tokenizer: the tokenizer that made the rows.
        max_new_tokens: the longest generated text, in tokens.
        batch_size: see the module.

    Raises:
        InvalidArgument: the rouge-score package is missing, or a row has no prompt or no answer.
    """
    scorer = rouge_scorer()
    _check(rows, batch_size)
    scores: dict[int, float] = {}
    for indices in _own_batches(rows, batch_size):
        prompts = [_prompt(rows[index], index) for index in indices]
        references = [[token for token in rows[index]["labels"] if token != IGNORED] for index in indices]
        ends = [reference[-1] for reference in references]  # a chat's turns may end with another token than a text
        generated = _generate(model, tokenizer, prompts, ends=ends, max_new_tokens=max_new_tokens)
        for index, reference, tokens in zip(indices, references, generated, strict=True):
            pair = [tokenizer.decode(text, skip_special_tokens=True) for text in (reference, tokens)]
            scores[index] = scorer.score(*pair)["rougeL"].fmeasure
    return statistics.fmean(_of_all(scores))


def rouge_scorer() -> Any:
    """Return the scorer of `rouge_l`. Raises InvalidArgument without the rouge-score package."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise InvalidArgument("rouge_l needs the rouge-score package: pip install gradpruner[rouge]") from None
    return RougeScorer(["rougeL"])


def generation_speed(model: Any, tokenizer: Any, *, new_tokens: int = 64, runs: int = 3) -> float:
    """Measure greedy generation of one sequence with a cache, in tokens per second.

    Args:
        model: see the module.
        tokenizer: its tokenizer.
        new_tokens: tokens to generate in each run. Default 64.
        runs: timed runs after a warm-up. Default 3.

    Returns:
        The median of the runs.

    Raises:
        InvalidArgument: `new_tokens` is not positive.
    """
    if new_tokens < 1:
        raise InvalidArgument(f"new_tokens is {new_tokens}; accepted: 1 or more")
    prompts = [tokenizer("Once upon a time")["input_ids"]]

    def seconds(tokens: int = new_tokens) -> float:
        start = time.perf_counter()
        _generate(model, tokenizer, prompts, max_new_tokens=tokens, min_new_tokens=tokens)
        return time.perf_counter() - start  # the tokens are on the host, so the device has finished

    seconds(min(WARM_UP, new_tokens))
    return new_tokens / statistics.median(seconds() for _ in range(runs))


def _batches_of_logits(
    model: Any, rows: Rows, collate: Collate, batch_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield row indices of this process's batches, their logits and their labels.

    Logits and labels are as `answer_logits` returns them.
    """
    _check(rows, batch_size)
    for indices in _own_batches(rows, batch_size):
        batch = to_device(collate([rows[index] for index in indices]), model.device)
        yield indices, *answer_logits(model, batch)


def _generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], ends: Sequence[int] = (), **limits: int
) -> list[list[int]]:
    """Continue prompts greedily up to an end token.

    Prompts are padded on the left, so that all end together.
    """
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with evaluating(model):
        sequences = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # greedy, whatever the model's own generation config prefers
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=sorted({tokenizer.eos_token_id, *ends}),
            **limits,
        )
    return sequences[:, longest:].tolist()


def _batches(rows: Rows, batch_size: int) -> Iterator[list[int]]:
    """Yield row indices, longest rows first.

    There is little padding then, and a batch that is too large for the memory fails at once.
    """
    order = np.argsort(-fact(rows, "length").astype(np.int64), kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size].tolist()


def _own_batches(rows: Rows, batch_size: int) -> Iterator[list[int]]:
    """Yield the batches that this process evaluates: every n-th of them in n processes."""
    peers = peers_of()
    own, count = (0, 1) if peers is None else (peers.rank, peers.size)
    return itertools.islice(_batches(rows, batch_size), own, None, count)


def _of_all(results: Mapping[int, T]) -> list[T]:
    """Return the results of all processes in the order of their numbers."""
    peers = peers_of()
    parts = [results] if peers is None else peers.gather(results)
    every = {number: result for part in parts for number, result in part.items()}
    return [every[number] for number in sorted(every)]


def _check(rows: Rows, batch_size: int) -> None:
    if batch_size < 1:
        raise InvalidArgument(f"batch_size is {batch_size}; accepted: 1 or more")
    if not len(rows):
        raise InvalidArgument("rows is empty: there is nothing to evaluate")
    check_labels(rows)


def check_labels(rows: Rows) -> None:
    """Check that every row has a label after its first token.

    Raises:
        InvalidArgument: one has not. The message names the row.
    """
    unlabelled = np.flatnonzero(fact(rows, "learned") == 0)
    if len(unlabelled):
        raise InvalidArgument(f"row {unlabelled[0]} has no label after its first token: there is nothing to predict")


def _prompt(row: Mapping[str, list[int]], index: int) -> list[int]:
    """Return the tokens before the first label."""
    length = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
    if length == 0:
        raise InvalidArgument(f"row {index} has no prompt to generate from: tokenise it with train_on='answer'")
    return row["input_ids"][:length]
