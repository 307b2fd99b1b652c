"""`python -m benchmarks.runs.curves`: how time and memory grow with rank, steps, width and depth, on a log-log plot."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gradpruner
from benchmarks.ops.implementations import Ours
from benchmarks.ops.timing import quiet_collector
from benchmarks.plots import blank, save
from benchmarks.records import FOLDER, Timed, read, shown, timed, write
from gradpruner.errors import GradPrunerError, InvalidArgument
from gradpruner.memory import peak_memory, reset_peak_memory
from gradpruner.report.tables import table
from gradpruner.training.finetune import add_adapters
from gradpruner.training.recipe import Recipe

CPU = torch.device("cpu")
PAIRS, RANK, STEPS, WIDTH = 16, 8, 40, 1024  # what stays fixed while one of them grows
PROBE_STEPS, HIDDEN, INNER, VOCABULARY = 20, 256, 512, 64


@dataclass(frozen=True, kw_only=True)
class Point(Timed):
    """One point of a curve. time_exponent, memory_exponent: of the power law fitted to the whole curve, nan if none.

    extra_bytes: of the probe, what it holds after its steps.
    """

    curve: str
    along: str
    value: int
    time_exponent: float
    memory_exponent: float


Measure = Callable[[], tuple[float, int]]  # seconds and extra bytes of one call


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log(cost) over log(value) by least squares; nan if there are fewer than two, or one is not positive.

    Raises InvalidArgument unless both are of one length.
    """
    if len(values) != len(costs):
        raise InvalidArgument(f"{len(values)} values and {len(costs)} costs; expected as many")
    if len(set(values)) < 2 or min(*values, *costs) <= 0:
        return math.nan
    return statistics.linear_regression([math.log(v) for v in values], [math.log(c) for c in costs]).slope


def _call(call: Callable[[], Any]) -> tuple[float, int]:
    reset_peak_memory()
    before = peak_memory()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began, max(0, peak_memory() - before)


def gram_norm(rank: int = RANK, width: int = WIDTH) -> Measure:
    """Of PAIRS pairs (rank, width) and (width, rank)."""
    a = [torch.randn(rank, width) for _ in range(PAIRS)]
    b = [torch.randn(width, rank) for _ in range(PAIRS)]
    return lambda: _call(lambda: Ours(CPU).gram_norm(a, b))


def factor_merge(steps: int = STEPS, rank: int = RANK, width: int = WIDTH) -> Measure:
    """Threshold and merge of one donor into a (width, width) bf16 weight."""
    original, donor = (torch.randn(width, width).bfloat16() for _ in range(2))
    a, b = torch.randn(steps, rank, width), torch.randn(steps, width, rank)
    weight = original.clone()

    def measure() -> tuple[float, int]:
        weight.copy_(original)
        return _call(lambda: Ours(CPU).factor_merge(weight, donor, a, b, weight.numel() // 5))

    return measure


def probe(depth: int) -> Measure:
    """PROBE_STEPS calls of `Probe.record` on the adapters of a small Llama: their time, and what the probe then holds.

    The gradients are random and always the same, so that neither a forward nor a backward pass is in the figures.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=depth,
        num_attention_heads=4,
    )
    model = add_adapters(LlamaForCausalLM(config), Recipe(rank=RANK))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None

    def measure() -> tuple[float, int]:
        watching = gradpruner.Probe(model)
        reset_peak_memory()
        before, began = peak_memory(), time.perf_counter()
        for _ in range(PROBE_STEPS):
            watching.record()
        took = time.perf_counter() - began
        reset_peak_memory()
        return took, max(0, peak_memory() - before)

    return measure


CURVES: dict[tuple[str, str], tuple[Callable[..., Measure], tuple[int, ...]]] = {
    ("gram_norm", "rank"): (gram_norm, (4, 8, 16, 32, 64, 128)),
    ("gram_norm", "width"): (gram_norm, (512, 1024, 2048, 4096, 8192)),
    ("factor_merge", "steps"): (factor_merge, (5, 10, 20, 40, 80)),
    ("factor_merge", "rank"): (factor_merge, (4, 8, 16, 32, 64)),
    ("factor_merge", "width"): (factor_merge, (256, 512, 1024, 2048)),
    ("probe", "depth"): (probe, (2, 4, 8, 16)),
}


def curve(name: str, along: str, values: Sequence[int], repeats: int) -> list[Point]:
    """Every value once a round, a first round thrown away; time is the median, memory the least of the rounds."""
    make = CURVES[name, along][0]
    torch.manual_seed(0)
    calls = [make(**{along: value}) for value in values]
    rounds = [[call() for call in calls] for _ in range(repeats + 1)][1:]
    times = [[each[n][0] for each in rounds] for n in range(len(values))]
    memory = [min(each[n][1] for each in rounds) for n in range(len(values))]
    slopes = exponent(values, [statistics.median(each) for each in times]), exponent(values, memory)
    return [
        Point(
            curve=name,
            along=along,
            value=value,
            time_exponent=slopes[0],
            memory_exponent=slopes[1],
            **timed(each, extra, CPU),
        )
        for value, each, extra in zip(values, times, memory, strict=True)
    ]


def _curves(points: Sequence[Point]) -> Iterator[list[Point]]:
    for key in dict.fromkeys((each.curve, each.along) for each in points):
        yield [each for each in points if (each.curve, each.along) == key]


def plot(csv_path: Path) -> Path:
    """Time and memory of every curve of the CSV, log-log, as one SVG beside it. Raises InvalidArgument."""
    groups = list(_curves(read(csv_path, Point)))
    figure = blank(3.2 * len(groups), 6.4)
    for column, points in enumerate(groups):
        for row, (what, slope) in enumerate(
            (("seconds", points[0].time_exponent), ("extra bytes", points[0].memory_exponent))
        ):
            axes = figure.add_subplot(2, len(groups), row * len(groups) + column + 1)
            costs = [each.extra_bytes if row else each.median_s for each in points]
            shape = ", no fit" if math.isnan(slope) else f" ~ {points[0].along}^{slope:.2f}"
            axes.plot([each.value for each in points], costs, "o-", color="#0072B2")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log" if min(costs) > 0 else "linear")
            axes.set_xlabel(points[0].along)
            axes.set_title(f"{points[0].curve}: {what}{shape}", fontsize=9)
            axes.grid(alpha=0.3)
    path = csv_path.with_suffix(".svg")
    save(figure, path)
    return path


def table_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """A line a curve: what each value costs, and the exponents."""
    return [
        {
            "curve": group[0].curve,
            "along": group[0].along,
            "values": " ".join(str(each.value) for each in group),
            "time": ", ".join(shown(each.median_s) for each in group),
            "time exponent": group[0].time_exponent,
            "extra MB": ", ".join(f"{each.extra_bytes / 1e6:.3g}" for each in group),
            "memory exponent": group[0].memory_exponent,
        }
        for group in _curves(points)
    ]


def main() -> int:
    """Measure every curve, print the table, write results/curves.csv and draw it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runs.curves", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="timed rounds (default 7)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    options = parser.parse_args()
    if options.repeats < 1 or (options.threads is not None and options.threads < 1):
        parser.error("--repeats and --threads: accepted are 1 and more")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        with quiet_collector():
            points = [
                point
                for (name, along), (_, values) in CURVES.items()
                for point in curve(name, along, values, options.repeats)
            ]
        print(table(table_rows(points)))
        FOLDER.mkdir(exist_ok=True)
        write(FOLDER / "curves.csv", points)
        print(f"wrote {plot(FOLDER / 'curves.csv')}")
    except GradPrunerError as error:
        print(f"benchmarks.runs.curves: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
