"""Chats: lists of messages as OpenAI and ShareGPT write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example, Message
from gradpruner.data.templates import EmptyRow, RowError, is_blank, json_in, listed

ASSISTANT = "assistant"

# What ShareGPT data calls the roles, and what chat templates call them.
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bot", "bing", "bard"), ASSISTANT),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response", "ipython"), "tool"),
    **{"system": "system", "developer": "developer", "function_call": ASSISTANT, "tool_call": ASSISTANT},
}


# Keys by which OpenAI, Axolotl and ms-swift say whether a message, or a part of it, is learned.
MARKS = ("weight", "train", "training", "loss", "train_detail", "training_detail")


def chat(messages: list[Message], system: str | None, tools: Any = None) -> Example:
    """Return a conversation as an example: the assistant's first turn begins the answer.

    Args:
        messages: all of them, in order.
        system: text of a system message. It is put first if the conversation has none.
        tools: what the assistant may call: a list, or the JSON of one. Default: none.

    Raises:
        RowError: the assistant says nothing, or nobody speaks before it.
    """
    if system and not any(message.role in ("system", "developer") for message in messages):
        messages = [Message("system", system), *messages]
    first = next((i for i, message in enumerate(messages) if message.role == ASSISTANT), None)
    if first is None:
        roles = listed(dict.fromkeys(message.role for message in messages))
        raise RowError(
            f" has no turn of the assistant: there is nothing to learn; the roles are {roles}, expected {ASSISTANT!r}"
        )
    if not any(message.role not in ("system", "developer") for message in messages[:first]):
        raise RowError(" begins with the assistant; expected a turn of the user before it")
    return Example(tuple(messages[:first]), tuple(messages[first:]), _tools(tools))


def messages_of(value: Any, column: str) -> list[Message]:
    """Return messages that are objects with `role` and `content`.

    Args:
        value: the cell: a list of objects, or the JSON of one.
        column: its name, for messages.

    Raises:
        RowError: it is something else.
    """
    return [_message(m, f", column {column!r}, message {n}") for n, m in enumerate(_list(value, column), 1)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RowError(f"{where}: not an object with a 'role' and a 'content'")
    more = {k: v for k, v in message.items() if k not in ("role", "content") and v is not None}
    marks = [more.pop(name) for name in MARKS if name in more]
    if message["role"] == ASSISTANT and any(mark not in (1, True) for mark in marks):
        raise RowError(
            f"{where} is marked as not to be learned, which is not supported; remove the mark, and choose the turns "
            "that are learned with train_on"
        )
    content = _text(message.get("content"), where)
    if message["role"] == ASSISTANT and not content.strip() and not more.get("tool_calls"):
        raise EmptyRow(f"{where}: an empty turn of the assistant")
    return Message(message["role"], content, _plain_json(more))


def _plain_json(more: Mapping[str, Any]) -> str:
    """Return other keys of a message as JSON, in alphabetical order.

    So messages are equal, however a file orders their keys.
    """
    return json.dumps(dict(sorted(more.items())), ensure_ascii=False) if more else ""


def _text(content: Any, where: str) -> str:
    """Return the content of a message: text, nothing, or a list of parts that are text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"{where}: content is a {type(content).__name__}; accepted: text")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RowError(f"{where}: content has a part of type {kind!r}; accepted: text alone")
        texts.append(part["text"])
    return "".join(texts)


def sharegpt_messages(value: Any, column: str) -> list[Message]:
    """Return messages that are objects with `from` and `value`.

    Args:
        value: the cell: a list of objects, or the JSON of one.
        column: its name, for messages.

    Raises:
        RowError: it is something else, or a role is unknown.
    """
    return [_sharegpt(m, f", column {column!r}, message {n}") for n, m in enumerate(_list(value, column), 1)]


def _sharegpt(message: Any, where: str) -> Message:
    if isinstance(message, Mapping) and "role" in message and "from" not in message:
        return _message(message, where)  # some files of this kind have the other keys
    if not isinstance(message, Mapping) or not isinstance(message.get("value"), str):
        raise RowError(f"{where}: not an object with a 'from' and a 'value'")
    speaker = message.get("from")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise RowError(f"{where} is from {speaker!r}; accepted: {listed(SHAREGPT_ROLES)}")
    plain = {"role": SHAREGPT_ROLES[speaker], "content": message["value"]}
    if speaker in ("function_call", "tool_call"):
        plain |= {"content": "", "tool_calls": _calls(message["value"], where)}
    return _message({**{k: v for k, v in message.items() if k not in ("from", "value")}, **plain}, where)


def _calls(text: str, where: str) -> list[dict[str, Any]]:
    found = json_in(text, where)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowError(f"{where}: a function call without a 'name'")
    return [{"type": "function", "function": call} for call in calls]


def _list(value: Any, column: str) -> list[Any]:
    if isinstance(value, str):
        value = json_in(value, f", column {column!r}")
    if not isinstance(value, list):
        found = "no value" if value is None else f"a {type(value).__name__}"
        raise RowError(f", column {column!r}: {found}; accepted: a list of messages")
    if not value:
        raise EmptyRow(f", column {column!r}: no messages")
    return value


def _tools(value: Any) -> str:
    if is_blank(value):
        return ""
    if isinstance(value, str):
        value = json_in(value, ", column 'tools'")
    if not isinstance(value, list):
        raise RowError(f", column 'tools': a {type(value).__name__}; accepted: a list of tools")
    return json.dumps(value, ensure_ascii=False) if value else ""
