"""`python -m benchmarks.static`: what can be known of every kernel without a card.

Everything is predicted or counted. No number in it may be taken for a measurement. The code is read from kernels that
are compiled ahead of time as they are launched (`benchmarks.static.compiled`). The occupancy is computed from published
limits (`benchmarks.static.occupancy`). Bytes and operations are counted (`benchmarks.static.counts`).

Writes `benchmarks/results/static.csv`: one row per op, shape and target, with its main kernel; then one row for every
other kernel and target.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks.records import FOLDER
from benchmarks.static.binaries import Code
from benchmarks.static.compiled import CASES, TARGETS
from benchmarks.static.counts import CARDS, Count, counts
from benchmarks.static.occupancy import LIMITS, occupancy
from gradpruner.report.tables import table
from gradpruner.storage.csv_files import write_dicts

RESULT = FOLDER / "static.csv"
NOTICE = "Predicted from compiled code and counted by hand. No number in it may be taken for a measurement."


def code_columns(code: Code, target: str) -> dict[str, Any]:
    """What the compiled code of one kernel says."""
    fits = occupancy(code, LIMITS[target])
    return {
        "registers (compiled)": code.registers,
        "spilled bytes (compiled)": code.spilled_bytes,
        "shared bytes (compiled)": code.shared_bytes,
        "blocks a processor (predicted)": fits.blocks,
        "occupancy (predicted)": f"{fits.share:.0%}",
        "limited by (predicted)": fits.limited_by,
        "widest load, bytes (compiled)": code.widest_load,
        "loads of 16 bytes or more (compiled)": f"{code.wide_share:.0%}",
        "matrix instructions (compiled)": " ".join(code.matrix) or "none",
    }


def count_columns(count: Count) -> dict[str, Any]:
    """What counting says of one op at one shape, ours beside the released way."""
    columns: dict[str, Any] = {
        "MB moved (counted)": f"{sum(p.bytes for p in count.ours) / 1e6:.1f}",
        "operations, 1e9 (counted)": f"{sum(sum(p.operations.values()) for p in count.ours) / 1e9:.2f}",
        "released: MB moved (counted)": f"{sum(p.bytes for p in count.released) / 1e6:.1f}",
    }
    for name, card in CARDS.items():
        ours = sum(p.seconds(card) for p in count.ours)
        released = sum(p.seconds(card) for p in count.released)
        columns |= {
            f"{name} roofline, us (predicted)": f"{1e6 * ours:.1f}",
            f"{name} released roofline, us (predicted)": f"{1e6 * released:.1f}",
            f"{name} released / ours (predicted)": f"{released / ours:.2f}",
        }
    return columns


def rows() -> list[dict[str, Any]]:
    """Compile every case for every target, and count every op."""
    codes = {(name, target): CASES[name].compile(target) for name in CASES for target in TARGETS}
    counted = counts()
    found = []
    for count in counted:
        for target in TARGETS:
            head = {"op": count.op, "shape": count.shape, "kernel": count.case, "target": target}
            found.append(head | code_columns(codes[count.case, target], target) | count_columns(count))
    main = {count.case for count in counted}
    for (name, target), code in codes.items():
        if name not in main:
            found.append({"op": "", "shape": "", "kernel": name, "target": target} | code_columns(code, target))
    return found


def main() -> int:
    """Print both halves and write the file."""
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser("python -m benchmarks.static", description=__doc__, formatter_class=formatter).parse_args()
    found = rows()
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    write_dicts(RESULT, found)
    kernels = {(row["kernel"], row["target"]): row for row in found}
    code_names = [
        "kernel",
        "target",
        *(name for name in found[0] if name.endswith(("(compiled)",)) or "processor" in name),
    ]
    code_names += ["occupancy (predicted)", "limited by (predicted)"]
    ops = {(row["op"], row["shape"]): row for row in found if row["op"]}
    op_names = [
        "op",
        "shape",
        *(name for name in found[0] if "counted" in name or "roofline" in name or "/ ours" in name),
    ]
    print(NOTICE)
    print("\nCode as compiled, and the occupancy predicted from it")
    print(table([{name: row[name] for name in code_names} for row in kernels.values()]))
    print("\nBytes and operations counted, and the roofline predicted from them")
    print(table([{name: row[name] for name in op_names} for row in ops.values()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
