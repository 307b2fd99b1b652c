"""Multiple choice: a question, its choices, and which one is right."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from gradpruner.data.templates import EmptyRow, Row, RowError, cell, is_blank, is_missing, json_in

QUESTIONS = ("question", "question_stem", "query", "ctx", "Question")
CHOICES = ("choices", "options", "endings")
ANSWERS = ("answerKey", "answer_idx", "answer", "label", "correct", "Answer")
LETTERS = string.ascii_uppercase


def choice_columns(row: Row) -> tuple[str, tuple[str, ...], str] | None:
    """Return the columns of question, choices and answer, or None if there are none.

    The choices are one column with a list, or the columns A, B and so on.
    """
    question = next((name for name in QUESTIONS if name in row), None)
    answer = next((name for name in ANSWERS if name in row), None)
    if question is None or answer is None:
        return None
    lists = next((name for name in CHOICES if name in row), None)
    if lists is not None:
        return question, (lists,), answer
    letters = tuple(letter for letter in LETTERS if letter in row)
    return (question, letters, answer) if letters[:2] == ("A", "B") else None


def choice_texts(row: Row, columns: tuple[str, str | None, tuple[str, ...], str]) -> tuple[str, str]:
    """Return the prompt, which lists the choices by letter, and the letter of the right one.

    Args:
        row: the row.
        columns: those of question, context (or None), choices and answer.

    Raises:
        RowError: a part is missing, or it is not clear which choice is right.
    """
    question, context, choices, answer = columns
    labels, texts = _choices(row, choices)
    right = _right(row.get(answer), labels, texts, answer)
    before = f"{cell(row, context)}\n\n" if context and not is_blank(row.get(context)) else ""
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False)]
    return "\n".join([before + cell(row, question).strip(), *lines, "Answer:"]), LETTERS[right]


def _choices(row: Row, columns: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return the labels and the texts of the choices."""
    if len(columns) > 1:
        filled = [column for column in columns if not is_blank(row.get(column))]
        return filled, [cell(row, column) for column in filled]
    (column,) = columns
    value = row.get(column)
    if isinstance(value, str):
        value = json_in(value, f", column {column!r}")
    labels, texts = _labelled(value)
    plain = isinstance(texts, list) and isinstance(labels, list)
    if not plain or not all(isinstance(one, str | int | float) for one in (*texts, *labels)):
        raise RowError(f", column {column!r}: accepted: a list of choices, or an object with 'text' and 'label'")
    if not 2 <= len(texts) <= len(LETTERS) or (labels and len(labels) != len(texts)):
        raise RowError(f", column {column!r}: {len(texts)} choices; accepted: 2 to {len(LETTERS)}, each with a label")
    return [str(label) for label in labels or LETTERS[: len(texts)]], [str(text) for text in texts]


def _labelled(value: Any) -> tuple[Any, Any]:
    """Return labels and texts of choices, as data sets hold them. There may be no labels."""
    if isinstance(value, Mapping) and "text" in value and "label" in value:
        return value["label"], value["text"]
    if isinstance(value, Mapping):
        return list(value), list(value.values())
    if isinstance(value, list) and value and all(isinstance(one, Mapping) and "text" in one for one in value):
        return [one.get("label") for one in value], [one["text"] for one in value]
    return [], value


def _right(value: Any, labels: list[str], texts: list[str], column: str) -> int:
    """Return the place of the right choice: its label, its place from 0 on, or its text."""
    if is_missing(value) or value in ("", -1, "-1"):
        raise EmptyRow(f", column {column!r}: the right choice is not given")
    if isinstance(value, str) and value in labels:
        found = {labels.index(value)}
        if value in texts:
            found.add(texts.index(value))
    elif isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(
            f", column {column!r}: a {type(value).__name__}; accepted: a label, a place from 0 on, or a text"
        )
    else:
        digits = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
        found = {int(digits)} if digits.isascii() and digits.isdigit() and int(digits) < len(texts) else set()
        if isinstance(value, str) and value in texts:
            found.add(texts.index(value))
        if not isinstance(value, str) and str(value) in labels and labels[0] not in LETTERS:
            found = {labels.index(str(value))}
    if len(found) != 1:
        problem = "fits several choices" if found else "fits no choice"
        raise RowError(f", column {column!r}: {value!r} {problem}; accepted: a label, a place from 0 on, or a text")
    return found.pop()
