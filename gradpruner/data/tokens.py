"""Tokenise examples for a training loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from gradpruner.data.examples import Example
from gradpruner.errors import InvalidArgument
from gradpruner.model.loss import IGNORED


def tokenize(
    examples: Iterable[Example],
    tokenizer: Any,
    *,
    max_length: int,
    train_on: Literal["answer", "all"] = "answer",
) -> list[dict[str, list[int]]]:
    """Tokenise examples as [BOS] prompt answer EOS.

    Prompt and answer are tokenised apart, so that the answer's tokens do not depend on the prompt's end and
    generation from the prompt can reproduce them. A prompt that is too long loses its beginning.

    Args:
        examples: what to tokenise.
        tokenizer: the model's. It must have an end token.
        max_length: the most tokens of an example.
        train_on: "answer" for labels on the answer and the end token only, "all" for labels on every token. An example
            without an answer has labels on every token.

    Returns:
        `input_ids` and `labels` of each example. Labels are -100 where nothing is learned.

    Raises:
        InvalidArgument: an answer does not fit or has no tokens, `train_on` is unknown, or the tokenizer has no end
            token.
    """
    if train_on not in ("answer", "all"):
        raise InvalidArgument(f"train_on is {train_on!r}; accepted: 'answer', 'all'")
    if tokenizer.eos_token_id is None:
        raise InvalidArgument("tokenizer has no end token (eos_token), which marks where an answer ends")
    examples = list(examples)
    bos = _bos(tokenizer)
    adds_space = _adds_space(tokenizer)
    prompts = _encode(tokenizer, [example.prompt for example in examples])
    answers = _encode(tokenizer, [_answer_text(example, adds_space) for example in examples])
    rows = []
    for number, (example, prompt_ids, answer_ids) in enumerate(zip(examples, prompts, answers, strict=True), 1):
        if example.answer and not answer_ids:
            raise InvalidArgument(
                f"the answer of example {number} ({example.answer[:40]!r}) has no tokens: there is nothing to learn; "
                "expected text that the tokenizer knows"
            )
        tail = [*answer_ids, tokenizer.eos_token_id]
        # The first answer token is predicted from something: BOS, or at least one token of the prompt.
        needed = len(tail) + min(1, len(bos) + len(prompt_ids))
        if needed > max_length:
            raise InvalidArgument(
                f"max_length is {max_length}, but the answer of example {number} "
                f"({example.answer[:40]!r}) needs {needed} tokens"
            )
        room = max_length - len(bos) - len(tail)
        head = bos + prompt_ids[max(0, len(prompt_ids) - room) :]
        learn_all = train_on == "all" or not example.answer
        labels = (head if learn_all else [IGNORED] * len(head)) + tail
        rows.append({"input_ids": head + tail, "labels": labels})
    return rows


def _bos(tokenizer: Any) -> list[int]:
    """Return the begin token as a list, empty if the tokenizer puts none before a text."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _adds_space(tokenizer: Any) -> bool:
    """Return whether the tokenizer, like SentencePiece's, puts a space before every text."""
    return tokenizer.tokenize("a")[0].startswith("\u2581")


def _answer_text(example: Example, adds_space: bool) -> str:
    prompt, answer = example.prompt, example.answer
    if not prompt or not answer or prompt[-1].isspace() or answer[0].isspace() or adds_space:
        return answer
    return " " + answer


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:  # a fast tokenizer takes an empty batch for a mistake
        return []
    return tokenizer(texts, add_special_tokens=False)["input_ids"]
