"""How good and how fast a model is on the user's own data.

Rows are what `gradpruner.training.data.tokenize` makes; labels other than -100 mark the tokens that count.
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gradpruner.errors import InvalidArgument
from gradpruner.model.loss import IGNORED, cross_entropy_sum
from gradpruner.model.modes import evaluating

Rows = Sequence[Mapping[str, list[int]]]
Collate = Callable[[Any], Mapping[str, torch.Tensor]]
WARM_UP = 8  # tokens generated before any are timed


@dataclass(frozen=True)
class Evaluation:
    """What was measured on `examples` examples; None where a measure was not asked for."""

    exact_match: float | None  # share of answers reproduced in full, 0 to 1
    perplexity: float | None
    rouge_l: float | None  # mean F-measure, 0 to 1
    examples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """What a model makes of one row. right: see `exact_matches`. loss: sum over `tokens` labelled tokens, in nats.

    said: the most likely token at every labelled position, given what truly stands before it.
    """

    right: bool
    loss: float
    tokens: int
    said: tuple[int, ...]


def answers(model: Any, rows: Rows, *, collate: Collate, batch_size: int) -> list[Answer]:
    """All that one pass tells of every row, in order: exact match, loss and what was said.

    Raises:
        InvalidArgument: there are no rows, or a row has no answer.
    """
    result: dict[int, Answer] = {}
    for indices, logits, labels in _answer_logits(model, rows, collate, batch_size):
        best = logits.argmax(-1)
        for index, scores, said, wanted in zip(indices, logits, best, labels, strict=True):
            counts = wanted != IGNORED
            right = bool((said == wanted)[counts].all())
            tokens = tuple(said[counts].tolist())
            result[index] = Answer(right, cross_entropy_sum(scores, wanted), len(tokens), tokens)
    return [result[index] for index in range(len(rows))]


def macro_f1(said: Sequence[Hashable], truth: Sequence[Hashable]) -> float:
    """Mean over the classes of `truth` of the F1 measure, 0 to 1; an answer outside them only costs recall."""
    scores = []
    for label in sorted(set(truth), key=repr):
        hits = sum(s == label == t for s, t in zip(said, truth, strict=True))
        scores.append(2 * hits / (sum(s == label for s in said) + sum(t == label for t in truth)))
    return statistics.fmean(scores)


def exact_match(model: Any, rows: Rows, *, collate: Collate, batch_size: int) -> float:
    """Share of rows whose answer, end token included, greedy generation would reproduce: 0 to 1.

    Raises:
        InvalidArgument: there are no rows, or a row has no answer.
    """
    return statistics.fmean(exact_matches(model, rows, collate=collate, batch_size=batch_size))


def exact_matches(model: Any, rows: Rows, *, collate: Collate, batch_size: int) -> list[bool]:
    """For each row, in order, whether greedy generation would reproduce its answer.

    No token is generated. Greedy generation yields exactly the answer if and only if, given the prompt and
    the answer so far, every answer token (and the end token) is the most likely one: one forward shows all.

    Raises:
        InvalidArgument: there are no rows, or a row has no answer.
    """
    result = [False] * len(rows)
    for indices, logits, labels in _answer_logits(model, rows, collate, batch_size):
        right = (logits.argmax(-1) == labels) | (labels == IGNORED)
        for index, row_is_right in zip(indices, right.all(-1).tolist(), strict=True):
            result[index] = row_is_right
    return result


def perplexity_of(loss: float) -> float:
    """Perplexity of a mean loss per token, in nats; infinite where it is too large for a float, NaN of a NaN."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def perplexity(model: Any, rows: Rows, *, collate: Collate, batch_size: int) -> float:
    """Exponential of the mean cross entropy of all labelled tokens of all rows, summed in float64.

    Raises:
        InvalidArgument: there are no rows, or a row has no labels.
    """
    total, tokens = 0.0, 0
    for _, logits, labels in _answer_logits(model, rows, collate, batch_size):
        total += cross_entropy_sum(logits.flatten(0, 1), labels.flatten())
        tokens += int((labels != IGNORED).sum())
    return perplexity_of(total / tokens)


def rouge_l(model: Any, rows: Rows, tokenizer: Any, *, max_new_tokens: int, batch_size: int) -> float:
    """Mean ROUGE-L F-measure, 0 to 1, of greedy generation against the answers.

    Raises:
        InvalidArgument: the rouge-score package is missing, or a row has no prompt or no answer.
    """
    scorer = rouge_scorer()
    _check(rows, batch_size)
    scores = []
    for indices in _batches(rows, batch_size):
        prompts = [_prompt(rows[index], index) for index in indices]
        answers = [[token for token in rows[index]["labels"] if token != IGNORED] for index in indices]
        written = _generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
        for answer, tokens in zip(answers, written, strict=True):
            pair = [tokenizer.decode(text, skip_special_tokens=True) for text in (answer, tokens)]
            scores.append(scorer.score(*pair)["rougeL"].fmeasure)
    return statistics.fmean(scores)


def rouge_scorer() -> Any:
    """What `rouge_l` scores with. Raises InvalidArgument if the rouge-score package is missing."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise InvalidArgument("rouge_l needs the rouge-score package: pip install gradpruner[rouge]") from None
    return RougeScorer(["rougeL"])


def generation_speed(model: Any, tokenizer: Any, *, new_tokens: int = 64, runs: int = 3) -> float:
    """Tokens per second of greedy generation with a cache, one sequence: median of `runs` after a warm-up.

    Raises:
        InvalidArgument: `new_tokens` is not positive.
    """
    if new_tokens < 1:
        raise InvalidArgument(f"new_tokens is {new_tokens}; accepted: 1 or more")
    prompts = [tokenizer("Once upon a time")["input_ids"]]

    def run(tokens: int = new_tokens) -> float:
        start = time.perf_counter()
        _generate(model, tokenizer, prompts, max_new_tokens=tokens, min_new_tokens=tokens)
        return time.perf_counter() - start  # the tokens are on the host, so the device has finished

    run(min(WARM_UP, new_tokens))
    return new_tokens / statistics.median(run() for _ in range(runs))


def _answer_logits(
    model: Any, rows: Rows, collate: Collate, batch_size: int
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Row indices, logits (rows, positions, vocabulary) and the labels (rows, positions) they predict.

    Only positions that predict a label of some row of the batch are there, in the model's own dtype.
    """
    _check(rows, batch_size)
    some = "logits_to_keep" in inspect.signature(_transformer(model).forward).parameters
    with evaluating(model):
        for indices in _batches(rows, batch_size):
            batch = {name: t.to(model.device) for name, t in collate([rows[i] for i in indices]).items()}
            labels = batch.pop("labels")[:, 1:]  # the logits at one position predict the next token
            positions = (labels != IGNORED).any(0).nonzero().flatten()
            if some:
                logits = model(**batch, use_cache=False, logits_to_keep=positions).logits
            else:
                logits = model(**batch, use_cache=False).logits[:, positions]
            yield indices, logits, labels[:, positions]


def _generate(model: Any, tokenizer: Any, prompts: list[list[int]], **limits: int) -> list[list[int]]:
    """Greedy continuations of `prompts`, padded on the left so that all end where generation starts."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with evaluating(model):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # greedy, whatever the model's own generation config prefers
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            **limits,
        )
    return out[:, longest:].tolist()


def _transformer(model: Any) -> Any:
    """The transformers model inside a PEFT model, whose own `forward` hides its arguments."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _batches(rows: Rows, batch_size: int) -> Iterator[list[int]]:
    """Row indices, longest first: little padding, and a batch too large for the memory fails at once."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _check(rows: Rows, batch_size: int) -> None:
    if batch_size < 1:
        raise InvalidArgument(f"batch_size is {batch_size}; accepted: 1 or more")
    if not rows:
        raise InvalidArgument("rows is empty: there is nothing to evaluate")
    check_labels(rows)


def check_labels(rows: Rows) -> None:
    """Raises InvalidArgument if a row has no answer: no token with a label that another one stands before."""
    for index, row in enumerate(rows):
        if all(label == IGNORED for label in row["labels"][1:]):
            raise InvalidArgument(f"row {index} has no label after its first token: there is nothing to predict")


def _prompt(row: Mapping[str, list[int]], index: int) -> list[int]:
    length = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
    if length == 0:
        raise InvalidArgument(f"row {index} has no prompt to generate from: tokenise it with train_on='answer'")
    return row["input_ids"][:length]
