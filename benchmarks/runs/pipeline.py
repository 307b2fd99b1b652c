"""`python -m benchmarks.runs.pipeline`: what the probe adds to a training step, and the time of the merge stage."""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

import gradpruner
from benchmarks.ops.device_timing import Clock
from benchmarks.ops.released import Released
from benchmarks.ops.timing import WrongAnswer, quiet_collector
from benchmarks.records import FOLDER, Timed, ratios, read, timed, write
from gradpruner.errors import GradPrunerError
from gradpruner.memory import peak_memory, reset_peak_memory
from gradpruner.model.decoder import Decoder
from gradpruner.model.load import load_model
from gradpruner.model.parameter_counts import count_parameters
from gradpruner.probe.igia import Igia
from gradpruner.probe.importance import Dense, Factors
from gradpruner.pruning.merge import merge_weight_
from gradpruner.report.tables import table
from gradpruner.training.finetune import add_adapters
from gradpruner.training.recipe import Recipe

ROWS, LENGTH, RANK = 4, 256, 8
TOP = Fraction(1, 5)
# 12 of SmolLM2's 30 layers, three of them merged: a cut that the layer scores of a real probe made (docs/evidence.md)
PLAN = gradpruner.Plan(30, drop=[8, 10, 13, 17, 20, 22, 23, 25, 26], merge=[6, 14, 18])
DIFFERENT = 1e-4  # share of merged entries that may differ: those whose importance lies at the threshold
CPU = torch.device("cpu")
SHOWN = (
    "stage",
    "case",
    "implementation",
    "median_s",
    "base",
    "ratio",
    "ratio_min",
    "ratio_max",
    "runs",
    "extra_bytes",
    "importance_bytes",
)

Named = dict[tuple[int, str], Tensor]


@dataclass(frozen=True, kw_only=True)
class Stage(Timed):
    """One way through one stage. ratio: its time over that of `base`, median of the rounds, with least and most.

    extra_bytes: of the probe, what its run added and kept. importance_bytes: what the importance itself takes, as
    factors, or as F where that is smaller.
    """

    stage: str
    case: str
    implementation: str
    base: str
    ratio: float
    ratio_min: float
    ratio_max: float
    importance_bytes: int


def _stages(
    stage: str, case: str, base: str, times: Mapping[str, Sequence[float]], extra: Mapping[str, int], kept: int
) -> list[Stage]:
    found = []
    for name, mine in times.items():
        ratio, least, most = ratios(mine, times[base])
        found.append(
            Stage(
                stage=stage,
                case=case,
                implementation=name,
                base=base,
                importance_bytes=kept,
                ratio=ratio,
                ratio_min=least,
                ratio_max=most,
                **timed(mine, extra.get(name, 0), CPU),
            )
        )
    return found


def _resident() -> int:
    reset_peak_memory()
    return peak_memory()


def stored_bytes(importance: Mapping[Any, Factors | Dense]) -> int:
    """Bytes of all tensors of an igia's importance."""
    parts = [t for f in importance.values() for t in ((f.f,) if isinstance(f, Dense) else (f.a, f.b))]
    return sum(t.numel() * t.element_size() for t in parts)


def probe_overhead(model: nn.Module, pairs: int, *, rows: int = ROWS, length: int = LENGTH) -> list[Stage]:
    """Training steps with and without `Probe.record`, in pairs, alternately first; LoRA on every linear, AdamW.

    The model learns random tokens: what they are does not change what a step costs. Memory: what the process holds
    after the last step over what it held before the first, against the bytes of the importance it stores.
    """
    model = add_adapters(model, Recipe(rank=RANK)).train()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    source, vocabulary = torch.Generator().manual_seed(0), model.get_input_embeddings().num_embeddings  # type: ignore
    probe = gradpruner.Probe(model)

    def step(record: bool) -> float:
        ids = torch.randint(vocabulary, (rows, length), generator=source)
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        if record:
            probe.record(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    for _ in range(2):  # the optimizer's state comes into being; B leaves zero
        step(False)
    times: dict[str, list[float]] = {"without": [], "with the probe": []}
    before = _resident()
    for pair in range(pairs):
        for record in (pair % 2 == 0, pair % 2 == 1):
            times["with the probe" if record else "without"].append(step(record))
    growth = _resident() - before
    kept = stored_bytes(probe.igia.importance)
    case = f"r={RANK}, {rows} x {length} tokens, {pairs} steps"
    return _stages("probe", case, "without", times, {"with the probe": growth}, kept)


def _random_factors(decoder: Decoder, steps: int) -> dict[tuple[int, str], Factors]:
    source = torch.Generator().manual_seed(steps)
    return {
        (w.layer, w.name): Factors(
            torch.randn(steps, RANK, w.shape[1], generator=source),
            torch.randn(steps, w.shape[0], RANK, generator=source),
        )
        for w in decoder.weights
    }


def _merge_released(weights: Named, factors: Mapping[tuple[int, str], Factors], plan: gradpruner.Plan) -> None:
    """F of every weight of every layer, then masks by argsort and merges by float masks (docs/method.md, C)."""
    released = Released(CPU)
    importance = {key: released.importance(f.a, f.b) for key, f in factors.items()}
    for target, donors in plan.donors.items():
        for layer, name in weights:
            if layer == target:
                masks = [released.threshold(f, int(TOP * f.numel())) for f in (importance[d, name] for d in donors)]
                released.merge(weights[layer, name], [weights[d, name] for d in donors], masks)


def _merge_ours(weights: Named, factors: Mapping[tuple[int, str], Factors], plan: gradpruner.Plan) -> None:
    """What `gradpruner.apply` does between its checks."""
    for target, donors in plan.donors.items():
        for layer, name in weights:
            if layer == target:
                chosen: list[Factors | Dense] = [factors[d, name] for d in donors]
                merge_weight_(weights[layer, name], [weights[d, name] for d in donors], chosen, TOP, 1.0)


def _igia(decoder: Decoder, importance: Mapping[tuple[int, str], Factors]) -> Igia:
    layers = range(len(decoder.layers))
    return Igia(
        model=decoder.fingerprint(),
        estimator="lora",
        layers=len(decoder.layers),
        weights=tuple(decoder.weights),
        square_norms=torch.ones(1, len(decoder.weights), dtype=torch.float64),
        structures=tuple(decoder.structure(j) for j in layers),
        **count_parameters(decoder),
        importance=dict(importance),
    )


@torch.no_grad()
def merge_stage(model: nn.Module, steps: int, rounds: int, *, plan: gradpruner.Plan = PLAN) -> list[Stage]:
    """The merge of a whole plan from random factors of `steps` steps: ours, the released way, and all of `apply`.

    "apply" also removes the layers and checks the logits, which the released way does not. Raises WrongAnswer if
    the two merges differ by more than entries at the threshold.
    """
    decoder = Decoder(model)
    factors = _random_factors(decoder, steps)
    weights: Named = {(w.layer, w.name): decoder.parameter(w).data for w in decoder.weights}
    originals = {key: tensor.clone() for key, tensor in weights.items() if key[0] in plan.donors}
    igia = _igia(decoder, {key: f for key, f in factors.items() if key[0] in plan.merge})
    ways: dict[str, Callable[[nn.Module], Any]] = {
        "released": lambda fresh: _merge_released(weights, factors, plan),
        "ours: apply, with its checks": lambda fresh: gradpruner.apply(fresh, plan, igia),
        "ours": lambda fresh: _merge_ours(weights, factors, plan),
    }

    def run(name: str) -> tuple[float, int]:
        for key, original in originals.items():
            weights[key].copy_(original)
        fresh = copy.deepcopy(model) if "apply" in name else model
        before = _resident()
        return Clock(CPU).call(lambda: ways[name](fresh))[0], max(0, peak_memory() - before)

    answers: dict[str, Named] = {}
    extra: dict[str, int] = {}
    for name in ways:
        extra[name] = run(name)[1]
        answers[name] = {key: weights[key].clone() for key in originals}
    different = sum(int((answers["ours"][key] != answers["released"][key]).sum()) for key in originals)
    changed = sum(int((answers["ours"][key] != original).sum()) for key, original in originals.items())
    if not changed or different > DIFFERENT * sum(original.numel() for original in originals.values()):
        raise WrongAnswer(f"merge: {changed} entries changed, {different} of them otherwise than the released way")
    times = {name: [0.0] * rounds for name in ways}
    for n in range(rounds):
        for name in ways:
            times[name][n] = run(name)[0]
    for key, original in originals.items():
        weights[key].copy_(original)
    case = f"{len(plan.removed)} of {plan.layers} layers, {len(plan.merge)} merged, r={RANK}, t={steps}"
    return _stages("merge", case, "ours", times, extra, stored_bytes(factors))


def main() -> int:
    """Run the stages asked for, print a table, write results/pipeline.csv."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runs.pipeline", description=__doc__)
    parser.add_argument("stage", nargs="*", help="probe, merge (default: both)")
    parser.add_argument("--pairs", type=int, default=15, metavar="N", help="steps with and without (default 15)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds of the merge (default 7)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    options = parser.parse_args()
    stages = options.stage or ["probe", "merge"]
    if set(stages) - {"probe", "merge"} or options.pairs < 1 or options.repeats < 1:
        parser.error("stage: accepted are probe and merge; --pairs and --repeats: 1 and more")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        model, _ = load_model("smollm2", dtype="bfloat16")
        found: list[Stage] = []
        with quiet_collector():
            if "merge" in stages:
                found += [each for steps in (10, 40) for each in merge_stage(model, steps, options.repeats)]
            if "probe" in stages:
                found += probe_overhead(model, options.pairs)
        print(table([{column: getattr(each, column) for column in SHOWN} for each in found]))
        FOLDER.mkdir(exist_ok=True)
        path = FOLDER / "pipeline.csv"
        # a stage that was not asked for keeps its lines
        kept = [each for each in read(path, Stage) if each.stage not in stages] if path.exists() else []
        write(path, [*kept, *found])
    except GradPrunerError as error:
        print(f"benchmarks.runs.pipeline: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
