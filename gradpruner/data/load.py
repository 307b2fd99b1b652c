"""Read examples from files or a hub data set."""

from __future__ import annotations

import csv
import json
import random
import string
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gradpruner.data.examples import Example
from gradpruner.errors import InvalidArgument
from gradpruner.storage.files import decode_json

FILE_TYPES = (".jsonl", ".json", ".csv", ".txt")


# Column pairs that need no template; the first pair that a data set has is taken.
KNOWN_COLUMNS = (
    *(("prompt", answer) for answer in ("completion", "answer", "response")),
    ("question", "answer"),
    *(("instruction", answer) for answer in ("output", "response")),
    *(("text", answer) for answer in ("label", "category", "answer")),
)


Row = Mapping[str, Any]


Template = list[tuple[str, str | None]]  # text, then the column that follows it


def load_examples(
    source: str | PathLike[str],
    *,
    split: str = "train",
    prompt: str | None = None,
    answer: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> list[Example]:
    r"""Read examples from a file or a hub data set.

    Args:
        source: a .jsonl, .json, .csv or .txt file, or the id of a hub data set.
        split: split of a hub data set. Default "train".
        prompt: template of the prompt, such as "Question: {text}\nIntent:". Alone it makes plain text. Default: the
            usual column pairs are recognised (see `KNOWN_COLUMNS`), or a column "text" alone.
        answer: template of the answer, such as "{category}".
        limit: keep at most this many examples. Default: all.
        seed: shuffle with this seed before `limit` is applied. Default: no shuffling.

    Returns:
        The examples, in the order of the source unless they are shuffled.

    Raises:
        InvalidArgument: source, split, template, limit or a row's content is wrong; the message says which.
    """
    if limit is not None and limit < 1:
        raise InvalidArgument(f"limit is {limit}; accepted: a number of examples from 1 on, or None")
    rows = _read_file(Path(source), split) if is_file(source) else _read_hub(str(source), split)
    if not rows:
        raise InvalidArgument(f"source {source} has no rows")
    prompt_template, answer_template = _templates(rows[0], prompt, answer)
    examples = [
        _example(row, prompt_template, answer_template, f"row {number} of {source}")
        for number, row in enumerate(rows, 1)
    ]
    if seed is not None:
        random.Random(seed).shuffle(examples)
    return examples[:limit]


def is_file(source: str | PathLike[str]) -> bool:
    """Return whether a source is a file rather than a hub data set.

    Raises:
        InvalidArgument: it is a folder.
    """
    path = Path(source)
    if path.is_dir():
        raise InvalidArgument(f"source {source} is a folder; accepted: a {', '.join(FILE_TYPES)} file or a hub id")
    return path.suffix.lower() in FILE_TYPES or path.is_file()


def _read_file(path: Path, split: str) -> list[Row]:
    if split != "train":
        raise InvalidArgument(f"split is {split!r}, but {path} is a file and has no splits: name another file")
    if not path.is_file():
        raise InvalidArgument(f"source {path} does not exist")
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".txt": _read_text}
    if path.suffix.lower() not in readers:
        raise InvalidArgument(f"source {path} is not a {', '.join(FILE_TYPES)} file")
    try:
        return list(readers[path.suffix.lower()](path))
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"source {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise InvalidArgument(f"source {path} cannot be read: {error.strerror}") from None


def _read_text(path: Path) -> Iterator[Row]:
    """Read a text file as one row."""
    text = path.read_text(encoding="utf-8-sig")
    if text.strip():
        yield {"text": text}


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _json_object(line, path, number)


def _json_object(line: str, path: Path, number: int) -> Row:
    try:
        row = decode_json(line)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path}, line {number}: broken JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(row, dict):
        raise InvalidArgument(f"{path}, line {number}: {type(row).__name__} instead of an object of columns")
    return row


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = decode_json(text)
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"{path}, line {error.lineno}: broken JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path}: broken JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InvalidArgument(f"{path} is not a JSON list of objects")
    return rows


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                # DictReader files surplus cells under None and fills missing ones with None
                if None in row or None in row.values():
                    columns = len(reader.fieldnames or ())
                    raise InvalidArgument(f"{path}, line {reader.line_num}: not {columns} cells as in the header")
                yield row
        except csv.Error as error:
            raise InvalidArgument(f"{path}, line {reader.line_num}: broken CSV: {error}") from None


def _read_hub(name: str, split: str) -> list[Row]:
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise InvalidArgument(
            f"source {name!r} is neither a {', '.join(FILE_TYPES)} file nor a hub id ('name' or 'owner/name')"
        ) from None
    import datasets  # slow to import, and a file does not need it

    try:
        table = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InvalidArgument(f"data set {name!r}, split {split!r}: {reason}") from error
    names = {column: getattr(feature, "names", None) for column, feature in table.features.items()}
    return [{column: _class_name(value, names[column]) for column, value in row.items()} for row in table]


def _class_name(value: Any, names: list[str] | None) -> Any:
    """Return the name of a class label, or None for -1, which means unlabelled."""
    if names is None or value is None:
        return value
    return names[value] if value >= 0 else None


def _templates(row: Row, prompt: str | None, answer: str | None) -> tuple[Template, Template]:
    if prompt is not None:
        return _parse("prompt", prompt, row), _parse("answer", answer or "", row)
    if answer is not None:
        raise InvalidArgument("answer is given without prompt; accepted: both, a prompt alone, or neither")
    for prompt_column, answer_column in KNOWN_COLUMNS:
        if prompt_column in row and answer_column in row:
            return [("", prompt_column)], [("", answer_column)]
    if "text" in row:
        return [("", "text")], []
    raise InvalidArgument(f"prompt is missing, and the columns {_listed(row)} hold no known pair")


def _parse(argument: str, template: str, row: Row) -> Template:
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
            raise InvalidArgument(f"{argument} names the column {column!r}; there are: {_listed(row)}")
    return [(text, column) for text, column, _, _ in fields]


def _listed(row: Row) -> str:
    return ", ".join(repr(column) for column in row)


def _example(row: Row, prompt: Template, answer: Template, where: str) -> Example:
    example = Example(_fill(prompt, row, where), _fill(answer, row, where))
    if answer and not example.answer.strip():
        raise InvalidArgument(f"{where} has an empty answer")
    if not answer and not example.prompt.strip():
        raise InvalidArgument(f"{where} has an empty text")
    return example


def _fill(template: Template, row: Row, where: str) -> str:
    return "".join(text + (_cell(row, column, where) if column is not None else "") for text, column in template)


def _cell(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    missing = value is None or value != value  # NaN is how pandas writes a missing cell
    if isinstance(value, str | int | float) and not missing:
        return str(value)
    found = "no value" if missing else f"a {type(value).__name__}"
    raise InvalidArgument(f"{where}, column {column!r}: {found}; accepted: text or a number")
