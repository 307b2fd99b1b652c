"""Parts and orders of examples."""

from __future__ import annotations

from disk_examples import on_disk

from gradpruner.data.examples import Example
from gradpruner.data.parts import with_answer

EXAMPLES = [Example("a", "b"), Example("text"), Example("c", "d"), Example("e", "f")]


class Selecting(list):
    def select(self, places):
        return Selecting(self[place] for place in places)


def test_those_with_an_answer():
    assert with_answer(EXAMPLES) == [EXAMPLES[0], EXAMPLES[2], EXAMPLES[3]]
    assert with_answer(EXAMPLES[1:2]) == []
    answered = on_disk(EXAMPLES[2:])
    assert with_answer(answered) is answered
    part = with_answer(Selecting(EXAMPLES))
    assert isinstance(part, Selecting) and part == with_answer(EXAMPLES)
