"""From one example to its rows of tokens and labels."""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gradpruner.checks import check_int
from gradpruner.data.chat import Conversation, exchanges, is_chat, learned_turns, turns_of, without_oldest
from gradpruner.data.chat_tokens import ChatTokens, adds_space, encode
from gradpruner.data.examples import Example
from gradpruner.data.special_tokens import Frame
from gradpruner.errors import InvalidArgument
from gradpruner.model.loss import IGNORED

TRAIN_ON = ("answer", "assistant", "last", "all")
TOO_LONG = ("cut", "skip", "error", "split")
ADVICE = "raise max_length, or leave such examples out with too_long 'skip'"


class Encoded(NamedTuple):
    """One row. An example that is skipped has no tokens.

    Args:
        input_ids: the tokens.
        labels: the tokens that are learned, -100 elsewhere.
        example: which example it is from, counted from 0.
        lost: tokens of the example that were cut or skipped.
    """

    input_ids: list[int]
    labels: list[int]
    example: int
    lost: int = 0


class Encoder:
    """Turns examples into rows.

    Args:
        tokenizer: the model's.
        max_length: the most tokens of a row.
        train_on: see `gradpruner.data.tokens.tokenize`.
        too_long: see `gradpruner.data.tokens.tokenize`.

    Raises:
        InvalidArgument: an argument is unknown, or the tokenizer has no end token.
    """

    def __init__(self, tokenizer: Any, max_length: int, train_on: str, too_long: str | None) -> None:
        for name, value, accepted in (("train_on", train_on, TRAIN_ON), ("too_long", too_long, (None, *TOO_LONG))):
            if value not in accepted:
                raise InvalidArgument(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")
        check_int("max_length", max_length, 1, "a number of tokens")
        self.tokenizer, self.max_length, self.train_on, self.too_long = tokenizer, max_length, train_on, too_long
        self._frame = Frame.of(tokenizer)
        self._adds_space = adds_space(tokenizer)
        self._chat: ChatTokens | None = None

    def __call__(
        self, examples: Sequence[Example], first: int, place: Callable[[int], str] | None = None
    ) -> list[Encoded]:
        """Return the rows of some examples.

        Args:
            examples: consecutive examples.
            first: the number of the first of them, counted from 0.
            place: says where an example is from. Default: its number, counted from 1.

        Raises:
            InvalidArgument: an example is not accepted. The message says which.
        """
        place = place or (lambda index: f"example {index + 1}")
        texts = [(first + i, e) for i, e in enumerate(examples) if not is_chat(e)]
        chats = [(first + i, e) for i, e in enumerate(examples) if is_chat(e)]
        made = dict([*self._texts(texts, place), *self._chats(chats, place)])
        return [row for index in sorted(made) for row in made[index]]

    # text

    def _texts(self, examples: list[tuple[int, Example]], place: Callable[[int], str]) -> list[Any]:
        if examples and self.train_on == "assistant":
            raise InvalidArgument(
                f"train_on is 'assistant', but {place(examples[0][0])} has no turns: it is text; accepted for text: "
                "'answer', 'last' (the same) and 'all'"
            )
        prompts = encode(self.tokenizer, [str(example.prompt) for _, example in examples])
        answers = encode(self.tokenizer, [self._answer_text(example) for _, example in examples])
        return [
            (index, self._text(index, example, prompt, answer, place))
            for (index, example), prompt, answer in zip(examples, prompts, answers, strict=True)
        ]

    def _text(
        self, index: int, example: Example, prompt: list[int], answer: list[int], place: Callable[[int], str]
    ) -> list[Encoded]:
        prefix, end = self._frame
        if example.answer and not answer:
            raise InvalidArgument(
                f"the answer of {place(index)} ({example.answer[:40]!r}) has no tokens: there is nothing to learn; "
                "expected text that the tokenizer knows"
            )
        prompt = self._frame.without_prefix(prompt)
        if not example.answer:
            prompt = self._frame.without_end(prompt)
        tail = self._frame.without_end(answer) + end
        length = len(prefix) + len(prompt) + len(tail)
        learn_all = self.train_on == "all" or not example.answer
        if length > self.max_length:
            what = f"{place(index)} ({(example.prompt or example.answer)[:40]!r})"
            if self._skips(length, what, splits=not example.answer):
                return [Encoded([], [], index, length)]
            if not example.answer and self.too_long in (None, "split"):
                return self._windows(index, prompt + end)
        # The first answer token is predicted from something: the prefix, or at least one token of the prompt.
        needed = len(tail) + (len(prefix) or min(1, len(prompt)))
        if needed > self.max_length:
            raise InvalidArgument(
                f"max_length is {self.max_length}, but the answer of {place(index)} "
                f"({example.answer[:40]!r}) needs {needed} tokens; {ADVICE}"
            )
        head = prefix + prompt[max(0, length - self.max_length) :]
        labels = (head if learn_all else [IGNORED] * len(head)) + tail
        return [Encoded(head + tail, labels, index, length - len(head) - len(tail))]

    def _windows(self, index: int, tokens: list[int]) -> list[Encoded]:
        """Cut tokens into consecutive rows, each with the prefix.

        No token is lost, and each has a label.
        """
        prefix = self._frame.prefix
        room = self.max_length - len(prefix)
        if room + min(1, len(prefix)) < 2:
            raise InvalidArgument(
                f"max_length is {self.max_length}; expected {len(prefix) + 1 + (not prefix)} or more: what the "
                "tokenizer puts before a text, and something to predict"
            )
        starts = [*range(0, len(tokens), room), len(tokens)]
        if not prefix and len(starts) > 2 and starts[-1] - starts[-2] == 1:
            starts[-2] -= 1  # one token alone predicts nothing
        rows = [prefix + tokens[start:stop] for start, stop in itertools.pairwise(starts)]
        return [Encoded(row, list(row), index) for row in rows]

    def _answer_text(self, example: Example) -> str:
        prompt, answer = str(example.prompt), str(example.answer)
        if not prompt or not answer or prompt[-1].isspace() or answer[0].isspace() or self._adds_space:
            return answer
        return " " + answer

    def _skips(self, length: int, what: str, *, splits: bool) -> bool:
        """Return whether an example that is too long is left out.

        Raises InvalidArgument if it is refused.
        """
        if self.too_long == "error" or (self.too_long == "split" and not splits):
            reason = "" if self.too_long == "error" else ", and only text without an answer can be split"
            raise InvalidArgument(
                f"max_length is {self.max_length}, but {what} has {length} tokens, and too_long is {self.too_long!r}"
                f"{reason}; expected shorter examples, a larger max_length, or too_long 'cut' or 'skip'"
            )
        return self.too_long == "skip"

    # messages

    def _chats(self, examples: list[tuple[int, Example]], place: Callable[[int], str]) -> list[Any]:
        if not examples:
            return []
        found = [self._found(index, example, place) for index, example in examples]
        rows = self._conversations(found, [index for index, _ in examples], place)
        return [
            (index, self._chat_row(index, conversation, row, place))
            for (index, _), conversation, row in zip(examples, found, rows, strict=True)
        ]

    def _found(self, index: int, example: Example, place: Callable[[int], str]) -> Conversation:
        turns, prompt = turns_of(example)
        learned = learned_turns(turns, prompt, self.train_on)
        if not learned and self.train_on != "all":
            raise InvalidArgument(
                f"{place(index)} has no turn of the assistant {'after its prompt ' if prompt else ''}to learn; "
                "expected a message with the role 'assistant', or train_on 'all'"
            )
        if self.train_on != "all":
            turns = turns[: learned[-1] + 1]  # what follows changes no loss
        return Conversation(turns, learned, json.loads(example.tools) if example.tools else None)

    def _chat_row(
        self, index: int, conversation: Conversation, row: tuple[list[int], list[int]], place: Callable[[int], str]
    ) -> list[Encoded]:
        turns, learned, tools = conversation
        length = len(row[0])
        if length <= self.max_length:
            return [Encoded(*row, index)]
        if self._skips(length, f"{place(index)} ({len(turns)} messages)", splits=False):
            return [Encoded([], [], index, length)]

        def without(count: int) -> tuple[list[int], list[int]]:
            kept = without_oldest(turns, count)
            still = [new for new, old in enumerate(kept) if old in set(learned)]
            return self._conversations([Conversation([turns[i] for i in kept], still, tools)], [index], place)[0]

        # the last exchange stays, and the one with the last learned turn
        most = sum(start <= (learned[-1] if learned else len(turns)) for start in exchanges(turns)) - 1
        counts = range(1, most + 1)
        fits = bisect.bisect_left(counts, True, key=lambda count: len(without(count)[0]) <= self.max_length)
        if fits == len(counts):
            least = len(without(most)[0]) if most > 0 else length
            raise InvalidArgument(
                f"max_length is {self.max_length}, but {place(index)} needs {least} tokens for its last exchange alone "
                f"(with the system message, if it has one); {ADVICE}"
            )
        shorter = without(counts[fits])
        return [Encoded(*shorter, index, length - len(shorter[0]))]

    def _conversations(
        self, conversations: Sequence[Conversation], indices: Sequence[int], place: Callable[[int], str]
    ) -> list[tuple[list[int], list[int]]]:
        """Return tokens and labels of whole conversations."""
        self._chat = self._chat or ChatTokens(self.tokenizer, self._frame.end, self.train_on)
        written = []
        for index, conversation in zip(indices, conversations, strict=True):
            try:
                written.append(self._chat.written(conversation))
            except InvalidArgument as error:
                raise InvalidArgument(f"{place(index)}: {error}") from error
        return self._chat.tokens(written)
