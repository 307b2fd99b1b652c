"""Where data is: files, folders, and data sets of the hub."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gradpruner.data.open_files import COMPRESSIONS, FILE_TYPES, file_type
from gradpruner.data.read_files import Read, plain_row, read_file, rows_of_batches
from gradpruner.data.reading import Reading
from gradpruner.errors import InvalidArgument

BATCH = 1000  # rows of a table at a time
LARGE_FILE, LARGE_TABLE = 8 << 20, 20_000  # bytes and rows from which on the examples are cached on disk
READ_AT_ONCE = 1 << 22  # bytes of a file that a digest is made of

Source = str | PathLike[str]


@dataclass(frozen=True)
class Place:
    """One file or one table of rows.

    Args:
        name: as the user knows it.
        rows: reads the rows.
        digest: makes a digest of the content. None if it can be read only once.
        large: whether it is so large that reading it again is worth a cache.
    """

    name: str
    rows: Callable[[Reading], Iterator[Read]]
    digest: Callable[[], str] | None
    large: bool


@dataclass(frozen=True)
class HubOptions:
    """Which part of a data set is read.

    Args:
        split: name of the split, with a slice such as "train[:10%]" if wanted.
        config: name of the configuration.
        revision: branch, tag or commit on the hub.
        streaming: how many rows to read of a data set that is not downloaded as a whole.
    """

    split: str = "train"
    config: str | None = None
    revision: str | None = None
    streaming: int | None = None


@dataclass(frozen=True)
class Found:
    """What a source stands for.

    Args:
        places: files or tables, in the order in which they are read.
        slice: which of their examples are wanted, such as "[:10%]". Empty for all.
    """

    places: list[Place]
    slice: str = field(default="")


def find(source: Source, options: HubOptions) -> Found:
    """Return the files or tables that a source stands for.

    Args:
        source: a file, a pattern of files, a folder, or the id of a hub data set.
        options: which part of it.

    Raises:
        InvalidArgument: there is nothing, or the options do not fit.
    """
    path, (base, part) = Path(source), _split(options.split)
    if path.is_dir():
        _no_hub_options(source, options, "a folder", folder=True)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return Found([_saved(path, base)], part)
        return Found([_file(file) for file in _files_of_folder(path, base, options.config)], part)
    files = files_of(source)
    if files is None:
        return Found([_hub(str(source), options)])
    _no_hub_options(source, options, "a file", folder=False)
    if base != "train":
        raise InvalidArgument(f"split is {options.split!r}, but {path} is a file and has no splits: name another file")
    return Found([_file(file) for file in files], part)


def files_of(source: Source) -> list[Path] | None:
    """Return the files that a source names or that fit its pattern, or None.

    Raises:
        InvalidArgument: no file fits the pattern, or a file of a known type does not exist.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if glob.has_magic(str(source)):
        found = sorted(Path(name) for name in glob.glob(str(source), recursive=True))
        if not (files := [file for file in found if file.is_file()]):
            raise InvalidArgument(f"source {source} fits no file")
        return files
    if file_type(path)[0] or file_type(path)[1]:
        raise InvalidArgument(f"source {path} does not exist")
    return None


def test_split_of(source: Source) -> str:
    """Return the split that holds test data: "test" where a source has one, else "train"."""
    path = Path(source)
    if path.is_dir():
        return "test" if "test" in _splits_of_folder(path) else "train"
    return "test" if files_of(source) is None else "train"


def _split(split: str) -> tuple[str, str]:
    """Return the name of a split and its slice."""
    found = re.fullmatch(r"([^\[\]]+)(\[.*\])?", split)
    if found is None:
        raise InvalidArgument(f"split is {split!r}; accepted: a name, or a name with a slice such as train[:10%]")
    return found[1], found[2] or ""


def _no_hub_options(source: Source, options: HubOptions, what: str, *, folder: bool) -> None:
    names = {"revision": options.revision, "streaming": options.streaming}
    names |= {} if folder else {"config": options.config}
    for name, value in names.items():
        if value is not None:
            raise InvalidArgument(f"{name} is given, but {source} is {what}; it is for data sets of the hub")


def _file(path: Path) -> Place:
    if not file_type(path)[0]:
        raise InvalidArgument(
            f"source {path} is not a {', '.join(FILE_TYPES)} file, nor one of these packed as {', '.join(COMPRESSIONS)}"
        )
    size = path.stat().st_size
    return Place(str(path), lambda reading: read_file(path, reading), lambda: _digest_of_file(path), size >= LARGE_FILE)


def _digest_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _files_of_folder(folder: Path, split: str, config: str | None) -> list[Path]:
    """Return the files of a folder that belong to a split, as `datasets` finds them."""
    splits = _data_files(folder, config)
    if split not in splits:
        raise InvalidArgument(f"split is {split!r}, but the folder {folder} has: {', '.join(splits)}")
    return splits[split]


def _splits_of_folder(folder: Path) -> Sequence[str]:
    if (folder / "state.json").is_file():
        return ()
    if (folder / "dataset_dict.json").is_file():
        import datasets

        return list(datasets.load_from_disk(str(folder)))
    return list(_data_files(folder, None))


def _data_files(folder: Path, config: str | None) -> dict[str, list[Path]]:
    import datasets

    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and file_type(path)[0]]
    files = [path for path in files if not any(p.startswith((".", "_")) for p in path.relative_to(folder).parts)]
    files = [path for path in files if path.name not in ("dataset_infos.json", "dataset_info.json")]
    if not files:
        raise InvalidArgument(
            f"source {folder} is a folder without data; accepted: {', '.join(FILE_TYPES)} files in it"
        )
    described = (folder / "README.md").is_file()
    types = sorted({file_type(path)[0] for path in files})
    if len(types) > 1 and not described:
        raise InvalidArgument(
            f"source {folder} is a folder with files of several types ({', '.join(types)}); name files"
        )
    try:
        # the whole path, because a folder could have the name of a builder, such as "json"
        found = datasets.load_dataset_builder(os.path.abspath(folder), config).config.data_files
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidArgument(f"source {folder}: {_reason(error)}") from error
    splits = {str(split): [Path(name) for name in names] for split, names in (found or {}).items()}
    taken = {path for names in splits.values() for path in names}
    left = [str(path.relative_to(folder)) for path in files if Path(os.path.abspath(path)) not in taken]
    if left and not described:
        raise InvalidArgument(f"source {folder}: it is not clear what {', '.join(left[:3])} is; name the files")
    base = os.path.abspath(folder)
    return {split: [folder / path.relative_to(base) for path in paths] for split, paths in splits.items()}


def _saved(folder: Path, split: str) -> Place:
    """Return the table that `save_to_disk` has written."""
    import datasets

    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever a damaged folder makes it raise
        raise InvalidArgument(
            f"source {folder} cannot be read as a data set that was saved: {_reason(error)}"
        ) from None
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise InvalidArgument(f"split is {split!r}, but the folder {folder} has: {', '.join(table)}")
        table = table[split]
    elif split != "train":
        raise InvalidArgument(f"split is {split!r}, but the folder {folder} has no splits: it holds one table")
    return _table(str(folder), table)


def _hub(name: str, options: HubOptions) -> Place:
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise InvalidArgument(
            f"source {name!r} does not exist, and is no hub id ('name' or 'owner/name'); accepted: a "
            f"{', '.join(FILE_TYPES)} file, a pattern of files, a folder, or a hub id"
        ) from None
    import datasets

    given = {"name": options.config, "revision": options.revision, "streaming": options.streaming is not None or None}
    given = {key: value for key, value in given.items() if value is not None}
    try:
        table = datasets.load_dataset(name, split=options.split, **given)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InvalidArgument(f"data set {name!r}, split {options.split!r}: {_reason(error)}") from error
    if options.streaming is not None:
        stream, rows = table, options.streaming
        return Place(name, lambda _: _streamed(name, stream, rows), None, False)
    return _table(name, table)


def _reason(error: Exception) -> str:
    if type(error).__name__ == "DatasetGenerationError" and isinstance(error.__cause__, Exception):
        error = error.__cause__  # which file is broken, and how
    lines = str(error).splitlines() or [type(error).__name__]
    if "Config name is missing" in lines[0]:  # the names are on the next lines
        return f"{' '.join(line.strip() for line in lines[:2])}; give one as config"
    return lines[0]


def _table(name: str, table: Any) -> Place:
    schema = table.features.arrow_schema

    def batches() -> Iterator[Any]:
        return table.with_format("arrow").iter(batch_size=BATCH)

    def digest() -> str:
        found = hashlib.sha256(schema.serialize())
        for rows in batches():
            for batch in rows.combine_chunks().to_batches():
                found.update(batch.serialize())
        return found.hexdigest()

    return Place(name, lambda _: rows_of_batches(batches(), schema), digest, len(table) >= LARGE_TABLE)


def _streamed(name: str, table: Any, rows: int) -> Iterator[Read]:
    names = {column: feature.names for column, feature in (table.features or {}).items() if hasattr(feature, "names")}
    try:
        for row in table.take(rows):
            yield None, plain_row(row, names)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidArgument(f"data set {name!r}, streamed: {_reason(error)}") from error
