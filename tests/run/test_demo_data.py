from __future__ import annotations

import random
import sys
from collections import Counter

import pytest

from gradpruner.data.examples import Example
from gradpruner.errors import GradPrunerError
from gradpruner.run import demo_data
from gradpruner.run.demo_data import CHAPTERS, demo_examples, majority_share, paragraphs, shingles

PROSE = (
    "The statement is used for {} and it must be one of the things that can be done in a block of {}, "
    "as described in the section on {}."
)


def paragraph_of(example: Example) -> str:
    paragraph, last_line = example.prompt.rsplit("\n", 1)
    assert last_line == "Chapter:"
    return paragraph


@pytest.fixture
def topics(monkeypatch):
    """Replace the interpreter's topics by a dictionary of the test's own."""
    own: dict[str, str] = {}
    monkeypatch.setattr(demo_data, "_topics", lambda: own)
    return own


def test_every_chapter_has_enough_to_learn_from():
    counts = Counter(chapter for _, chapter in paragraphs())
    assert set(counts) == set(CHAPTERS)
    assert min(counts.values()) >= 20
    assert sum(counts.values()) >= 700


def test_no_two_paragraphs_share_eight_words():
    seen: dict[tuple[str, ...], str] = {}
    for paragraph, _ in paragraphs():
        for gram in shingles(paragraph):
            assert gram not in seen, (paragraph, seen.get(gram))
            seen[gram] = paragraph


def test_train_and_test_share_no_eight_words():
    train, test = demo_examples()
    known = set().union(*(shingles(paragraph_of(example)) for example in train))
    assert not any(known & shingles(paragraph_of(example)) for example in test)
    assert 180 <= len(test) <= 220 and len(train) > 2 * len(test)


def test_chapters_have_the_same_share_in_train_and_test():
    train, test = demo_examples()
    in_train, in_test = (Counter(example.answer for example in part) for part in (train, test))
    for chapter in CHAPTERS:
        share = in_test[chapter] / (in_test[chapter] + in_train[chapter])
        assert abs(share - len(test) / (len(test) + len(train))) < 0.03
    assert 0.2 < majority_share(test) < 0.4


def test_the_seed_decides():
    state = random.getstate()
    assert demo_examples(seed=1) == demo_examples(seed=1)
    assert demo_examples(seed=1)[1] != demo_examples(seed=2)[1]
    assert random.getstate() == state
    train, test = demo_examples(seed=1)
    assert sorted(map(paragraph_of, train + test)) == sorted(text for text, _ in paragraphs())


def test_paragraphs_are_prose_of_a_reasonable_length():
    for paragraph, _ in paragraphs():
        assert demo_data.SHORTEST <= len(paragraph) <= demo_data.LONGEST
        assert "\n" not in paragraph and "  " not in paragraph
        assert "::=" not in paragraph and ">>>" not in paragraph and "+---" not in paragraph


def test_a_paragraph_of_several_topics_belongs_to_the_shorter_one(topics):
    shared, other = PROSE.format("loops", "code", "flow"), PROSE.format("names", "scopes", "binding")
    # wrapped and capitalised elsewhere, it is still the same paragraph
    topics["compound"] = f"Heading\n*******\n\n{other}\n\n{shared.upper().replace(' ', chr(10))}\n"
    topics["naming"] = f"Naming\n******\n\n{shared}\n"
    found = dict(paragraphs())
    assert found[shared] == "Execution model"
    assert sum("loops" in text.casefold() for text in found) == 1


def test_what_is_not_prose_is_left_out(topics):
    kept = PROSE.format("loops", "code", "flow")
    topics["for"] = "\n\n".join(
        [
            'The "for" statement and all that there is to be said of it in one line\n' + "*" * 60,
            'for_stmt ::= "for" target_list "in" starred_list ":" suite and so on, as it is in the grammar',
            "   >>> for a in the_list_that_is_to_be_used: print(a) or not, as it may be in the example",
            "See also the section on the other statements, which is to be found in the chapter on them",
            f"1. {kept}",
            "Short.",
        ]
    )
    topics["a-topic-of-a-later-python"] = PROSE.format("magic", "wonder", "tomorrow")
    assert paragraphs() == [(kept, "Compound statements")]


def test_long_paragraphs_are_cut_between_sentences(topics):
    sentences = [f"The item{i} is one of the parts{i} that can be in a list{i} or not." for i in range(30)]
    topics["for"] = " ".join(sentences)
    pieces = [text for text, _ in paragraphs()]
    assert len(pieces) > 1
    assert " ".join(pieces) == topics["for"]
    assert all(piece.startswith("The") and piece.endswith(".") for piece in pieces)


def test_words_broken_at_a_hyphen_are_joined(topics):
    topics["debugger"] = PROSE.format("post-\nmortem debugging", "code", "flow").replace(" must", "\nmust")
    assert [text for text, _ in paragraphs()] == [PROSE.format("post-mortem debugging", "code", "flow")]


def test_majority_share():
    assert majority_share([Example("", "a"), Example("", "b"), Example("", "a"), Example("", "a")]) == 0.75


def test_an_interpreter_without_topics_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(GradPrunerError, match="pydoc_data"):
        paragraphs()
