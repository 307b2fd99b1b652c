"""Templates that make a text from the columns of a row."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from gradpruner.errors import InvalidArgument
from gradpruner.storage.files import decode_json

Row = Mapping[str, Any]

Template = list[tuple[str, str | None]]  # text, then the column that follows it


class RowError(Exception):
    """What is wrong with one row, to be read after the name of the row."""


class EmptyRow(RowError):
    """A row without a text or an answer."""


def parse_template(argument: str, template: str, row: Row) -> Template:
    """Return the parts of a template.

    Args:
        argument: its name, for messages.
        template: text with fields like {column}. The characters \\\\n and \\\\t stand for a new line and a tab.
        row: a row with the columns that can be named.

    Raises:
        InvalidArgument: the template is broken, or names a column that the row has not.
    """
    template = template.replace("\\n", "\n").replace("\\t", "\t")  # as typed on a command line
    try:
        # str.format itself would also follow attributes and indices; here a field is a column's name, no more
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InvalidArgument(f"{argument} is a broken template ({error}): {template!r}") from None
    for _, column, spec, conversion in fields:
        if spec or conversion:
            raise InvalidArgument(f"{argument} may hold only {{column}} fields, without a format: {template!r}")
        if column is not None and column not in row:
            raise InvalidArgument(f"{argument} names the column {column!r}; there are: {listed(row)}")
    return [(text, column) for text, column, _, _ in fields]


def fill(template: Template, row: Row) -> str:
    """Return the text of a template with the cells of a row.

    Args:
        template: from `parse_template`.
        row: the row.

    Raises:
        RowError: the row lacks a cell, or one is neither text nor a number.
    """
    return "".join(text + (cell(row, column) if column is not None else "") for text, column in template)


def cell(row: Row, column: str) -> str:
    """Return a cell as text.

    Args:
        row: the row.
        column: the cell's column.

    Raises:
        RowError: the cell is missing, or is neither text nor a number.
    """
    value = row.get(column)
    if isinstance(value, str | int | float) and not is_missing(value):
        return str(value)
    found = "no value" if is_missing(value) else f"a {type(value).__name__}"
    raise RowError(f", column {column!r}: {found}; accepted: text or a number")


def json_in(text: str, where: str) -> Any:
    """Return what the JSON in a cell says.

    Args:
        text: the cell.
        where: the cell's place in its row, for messages.

    Raises:
        RowError: the JSON is broken.
    """
    try:
        return decode_json(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{where}: broken JSON: {getattr(error, 'msg', error)}") from None


def is_missing(value: Any) -> bool:
    """Return whether a cell is None or NaN, which is how pandas writes a missing cell."""
    return value is None or (isinstance(value, float) and value != value)


def is_blank(value: Any) -> bool:
    """Return whether a cell holds nothing: no value, an empty text, or an empty list."""
    return is_missing(value) or (isinstance(value, str) and not value.strip()) or (value in ([], {}))


def listed(names: Any) -> str:
    """Return names in quotes, separated by commas."""
    return ", ".join(repr(name) for name in names)
