"""Examples in a memory-mapped table."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from gradpruner.data.examples import Example, Record, decoded, digest_of_examples, encoded

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("kind", "prompt", "answer", "tools", "where")
BATCH = 1000  # rows
BATCH_BYTES = 1 << 26  # a batch of long rows is written earlier


class Examples(Sequence[Example]):
    """Examples in a memory-mapped table. They are decoded when they are asked for.

    A part of the examples, or another order, is a list of row numbers over the same table.

    Args:
        table: a `datasets.Dataset` with the text columns kind ("text" or "chat"), prompt, answer, tools and where.
            Messages are JSON.
        places: row numbers of the table, in order. Default: all rows.
        counts: how many files and rows were read, and what became of the rows.
        sets: name and size of each set of examples that this one is joined from.
    """

    def __init__(
        self,
        table: Dataset,
        places: Any = None,
        *,
        counts: Mapping[str, int] | None = None,
        sets: Sequence[tuple[str, int]] = (),
    ) -> None:
        self._table = table
        self._places = np.arange(len(table)) if places is None else np.asarray(places, dtype=np.int64)
        self.counts, self.sets = dict(counts or {}), tuple(sets)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Examples: ...

    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        row = self._table[int(self._places[index])]
        return decoded((row["kind"], row["prompt"], row["answer"], row["tools"]))

    def __iter__(self) -> Iterator[Example]:
        return map(decoded, self.records())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a list has none

    def __repr__(self) -> str:
        return f"<{len(self)} examples>"

    def records(self) -> Iterator[Record]:
        """Return each example as four strings: kind, prompt, answer and tools."""
        for start in range(0, len(self), BATCH):
            rows = self._table[self._places[start : start + BATCH].tolist()]
            yield from zip(rows["kind"], rows["prompt"], rows["answer"], rows["tools"], strict=True)

    @property
    def dataset(self) -> Dataset:
        """The examples as a `datasets.Dataset` with the columns of `COLUMNS`."""
        if np.array_equal(self._places, np.arange(len(self._table))):
            return self._table
        return self._table.select(self._places, keep_in_memory=True)

    def kinds(self) -> set[str]:
        """Return which kinds of examples the table has: "text", "chat" or both."""
        return set(self._table.unique("kind"))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the content of the examples, in their order."""
        return digest_of_examples(self)

    def where(self, index: int) -> str:
        """Return the file and the line that an example comes from."""
        return self._table[int(self._places[index])]["where"]

    def select(self, places: Any) -> Examples:
        """Return the examples at some places, in the order of the places."""
        return Examples(self._table, self._places[np.asarray(places, dtype=np.int64)], counts=self.counts)

    def shuffled(self, seed: int) -> Examples:
        """Return the examples in the order in which `random.Random(seed)` shuffles a list."""
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        return self.select(order)


def join(named: Sequence[tuple[str, Examples]]) -> Examples:
    """Return several sets of examples as one.

    Args:
        named: the name of each set, and its examples.

    Returns:
        All examples. `sets` holds the name and the size of each set, and `counts` the sums.
    """
    import datasets

    sets = [(name, len(examples)) for name, examples in named]
    counts = {key: sum(examples.counts.get(key, 0) for _, examples in named) for key in named[0][1].counts}
    if len(named) == 1:
        ((_, one),) = named
        return Examples(one._table, one._places, counts=counts, sets=sets)
    starts = np.cumsum([0, *(len(examples._table) for _, examples in named)])
    places = np.concatenate([e._places + start for (_, e), start in zip(named, starts[:-1], strict=True)])
    table = datasets.concatenate_datasets([examples._table for _, examples in named])
    return Examples(table, places, counts=counts, sets=sets)


class TableWriter:
    """Writes examples as an Arrow stream, which `datasets` maps into memory.

    Args:
        sink: a path, or a `pyarrow.BufferOutputStream`.
    """

    def __init__(self, sink: Any) -> None:
        import pyarrow as pa

        self._schema = pa.schema([(name, pa.string()) for name in COLUMNS])
        self._writer = pa.ipc.new_stream(sink, self._schema)
        self._rows: list[tuple[str, ...]] = []
        self._bytes = 0

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._flush()
        self._writer.close()

    def add(self, example: Example, where: str) -> None:
        """Write one example.

        Args:
            example: what is written.
            where: the file and the line that it comes from.
        """
        record = encoded(example)
        self._rows.append((*record, where))
        self._bytes += len(record[1]) + len(record[2]) + len(record[3])
        if len(self._rows) >= BATCH or self._bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            columns = [pa.array(column, pa.string()) for column in zip(*self._rows, strict=True)]
            self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._rows, self._bytes = [], 0
