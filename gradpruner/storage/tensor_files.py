"""Read and write safetensors files tensor by tensor.

The memory that this needs does not grow with the file. Files are read with plain reads: the safetensors library maps a
file as private and writable instead, so that every open file counts against RLIMIT_DATA with its whole size.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gradpruner.errors import CheckpointError
from gradpruner.storage.files import parse_json, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK = 16 << 20  # bytes that are read at a time
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
LARGEST_TENSOR = 2**59  # entries; checked, because next to a dimension of 0 a shape can claim any size
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInFile:
    """One tensor in a file that has not been read yet.

    Args:
        name: its name in the file.
        dtype: the dtype as it is stored.
        shape: the shape.
        file: the path of the file.
        offset: where its first byte is in the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.entries * self.dtype.itemsize

    def chunks_as(self, dtype: torch.dtype) -> Iterator[memoryview]:
        """Yield the bytes of its values in another dtype, in order.

        At most `CHUNK` bytes are read at a time.

        Each view is overwritten by the next.
        """
        for part in self.chunks():
            yield part if dtype == self.dtype else bytes_of(torch.frombuffer(part, dtype=self.dtype).to(dtype))

    def chunks(self) -> Iterator[memoryview]:
        """Yield its bytes in order, `CHUNK` bytes at a time. Each view is overwritten by the next."""
        buffer = memoryview(bytearray(min(CHUNK, self.size)))
        with self.file.open("rb", buffering=0) as file:
            for start in range(0, self.size, CHUNK):
                part = buffer[: min(CHUNK, self.size - start)]
                self._fill(file, part, self.offset + start)
                yield part

    def read(self) -> Tensor:
        """Read the tensor into new memory.

        Raises:
            CheckpointError: the file ends inside the tensor.
            MemoryError: there is not enough memory.
        """
        try:
            flat = torch.empty(self.size, dtype=torch.uint8)
        except RuntimeError as error:
            raise MemoryError(f"{self.name} of {self.file.name} needs {self.size} bytes: {error}") from error
        with self.file.open("rb", buffering=0) as file:
            self._fill(file, flat.numpy().data, self.offset)
        return flat.view(self.dtype).view(self.shape)

    def read_entries(self, positions: Sequence[int]) -> Tensor:
        """Read the entries at some flat indices, and no others."""
        flat = torch.empty(len(positions) * self.dtype.itemsize, dtype=torch.uint8)
        step = self.dtype.itemsize
        with self.file.open("rb", buffering=0) as file:
            for i, position in enumerate(positions):
                self._fill(file, flat.numpy().data[i * step : (i + 1) * step], self.offset + position * step)
        return flat.view(self.dtype)

    def _fill(self, file: io.FileIO, part: memoryview, offset: int) -> None:
        file.seek(offset)
        while part:
            count = file.readinto(part)
            if not count:
                raise CheckpointError(f"{self.file} ends inside {self.name}")
            part = part[count:]


@dataclass(frozen=True)
class Pending:
    """A tensor that is to be written.

    Args:
        name: its name in the file.
        dtype: the dtype to store.
        shape: the shape.
        content: is called when the tensor is written, and gives its bytes in order, in parts.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    content: Callable[[], Iterable[Any]]

    @property
    def size(self) -> int:
        """Number of bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def read_header(path: Path) -> tuple[dict[str, TensorInFile], dict[str, str]]:
    """Read the header of a safetensors file, and check that it describes the whole file.

    Returns:
        Every tensor by name, and the metadata of the file.

    Raises:
        CheckpointError: the file is damaged, or is not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else LONGEST_HEADER + 1
            if length > min(LONGEST_HEADER, size - 8):
                raise CheckpointError(f"{path} is not a safetensors file, or is cut short")
            header = parse_json(file.read(length).decode("utf-8"), path, "safetensors")
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text")
        tensors, spans = {}, []
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
                raise ValueError(f"{name!r} has a negative or fractional size")
            if math.prod(max(n, 1) for n in shape) > LARGEST_TENSOR:
                raise ValueError(f"{name!r} has a shape that no tensor can have")
            tensors[name] = TensorInFile(name, DTYPES[entry["dtype"]], shape, path, 8 + length + begin)
            if end - begin != tensors[name].size:
                raise ValueError(f"{name!r} has {end - begin} bytes; its shape needs {tensors[name].size}")
            spans.append((begin, end, name))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a safetensors file, or is damaged: {error!r}") from error
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            raise CheckpointError(f"{path} is damaged: {name!r} begins at byte {begin}, not {reached}")
        reached = end
    if 8 + length + reached != size:
        raise CheckpointError(f"{path} is damaged: it has {size} bytes; its header describes {8 + length + reached}")
    return tensors, metadata


def holds_safetensors(folder: Path) -> bool:
    """Whether a checkpoint folder has safetensors, in one file or in shards."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def read_folder(folder: Path) -> dict[str, TensorInFile]:
    """Find every tensor of a checkpoint folder.

    The tensors are in one file, or in the shards that an index names. If both exist, the one file counts, as in
    transformers.

    Returns:
        The tensors by name, in the order of the files and of the bytes in them.

    Raises:
        CheckpointError: a file is missing or damaged, or the index does not match the shards.
    """
    if (folder / SINGLE).is_file():
        return dict(_by_offset(read_header(folder / SINGLE)[0]))
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}")
    index = read_json(folder / INDEX, "index").get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map from names to files")
    tensors: dict[str, TensorInFile] = {}
    for file in sorted(set(index.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{folder / INDEX} names {file!r}; expected a file in the same folder")
        if not os.path.isfile(folder / file):  # also False for text that cannot be a file name
            raise CheckpointError(f"{folder} has no {file}, which its index names")
        for name, stored in _by_offset(read_header(folder / file)[0]):
            if index.get(name) != file:
                raise CheckpointError(f"{file} holds {name!r}; the index says {index.get(name, 'nothing of it')}")
            tensors[name] = stored
    missing = sorted(index.keys() - tensors.keys())
    if missing:
        raise CheckpointError(f"{index[missing[0]]} does not hold {missing[0]!r}, as the index says")
    return tensors


def _by_offset(tensors: Mapping[str, TensorInFile]) -> list[tuple[str, TensorInFile]]:
    return sorted(tensors.items(), key=lambda item: item[1].offset)


def write_folder(folder: Path, tensors: Sequence[Pending], largest: int, totals: Mapping[str, int]) -> dict[str, int]:
    """Write tensors to one file, or to shards with an index.

    Args:
        folder: the folder to write to.
        tensors: what to write. Tensors keep their order from shard to shard.
        largest: the most bytes of a shard. A larger tensor gets a shard of its own.
        totals: more entries for the metadata of the index.

    Returns:
        The CRC-32 of every tensor's bytes as they were written, by name.

    Raises:
        OSError: writing fails.
        CheckpointError: a tensor has more or fewer bytes than its shape needs.
    """
    shards: list[list[Pending]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.size for t in shards[-1]) + tensor.size > largest:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return write_file(folder / SINGLE, shards[0])
    checksums: dict[str, int] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        checksums |= write_file(folder / file, shard)
        weight_map |= {tensor.name: file for tensor in shard}
    metadata = {**totals, "total_size": sum(tensor.size for tensor in tensors)}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return checksums


def write_file(path: Path, tensors: Iterable[Pending]) -> dict[str, int]:
    """Write one file, and drop it from the page cache.

    Args:
        path: the file to write.
        tensors: what to write.

    Returns:
        The CRC-32 of every tensor's bytes as they were written, by name.

    Raises:
        OSError: writing fails.
        CheckpointError: a tensor has more or fewer bytes than its shape needs.
    """
    # Wider dtypes first. With a header that is a multiple of 8 bytes long, every tensor is aligned then.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.size
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    checksums = {}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered:
            checksums[tensor.name] = _write(file, tensor)
        file.flush()
        os.fsync(file.fileno())
        _drop_from_page_cache(file)
    return checksums


def _write(file: BinaryIO, tensor: Pending) -> int:
    checksum = written = 0
    for part in tensor.content():
        checksum, written = zlib.crc32(part, checksum), written + len(part)
        file.write(part)
    if written != tensor.size:
        raise CheckpointError(f"{tensor.name} has {written} bytes; its shape needs {tensor.size}")
    return checksum


def checksum_of(stored: TensorInFile) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    checksum = 0
    for part in stored.chunks():
        checksum = zlib.crc32(part, checksum)
    return checksum


def _drop_from_page_cache(file: BinaryIO) -> None:
    """Make room under memory limits that count cached pages. The next read reads the disk."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
