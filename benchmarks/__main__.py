"""`python -m benchmarks [op ...]`: every op against its reference, as ratios inside one run."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from benchmarks.cases import CASES
from benchmarks.timing import compare
from gradpruner.ops import available_backends
from gradpruner.report import table


def main() -> int:
    """Time what was asked for and print one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("op", nargs="*", help=f"one or more of {', '.join(CASES)} (default: all)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="timed calls each (default 7)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    options = parser.parse_args()
    unknown = [name for name in options.op if name not in CASES]
    if unknown:
        parser.error(f"unknown op {unknown[0]!r}; accepted are {', '.join(CASES)}")
    device = torch.device(options.device)
    backend = {"cpu": "cpp", "cuda": "triton"}.get(device.type, "reference")
    state = available_backends()[backend]
    if state != "available":
        print(f"benchmarks: the {backend} backend is {state}", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}; backend {backend}")
    rows = [compare(CASES[op], op, backend, device, options.repeats) for op in options.op or CASES]
    print(table(rows))
    return 0


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
