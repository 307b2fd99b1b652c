"""`python -m benchmarks.gpu --out FOLDER --budget 540`: all that a card must show, from a checkout, without a network.

Every part runs in a process of its own with a time limit, the most valuable part first. A part that hangs or crashes
is killed with all that it has started, and the next one begins. Rows are written as soon as they are known, and
report.json, the CSV file and the plots after every part. A part for which too little of the budget is left is not
begun, and the report says so; a second run into the same folder with `--only` takes what the first has left.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A fork is chosen for the parts, so this process asks the driver's library about cards and starts none itself.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
from transformers.utils import logging

from benchmarks.gpu.isolation import Ended, run_apart
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.report import read_rows, write_report
from benchmarks.gpu.session import Session

RESERVE = 6  # seconds of the budget for the last report
PATIENCE = 5  # times its limit that a part has in a dry run: a CPU compiles and computes as it can


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that were asked for. Returns 0 if all of them ended well, else 1."""
    options = _options(arguments)
    began = time.monotonic()
    logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = _outcomes(options.out / "report.json")
    for part in [part for part in PARTS if (part.name in options.only if options.only else part.by_default)]:
        left = options.budget - (time.monotonic() - began) - RESERVE
        outcomes[part.name] = _run(part, options, left)
        print(f"== {part.name}: {json.dumps(outcomes[part.name])}", flush=True)
        rows = read_rows(options.out / "rows.jsonl")
        own = [row for row in rows if row["part"] == part.name]
        print(json.dumps(own[-1])[:600] if own else "no row", flush=True)
        write_report(options.out, rows, outcomes)
    return 0 if all(outcome["how"] == "ok" for outcome in outcomes.values()) else 1


def _run(part: Part, options: argparse.Namespace, left: float) -> dict[str, object]:
    if left < part.least:
        return {"how": "not begun", "why": f"{left:.0f} s of the budget were left; it needs {part.least:.0f}"}
    rows = options.out / "rows.jsonl"
    session = Session(
        part.name,
        torch.device(options.device),
        options.tiny,
        rows,
        options.model,
        tuple(options.data),
        tuple(options.seeds),
    )
    _forget(rows, part.name)
    limit = min(part.limit * (PATIENCE if options.tiny else 1), left)
    ended: Ended = run_apart(lambda: part.run(session), limit, options.out / "log.txt")
    _end_line(rows)
    wrong = [_name(row) for row in read_rows(rows) if row["part"] == part.name and _is_wrong(row)]
    how = "wrong" if wrong and ended.how == "ok" else ended.how
    return {
        "how": how,
        "seconds": round(ended.seconds, 1),
        **({"error": ended.error} if ended.error else {}),
        **({"wrong": wrong} if wrong else {}),
    }


def _is_wrong(row: Mapping[str, Any]) -> bool:
    return row.get("right") is False or row.get("twice_the_same") is False or bool(row.get("error"))


def _name(row: Mapping[str, Any]) -> str:
    return row.get("what") or f"{row.get('op')}, {row.get('variant')}: {row.get('implementation')}: {row.get('error')}"


def _end_line(rows: Path) -> None:
    """End the line that a killed part may have left unfinished, so that it does not swallow the next row."""
    if rows.exists() and not rows.read_bytes().endswith(b"\n"):
        with rows.open("a", encoding="utf-8") as file:
            file.write("\n")


def _forget(rows: Path, part: str) -> None:
    """Take the rows of an earlier run of this part out: two runs are not one table."""
    if rows.exists():
        kept = [line for line in rows.read_text(encoding="utf-8").splitlines() if f'"part": "{part}"' not in line]
        rows.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _outcomes(report: Path) -> dict[str, dict[str, object]]:
    return json.loads(report.read_text(encoding="utf-8"))["outcomes"] if report.exists() else {}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the report is written")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="for all parts (default 540)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: with --tiny alone, a dry run")
    parser.add_argument("--tiny", action="store_true", help="shapes for a dry run; no figure of it means anything")
    parser.add_argument("--only", default="", metavar="PART,PART", help=f"of {', '.join(names)}")
    parser.add_argument("--model", type=Path, metavar="FILE", help="GGUF file, or a folder of its pieces: for accuracy")
    parser.add_argument("--data", type=Path, nargs="+", default=[], metavar="CSV", help="banking77: for accuracy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="for accuracy (0 1 2)")
    options = parser.parse_args(arguments)
    options.only = [name for name in options.only.split(",") if name]
    unknown = [name for name in options.only if name not in names]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: accepted are {', '.join(names)}")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu: accepted with --tiny alone, whose figures mean nothing")
    if "accuracy" in options.only and (options.model is None or not options.data):
        parser.error("--only accuracy: expected --model FILE_OR_FOLDER_OF_PIECES and --data CSV [CSV]")
    return options


if __name__ == "__main__":
    sys.exit(main())
