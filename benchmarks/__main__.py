"""`python -m benchmarks [op ...]`: the ops beside the released way, the best torch way and the machine's limit."""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch

from benchmarks.ops.cases import OPERATIONS, SHAPES, cases
from benchmarks.ops.implementations import implementations
from benchmarks.ops.limits import Limits
from benchmarks.ops.timing import measure, quiet_collector
from benchmarks.plots import plot
from benchmarks.records import Result, default_path, machine, results, table_rows, update
from gradpruner.errors import GradPrunerError
from gradpruner.ops import available_backends
from gradpruner.report.tables import table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("op", nargs="*", help=f"one or more of {', '.join(OPERATIONS)} (default: all)")
    parser.add_argument("--shapes", default="smollm2", choices=SHAPES, help="whose weights (default smollm2)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="timed rounds (default 7)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no row after so many seconds")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="leave an implementation out")
    parser.add_argument("--also", action="append", default=[], metavar="MODULE:CLASS", help="add your own")
    parser.add_argument("--csv", action="store_true", help="write benchmarks/results/<machine>-<shapes>.csv")
    parser.add_argument("--plot", action="store_true", help="draw that CSV (implies --csv)")
    options = parser.parse_args()
    for op in options.op:
        if op not in OPERATIONS:
            parser.error(f"unknown op {op!r}; accepted are {', '.join(OPERATIONS)}")
    if options.repeats < 1 or (options.threads is not None and options.threads < 1):
        parser.error("--repeats and --threads: accepted are 1 and more")
    if options.budget is not None and not options.budget > 0:
        parser.error(f"--budget {options.budget:g}: accepted are numbers above 0")
    return options


def _run(options: argparse.Namespace) -> list[Result]:
    """Print and write every row; the results without a time."""
    began = time.monotonic()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    classes = implementations(options.also, options.skip)
    limits = Limits(device, options.repeats)
    path = default_path(device, options.shapes) if options.csv or options.plot else None
    failed: list[Result] = []
    left_out: list[str] = []
    print(f"{machine(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.repeats} rounds")
    for op in options.op or OPERATIONS:
        found: list[Result] = []
        for case in cases(op, SHAPES[options.shapes], device):
            if options.budget is not None and time.monotonic() - began > options.budget:
                left_out.append(f"{op} at {case.shape}, {case.variant}")
                continue
            limit = limits.of(case.count)
            found += results(case, measure(case, classes, options.repeats, device), limit, device)
            if path is not None:
                update(path, found)  # at once: a long run that is stopped keeps what it has
        print(f"\n{op}\nlimit: {OPERATIONS[op].__doc__}\n{table(table_rows(found))}", flush=True)
        failed += [each for each in found if each.error]
    if left_out:
        print(f"\nnot run, {options.budget:g} seconds were over:", *left_out, sep="\n  ")
    if options.plot and path is not None:
        for drawn in plot(path):
            print(f"wrote {drawn}")
    return failed


def main() -> int:
    """Time what was asked for and print a table an op; 1 if an answer was wrong or something could not be run."""
    options = _options()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else peak memory would be that of the GPU
    try:
        state = available_backends()["cpp" if options.device == "cpu" else "triton"]
        if state != "available":
            raise GradPrunerError(f"the backend for {options.device} is {state}")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise GradPrunerError("--device cuda: torch sees no GPU here; accepted is cpu")
        with quiet_collector():
            failed = _run(options)
    except GradPrunerError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    for each in failed:
        row = f"{each.op} at {each.shape}, {each.variant}"
        print(f"benchmarks: {row}: {each.implementation!r}: {each.error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
