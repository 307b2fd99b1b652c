"""Write docs/adapters.md: `python tests/support/adapters_table.py` runs every case, the slow ones too.

This takes a few minutes.
"""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

from adapter_loops import CASES
from adapter_matrix import run
from adapter_models import Case, Row

TABLE = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"
HEAD = """# Adapters, optimizers and training loops

Written by `python tests/support/adapters_table.py`, which runs every row; \
`tests/pruning/test_adapters.py` runs them again and
compares.

Each row is a random model of six layers, trained for four steps under the probe:

* **scores**: all three kinds, and the layers a plan of three would remove, against float64 arithmetic on the gradients
  as they were just before `optimizer.step()` (relative difference at most 1e-6; 1e-4 for the
  estimator `exact`; 1e-2 for `orthogonal`, whose first step has G = 0 but for rounding).
  "No plan": not every layer is measured alike, so `Igia.plan` refuses to compare their scores
  ([training.md](training.md#which-layers-can-be-compared)).
* **merged**: layer 3 folded into layer 2, every entry of these weights against the rule of the method; an entry whose
  importance lies within 1e-5 of the threshold may be on either side. Every other parameter bit for bit its own.
* **dropped**: logits with layers 1, 3 and 4 removed, against the dense model with those layers skipped.
* A row refused by `apply` was left as it was; its other columns are then of the same plan applied to the model as it
  was before it got adapters. A row refused by the probe has none.

What follows from them:

* Adapters of the probe are discarded, and so are the trained copies of `modules_to_save`: what comes back is the model
  as it was, smaller. Tied embeddings stay tied.
* An adapter that keeps a part of the base weights in itself cannot be discarded. `apply` refuses it, and the plan and
  igia fit the original model.
* A quantised model is probed, its layers can be dropped in place, and its merge is done by `apply_folder` on the
  full-precision checkpoint.
* `estimator="exact"` reads the frozen weights' own gradient, dY^T X of the base layer's product, under any adapter that
  runs it.
* Adam's state of a bfloat16 model is bfloat16 too: read as importance it puts about 0.2 % of a mask elsewhere after 40
  steps of random gradients. `estimator="gradient"` keeps float32.
* Of the kinds of adapter that peft 0.21 has, ADAPTION_PROMPT (its attention cannot be taken off again: `apply` refuses
  it), SHADOW (its forward fails with this transformers) and XLORA (wants trained adapters on disk) have no row.
* `probe.record()` is called before the optimizer's step, so under GradScaler after `scaler.unscale_(optimizer)`.
"""
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "schedulefree", "lomo-optim", "scipy")


def line(case: Case, row: Row) -> str:
    result = " ".join(row.result.replace("|", "/").split())
    return f"| {case.name} | {row.scores} | {row.merged} | {row.dropped} | {result} |"


def kind_of(line: str) -> str:
    """What a row's result begins with: works, refused, not available here."""
    return line.rstrip(" |").rpartition("| ")[2].split(":")[0]


def counts(lines: list[str]) -> str:
    kinds = [kind_of(line) for line in lines]
    works, refused, absent = (kinds.count(kind) for kind in ("works", "refused", "not available here"))
    return f"{len(lines)} rows: {works} work, {refused} are refused with a reason, {absent} were not available here."


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
        elif text_line.startswith("| ") and not text_line.startswith("| case "):
            found[group, text_line.split(" | ")[0].removeprefix("| ")] = text_line
    return found


def main() -> None:
    sections: dict[str, list[str]] = {}
    for case in CASES:
        row = Row(result=f"not available here: needs {case.missing}") if case.missing else run(case)
        sections.setdefault(case.group, []).append(line(case, row))
        print(sections[case.group][-1], flush=True)
    lines = [row for section in sections.values() for row in section]
    text = [HEAD, counts(lines), "", f"Seen with {versions()}", ""]
    for group, section in sections.items():
        head = ["| case | scores | merged | dropped | result |", "|---|---|---|---|---|"]
        text += [f"## {group}", "", *head, *section, ""]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(text))


if __name__ == "__main__":
    main()
