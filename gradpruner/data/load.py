"""Read examples from files, folders or hub data sets."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from gradpruner.data.examples import CHAT, TEXT
from gradpruner.data.read_files import Broken
from gradpruner.data.reading import Converter, LostColumn, Reading
from gradpruner.data.rows_key import code_of_room
from gradpruner.data.sources import Found, HubOptions, Place, Source, find
from gradpruner.data.table import Examples, TableWriter, join
from gradpruner.data.templates import EmptyRow, RowError, listed
from gradpruner.errors import InvalidArgument
from gradpruner.storage.files import atomic_folder, read_json, write_json
from gradpruner.storage.locks import lock

TABLE, ABOUT = "examples.arrow", "about.json"
NAMED = 3  # bad rows that a message names

logger = logging.getLogger(__name__)


def load_examples(
    source: Source | Sequence[Source],
    *,
    split: str = "train",
    prompt: str | None = None,
    answer: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    format: str | None = None,
    system: str | None = None,
    as_chat: bool = False,
    delimiter: str | None = None,
    encoding: str | None = None,
    text_rows: str = "file",
    skip_bad_rows: float = 0.0,
    quiet: bool = True,
) -> Examples:
    r"""Read examples from files, folders or hub data sets.

    The examples are in a table on disk or, if they are few, in memory. A large source is read once. Later calls find
    its table in the cache folder of `datasets`, under a digest of the content of the source and of these arguments.

    Args:
        source: a .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet or .arrow file, also packed as .gz, .bz2, .xz or
            .zst; a pattern such as "data/*.jsonl"; a folder; the id of a hub data set; or several of these, in a list
            or separated by commas.
        split: split of a folder or a hub data set, with a slice if wanted: "train[:10%]". Default "train".
        prompt: template of the prompt, such as "Question: {text}\nIntent:". Alone it makes plain text. Default: the
            format is found by the columns.
        answer: template of the answer, such as "{category}".
        limit: keep at most this many examples. Default: all.
        seed: shuffle with this seed before `limit` is applied. Default: no shuffling.
        config: configuration of a hub data set.
        revision: branch, tag or commit of a hub data set.
        streaming: whether to read only the first `limit` rows of a hub data set, without downloading all of it.
        format: name of the format, if its columns do not tell. See `gradpruner.data.formats.FORMATS`.
        system: text of a system message for chats without one. It makes chats of pairs of texts.
        as_chat: whether a prompt and an answer become a turn of the user and one of the assistant.
        delimiter: of the cells of a .csv file. Default: a comma, or a tab in a .tsv file.
        encoding: of text files. Default: UTF-8, with or without a byte order mark.
        text_rows: what is one example of a .txt file: "file", "line" or "paragraph". Default "file".
        skip_bad_rows: the share of rows that may be bad. They are left out and counted. Default: none.
        quiet: whether to show no progress bar.

    Returns:
        The examples, in the order of the source unless they are shuffled.

    Raises:
        InvalidArgument: source, split, template, limit or a row's content is wrong; the message says which.
    """
    if limit is not None and limit < 1:
        raise InvalidArgument(f"limit is {limit}; accepted: a number of examples from 1 on, or None")
    if streaming and limit is None:
        raise InvalidArgument("streaming needs a limit: how many rows of the stream are read")
    reading = Reading(prompt, answer, format, system, as_chat, delimiter, encoding, text_rows, skip_bad_rows)
    options = HubOptions(split, config, revision, limit if streaming else None)
    sets = [(str(one), _load(find(one, options), str(one), reading, quiet)) for one in sources(source)]
    examples = join(sets)
    _say(examples, [name for name, _ in sets])
    _name_mixture(sets)
    if seed is not None:
        examples = examples.shuffled(seed)
    return examples if limit is None else examples[:limit]


def sources(source: Source | Sequence[Source]) -> list[Source]:
    """Return several sources apart: those of a list, and those that a text separates by commas."""
    if isinstance(source, PathLike):
        return [source]
    if not isinstance(source, str):
        if not source:
            raise InvalidArgument("source is empty; accepted: at least one file, folder or hub id")
        return [single for one in source for single in sources(one)]
    parts = [part.strip() for part in source.split(",") if part.strip()]
    return [source] if len(parts) < 2 or Path(source).exists() else list(parts)


@dataclass
class _Account:
    """What became of the rows of a source.

    Args:
        files: how many files or tables were read.
        rows: how many rows they had.
        bad: how many rows were skipped because they are broken.
        empty: how many rows were skipped because they have no text or no answer.
        chats: how many examples are chats.
        format: how the rows became examples.
        unused: columns that no example is made of.
        named: the first problems.
        bare: files without rows.
    """

    files: int = 0
    rows: int = 0
    bad: int = 0
    empty: int = 0
    chats: int = 0
    format: str = ""
    unused: list[str] = field(default_factory=list)
    named: list[str] = field(default_factory=list)
    bare: list[str] = field(default_factory=list)

    def skip(self, problem: str, empty: bool) -> None:
        self.bad, self.empty = self.bad + (not empty), self.empty + empty
        if len(self.named) < NAMED:
            self.named.append(problem)

    @property
    def counts(self) -> dict[str, int]:
        kept = self.rows - self.bad - self.empty
        return {"files": self.files, "rows": self.rows, "kept": kept, "bad": self.bad, "empty": self.empty}


def _load(found: Found, name: str, reading: Reading, quiet: bool) -> Examples:
    """Return the examples of one source, from the cache if they are there."""
    import datasets
    import pyarrow as pa

    if any(place.large for place in found.places) and all(place.digest for place in found.places):
        folder = _cache_folder() / _key(found.places, reading)
        try:
            with lock(folder):
                if not (folder / TABLE).is_file():
                    with atomic_folder(folder) as new:
                        account = _write(str(new / TABLE), found.places, reading, quiet)
                        write_json(new / ABOUT, vars(account))
        except OSError as error:
            raise InvalidArgument(
                f"the cache folder {folder.parent} cannot be written ({error.strerror}); set HF_DATASETS_CACHE"
            ) from None
        account = _Account(**read_json(folder / ABOUT, "examples"))
        table = datasets.Dataset.from_file(str(folder / TABLE))
    else:
        sink = pa.BufferOutputStream()
        account = _write(sink, found.places, reading, quiet)
        table = datasets.Dataset.from_buffer(sink.getvalue())
    if account.rows == 0:
        raise InvalidArgument(f"source {name} has no rows")
    _judge(account, name, reading.skip_bad_rows)
    return _sliced(Examples(table, counts=account.counts), found.slice, name)


def _cache_folder() -> Path:
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "gradpruner"


def _key(places: Iterable[Place], reading: Reading) -> str:
    """Return a digest of names and bytes of files, of the settings, and of this code."""
    content = [(place.name, place.digest() if place.digest else None) for place in places]
    return hashlib.sha256(json.dumps([content, reading.to_dict(), code_of_room()]).encode()).hexdigest()[:32]


def _write(sink: Any, places: list[Place], reading: Reading, quiet: bool) -> _Account:
    """Write the examples of all files of a source. Return what became of their rows."""
    from tqdm.auto import tqdm

    account = _Account(files=len(places))
    unused: dict[str, None] = {}
    with TableWriter(sink) as writer, tqdm(unit=" rows", desc="reading", disable=quiet or None) as bar:
        for place in places:
            converter, before = Converter(reading), account.rows
            for number, (line, row) in enumerate(place.rows(reading), 1):
                account.rows += 1
                where = f"row {number} of {place.name}{f' (line {line})' if line else ''}"
                try:
                    if isinstance(row, Broken):
                        raise _BrokenRow(row.problem)
                    example = converter(row)
                except LostColumn as error:
                    raise InvalidArgument(f"{where}{error}") from None
                except InvalidArgument as error:
                    raise InvalidArgument(f"{place.name}: {error}") from None
                except RowError as error:
                    problem = str(error) if isinstance(error, _BrokenRow) else f"{where}{error}"
                    if not reading.skip_bad_rows:
                        raise InvalidArgument(problem) from None
                    account.skip(problem, isinstance(error, EmptyRow))
                    continue
                account.chats += not isinstance(example.prompt, str)
                writer.add(example, where)
                bar.update()
            if account.rows == before:
                account.bare.append(place.name)
            unused.update(converter.unused)
            account.format = converter.name or account.format
    account.unused = list(unused)
    return account


class _BrokenRow(RowError):
    """A row that could not be read. Its message names the row."""


def _judge(account: _Account, name: str, share: float) -> None:
    """Refuse a source with too many bad rows. Name the rows and the columns that are left out."""
    skipped = account.bad + account.empty
    if skipped > share * account.rows:
        raise InvalidArgument(
            f"source {name}: {skipped} of {account.rows} rows are bad, which is more than the share of {share:g} that "
            f"may be skipped (skip_bad_rows); the first ones: {'; '.join(account.named)}"
        )
    if skipped:
        logger.warning("%s: skipped %d of %d rows: %s", name, skipped, account.rows, "; ".join(account.named))
    if account.bare:
        logger.warning("%s: files without rows: %s", name, ", ".join(account.bare))
    if account.unused:
        logger.info("%s: columns that are not used: %s", name, listed(account.unused))
    if 0 < account.chats < account.rows - skipped:
        logger.warning(
            "%s: %d of %d examples are chats, the rest plain text", name, account.chats, account.rows - skipped
        )


def _sliced(examples: Examples, part: str, name: str) -> Examples:
    if not part:
        return examples
    import datasets

    try:
        (found,) = datasets.ReadInstruction.from_spec(f"train{part}").to_absolute({"train": len(examples)})
    except (ValueError, AssertionError) as error:
        raise InvalidArgument(
            f"split: the slice {part} does not fit the {len(examples)} examples of {name}: {error}"
        ) from None
    chosen = examples[found.from_ : found.to]
    if not len(chosen):
        raise InvalidArgument(f"split: the slice {part} leaves none of the {len(examples)} examples of {name}")
    return chosen


def _name_mixture(sets: Sequence[tuple[str, Examples]]) -> None:
    """Warn if some sources are chats and others are text.

    The model reads the text without a chat template.
    """
    kinds = {name: examples.kinds() for name, examples in sets}
    of_chats, of_text = ([name for name, found in kinds.items() if found == {kind}] for kind in (CHAT, TEXT))
    if of_chats and of_text:
        logger.warning(
            "data: chats from %s, plain text from %s, which gets no chat template; --as-chat makes chats of pairs",
            ", ".join(of_chats),
            ", ".join(of_text),
        )


def _say(examples: Examples, names: list[str]) -> None:
    counts = examples.counts
    skipped = [f"{counts[kind]:,} {kind}" for kind in ("bad", "empty") if counts[kind]]
    logger.info(
        "data: %s of %s rows kept%s, from %s: %s",
        f"{counts['kept']:,}",
        f"{counts['rows']:,}",
        f" ({', '.join(skipped)} skipped)" if skipped else "",
        f"{counts['files']} {'file' if counts['files'] == 1 else 'files'}",
        ", ".join(names),
    )
