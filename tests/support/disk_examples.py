"""Examples as a reader of large files hands them on: lazily decoded, with a digest of their content."""

from __future__ import annotations

from collections.abc import Sequence

from gradpruner.data.examples import Example


class DiskExamples(Sequence):
    """`make(i)` is called for an example when it is asked for; `fingerprint` stands for the content of all."""

    def __init__(self, fingerprint, make, numbers):
        self.fingerprint, self.make, self.numbers = fingerprint, make, numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return DiskExamples(f"{self.fingerprint}{index}", self.make, self.numbers[index])
        return self.make(self.numbers[index])

    def where(self, index):
        return f"train.jsonl, line {index + 1}"


class OfList:
    """Can be sent to other processes, as a function inside a test cannot."""

    def __init__(self, examples):
        self.examples = examples

    def __call__(self, number):
        return self.examples[number]


def on_disk(examples, fingerprint="content"):
    return DiskExamples(fingerprint, OfList(list(examples)), range(len(examples)))


def short(number):
    """One of many short examples."""
    return Example(f"What is {number % 1000} plus {number % 7}?", f"{number % 1000 + number % 7}")
