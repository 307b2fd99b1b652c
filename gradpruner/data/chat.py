"""Conversations as a chat template writes them, and which part of the text is learned.

The template is a program: it may leave out what earlier turns said, merge messages, or write another text than a
generation would begin with. So nothing is assumed. A turn is learned only if the text before it is exactly the prompt
that the model would generate the turn from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from gradpruner.data.examples import Example, Message
from gradpruner.errors import InvalidArgument

ASSISTANT = "assistant"
SYSTEM = ("system", "developer")
PROBE = "gradpruner"  # a text that every template should write
THOUGHTS = "</think>"  # templates may leave out what an assistant wrote up to here, or write it elsewhere
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the template itself marks what the assistant wrote

Turn = dict[str, Any]


class Conversation(NamedTuple):
    """The messages of an example.

    Args:
        turns: all messages.
        learned: indices of those that are learned.
        tools: the tools that a template may show, or None.
    """

    turns: list[Turn]
    learned: list[int]
    tools: Any


def is_chat(example: Example) -> bool:
    """Return whether an example has messages instead of text."""
    return isinstance(example.prompt, tuple) or isinstance(example.answer, tuple)


def turns_of(example: Example) -> tuple[list[Turn], int]:
    """Return all messages of an example, and how many of them are the prompt."""
    prompt, answer = _turns(example.prompt, "user"), _turns(example.answer, ASSISTANT)
    return prompt + answer, len(prompt)


def _turns(part: str | tuple[Message, ...], role: str) -> list[Turn]:
    if isinstance(part, str):
        return [{"role": role, "content": part}] if part else []
    return [
        {"role": message.role, "content": message.content, **(json.loads(message.more) if message.more else {})}
        for message in part
    ]


def learned_turns(turns: Sequence[Turn], prompt: int, train_on: str) -> list[int]:
    """Return the indices of the turns that are learned.

    Args:
        turns: all messages.
        prompt: how many of them are the prompt.
        train_on: "answer" for the assistant's turns after the prompt, "assistant" or "all" for all of the assistant's,
            "last" for its last one.
    """
    first = prompt if train_on == "answer" else 0
    found = [i for i, turn in enumerate(turns) if i >= first and turn["role"] == ASSISTANT]
    return found[-1:] if train_on == "last" else found


def without_oldest(turns: Sequence[Turn], count: int) -> list[int]:
    """Return the indices of the turns that stay if the `count` oldest exchanges go.

    An exchange is a user's message and everything up to the user's next. System messages at the beginning stay.

    Args:
        turns: all messages.
        count: exchanges to leave out.
    """
    system = next((i for i, turn in enumerate(turns) if turn["role"] not in SYSTEM), len(turns))
    starts = exchanges(turns)
    begin = starts[count] if count < len(starts) else len(turns)
    return [*range(system), *range(system if not count else begin, len(turns))]


def exchanges(turns: Sequence[Turn]) -> list[int]:
    """Return where each exchange begins."""
    system = next((i for i, turn in enumerate(turns) if turn["role"] not in SYSTEM), len(turns))
    return [i for i, turn in enumerate(turns) if i >= system and (turn["role"] == "user" or i == system)]


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: the model's.

    Raises:
        InvalidArgument: it has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise InvalidArgument(
                "the data has messages, but the tokenizer has no chat template to write them with; expected a model "
                "with one (mostly those named -Instruct or -Chat), or a template as a jinja file: --chat-template "
                "FILE, or tokenizer.chat_template = ... in Python"
            )
        self._tokenizer = tokenizer
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._specials = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._in_parts = self._wants_parts()

    def _wants_parts(self) -> bool:
        """Return whether the template drops content that is text.

        Templates of some vision models want a list of parts.
        """
        for in_parts in (False, True):
            self._in_parts = in_parts
            try:
                if PROBE in self.render([{"role": "user", "content": PROBE}], None):
                    return in_parts
            except InvalidArgument:  # it may want other messages; each example is rendered and checked anyway
                continue
        return False

    def marks(self, tools: Any) -> bool:
        """Return whether the template itself marks what the assistant writes."""
        template = self._tokenizer.get_chat_template(tools=tools)
        return bool(self._tokenizer.is_fast and _MARKED.search(template))

    def render(self, turns: Sequence[Turn], tools: Any, *, generation: bool = False) -> str:
        """Write messages as text.

        Args:
            turns: the messages.
            tools: the tools that the template may show, or None.
            generation: whether the beginning of an assistant's turn follows.

        Raises:
            InvalidArgument: the template refuses the messages.
        """
        options = {"tools": tools, "add_generation_prompt": generation}
        return self._apply(turns, tokenize=False, **options)

    def marked(self, turns: Sequence[Turn], tools: Any) -> tuple[list[int], list[bool]]:
        """Return the tokens, and for each whether the template marks it as the assistant's.

        Args:
            turns: the messages.
            tools: the tools that the template may show, or None.
        """
        made = self._apply(turns, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(made["input_ids"]), [bool(mark) for mark in made["assistant_masks"]]

    def _apply(self, turns: Sequence[Turn], **options: Any) -> Any:
        if self._in_parts:
            turns = [
                {**turn, "content": [{"type": "text", "text": turn["content"]}]}
                if isinstance(turn["content"], str)
                else turn
                for turn in turns
            ]
        try:
            return self._tokenizer.apply_chat_template(list(turns), **options)
        except Exception as error:  # a template is a program, and raises what it likes
            roles = ", ".join(str(turn.get("role")) for turn in turns[:6]) + (", ..." if len(turns) > 6 else "")
            raise InvalidArgument(
                f"the chat template does not accept the messages ({roles or 'none'}): {type(error).__name__}: {error}"
            ) from error

    def spans(self, turns: Sequence[Turn], learned: Sequence[int], tools: Any) -> tuple[str, list[tuple[int, int]]]:
        """Write messages as text, and find the learned turns in it.

        A turn begins where the generation prompt ends. It ends with its end-of-turn token, so that white space after
        it is not learned: no generation gets there.

        Args:
            turns: the messages.
            learned: indices of the turns that are learned.
            tools: the tools that the template may show, or None.

        Returns:
            The text, and the beginning and end of each learned turn in it, in characters.

        Raises:
            InvalidArgument: a turn does not follow the prompt that the model would generate it from.
        """
        whole = self.render(turns, tools)
        return whole, [self._span(whole, turns, index, tools) for index in learned]

    def _span(self, whole: str, turns: Sequence[Turn], index: int, tools: Any) -> tuple[int, int]:
        before = self.render(turns[:index], tools, generation=True) if index else self._opening(whole, turns, tools)
        if not before or not whole.startswith(before):
            raise InvalidArgument(_unlike(index, "before", last=index == len(turns) - 1))
        if index == len(turns) - 1:
            end = len(whole)
        else:
            after = self.render(turns[: index + 1], tools)
            end = self._common(after, whole)
            if self._bare(after[end:]):
                raise InvalidArgument(_unlike(index, "of", last=False))
        turn = self._up_to_its_end(whole[len(before) : end])
        content = turns[index].get("content")
        said = content.rpartition(THOUGHTS)[2].strip() if isinstance(content, str) else ""
        if not turn.strip() or said not in turn:
            raise InvalidArgument(
                f"the chat template does not write the content of message {index + 1}, {said[:40]!r}, which is to be "
                "learned; expected a template that does (--chat-template FILE)"
            )
        return len(before), len(before) + len(turn)

    def _up_to_its_end(self, turn: str) -> str:
        """Return a turn up to its end-of-turn token, or all of it if it has none.

        After that token, a template may write white space, and after the last turn the token that ends a text.
        """
        while self.ends(turn):
            turn = turn.rstrip()
            last = next(special for special in self._specials if turn.endswith(special))
            rest = turn.removesuffix(last)
            if rest == rest.rstrip() or not self.ends(rest):
                return turn
            turn = rest
        return turn

    def _opening(self, whole: str, turns: Sequence[Turn], tools: Any) -> str:
        """Return the text before a conversation's first message, if the assistant wrote that one."""
        closed, opened = self.render(turns[:1], tools), self.render(turns[:1], tools, generation=True)
        beginning = opened.removeprefix(closed)
        found = whole.find(beginning) if beginning != opened else -1
        return whole[: found + len(beginning)] if found >= 0 else ""

    def ends(self, text: str) -> bool:
        """Return whether a text ends with a special token, white space aside."""
        return text.rstrip().endswith(tuple(self._specials))

    def _bare(self, text: str) -> str:
        """Return text without special tokens and white space."""
        for special in self._specials:
            text = text.replace(special, "")
        return text.strip()

    def _common(self, one: str, other: str) -> int:
        """Return how many characters two texts begin with alike.

        No special token is divided.
        """
        size = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        for special in self._specials:
            for inside in range(1, min(len(special), size + 1)):
                begin = size - inside
                if one.startswith(special, begin) or other.startswith(special, begin):
                    return begin
        return size


def _unlike(index: int, where: str, *, last: bool) -> str:
    what = {
        "before": "the text before it is not the prompt that the model would generate it from",
        "of": "in the whole conversation it stands otherwise than when the model has just written it",
    }
    wayout = "train_on 'all', which learns every token" if last else "train_on 'last', which learns the last turn only"
    return (
        f"the chat template changes message {index + 1}, a turn of the assistant that is to be learned: {what[where]} "
        "(templates of models that think do so where a turn has no thoughts, and leave those of earlier turns out); "
        "expected a template that marks the assistant's turns with {% generation %} (--chat-template FILE), or "
        f"{wayout}"
    )
