"""Tokenise examples for a training loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gradpruner.data.counts import Counts
from gradpruner.data.encoder import Encoded, Encoder
from gradpruner.data.examples import Example
from gradpruner.data.row_facts import learned_tokens
from gradpruner.data.rows import Rows, rows_of

ROWS_AT_ONCE = 1000  # examples that are tokenised together


class RowList(list[dict[str, list[int]]]):
    """Tokenised rows in memory.

    `counts` says what became of the examples.
    """

    counts: Counts


def tokenize(
    examples: Iterable[Example],
    tokenizer: Any,
    *,
    max_length: int,
    train_on: str = "answer",
    too_long: str | None = None,
) -> RowList | Rows:
    """Tokenise examples as the model will read them.

    Text becomes [prefix] prompt answer [end]. The prefix is what the tokenizer itself puts before a text, and the end
    is the token that ends an answer. Prompt and answer are tokenised apart, so that the answer's tokens do not depend
    on the prompt's end and generation from the prompt can reproduce them. Messages become what the tokenizer's chat
    template writes, and nothing is added but an end token where the template has no token that ends a turn.

    Args:
        examples: what to tokenise. Those of `load_examples` stay on disk, and so do their rows.
        tokenizer: the model's. It must have an end token, and for messages a chat template.
        max_length: the most tokens of a row.
        train_on: the tokens that have labels. "answer": the answer and its end token; of messages, every turn of the
            assistant after the prompt. "assistant": every turn of the assistant. "last": the last of them. "all":
            every token. An example without an answer has labels on every token.
        too_long: what becomes of an example that is longer. "cut": text loses its beginning, a conversation its oldest
            exchanges; an answer is never cut. "skip": it is left out. "error": it is refused. "split": text
            without an answer becomes several rows. Default: "split" for text without an answer, "cut" for the rest.

    Returns:
        `input_ids` and `labels` of each row. Labels are -100 where nothing is learned. Rows on disk (`Rows`) if the
        examples are on disk, otherwise a list. `counts` says what was cut, skipped or split.

    Raises:
        InvalidArgument: an answer does not fit or has no tokens, an argument is unknown, the tokenizer has no end
            token, or the chat template cannot be used with these messages.
    """
    encoder = Encoder(tokenizer, max_length, train_on, too_long)
    if getattr(examples, "fingerprint", None) is not None:
        return rows_of(examples, encoder)
    made, every = RowList(), list(examples)
    encoded: list[Encoded] = []
    for start in range(0, len(every), ROWS_AT_ONCE):
        encoded += encoder(every[start : start + ROWS_AT_ONCE], start)
    made += [{"input_ids": row.input_ids, "labels": row.labels} for row in encoded if row.input_ids]
    made.counts = counts_of(encoded, len(every))
    return made


def counts_of(encoded: Sequence[Encoded], examples: int) -> Counts:
    """Count rows and tokens.

    Args:
        encoded: what the examples became.
        examples: how many there were.
    """
    kept = [row for row in encoded if row.input_ids]
    cut = [row.lost for row in kept if row.lost]
    skipped = [row.lost for row in encoded if not row.input_ids]
    parts: dict[int, int] = {}
    for row in kept:
        parts[row.example] = parts.get(row.example, 0) + 1
    return Counts(
        examples=examples,
        rows=len(kept),
        tokens=sum(len(row.input_ids) for row in kept),
        learned=sum(learned_tokens({"labels": row.labels}) for row in kept),
        cut=len(cut),
        cut_tokens=sum(cut),
        skipped=len(skipped),
        skipped_tokens=sum(skipped),
        split=sum(count > 1 for count in parts.values()),
    )
