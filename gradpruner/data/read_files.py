"""Read the rows of a data file, each with its line."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gradpruner.data.open_files import file_type, open_bytes, open_text
from gradpruner.data.reading import Reading
from gradpruner.data.templates import Row
from gradpruner.errors import InvalidArgument
from gradpruner.storage.files import decode_json, decode_json_at

LONGEST_CELL = 1 << 30  # characters; the csv module's own limit is 128 KiB
CHATS = ("messages", "conversations", "conversation")  # names of lists that are one row
BATCH = 1000  # rows of an Arrow table that are turned into Python objects at a time


@dataclass(frozen=True)
class Broken:
    """A row that cannot be read, though those after it can."""

    problem: str


Read = tuple[int | None, Row | Broken]  # the line where the row begins, if the file has lines


def read_file(path: Path, reading: Reading) -> Iterator[Read]:
    """Read the rows of a file.

    Args:
        path: a file whose type is known.
        reading: delimiter, encoding, and what is a row of text.

    Yields:
        The line where a row begins, or None if the file has no lines, and the row.

    Raises:
        InvalidArgument: the file as a whole is broken.
    """
    kind = file_type(path)[0]
    if kind in (".parquet", ".arrow"):
        yield from _read_arrow(path, kind)
    elif kind in (".csv", ".tsv"):
        with open_text(path, reading.encoding, newline="") as file:
            yield from _read_csv(file, path, reading.delimiter, "\t" if kind == ".tsv" else ",")
    elif kind == ".txt":
        with open_text(path, reading.encoding) as file:
            yield from _read_text(file, reading.text_rows)
    else:
        with open_text(path, reading.encoding) as file:
            yield from _read_lines(file, path) if kind != ".json" else _read_json(file.read(), path)


def _read_text(file: IO[str], rows: str) -> Iterator[Read]:
    if rows == "line":
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, {"text": line.rstrip("\n")}
    elif rows == "paragraph":
        yield from _paragraphs(file)
    elif (text := file.read()).strip():
        yield 1, {"text": text}


def _paragraphs(file: IO[str]) -> Iterator[Read]:
    lines: list[str] = []
    start = 1
    for number, line in enumerate(file, 1):
        if line.strip():
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield start, {"text": "".join(lines).rstrip("\n")}
            lines = []
    if lines:
        yield start, {"text": "".join(lines).rstrip("\n")}


def _read_lines(file: Iterable[str], path: Path) -> Iterator[Read]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, _object(line, f"{path}, line {number}")


def _object(line: str, where: str) -> Row | Broken:
    try:
        row = decode_json(line)
    except (ValueError, RecursionError) as error:
        return Broken(f"{where}: broken JSON: {_reason(error)}{_hint(line)}")
    if isinstance(row, dict):
        return row
    return Broken(f"{where}: {type(row).__name__} instead of an object of columns{_hint(line)}")


def _hint(line: str) -> str:
    return "; a file that is one JSON list needs a name that ends in .json" if line.lstrip().startswith("[") else ""


_SPACE = re.compile(r"\s*")


def _read_json(text: str, path: Path) -> Iterator[Read]:
    """Read a list of objects, an object that holds one, or one object a line."""
    start = _after_space(text, 0)
    if start == len(text):
        return
    if text[start] == "[":
        yield from _read_json_list(text, start, path)
        return
    lists: dict[str, int] = {}
    end = start
    if text[start] == "{":
        with _json_errors(path):
            lists, end = _lists_in(text, start)
        if text[end:].strip():
            yield from _read_lines(io.StringIO(text), path)
            return
        if lists.keys() & {*CHATS}:  # the list is not the rows: the object is one conversation
            yield 1, decode_json(text)
            return
    if len(lists) != 1:
        several = f"; it holds several: {', '.join(lists)}" if lists else ""
        raise InvalidArgument(
            f"{path} is not a JSON list of objects, nor an object with one such list, nor one object a line{several}"
        )
    (start,) = lists.values()
    yield from _read_json_list(text, start, path)


@contextlib.contextmanager
def _json_errors(path: Path) -> Iterator[None]:
    """Say of what is raised inside that the JSON of a file is broken, and where."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"{path}, line {error.lineno}: broken JSON: {_reason(error)}") from None
    except InvalidArgument:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path}: broken JSON: {error}") from None


def _lists_in(text: str, start: int) -> tuple[dict[str, int], int]:
    """Find the lists of objects in an object.

    Returns where each begins, by its name, and where the object ends. What is decoded is not kept: all at once would
    take much memory.
    """
    places: dict[str, int] = {}
    tables: dict[str, int] = {}
    place = _after_space(text, start + 1)
    while text[place : place + 1] != "}" or places:
        if text[place : place + 1] != '"':
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, place)
        name, end = decode_json_at(text, place)
        if name in places:
            raise json.JSONDecodeError(f"the object has the name {name!r} twice", text, place)
        colon = _after_space(text, end)
        if text[colon : colon + 1] != ":":
            raise json.JSONDecodeError("Expecting ':' delimiter", text, colon)
        places[name] = value = _after_space(text, colon + 1)
        if text[value : value + 1] == "[":
            end = _after_space(text, value + 1)
            for _, element, after in _elements(text, value):
                end = after
                if isinstance(element, dict):
                    tables[name] = value
            end = _after_space(text, end) + 1  # behind the bracket
        else:
            end = decode_json_at(text, value)[1]
        place = _after_space(text, end)
        mark = text[place : place + 1]
        if mark not in (",", "}"):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
        if mark == "}":
            break
        place = _after_space(text, place + 1)
    return tables, place + 1


def _elements(text: str, start: int) -> Iterator[tuple[int, Any, int]]:
    """Decode one element of a list after the other: all at once would take much memory.

    Args:
        text: a text with a list.
        start: where the list begins.

    Yields:
        Where an element begins, the element, and where it ends. The list ends with the bracket after the last one.
    """
    place = _after_space(text, start + 1)
    while text[place : place + 1] != "]":
        element, end = decode_json_at(text, place)
        yield place, element, end
        end = _after_space(text, end)
        mark = text[end : end + 1]
        if mark == "]":
            return
        if mark != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        place = _after_space(text, end + 1)
        if text[place : place + 1] == "]":
            raise json.JSONDecodeError("Expecting value", text, place)


def _read_json_list(text: str, start: int, path: Path) -> Iterator[Read]:
    """Read the objects of a list. If the list is all of the text, nothing may follow it."""
    whole = not text[:start].strip()
    line, counted, end, first = 1, 0, _after_space(text, start + 1), True
    with _json_errors(path):
        for place, row, after in _elements(text, start):
            end = after
            line, counted = line + text.count("\n", counted, place), place
            if isinstance(row, dict):
                yield line, row
            elif whole and first:
                raise InvalidArgument(f"{path} is not a JSON list of objects, but one of {type(row).__name__}")
            else:
                yield line, Broken(f"{path}, line {line}: {type(row).__name__} instead of an object of columns")
            first = False
        end = _after_space(text, _after_space(text, end) + 1)
        if whole and end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)


def _after_space(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    return found.end() if found else start


def _read_csv(file: IO[str], path: Path, delimiter: str | None, usual: str) -> Iterator[Read]:
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(file, strict=True, delimiter=delimiter or usual)
    header: list[str] = []
    start = 1  # the line where the row begins: cells may hold new lines
    try:
        for cells in reader:
            if cells and not header:
                header = cells
                _check_header(header, path, start, delimiter, usual)
            elif cells and len(cells) != len(header):
                yield start, Broken(f"{path}, line {start}: not {len(header)} cells as in the header")
            elif cells:
                yield start, dict(zip(header, cells, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise InvalidArgument(
            f"{path}, line {start}: broken CSV: {error}; a row that begins there has a wrong quote or a wrong end"
        ) from None


def _check_header(header: list[str], path: Path, line: int, delimiter: str | None, usual: str) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InvalidArgument(f"{path}, line {line}: the header names {', '.join(map(repr, twice))} twice")
    other = next((mark for mark in ";\t|," if mark != usual and mark in header[0]), None)
    if len(header) == 1 and delimiter is None and other is not None:
        raise InvalidArgument(
            f"{path}, line {line}: one column {header[0]!r}; if {other!r} separates columns, give delimiter {other!r}"
        )


def _read_arrow(path: Path, kind: str) -> Iterator[Read]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with open_bytes(path) as file:
            packed = bool(file_type(path)[1])
            source = pa.BufferReader(file.read()) if packed else pa.memory_map(str(path))
            if kind == ".parquet":
                table = parquet.ParquetFile(source)
                yield from rows_of_batches(table.iter_batches(BATCH), table.schema_arrow)
            else:
                stream = _arrow_stream(source)
                yield from rows_of_batches(iter(stream), stream.schema)
    except pa.ArrowException as error:
        raise InvalidArgument(f"source {path} is broken: {_first_line(error)}") from None


def _arrow_stream(source: Any) -> Any:
    """Return the batches of an Arrow file, which comes in two layouts."""
    import pyarrow as pa

    start = source.read(6)
    source.seek(0)
    if start != b"ARROW1":
        return pa.ipc.open_stream(source)
    file = pa.ipc.open_file(source)
    return pa.RecordBatchReader.from_batches(
        file.schema, (file.get_batch(number) for number in range(file.num_record_batches))
    )


def rows_of_batches(batches: Iterable[Any], schema: Any) -> Iterator[Read]:
    """Return the rows of Arrow batches, with names of class labels for their numbers.

    Args:
        batches: Arrow record batches or tables.
        schema: theirs, with what `datasets` has noted there.
    """
    names = {}
    if b"huggingface" in (schema.metadata or {}):
        import datasets

        features = datasets.Features.from_arrow_schema(schema)
        names = {column: found for column in features if (found := getattr(features[column], "names", None))}
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            for row in batch.slice(start, BATCH).to_pylist():
                yield None, plain_row(row, names)


def plain_row(row: Row, names: dict[str, list[str]]) -> Row:
    """Return a row of a `datasets` table as a file would hold it.

    Args:
        row: the row. Its objects have all keys of all objects of the column, most of them without a value.
        names: of the class labels, by column. A label of -1 means unlabelled.
    """
    plain = {column: _without_nothing(value) for column, value in row.items()}
    for column, classes in names.items():
        value = plain.get(column)
        if isinstance(value, int):
            plain[column] = classes[value] if 0 <= value < len(classes) else None
    return plain


def _without_nothing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nothing(inner) for key, inner in value.items() if inner is not None}
    return [_without_nothing(inner) for inner in value] if isinstance(value, list) else value


def _reason(error: Exception) -> str:
    """Return what is wrong with a JSON text, and where in its line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.colno}"
    return str(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
