"""From conversations to tokens and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from gradpruner.data.chat import ChatTemplate, Conversation, learned_turns
from gradpruner.errors import InvalidArgument
from gradpruner.model.loss import IGNORED

Row = tuple[list[int], list[int]]  # tokens and labels


class Written(NamedTuple):
    """A conversation as text.

    Args:
        parts: the text in parts, each with whether it is learned.
        closed: whether an end-of-turn token stands at the end of what is learned.
    """

    parts: list[tuple[str, bool]]
    closed: bool


class ChatTokens:
    """Makes tokens and labels of conversations.

    Args:
        tokenizer: the model's.
        end: tokens that end an answer. They are added where the template writes no token that ends a turn.
        train_on: see `gradpruner.data.tokens.tokenize`.

    Raises:
        InvalidArgument: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, end: list[int], train_on: str) -> None:
        self._tokenizer, self._end, self._train_on = tokenizer, end, train_on
        self._template = ChatTemplate(tokenizer)
        self._adds_space = adds_space(tokenizer)

    def written(self, conversation: Conversation) -> Written | Row:
        """Write a conversation as text, or as tokens where the template marks what is learned.

        Args:
            conversation: its turns, and which of them are learned.

        Raises:
            InvalidArgument: the template does not accept it, or changes what is learned.
        """
        turns, learned, tools = conversation
        if self._train_on == "all":
            whole = self._template.render(turns, tools)
            return Written([(whole, True)], self._template.ends(whole))
        marks = self._template.marks(tools)
        if marks and self._train_on != "last":
            return self._marked(conversation)
        try:
            whole, spans = self._template.spans(turns, learned, tools)
        except InvalidArgument:
            if not marks:
                raise
            return self._marked(conversation)
        parts, at = [], 0
        for start, end in spans:
            parts += [(whole[at:start], False), (whole[start:end], True)]
            at = end
        if self._template.ends(whole[:at]):
            return Written([*parts, (whole[at:], False)], closed=True)
        return Written(parts, closed=False)

    def _marked(self, conversation: Conversation) -> Row:
        turns, learned, tools = conversation
        ids, marks = self._template.marked(turns, tools)
        if learned != learned_turns(turns, 0, "assistant"):
            (earlier,) = encode(self._tokenizer, [self._template.render(turns[: learned[0]], tools)])
            if ids[: len(earlier)] != earlier:
                raise InvalidArgument(
                    f"the chat template writes what comes before message {learned[0] + 1} otherwise when that message "
                    "follows, so it is not known where it begins; expected train_on 'assistant'"
                )
            marks = [mark and position >= len(earlier) for position, mark in enumerate(marks)]
        if not any(marks):
            raise InvalidArgument("the chat template has {% generation %}, but marks nothing of what is to be learned")
        return ids, [token if mark else IGNORED for token, mark in zip(ids, marks, strict=True)]

    def tokens(self, written: Sequence[Written | Row]) -> list[Row]:
        """Tokenise what was written.

        Texts are tokenised part by part, so that a learned turn follows the tokens that its prompt has at generation.
        A tokenizer that puts a space before every text sees the whole text instead. Then a token that reaches over the
        beginning of a turn is learned.

        Args:
            written: what `written` returned for each conversation.
        """
        texts = [text for one in written if isinstance(one, Written) for text, _ in one.parts]
        parts, rows = iter(encode(self._tokenizer, texts)), []
        for one in written:
            if not isinstance(one, Written):
                rows.append(one)
                continue
            tokens = [next(parts) for _ in one.parts]
            if self._adds_space:
                tokens = self._parts_of_whole(one)
            ids, labels = list[int](), list[int]()
            for part, (_, learned) in zip(tokens, one.parts, strict=True):
                ids += part
                labels += part if learned else [IGNORED] * len(part)
            rows.append((ids, labels) if one.closed else (ids + self._end, labels + self._end))
        return rows

    def _parts_of_whole(self, written: Written) -> list[list[int]]:
        """Return the tokens of the whole text by part.

        A part begins after the tokens that the text before it has alone too.
        """
        texts = ["".join(text for text, _ in written.parts[: i + 1]) for i in range(len(written.parts))]
        *prefixes, whole = encode(self._tokenizer, texts)
        cuts = [0]
        for prefix in prefixes:
            alike = next((i for i, (a, b) in enumerate(zip(prefix, whole, strict=False)) if a != b), len(prefix))
            cuts.append(max(cuts[-1], min(alike, len(whole))))
        return [whole[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(whole)], strict=True)]


def adds_space(tokenizer: Any) -> bool:
    """Return whether a tokenizer, like SentencePiece's, puts a space before every text."""
    return bool(tokenizer.tokenize("a")[0].startswith("\u2581"))


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the tokens of texts, without special tokens around them.

    Args:
        tokenizer: the model's.
        texts: any number of texts.
    """
    if not texts:  # a fast tokenizer takes an empty batch for a mistake
        return []
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return found
