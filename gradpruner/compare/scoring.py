"""How the models of a comparison are scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradpruner.data.chat import is_chat
from gradpruner.data.collator import Collator
from gradpruner.data.examples import Example
from gradpruner.data.parts import with_answer
from gradpruner.data.tokens import tokenize
from gradpruner.model.loss import IGNORED
from gradpruner.run.job import Job
from gradpruner.training.evaluate import answers, macro_f1, perplexity, perplexity_of

FEW = 10  # classes: with more of them, macro F1 is not what people look at
EVALUATED_AT_ONCE = 32  # examples


def tested(model: Any, tokenizer: Any, examples: Sequence[Example], job: Job) -> dict[str, Any]:
    """Score a model on examples.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer.
        examples: what to score it on.
        job: how the examples become tokens.

    Returns:
        "exact_match" of the answers, None without answers. "macro_f1", None with more than 10 different answers.
        "perplexity" of the tokens that were trained on. "right": one character per answer, "1" or "0". "examples":
        how many there were.
    """
    collate, scores = Collator(tokenizer), dict[str, Any](exact_match=None, macro_f1=None, right="")
    answered = with_answer(examples)
    rows = tokenize(answered, tokenizer, max_length=job.max_length, train_on="last", too_long=job.too_long)
    judged = answers(model, rows, collate=collate, batch_size=EVALUATED_AT_ONCE) if len(rows) else []
    if judged:
        scores["exact_match"] = sum(answer.right for answer in judged) / len(judged)
        scores["right"] = "".join(str(int(answer.right)) for answer in judged)
        truth = [
            tuple(t for t in row["labels"][1:] if t != IGNORED) for row in rows
        ]  # nothing predicts the first token
        if len(set(truth)) <= FEW:
            scores["macro_f1"] = macro_f1([answer.predicted for answer in judged], truth)
    chats = any(map(is_chat, examples))  # of which more than the last turn may be learned
    if job.train_on in ("answer", "last") and len(answered) == len(examples) and not chats:
        every = rows
        scores["perplexity"] = perplexity_of(sum(a.loss for a in judged) / sum(a.tokens for a in judged))
    else:
        every = job.tokenize(examples, tokenizer)
        scores["perplexity"] = perplexity(model, every, collate=collate, batch_size=EVALUATED_AT_ONCE)
    return {**scores, "examples": every.counts.examples - every.counts.skipped}
