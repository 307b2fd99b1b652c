"""The formats that training data comes in, found by the columns of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gradpruner.data.chats import ASSISTANT, chat, messages_of, sharegpt_messages
from gradpruner.data.choices import LETTERS, choice_columns, choice_texts
from gradpruner.data.examples import Example, Message
from gradpruner.data.templates import EmptyRow, Row, RowError, cell, fill, is_blank, listed, parse_template
from gradpruner.errors import InvalidArgument

# Column pairs that need no template; of each format, the first pair that a row has is taken.
PROMPT_COMPLETION = tuple(("prompt", answer) for answer in ("completion", "answer", "response"))
QUESTION_ANSWER = (("question", "answer"), ("question", "response"))
ALPACA = tuple(("instruction", answer) for answer in ("output", "response"))
TEXT_LABEL = tuple(("text", answer) for answer in ("label", "category", "answer"))

SYSTEM = ("system", "system_prompt")
CONTEXT = ("context", "passage", "article")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")


@dataclass(frozen=True)
class Format:
    """A format as it is found in one source.

    Args:
        name: as `FORMATS` has it, or "template".
        convert: makes an example of a row. It raises RowError.
        uses: the columns that are read.
        loses: columns that belong to the task. A row with content there is refused, because it would be lost.
    """

    name: str
    convert: Callable[[Row], Example]
    uses: tuple[str, ...]
    loses: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Chatting:
    """How texts become chats.

    Args:
        system: text of a system message, for chats that have none.
        pairs: whether a prompt and an answer become a turn of the user and one of the assistant.
    """

    system: str | None = None
    pairs: bool = False

    def pair(
        self, prompt: str, answer: str, system: str | None = None, history: list[Message] | None = None
    ) -> Example:
        """Return the example of a prompt and its answer, as text or as a chat.

        Args:
            prompt: the text before the answer.
            answer: the text to learn.
            system: the row's own system message. It makes a chat of any pair.
            history: earlier messages, which make a chat of any pair.
        """
        if not answer.strip():
            raise EmptyRow(" has an empty answer")
        if not (self.pairs or self.system or system or history):
            return Example(prompt, answer)
        messages = [*(history or ()), Message("user", prompt), Message(ASSISTANT, answer)]
        return chat(messages, system or self.system)


def template_format(row: Row, prompt: str, answer: str | None, chatting: Chatting) -> Format:
    """Return the format that the user's templates describe.

    Args:
        row: a row with all columns.
        prompt: template of the prompt.
        answer: template of the answer. None makes plain text.
        chatting: whether the texts become chats.

    Raises:
        InvalidArgument: a template is broken, or names a column that the row has not.
    """
    before, after = parse_template("prompt", prompt, row), parse_template("answer", answer or "", row)

    def convert(row: Row) -> Example:
        text, learned = fill(before, row), fill(after, row)
        return chatting.pair(text, learned) if after else _plain(text)

    if not after and (chatting.pairs or chatting.system):
        raise InvalidArgument("a chat is asked for, but there is no answer template; expected a template of the answer")
    return Format("template", convert, tuple(column for _, column in (*before, *after) if column is not None))


def _plain(text: str) -> Example:
    if not text.strip():
        raise EmptyRow(" has an empty text")
    return Example(text)


def _text(row: Row, chatting: Chatting) -> Format | None:
    if "text" not in row:
        return None
    if chatting.pairs or chatting.system:
        raise InvalidArgument(
            "a chat is asked for, but the data is plain text (column 'text'); expected chats or pairs"
        )
    return Format("text", lambda row: _plain(cell(row, "text")), ("text",), frozenset(MEDIA))


def _pairs(name: str, pairs: tuple[tuple[str, str], ...]) -> Callable[[Row, Chatting], Format | None]:
    """Return what finds a pair of columns in a row."""

    def find(row: Row, chatting: Chatting) -> Format | None:
        pair = next((pair for pair in pairs if pair[0] in row and pair[1] in row), None)
        if pair is None:
            return None
        prompt, answer = pair

        def convert(row: Row) -> Example:
            if isinstance(row.get(prompt), list) or isinstance(row.get(answer), list):
                return _conversational(row, prompt, answer, chatting)
            if not is_blank(row.get("tools")):
                raise RowError(" has tools, which need messages as prompt and answer")
            return chatting.pair(cell(row, prompt), cell(row, answer), _system(row))

        loses = {*CONTEXT, *MEDIA, "input", "history", "choices", "options"} - {*pair}
        return Format(name, convert, (prompt, answer, *SYSTEM, "tools"), frozenset(loses))

    return find


def _conversational(row: Row, prompt: str, answer: str, chatting: Chatting) -> Example:
    if not (isinstance(row.get(prompt), list) and isinstance(row.get(answer), list)):
        raise RowError(f": one of {prompt!r} and {answer!r} holds messages, and the other one does not")
    before, after = messages_of(row[prompt], prompt), messages_of(row[answer], answer)
    whole = chat([*before, *after], _system(row) or chatting.system, row.get("tools"))
    messages = (*whole.prompt, *whole.answer)  # the prompt may hold earlier turns of the assistant
    if not any(message.role == ASSISTANT for message in after):
        raise RowError(f", column {answer!r}: no turn of the assistant: there is nothing to learn")
    return Example(messages[: -len(after)], messages[-len(after) :], whole.tools)


def _system(row: Row) -> str | None:
    return next((cell(row, column) for column in SYSTEM if not is_blank(row.get(column))), None)


def _alpaca(row: Row, chatting: Chatting) -> Format | None:
    pair = next((pair for pair in ALPACA if pair[0] in row and pair[1] in row), None)
    if pair is None:
        return None
    instruction, answer = pair
    inputs = ("input", "context")

    def convert(row: Row) -> Example:
        texts = [cell(row, instruction), *(cell(row, column) for column in inputs if not is_blank(row.get(column)))]
        return chatting.pair("\n".join(texts), cell(row, answer), _system(row), _history(row.get("history")))

    loses = {*MEDIA, *CONTEXT, "tools"} - {*inputs}
    return Format("alpaca", convert, (*pair, *inputs, *SYSTEM, "history"), frozenset(loses))


def _history(value: object) -> list[Message]:
    if is_blank(value):
        return []
    pairs: list[Any] = value if isinstance(value, list) else [None]
    if not all(isinstance(v, list) and len(v) == 2 and all(isinstance(text, str) for text in v) for v in pairs):
        raise RowError(", column 'history': accepted: a list of [prompt, answer] pairs of text")
    return [Message(role, text) for pair in pairs for role, text in zip(("user", ASSISTANT), pair, strict=True)]


def _messages(row: Row, chatting: Chatting) -> Format | None:
    if "messages" not in row:
        return None
    return Format(
        "messages",
        lambda row: chat(
            messages_of(row.get("messages"), "messages"), _system(row) or chatting.system, row.get("tools")
        ),
        ("messages", "tools", *SYSTEM),
        frozenset({*MEDIA, *CONTEXT}),
    )


def _sharegpt(row: Row, chatting: Chatting) -> Format | None:
    column = next((name for name in ("conversations", "conversation") if name in row), None)
    if column is None:
        return None
    return Format(
        "sharegpt",
        lambda row: chat(sharegpt_messages(row.get(column), column), _system(row) or chatting.system, row.get("tools")),
        (column, "tools", *SYSTEM),
        frozenset({*MEDIA, *CONTEXT}),
    )


def _choice(row: Row, chatting: Chatting) -> Format | None:
    columns = choice_columns(row)
    if columns is None:
        return None
    question, choices, answer = columns
    context = next((name for name in CONTEXT if name in row), None)

    def convert(row: Row) -> Example:
        lettered = (
            tuple(letter for letter in LETTERS if letter in row) if len(choices) > 1 else ()
        )  # a row may have more
        return chatting.pair(*choice_texts(row, (question, context, lettered or choices, answer)))

    uses = (question, *(LETTERS if len(choices) > 1 else choices), answer, *((context,) if context else ()))
    return Format("multiple-choice", convert, uses, frozenset({*MEDIA, *CONTEXT, *SYSTEM} - {*uses}))


def _remedy(row: Row) -> str:
    """Say what to do about columns that no format has."""
    if "input_ids" in row:
        return "these are tokens; expected the text that they were made of"
    usual = {column.strip().lower(): value for column, value in row.items()}
    if any(find(usual, Chatting()) for find in _FINDERS.values()):
        return f"only spaces or capitals make the names differ from known ones; rename them to {listed(usual)}"
    column = next((name for name, value in row.items() if isinstance(value, str)), "column")
    return f"give templates of prompt and answer, such as prompt '{{{column}}}'; a .csv file begins with the names"


# In the order of preference, if a row fits several.
_FINDERS: dict[str, Callable[[Row, Chatting], Format | None]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "multiple-choice": _choice,
    "prompt-completion": _pairs("prompt-completion", PROMPT_COMPLETION),
    "question-answer": _pairs("question-answer", QUESTION_ANSWER),
    "alpaca": _alpaca,
    "text-label": _pairs("text-label", TEXT_LABEL),
    "text": _text,
}
FORMATS = tuple(_FINDERS)
CHATS = ("messages", "sharegpt")


def fitting_formats(row: Row) -> list[str]:
    """Return the formats whose columns a row has, in the order of preference."""
    return [name for name, find in _FINDERS.items() if find(row, Chatting())]


def find_format(row: Row, name: str | None, chatting: Chatting) -> Format:
    """Return the format of a row.

    Args:
        row: the first row of a source.
        name: one of `FORMATS`, which the row must fit. Default: found by the columns.
        chatting: whether texts become chats.

    Raises:
        InvalidArgument: no format fits, more than one does and they differ, or the data is preference data.
    """
    filled = {column: value for column, value in row.items() if not is_blank(value)}
    if name is not None:
        found = _FINDERS[name](row, chatting)
        if found is None:
            raise InvalidArgument(f"format is {name!r}, but the columns {listed(row)} do not hold it")
        return found
    if "chosen" in row and "rejected" in row:
        raise InvalidArgument(
            "the columns 'chosen' and 'rejected' are preference data, which fine-tuning cannot use; train on it with a "
            "preference trainer such as trl.DPOTrainer, or keep the chosen answers alone as prompt and completion"
        )
    fitting = fitting_formats(row)
    if not fitting:
        raise InvalidArgument(
            f"prompt is missing, and the columns {listed(row)} hold no known pair and no other known format "
            f"({', '.join(FORMATS)}); {_remedy(row)}"
        )
    if fitting[0] in CHATS and len(fitting) > 1:  # a table has all columns, also those that no row fills
        fitting = [name for name in fitting if _FINDERS[name](filled, Chatting())]
    if len(fitting) != 1 and (not fitting or fitting[0] in CHATS):
        raise InvalidArgument(
            f"the columns {listed(row)} hold several formats{': ' * bool(fitting)}{', '.join(fitting)}; "
            "say which one is meant (format)"
        )
    found = _FINDERS[fitting[0]](row, chatting)
    assert found is not None  # the row has at least the columns that were looked at
    return found
