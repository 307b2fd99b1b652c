"""One safetensors file that holds tensors, a description of them as JSON, and a checksum of each and of that text."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gradpruner.errors import CheckpointError
from gradpruner.storage.files import atomic_path, parse_json
from gradpruner.storage.tensor_files import TensorInFile, bytes_of, read_header

DESCRIPTION, CHECKSUM = "gradpruner", "gradpruner_crc32"  # in the metadata of the file


def write_described(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], description: dict[str, Any]) -> None:
    """Write the file atomically. tensors: contiguous. Raises CheckpointError (disk full), InvalidArgument (no folder).

    description: what JSON can hold, with the file's "format".
    """
    checksums = {name: zlib.crc32(bytes_of(tensor)) for name, tensor in tensors.items()}
    text = json.dumps({**description, "crc32": checksums})
    with atomic_path(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata={DESCRIPTION: text, CHECKSUM: str(zlib.crc32(text.encode()))})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_described(path: Path, kind: str, form: str) -> tuple[dict[str, TensorInFile], dict[str, Any]]:
    """The tensors, left in the file, and the description. kind: what to call the file; form: the "format" it must have.

    Raises CheckpointError if the file is another one or damaged; what the description says has still to be checked.
    """
    stored, metadata = read_header(path)
    text = metadata.get(DESCRIPTION, "{}")
    # a file of an earlier version has no checksum of its description
    if metadata.get(CHECKSUM) not in (None, str(zlib.crc32(text.encode()))):
        raise CheckpointError(f"{path} is corrupted: the checksum of its description does not match")
    description = parse_json(text, path, kind)
    if description.get("format") != form:
        raise CheckpointError(f"{path} is not a {kind} file: expected format {form!r}")
    checksums = description.get("crc32")
    if not isinstance(checksums, dict) or checksums.keys() != stored.keys():
        raise CheckpointError(f"{path} is corrupted: its checksums are not those of its tensors")
    return stored, description


def read_checked(stored: TensorInFile, checksums: Mapping[str, int]) -> Tensor:
    """One tensor. Raises CheckpointError where its checksum does not match."""
    tensor = stored.read()
    if zlib.crc32(bytes_of(tensor)) != checksums[stored.name]:
        raise CheckpointError(f"{stored.file} is corrupted: checksum of {stored.name!r} does not match")
    return tensor
