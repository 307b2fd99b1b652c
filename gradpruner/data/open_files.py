"""Open data files: their types, compression and encoding."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from gradpruner.errors import InvalidArgument

FILE_TYPES = (".jsonl", ".json", ".csv", ".txt", ".tsv", ".ndjson", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def file_type(path: Path) -> tuple[str, str]:
    """Return the type of a file and its compression, as its name says: ".jsonl" and ".gz", say.

    The type is empty if it is none of `FILE_TYPES`, and the compression is empty if there is none.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    kind = suffixes[-1] if suffixes and suffixes[-1] in FILE_TYPES else ""
    return kind, compression


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, unpacked.

    Raises:
        InvalidArgument: it cannot be read, or its compression is broken. This is raised inside the block, too.
    """
    compression = file_type(path)[1]
    try:
        with _opened(path, compression) as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise InvalidArgument(f"source {path} cannot be read: {error.strerror}") from None
        raise InvalidArgument(f"source {path}: broken {compression or 'file'}: {error}") from None


def _opened(path: Path, compression: str) -> Any:
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression == ".bz2":
        return bz2.open(path, "rb")
    if compression == ".xz":
        return lzma.open(path, "rb")
    if compression == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")
    return path.open("rb")


@contextlib.contextmanager
def open_text(path: Path, encoding: str | None, newline: str | None = None) -> Iterator[IO[str]]:
    """Open a text file for reading, unpacked.

    Args:
        path: the file.
        encoding: of its text. Default: UTF-8, with or without a byte order mark.
        newline: as of `open`.

    Raises:
        InvalidArgument: it cannot be read, or its bytes are not text in this encoding. This is raised inside the block,
            too.
    """
    try:
        with open_bytes(path) as file, io.TextIOWrapper(file, encoding or "utf-8-sig", newline=newline) as text:
            yield text
    except UnicodeError as error:
        reason = getattr(error, "reason", str(error))
        name = encoding or "UTF-8"
        raise InvalidArgument(
            f"source {path}{_broken_line(path, encoding)} is not {name} text: {reason}; {_advice(path, encoding)}"
        ) from None


def _broken_line(path: Path, encoding: str | None) -> str:
    """Return the number of the first line that cannot be decoded, as a part of a sentence."""
    if (encoding or "utf-8").lower().startswith("utf-16") or (encoding or "").lower().startswith("utf-32"):
        return ""  # its lines cannot be found in the bytes
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode(encoding or "utf-8")
            except UnicodeError:
                return f", line {number},"
    return ""


def _advice(path: Path, encoding: str | None) -> str:
    with open_bytes(path) as file:
        start = file.read(4)
    if encoding is None and start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "it begins as UTF-16 does: give encoding utf-16"
    return "give its encoding, such as latin-1, cp1252 or utf-16"
