"""Perplexity after single weights are removed, for every criterion, pattern and seed of the calibration.

python -m benchmarks.runs.single_weights PUBMEDQA --processes 2

PUBMEDQA is a folder of train.jsonl and test.jsonl, see benchmarks/runs/pubmedqa.py. The criteria are calibrated on 128
windows of 512 tokens of its training contexts. Perplexity is measured on its test contexts and on the Python reference
manual, which no criterion saw, also for the dense model. What the CSV holds already is not made again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import records
from benchmarks.records import FOLDER
from gradpruner.data.collator import Collator
from gradpruner.data.text_windows import consecutive, sampled, tokens_of
from gradpruner.memory import peak_memory, reset_peak_memory
from gradpruner.model.identity import identify, sha256_of
from gradpruner.model.load import load_model
from gradpruner.probe.igia import Igia
from gradpruner.report.tables import table as text_table
from gradpruner.run.demo_data import paragraphs
from gradpruner.run.stages import watch
from gradpruner.sparsity import gradient_norms, sparsify
from gradpruner.storage.files import write_json
from gradpruner.storage.provenance import RECORD, digest, is_made
from gradpruner.training.evaluate import perplexity
from gradpruner.training.recipe import Recipe
from gradpruner.training.schedule import schedule

LENGTH = 512
DENSE = "dense"
FREE = ("magnitude",)  # goes by no sample: one seed is all
MAIN = ("wanda", "gblm", "sparsegpt", "dsnot", "igia")
# of gblm: norms over samples beside a sum of signed gradients, alone and with activations, and beside a sum of squares,
# which is what igia ranks by; DSnoT as its authors run it
SIGNED = ("gblm signed, gradients alone", "gblm l1, gradients alone", "gblm signed", "gblm l1")
ALONE = "gblm l2, gradients alone"
SQUARES = "gblm squares, gradients alone"
ABLATION = (*(("row", method) for method in (ALONE, SQUARES, *SIGNED, "dsnot:overshoot=true")), ("2:4", ALONE))
NEEDS = {"igia": ("igia",), "l2": ("gblm", ALONE, SQUARES), "signed": SIGNED}
PATTERNS = ("row", "4:8", "2:4")


@dataclass(frozen=True)
class Judged:
    """One line of the CSV. seed: of the windows calibrated on. seconds: of pruning, gradients given.

    extra_mb: what pruning takes at its peak beyond the model and the gradients.
    """

    seed: int
    pattern: str
    method: str
    text: str
    perplexity: float
    seconds: float
    extra_mb: float

    @property
    def job(self) -> tuple[int, str, str]:
        """What was judged."""
        return self.seed, self.pattern, self.method


def contexts(path: Path) -> str:
    """The contexts of PubMedQA, one after the other."""
    return "\n\n".join(json.loads(line)["context"] for line in path.read_text(encoding="utf-8").splitlines())


def loaded(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model, in bfloat16, and its tokenizer."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.processes))
    model, tokenizer = load_model(options.model, dtype=torch.bfloat16)
    for parameter in model.parameters():  # out of the mapped file, whose pages count only once they are touched
        parameter.data = parameter.data.clone()
    return model, tokenizer


def calibration(options: argparse.Namespace, tokenizer: Any, seed: int) -> list[dict[str, Tensor]]:
    """The windows of one seed."""
    tokens = tokens_of(contexts(options.pubmedqa / "train.jsonl"), tokenizer, LENGTH)
    return sampled(tokens, LENGTH, options.samples, seed)


def prepare(options: argparse.Namespace, cache: Path, what: str, seed: int) -> None:
    """What several runs of one seed go by: gradients or a probe, as a file in `cache`."""
    if (path := cache / f"{what}-{seed}.safetensors").exists():
        return
    model, tokenizer = loaded(options)
    batches, began = calibration(options, tokenizer, seed), time.perf_counter()
    if what == "igia":
        rows = [{"input_ids": b["input_ids"][0].tolist(), "labels": b["input_ids"][0].tolist()} for b in batches]
        recipe = Recipe(batch_size=4, seed=seed)
        watch(model, tokenizer, schedule(rows, len(rows) // 4, recipe), recipe, quiet=True)[1].save(path)
    elif what == "l2":
        save_file(gradient_norms(model, batches), path)
    else:
        found = signed_and_l1(model, batches)
        for name, sums in found.items():
            save_file(sums, cache / f"{name}-{seed}.safetensors")
    print(f"{what}, seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)


def signed_and_l1(model: Any, batches: Sequence[dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """abs(sum over samples of the gradient) and sum over samples of abs(gradient), from autograd's own gradients."""
    trained = {n: p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2}
    model.eval().requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    signed, sizes = ({n: torch.zeros_like(p, dtype=torch.float32) for n, p in trained.items()} for _ in range(2))
    for batch in batches:
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        for name, parameter in trained.items():
            assert parameter.grad is not None
            signed[name] += parameter.grad
            sizes[name] += parameter.grad.abs()
            parameter.grad = None
    return {"l1": sizes, "signed": {name: sums.abs() for name, sums in signed.items()}}


def judge(options: argparse.Namespace, cache: Path, seed: int, pattern: str, method: str) -> list[Judged]:
    """Prune and take the perplexity of all texts."""
    model, tokenizer = loaded(options)
    given: dict[str, Any] = {}
    seconds = extra = 0.0
    if method != DENSE:
        criterion, _, how = method.partition(" ")
        if criterion == "gblm":
            norm, _, alone = (how or "l2").partition(", ")
            stored = load_file(cache / f"{'l2' if norm == 'squares' else norm}-{seed}.safetensors")
            given["gradients"] = {n: of.square() if norm == "squares" else of.clone() for n, of in stored.items()}
            criterion += ":activations=false" if alone else ""
        if criterion == "igia":
            given["igia"] = Igia.load(cache / f"igia-{seed}.safetensors")
        batches = calibration(options, tokenizer, seed)
        reset_peak_memory()
        before, began = peak_memory(), time.perf_counter()
        sparsify(model, batches, method=criterion, pattern=pattern, **given)
        seconds, extra = time.perf_counter() - began, (peak_memory() - before) / 1e6
    texts = {
        "pubmedqa": contexts(options.pubmedqa / "test.jsonl"),
        "manual": "\n\n".join(paragraph for paragraph, _ in paragraphs()),
    }
    found = []
    for name, text in texts.items():
        rows = consecutive(tokens_of(text, tokenizer, LENGTH), LENGTH)[: options.windows]
        value = perplexity(model, rows, collate=Collator(tokenizer), batch_size=1)
        found.append(Judged(seed, pattern, method, name, round(value, 3), round(seconds, 1), round(extra, 1)))
    print(*(f"{each}" for each in found), sep="\n", flush=True)
    return found


def stages(seeds: Sequence[int]) -> Iterator[list[tuple[int, str, str]]]:
    """Jobs of one seed that can run beside each other, what matters most first."""
    first, *others = seeds
    plain = [(first, DENSE, DENSE)] + [(first, pattern, method) for pattern in PATTERNS for method in FREE]
    main = {seed: [(seed, pattern, method) for pattern in PATTERNS for method in MAIN] for seed in seeds}
    ablation = {seed: [(seed, *job) for job in ABLATION] for seed in seeds}
    yield plain + main[first]
    yield ablation[first]
    yield from (main[seed] for seed in others)
    yield from (ablation[seed] for seed in others)


def shown(found: Sequence[Judged]) -> list[dict[str, Any]]:
    """One line a pattern and method: mean and standard deviation over seeds."""
    rows = []
    for pattern, method in dict.fromkeys((j.pattern, j.method) for j in found):
        row: dict[str, Any] = {"pattern": pattern, "method": method}
        for text in dict.fromkeys(j.text for j in found):
            of = [j.perplexity for j in found if (j.pattern, j.method, j.text) == (pattern, method, text)]
            row[text] = f"{statistics.fmean(of):.2f}" + (f" ± {statistics.stdev(of):.2f}" if len(of) > 1 else "")
        of = [j.extra_mb for j in found if (j.pattern, j.method, j.text) == (pattern, method, text)]
        row |= {"seeds": len(of), "MB beyond the model": f"{statistics.fmean(of):.0f}"}
        rows.append(row)
    return rows


def main() -> None:
    """Fill the CSV, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pubmedqa", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128, help="windows to calibrate on")
    parser.add_argument("--windows", type=int, default=32, help="of each text, to judge by")
    parser.add_argument("--processes", type=int, default=1, help="each with its share of the cores")
    parser.add_argument("--cache", type=Path, help="where gradients and probes are kept; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=FOLDER / "single_weights.csv")
    options = parser.parse_args()
    found = records.read(options.out, Judged) if options.out.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        cache = options.cache or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        made_from = {
            "model": digest(identify(options.model).to_dict()),
            "train.jsonl": sha256_of(options.pubmedqa / "train.jsonl"),
            "samples": str(options.samples),
        }
        if not is_made(cache, made_from):
            write_json(cache / RECORD, made_from)
        with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
            for stage in stages(options.seeds):
                jobs = [job for job in stage if job not in {judged.job for judged in found}]
                needed = [
                    (options, cache, what, jobs[0][0])
                    for what, methods in NEEDS.items()
                    if any(method in methods for _, _, method in jobs)
                ]
                pool.starmap(prepare, needed, chunksize=1)
                for task in [pool.apply_async(judge, (options, cache, *job)) for job in jobs]:
                    found += task.get()
                    records.write(options.out, found)
    print(text_table(shown(found)))


if __name__ == "__main__":
    main()
