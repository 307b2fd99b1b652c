"""Tokenised rows on disk: made once, memory-mapped, and found again by their content."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from gradpruner.data.counts import Counts
from gradpruner.data.encoder import Encoder
from gradpruner.data.row_facts import learned_tokens
from gradpruner.data.rows_key import rows_key
from gradpruner.errors import InvalidArgument
from gradpruner.storage.locks import lock

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

LARGE = 20_000  # examples; more are tokenised by several processes, with a progress bar
EACH = 5_000  # examples that a process should have at least, since starting it takes time
Indices = np.ndarray[Any, np.dtype[np.int64]]


class Rows(Sequence[Mapping[str, list[int]]]):
    """Tokenised rows on disk. A row is read when it is asked for.

    Args:
        dataset: the columns `input_ids`, `labels`, `length`, `learned`, `highest`, `example` and `lost`.
        indices: which rows of the data set, in order. Default: all that have tokens.
        counts: what became of the examples. Default: counted.
    """

    def __init__(self, dataset: Dataset, indices: Indices | None = None, counts: Counts | None = None) -> None:
        self._dataset = dataset
        self._indices = np.flatnonzero(self._column("length")) if indices is None else indices
        self.counts = counts or self._counted()

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> dict[str, list[int]]: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> dict[str, list[int]] | Rows:
        if isinstance(index, slice):
            return Rows(self._dataset, self._indices[index], self.counts)
        row = self._dataset[int(self._indices[index])]
        return {"input_ids": row["input_ids"], "labels": row["labels"]}

    def fact(self, name: str) -> np.ndarray[Any, Any]:
        """Return one number for every row: its "length", "learned" tokens or "highest" token."""
        return self._column(name)[self._indices]

    @functools.cached_property
    def content(self) -> str:
        """A digest of all tokens and labels, in order."""
        mark = hashlib.sha256(self._indices.astype("<i8").tobytes())
        for name in ("length", "input_ids", "labels"):
            for chunk in self._dataset.data.column(name).chunks:
                values = chunk if name == "length" else chunk.flatten()
                mark.update(values.to_numpy().astype("<i4", copy=False).tobytes())
        return mark.hexdigest()[:16]

    def _column(self, name: str) -> np.ndarray[Any, Any]:
        return self._dataset.data.column(name).to_numpy()

    def _counted(self) -> Counts:
        length, lost, example = self._column("length"), self._column("lost").astype(np.int64), self._column("example")
        kept = length > 0
        parts = np.unique(example[kept], return_counts=True)[1]
        return Counts(
            examples=len(np.unique(example)),
            rows=int(kept.sum()),
            tokens=int(length.sum(dtype=np.int64)),
            learned=int(self._column("learned").sum(dtype=np.int64)),
            cut=int((lost[kept] > 0).sum()),
            cut_tokens=int(lost[kept].sum()),
            skipped=int((~kept).sum()),
            skipped_tokens=int(lost[~kept].sum()),
            split=int((parts > 1).sum()),
        )


def rows_of(examples: Any, encoder: Encoder) -> Rows:
    """Tokenise examples that are on disk, or find the rows that were made of them before.

    Args:
        examples: a sequence of examples with a `fingerprint` of its content.
        encoder: makes rows of them.

    Raises:
        InvalidArgument: an example is not accepted, or the folder of the cache cannot be written.
    """
    import datasets  # slow to import

    if not len(examples):
        return Rows(datasets.Dataset.from_dict({name: [] for name in _features()}, features=_features()))
    folder = Path(datasets.config.HF_DATASETS_CACHE, "gradpruner")
    key = rows_key(examples.fingerprint, encoder)
    path = folder / f"{key}.arrow"
    large = len(examples) > LARGE
    processes = min(len(os.sched_getaffinity(0)), len(examples) // EACH) if large else 1
    numbers = datasets.Dataset.from_dict({"number": np.arange(len(examples))})
    try:
        with lock(path) if key else contextlib.nullcontext(), _progress_bars(large):
            made = numbers.map(
                _Batch(examples, encoder),
                batched=True,
                input_columns="number",
                remove_columns="number",
                features=_features(),
                num_proc=processes if processes > 1 else None,
                cache_file_name=str(path) if key else None,
                keep_in_memory=key is None,  # they could not be found again
                load_from_cache_file=True,
                new_fingerprint=key or uuid.uuid4().hex,
                desc="tokenising",
            )
    except OSError as error:
        raise InvalidArgument(
            f"the tokenised rows cannot be kept in {str(folder)!r}: {error}; expected a folder that can be written, "
            "with room (HF_DATASETS_CACHE names it)"
        ) from error
    return Rows(made)


class _Batch:
    """What the processes do: consecutive numbers of examples to the columns of their rows."""

    def __init__(self, examples: Any, encoder: Encoder) -> None:
        self._examples, self._encoder = examples, encoder

    def __call__(self, numbers: list[int]) -> dict[str, list[Any]]:
        first = numbers[0]
        encoded = self._encoder(list(self._examples[first : first + len(numbers)]), first, self._place)
        return {
            "input_ids": [row.input_ids for row in encoded],
            "labels": [row.labels for row in encoded],
            "length": [len(row.input_ids) for row in encoded],
            "learned": [learned_tokens({"labels": row.labels}) for row in encoded],
            "highest": [max(row.input_ids, default=0) for row in encoded],
            "example": [row.example for row in encoded],
            "lost": [row.lost for row in encoded],
        }

    def _place(self, index: int) -> str:
        where = getattr(self._examples, "where", None)
        return f"example {index + 1}" if where is None else f"example {index + 1} ({where(index)})"


def _features() -> Any:
    from datasets import Features, Sequence, Value

    tokens = {name: Sequence(Value("int32")) for name in ("input_ids", "labels")}
    return Features(
        {**tokens, **{name: Value("int32") for name in ("length", "learned", "highest", "example", "lost")}}
    )


@contextlib.contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Hide the progress bars of datasets inside, unless they are to be shown."""
    import datasets

    if shown or datasets.utils.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
