"""Importance of the entries of a weight: as factors or matrix, on disk, over processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradpruner import ops
from gradpruner.distributed.processes import Peers
from gradpruner.model.decoder import Weight
from gradpruner.storage.checked_tensors import read_checked
from gradpruner.storage.tensor_files import TensorInFile


@dataclass(frozen=True)
class Factors:
    """Importance F of a weight as factors: the sum over steps of (b_i @ a_i) ** 2.

    A positive constant is left out: F is only ranked.

    Args:
        a: shape (t, r, in), float32 or bfloat16, in host memory.
        b: shape (t, out, r), as `a`.
        exponents: the factors of the gradients are a * 2 ** exponents[0] and b * 2 ** exponents[1]. A probe that goes
            on after an interruption scales by the same powers.

    Source: docs/method.md, section 1.
    """

    a: Tensor
    b: Tensor
    exponents: tuple[int, int] = (0, 0)

    def dense(self) -> Dense:
        """Compute F as one float32 matrix."""
        f = torch.zeros(self.b.shape[1], self.a.shape[2], device=self.a.device)
        for a, b in zip(self.a, self.b, strict=True):
            ops.outer_square_accumulate_(f, a, b)
        return Dense(f, self.exponents)

    @property
    def parts(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {"a": self.a, "b": self.b}

    def to(self, device: torch.device) -> Factors:
        """A copy on another device."""
        return Factors(self.a.to(device), self.b.to(device), self.exponents)


@dataclass(frozen=True)
class Dense:
    """Importance F of one weight as a matrix, up to a positive constant.

    Args:
        f: float32, in the shape and layout of the weight.
        exponents: of the factors that F was summed from, see `Factors`.
    """

    f: Tensor
    exponents: tuple[int, int] = (0, 0)

    def dense(self) -> Dense:
        """Return this object itself."""
        return self

    @property
    def parts(self) -> dict[str, Tensor]:
        """Its tensor by name."""
        return {"f": self.f}

    def to(self, device: torch.device) -> Dense:
        """A copy on another device."""
        return Dense(self.f.to(device), self.exponents)


class SharedImportance(Mapping[tuple[int, str], Factors | Dense]):
    """Importance by (layer, name) of which each process holds a part.

    Every process knows all keys. Asking for an entry is a collective: all processes ask for the same entries in the
    same order, and each gets a copy.

    Args:
        fetch: for each key, the function that fetches the entry.
        peers: the processes.
    """

    def __init__(self, fetch: Mapping[tuple[int, str], Callable[[], Factors | Dense]], peers: Peers) -> None:
        self._fetch, self.peers = fetch, peers

    def __getitem__(self, key: tuple[int, str]) -> Factors | Dense:
        return self._fetch[key]()

    def __contains__(self, key: object) -> bool:  # Mapping's own would be a collective
        return key in self._fetch

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self._fetch)

    def __len__(self) -> int:
        return len(self._fetch)


def shared(
    own: Mapping[tuple[int, str], Factors | Dense],
    sharded: Mapping[tuple[int, str], Callable[[], Factors | Dense]],
    peers: Peers | None,
) -> Mapping[tuple[int, str], Factors | Dense]:
    """Make one mapping of the entries of all processes. This is a collective.

    Args:
        own: the entries that this process holds.
        sharded: the entries of which each process holds a shard, each with the function that gathers it.
        peers: the processes, or None for one process.

    Returns:
        A plain dict for one process, else a `SharedImportance`.
    """
    if peers is None:
        return {**own, **{key: gather() for key, gather in sharded.items()}}
    meta = torch.device("meta")
    fetch: dict[tuple[int, str], Callable[[], Factors | Dense]] = dict(sharded)
    for source, entries in enumerate(peers.gather([(key, kept.to(meta)) for key, kept in own.items()])):
        fetch |= {key: functools.partial(_fetch, peers, source, own.get(key), like) for key, like in entries}
    return SharedImportance(dict(sorted(fetch.items())), peers)


def _fetch(peers: Peers, source: int, kept: Factors | Dense | None, like: Factors | Dense) -> Factors | Dense:
    """Send an entry from process `source` to all; `like` has its shapes and dtypes."""
    parts = {
        name: peers.broadcast(None if kept is None else kept.parts[name], tensor, source)
        for name, tensor in like.parts.items()
    }
    if isinstance(like, Dense):
        return Dense(parts["f"], like.exponents)
    return Factors(parts["a"], parts["b"], like.exponents)


class StoredImportance(Mapping[tuple[int, str], Factors | Dense]):
    """Importance by (layer, name) that stays in its file and is read when asked for.

    Raises CheckpointError where a checksum does not match.

    Args:
        weights: the watched weights.
        stored: the tensors in the file, by name.
        crc32: their checksums, by name.
        exponents: see `Factors`, by "layer/name".
    """

    def __init__(
        self,
        weights: Iterable[Weight],
        stored: Mapping[str, TensorInFile],
        crc32: Mapping[str, int],
        exponents: Mapping[str, list[int]],
    ) -> None:
        self._stored, self._crc32, self._exponents = stored, crc32, exponents
        self._parts: dict[tuple[int, str], tuple[str, ...]] = {}
        for weight in weights:
            for parts in (("f",), ("a", "b")):
                names = tuple(f"{weight.layer}/{weight.name}/{part}" for part in parts)
                if all(name in stored for name in names):
                    self._parts[weight.layer, weight.name] = names

    def __getitem__(self, key: tuple[int, str]) -> Factors | Dense:
        tensors = [read_checked(self._stored[name], self._crc32) for name in self._parts[key]]
        first, second = self._exponents.get(f"{key[0]}/{key[1]}", (0, 0))
        exponents = (first, second)
        return Dense(tensors[0], exponents) if len(tensors) == 1 else Factors(tensors[0], tensors[1], exponents)

    def __contains__(self, key: object) -> bool:  # Mapping's own would read the tensor
        return key in self._parts

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
