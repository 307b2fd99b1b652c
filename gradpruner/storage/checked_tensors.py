"""Safetensors files with a description in JSON, and checksums of everything in them."""

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

DESCRIPTION, CHECKSUM = "gradpruner", "gradpruner_crc32"  # names in the metadata of the file


def write_described(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], description: dict[str, Any]) -> None:
    """Write tensors and a description of them to one file, atomically.

    Args:
        path: the file to write.
        tensors: contiguous CPU tensors by name.
        description: a JSON object. Its "format" says what kind of file this is.

    Raises:
        InvalidArgument: the folder does not exist.
        CheckpointError: the file cannot be written, e.g. because the disk is full.
    """
    checksums = {name: zlib.crc32(bytes_of(tensor)) for name, tensor in tensors.items()}
    text = json.dumps({**description, "crc32": checksums})
    with atomic_path(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata={DESCRIPTION: text, CHECKSUM: str(zlib.crc32(text.encode()))})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_described(path: Path, kind: str, form: str) -> tuple[dict[str, TensorInFile], dict[str, Any]]:
    """Read the description of a file, and where its tensors are.

    Args:
        path: the file to read.
        kind: what the error calls it, e.g. "igia".
        form: the "format" that its description must have.

    Returns:
        The tensors by name, which are still in the file (see `read_checked`), and the description. The caller checks
        what the description says.

    Raises:
        CheckpointError: the file is damaged, or is not of this kind.
    """
    tensors, metadata = read_header(path)
    text = metadata.get(DESCRIPTION, "{}")
    # a file of an earlier version has no checksum of its description
    if metadata.get(CHECKSUM) not in (None, str(zlib.crc32(text.encode()))):
        raise CheckpointError(f"{path} is corrupted: the checksum of its description does not match")
    description = parse_json(text, path, kind)
    if description.get("format") != form:
        raise CheckpointError(f"{path} is not a {kind} file: expected format {form!r}")
    checksums = description.get("crc32")
    if not isinstance(checksums, dict) or checksums.keys() != tensors.keys():
        raise CheckpointError(f"{path} is corrupted: its checksums are not those of its tensors")
    return tensors, description


def read_checked(stored: TensorInFile, checksums: Mapping[str, int]) -> Tensor:
    """Read one tensor of a file.

    Args:
        stored: where it is, as `read_described` says.
        checksums: the entry "crc32" of the description.

    Raises:
        CheckpointError: the checksum does not match.
    """
    tensor = stored.read()
    if zlib.crc32(bytes_of(tensor)) != checksums[stored.name]:
        raise CheckpointError(f"{stored.file} is corrupted: checksum of {stored.name!r} does not match")
    return tensor
