"""How rows are read and become examples."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gradpruner.checks import check_choice, is_number
from gradpruner.data.examples import Example
from gradpruner.data.formats import (
    CHATS,
    FORMATS,
    MEDIA,
    Chatting,
    Format,
    find_format,
    fitting_formats,
    template_format,
)
from gradpruner.data.templates import Row, RowError, is_blank, listed
from gradpruner.errors import InvalidArgument

JUDGEMENTS = ("label", "kto_tag")  # columns that say whether an answer is good, if they are True or False
TEXT_ROWS = ("file", "line", "paragraph")


@dataclass(frozen=True)
class Reading:
    """The settings that decide which examples a source holds, as `load_examples` has them.

    Args:
        prompt: template of the prompt.
        answer: template of the answer.
        format: name of the format.
        system: system message of chats.
        as_chat: whether pairs of texts become chats.
        delimiter: of the cells of a .csv file.
        encoding: of text files.
        text_rows: what is one row of a .txt file.
        skip_bad_rows: the share of rows that may be bad.
    """

    prompt: str | None = None
    answer: str | None = None
    format: str | None = None
    system: str | None = None
    as_chat: bool = False
    delimiter: str | None = None
    encoding: str | None = None
    text_rows: str = "file"
    skip_bad_rows: float = 0.0

    def __post_init__(self) -> None:
        if self.answer is not None and self.prompt is None:
            raise InvalidArgument("answer is given without prompt; accepted: both, a prompt alone, or neither")
        if self.format is not None:
            check_choice("format", self.format, FORMATS)
            if self.prompt is not None:
                raise InvalidArgument("prompt and format are both given; accepted: a template, or the name of a format")
        check_choice("text_rows", self.text_rows, TEXT_ROWS)
        if not is_number(self.skip_bad_rows) or not 0 <= self.skip_bad_rows < 1:
            raise InvalidArgument(f"skip_bad_rows is {self.skip_bad_rows!r}; accepted: a share from 0 to below 1")
        if self.delimiter is not None:
            object.__setattr__(self, "delimiter", self.delimiter.replace("\\t", "\t"))
            if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
                raise InvalidArgument(f"delimiter is {self.delimiter!r}; accepted: one character, such as ';' or '\\t'")
        if self.encoding is not None:
            try:
                "".encode(self.encoding)
            except (LookupError, TypeError):
                raise InvalidArgument(
                    f"encoding is {self.encoding!r}, which Python does not know; accepted: utf-8, latin-1, cp1252, ..."
                ) from None
        if self.system is not None and not self.system.strip():
            raise InvalidArgument("system is empty; accepted: the text of a system message")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON holds them."""
        return asdict(self)


class Converter:
    """Makes examples of the rows of one source. The first row decides about the format.

    Args:
        reading: the settings.
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._format: Format | None = None
        self._lost: dict[tuple[str, ...], list[str]] = {}
        self._first: frozenset[str] = frozenset()  # columns of the first row
        self._same: set[tuple[str, ...]] = set()  # columns that are known to hold the format of the first row
        self.unused: dict[str, None] = {}  # columns that no example is made of, in the order of their appearance

    @property
    def name(self) -> str:
        """Name of the format, or an empty text before the first row."""
        return self._format.name if self._format else ""

    def __call__(self, row: Row) -> Example:
        """Return the example of a row.

        Raises:
            RowError: the row has no text or answer, or has a content that would be lost.
            InvalidArgument: the format of the first row is unknown.
        """
        if self._format is None:
            self._format, self._first = self._find(row), frozenset(row)
        self._check_same_format(row, self._format.name)
        columns = tuple(row)
        if columns not in self._lost:
            self._lost[columns] = [column for column in columns if column in self._format.loses]
            self.unused.update(dict.fromkeys(c for c in columns if c not in self._format.uses))
        for column in self._lost[columns]:
            if not is_blank(row[column]):
                raise LostColumn(_lost(column, self._format.name))
        for column in JUDGEMENTS:
            if isinstance(row.get(column), bool) and column not in self._format.uses:
                raise LostColumn(
                    f" has a {column!r} True or False beside the answer, as preference data has: answers that were "
                    "judged bad would be learned; keep the rows that are True, and remove the column"
                )
        return self._format.convert(row)

    def _check_same_format(self, row: Row, name: str) -> None:
        """Refuse a row whose further columns make another format of it: they would be left out."""
        if self._reading.prompt is not None or self._reading.format is not None or row.keys() <= self._first:
            return
        filled = {column: value for column, value in row.items() if not is_blank(value)}
        if (columns := tuple(filled)) in self._same:
            return
        found = fitting_formats(filled)
        if found and (found[0] != name or (name in CHATS and len(found) > 1)):
            raise LostColumn(
                f" has further columns ({listed(row.keys() - self._first)}), by which its format is "
                f"{' or '.join(found)}, while that of the first row is {name}; say which one is meant (format)"
            )
        self._same.add(columns)

    def _find(self, row: Row) -> Format:
        reading = self._reading
        chatting = Chatting(reading.system, reading.as_chat)
        if reading.prompt is not None:
            return template_format(row, reading.prompt, reading.answer, chatting)
        return find_format(row, reading.format, chatting)


class LostColumn(RowError):
    """A row with a column that would be lost. It is a mistake in the settings, not in one row."""


def _lost(column: str, name: str) -> str:
    problem = f" has a {column!r}, which would be lost: the format {name} does not use it"
    if column in MEDIA:
        return f"{problem}, and only text is trained on; remove the column if the text alone makes sense"
    if name in CHATS:
        return f"{problem}; put it into the messages, or remove the column"
    return f"{problem}; give templates of prompt and answer, which name {{{column}}} or leave it out"
