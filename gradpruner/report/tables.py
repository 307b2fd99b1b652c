"""One table in three forms: aligned text, Markdown and HTML.

The macro `table` of macros.html makes the HTML. All forms take the same rows: a sequence of mappings from a column's
name to a value. The columns are all names in the order in which they first appear. A name may hold newlines, where HTML
breaks the line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Rows = Sequence[Mapping[str, Any]]


class Tagged(NamedTuple):
    """A cell that begins with one word of judgement. A page shows the word as a coloured tag.

    Args:
        tag: the word, which is also the name of its CSS class: "ahead", for example.
        text: what follows the word.
    """

    tag: str
    text: str

    def __str__(self) -> str:
        return f"{self.tag} {self.text}"


def table(rows: Rows) -> str:
    """Return the rows as aligned text with a header, numbers to the right; "" without rows."""
    if not rows:
        return ""
    columns = columns_of(rows)
    cells = [[" ".join(column.split()) for column in columns]]
    cells += [[shown(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [is_numeric(rows, column) for column in columns]
    lines = [
        "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(rows: Rows) -> str:
    """Return the rows as a Markdown table. Bars and line breaks in a cell are harmless."""
    columns = columns_of(rows)
    lines = [columns, ["---"] * len(columns), *([shown(row.get(column)) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(_markdown_cell(text) for text in line) + " |" for line in lines)


def columns_of(rows: Rows) -> list[str]:
    """Return the names of all columns, in the order in which they first appear."""
    return list(dict.fromkeys(column for row in rows for column in row))


def is_numeric(rows: Rows, column: str) -> bool:
    """Return whether a column holds only numbers, so that it is aligned to the right.

    Args:
        rows: the table.
        column: the name of the column. A missing value counts as a number.
    """
    return all(isinstance(row.get(column), int | float | None) for row in rows)


def shown(value: Any) -> str:
    """Return a value as a person reads it: four significant digits, nothing for None."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _markdown_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
