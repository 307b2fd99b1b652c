"""Writes docs/adapters.md: `python tests/support/adapters_table.py` runs every case, in a few minutes.

With `--keep-rows` it runs nothing, and writes only the text around the rows that are there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from pathlib import Path

from adapter_loops import CASES
from adapter_matrix import run
from adapter_models import Case, Row

TABLE = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"
HEAD = """# Is my adapter, optimizer or loop supported?

Search this page for the adapter, the optimizer or the loop. "works" means that every number compared below was right.
"refused" means that an error names the reason and the model is not changed.
"""
RULES = """## What follows from the rows

* **LoRA, rsLoRA, LoRA+, DoRA and QLoRA work**, with any rank, alpha, dropout and choice of linears. LoRA-FA and MiCA
  freeze one of the two factors, so they need `estimator="exact"`. "No plan" in a row means that the layers are not
  measured alike, so `Igia.plan` refuses to rank them
  ([which layers can be compared](training.md#which-layers-can-be-compared)).
* **Most other adapters of PEFT work with `estimator="exact"`**, which reads the gradient of the frozen weight itself,
  whatever adapter runs it. The default estimator reads LoRA's two factors and refuses other kinds. "No usable step"
  means that nothing flows back through the weights in these four steps.
* **An adapter that holds a part of the base weights cannot be discarded** (PiSSA, OLoRA, CorDA, LoRA-GA, KaSA).
  `apply` refuses it. Apply the plan and the igia to the original model instead.
* **A quantised model can be probed, and its layers can be dropped in place.** Merging needs the full-precision
  checkpoint and `apply_folder`.
* **Adapters on weights outside the decoder layers and trained copies (`modules_to_save`) are discarded** with the
  adapters in these rows. Tied embeddings stay tied.
* **Adam's state of a bfloat16 model is bfloat16 too.** Read as importance (`estimator="adam"`), it puts about 0.2 %
  of a mask elsewhere after 40 steps of random gradients. `estimator="gradient"` keeps float32.
* **With GradScaler**, call `probe.record()` after `scaler.unscale_(optimizer)` and before the optimizer's step.
* Three kinds of adapter that peft 0.21 has are not in the table. `apply` refuses ADAPTION_PROMPT, whose attention
  cannot be taken off again. SHADOW's forward fails with this version of transformers. XLORA needs trained adapters
  on disk.

## What each row runs

`python tests/support/adapters_table.py` runs every row and writes this page. `tests/pruning/test_adapters.py` runs
the rows again and compares. Each row is a random model of six layers that is trained for four steps under the
probe.

* **scores**: all three kinds of score, and the layers that a plan of three would remove, are compared with float64
  arithmetic on the gradients as they were just before `optimizer.step()`. The relative difference is at most 1e-6.
  It is at most 1e-4 for the estimator `exact`, and at most 1e-2 for `orthogonal`, whose first step has G = 0 up to
  rounding. The number is that of the weights watched.
* **merged**: layer 3 is merged into layer 2, and every entry of these weights is compared with the rule of the
  method. An entry whose importance lies within 1e-5 of the threshold may be on either side. Every other parameter
  is equal to the bit.
* **dropped**: the logits with layers 1, 3 and 4 removed are compared with those of the dense model with these
  layers skipped.

A row that `apply` refuses left the model as it was. Its other columns are of the same plan applied to the model as
it was before it got adapters. A row that the probe refuses has no other columns.
"""
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "schedulefree", "lomo-optim", "scipy")
KINDS = ("works", "refused", "not available here")


def line(case: Case, row: Row) -> str:
    result = " ".join(row.result.replace("|", "/").split())
    return f"| {case.name} | {row.scores} | {row.merged} | {row.dropped} | {result} |"


def kind_of(line: str) -> str:
    """What a row's result begins with: works, refused, not available here."""
    return line.rstrip(" |").rpartition("| ")[2].split(":")[0]


def counts(lines: list[str]) -> str:
    kinds = [kind_of(line) for line in lines]
    works, refused, absent = (kinds.count(kind) for kind in KINDS)
    return f"{len(lines)} rows: {works} work, {refused} are refused with a reason, {absent} were not available here."


def summary(sections: dict[str, list[str]]) -> list[str]:
    """How many rows of each group fall under each result."""
    lines = ["| group | work | are refused | were not available here |", "|---|---|---|---|"]
    for group, section in sections.items():
        kinds = [kind_of(line) for line in section]
        numbers = " | ".join(str(kinds.count(kind) or "") for kind in KINDS)
        lines.append(f"| [{group}](#{group.lower().replace(' ', '-')}) | {numbers} |")
    return lines


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found) + "."


def rows_in(text: str) -> dict[tuple[str, str], str]:
    """The rows of a written table, by group and name."""
    found, group = {}, ""
    for text_line in text.splitlines():
        if text_line.startswith("## "):
            group = text_line.removeprefix("## ")
        elif group and text_line.startswith("| ") and not text_line.startswith("| case "):
            found[group, text_line.split(" | ")[0].removeprefix("| ")] = text_line
    return found


def page(sections: dict[str, list[str]], seen_with: str) -> str:
    """The whole page: the summary first, then the rules, then every row."""
    lines = [row for section in sections.values() for row in section]
    text = [HEAD, f"**{counts(lines)}**", "", *summary(sections), "", f"{seen_with}", "", RULES]
    for group, section in sections.items():
        head = ["| case | scores | merged | dropped | result |", "|---|---|---|---|---|"]
        text += [f"## {group}", "", *head, *section, ""]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep-rows", action="store_true", help="run nothing: write the text around the page's rows")
    sections: dict[str, list[str]] = {}
    if parser.parse_args().keep_rows:
        written = TABLE.read_text()
        seen_with = next(text_line for text_line in written.splitlines() if text_line.startswith("Seen with "))
        for (group, _), row_line in rows_in(written).items():
            sections.setdefault(group, []).append(row_line)
    else:
        seen_with = f"Seen with {versions()}"
        for case in CASES:
            row = Row(result=f"not available here: needs {case.missing}") if case.missing else run(case)
            sections.setdefault(case.group, []).append(line(case, row))
            print(sections[case.group][-1], flush=True)
    TABLE.write_text(page(sections, seen_with))


if __name__ == "__main__":
    main()
