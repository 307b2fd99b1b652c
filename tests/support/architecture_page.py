"""Writes docs/decoders.md: `python tests/support/architecture_page.py` runs every architecture, in half an hour or so.

With `--keep-rows` it runs nothing, and writes only the text around the rows that are there.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import transformers as hf
from architecture_matrix import LAST, REFUSED, UNBUILT, WORKS, WRONG, Outcome, examine_all, plain
from tiny_configs import LAYERS, REGISTERED

PAGE = Path(__file__).resolve().parents[2] / "docs" / "decoders.md"
ADDRESS = "https://huggingface.co/docs/transformers"
FAMILIES = (
    *("llama", "mistral", "mixtral", "ministral", "qwen", "gemma", "phi", "deepseek", "glm", "gpt", "olmo", "granite"),
    *("falcon", "cohere", "smollm", "ernie", "exaone", "nemotron", "bloom", "opt", "mamba", "jamba", "t5", "bart"),
)


def table(outcomes: list[Outcome]) -> str:
    """The page docs/decoders.md."""
    count = Counter(outcome.status for outcome in outcomes)
    built = len(outcomes) - count[UNBUILT]
    lines = [
        "# Is my model supported?",
        "",
        f"What `gradpruner.apply` does with each architecture that [transformers]({ADDRESS}) {hf.__version__} "
        "registers for causal language modelling, image-text-to-text or sequence-to-sequence. Search this page for the "
        "`model_type` in your `config.json`.",
        "",
        f"**{count[WORKS]} of the {built} architectures that can be built work, {count[WORKS] / max(1, built):.1%}.**",
        "",
        "| result | architectures | meaning |",
        "|---|---|---|",
        f"| {WORKS} | {count[WORKS]} | any layers can be removed, and everything compared was equal |",
        f"| {LAST} | {count[LAST]} | only the last layers can be removed; any other choice is refused with a reason |",
        f"| {REFUSED} | {count[REFUSED]} | raises `UnsupportedModel`; the model is not changed |",
        f"| {WRONG} | {count[WRONG]} | a difference that nothing reported: a bug |",
        f"| {UNBUILT} | {count[UNBUILT]} | no tiny model of it could be built and reloaded here: not known |",
        "",
        "## By family",
        "",
        "How many model types of each family fall under each result. A family is every model type that begins with its "
        "name.",
        "",
        "| family | work | last layers | are refused | could not be built |",
        "|---|---|---|---|---|",
        *(line for family in FAMILIES if (line := family_row(family, outcomes))),
        "",
        "## The exceptions",
        "",
        "| model type | result | reason |",
        "|---|---|---|",
        *(f"| {o.model_type} | {o.status} | {plain(o.note)} |" for o in outcomes if o.status in (LAST, REFUSED, WRONG)),
        "",
        "## How this page is made",
        "",
        "`python tests/support/architecture_page.py` writes this page, and a slow test compares it with what it finds.",
        "",
        f"For each architecture, a random model with {LAYERS} decoder layers is built. Layers 1, 3 and 4 are removed, "
        "one of them merged; if that choice is refused, other choices are tried. The smaller model is saved and read "
        "back by the stock class. Two things are compared with the dense model whose removed layers are skipped: the "
        "logits, and greedy generation with and without a cache, step by step. Images are given only where the model "
        "cannot run without them, so what a vision tower adds is not compared.",
    ]
    for group in REGISTERED:
        lines += ["", f"## Registered for {group}", "", "| model type | class | result | removed | remarks |"]
        lines += ["|---|---|---|---|---|", *(outcome.row() for outcome in outcomes if outcome.group == group)]
    return "\n".join(lines) + "\n"


def family_row(family: str, outcomes: list[Outcome]) -> str | None:
    """One line of the table by family, or None where nothing is registered under that name."""
    count = Counter(outcome.status for outcome in outcomes if outcome.model_type.startswith(family))
    numbers = [count[status] for status in (WORKS, LAST, REFUSED, UNBUILT)]
    return f"| {family} | {' | '.join(str(number or '') for number in numbers)} |" if sum(numbers) else None


def outcomes_in(page: str) -> list[Outcome]:
    """The rows of a written page: for writing its other parts anew."""
    outcomes, group = [], ""
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("## "):
            group = line.removeprefix("## Registered for ")
        elif group in REGISTERED and line.startswith("| ") and cells[0] != "model type":
            removed = cells[3].removesuffix(", one merged")
            layers = tuple(map(int, filter(None, removed.split(", "))))
            outcomes.append(Outcome(group, *cells[:3], layers, ", one merged" in cells[3], cells[4]))
            assert outcomes[-1].row() == line, line
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep-rows", action="store_true", help="run nothing: write the text around the page's rows")
    outcomes = outcomes_in(PAGE.read_text()) if parser.parse_args().keep_rows else examine_all([])
    PAGE.write_text(table(outcomes))


if __name__ == "__main__":
    main()
