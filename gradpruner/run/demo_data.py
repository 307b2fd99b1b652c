"""The demo's task, made from the Python reference that ships inside every interpreter.

"Which chapter is this paragraph from?": no download, no licence question, and answers a person can check.
The text is `pydoc_data.topics`, what `help("for")` prints, so it differs a little between Python versions.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator

from gradpruner.data.examples import Example
from gradpruner.errors import GradPrunerError

# Chapters of the language reference, then of the library reference. A topic that a Python version does not
# have is skipped, and so is a topic of a newer version that is not named here.
CHAPTERS = {
    "Lexical analysis": "floating id-classes identifiers imaginary integers numbers strings",
    "Data model": "attribute-access callable-types context-managers customization numeric-types objects "
    "sequence-types specialnames types",
    "Execution model": "dynamic-features exceptions execmodel naming",
    "Expressions": "atom-identifiers atom-literals attribute-references await binary bitwise booleans calls "
    "comparisons conversions dict exprlists in lambda lists operator-summary power shifting slicings "
    "subscriptions unary",
    "Simple statements": "assert assignment augassign break continue del global import nonlocal pass raise "
    "return yield",
    "Compound statements": "async class compound else for function if try while with",
    "Built-in types": "bltin-code-objects bltin-ellipsis-object bltin-null-object bltin-type-objects "
    "specialattrs string-methods truth typesfunctions typesmapping typesmethods typesmodules typesseq "
    "typesseq-mutable",
    "String formatting": "formatstrings",
    "Debugger": "debugger",
}
TEST_SIZE = 200
SHORTEST, LONGEST = 80, 600  # characters of a paragraph
SHINGLE = 8  # two paragraphs that share this many words in a row count as the same text
FUNCTION_WORDS = re.compile(
    r"\b(an?|and|are|as|at|be|been|but|by|can|do|for|from|has|have|if|in|is|its?|may|more|must|not|of|on|one|or|"
    r"other|should|so|that|the|then|this|to|used|was|when|which|will|with)\b",
    re.IGNORECASE,
)


def paragraphs() -> list[tuple[str, str]]:
    """Return the prose of this interpreter's reference as pairs of paragraph and chapter.

    No two paragraphs share eight words in a row. Topics overlap ("compound" contains "for"), so shorter topics are read
    first: a paragraph of several topics belongs to the most specific one.

    Raises:
        GradPrunerError: this interpreter was installed without `pydoc_data`.
    """
    topics = _topics()
    known = [(topic, chapter) for chapter, names in CHAPTERS.items() for topic in names.split() if topic in topics]
    seen: set[tuple[str, ...]] = set()
    kept = []
    for topic, chapter in sorted(known, key=lambda pair: (len(topics[pair[0]]), pair[0])):
        for paragraph in _prose(topics[topic]):
            grams = shingles(paragraph)
            if seen.isdisjoint(grams):
                kept.append((paragraph, chapter))
            seen |= grams
    return kept


def demo_examples(seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Return training and test examples, with about the same share of each chapter in both.

    Args:
        seed: of the shuffling.

    Returns:
        The training examples and about 200 test examples.

    Raises:
        GradPrunerError: this interpreter was installed without `pydoc_data`.
    """
    by_chapter: dict[str, list[Example]] = {}
    everything = paragraphs()
    for paragraph, chapter in everything:
        by_chapter.setdefault(chapter, []).append(Example(f"{paragraph}\nChapter:", chapter))
    share = min(0.25, TEST_SIZE / len(everything))
    rng = random.Random(seed)
    train: list[Example] = []
    test: list[Example] = []
    for chapter in sorted(by_chapter):
        examples = by_chapter[chapter]
        rng.shuffle(examples)
        cut = max(1, round(share * len(examples)))
        test += examples[:cut]
        train += examples[cut:]
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def majority_share(examples: list[Example]) -> float:
    """Return the share of the most frequent answer: the exact match of always giving it."""
    return max(Counter(example.answer for example in examples).values()) / len(examples)


def shingles(text: str) -> set[tuple[str, ...]]:
    """Return every run of eight words of a text, without case and punctuation.

    A text of fewer words is one run.
    """
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions leave it out of a minimal Python
        raise GradPrunerError("the demo reads pydoc_data.topics, which this Python was installed without") from error
    return topics


def _prose(topic: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", topic):
        # "post-\nmortem" is one word; list and footnote markers are not prose
        line = " ".join(re.sub(r"(\w-)\n\s*", r"\1", block).split())
        line = re.sub(r"^(\*|\[?\d+[.\]]) ", "", line)
        if _is_prose(line):
            yield from (piece for piece in _pieces(line) if len(piece) >= SHORTEST)


def _is_prose(line: str) -> bool:
    """Return whether a line is prose: no heading, grammar, code, table or pointer elsewhere."""
    if line.startswith("See also") or "::=" in line or ">>>" in line or re.search(r"[=*\-|+]{4}", line):
        return False
    words = re.findall(r"[A-Za-z]+", line)
    return len(words) >= 12 and len(FUNCTION_WORDS.findall(line)) >= 0.2 * len(words)


def _pieces(line: str) -> Iterator[str]:
    """Split a line into runs of whole sentences of at most `LONGEST` characters.

    A single sentence that is longer is left out.
    """
    piece = ""
    for sentence in re.split(r"(?<=[.:?!]) (?=[A-Z\"*(])", line):
        if piece and len(piece) + 1 + len(sentence) > LONGEST:
            yield piece
            piece = ""
        if len(sentence) <= LONGEST:
            piece = f"{piece} {sentence}".strip()
    if piece:
        yield piece
