"""`python -m benchmarks.runs.out_of_core --folder DIR`: `apply` on a model larger than its memory limit.

A synthetic checkpoint with the layer shapes of Llama-3.1-70B is pruned by the command in a process under
RLIMIT_DATA: once to the end; once killed with SIGKILL when half is written; and once more after that.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.records import FOLDER
from gradpruner.checkpoint.stored_model import StoredModel
from gradpruner.model.decoder import Decoder, Weight
from gradpruner.model.parameter_counts import count_parameters
from gradpruner.ops import reference
from gradpruner.plan import Plan
from gradpruner.probe.igia import Igia
from gradpruner.probe.importance import Factors
from gradpruner.report.tables import table
from gradpruner.storage.csv_files import write_dicts
from gradpruner.storage.tensor_files import Pending, bytes_of, holds_safetensors, read_folder, write_folder

SHAPE: dict[str, Any] = dict(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    dtype="bfloat16",
)
SHARD = 5 * 10**9  # bytes
BLOCK = 1_000_003  # random values of a weight before they repeat: prime, so that no two rows are alike
STEPS, RANK = 4, 8  # of the importance's factors
TOP = 0.2
CHECKED = ("self_attn.k_proj.weight", "self_attn.v_proj.weight")  # small enough for the float64 reference
RESULTS = FOLDER / "out_of_core.csv"


@dataclass
class Measured:
    """One run of the command. Bytes and seconds; peaks from /proc/<pid>/status, VmHWM includes file pages.

    read and written are all bytes that passed read() and write(), disk_* those that the disk saw.
    """

    run: str
    exit: int
    seconds: float
    limit: int
    limit_of_checkpoint: float
    limit_in_layers: float
    peak_vmdata: int
    peak_rssanon: int
    peak_vmhwm: int
    read: int
    written: int
    disk_read: int
    disk_written: int
    out_exists: bool
    out_loads: bool
    leftovers: int


def main() -> int:
    """Make, run, check, delete; print one table and write the CSV."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runs.out_of_core", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="on a disk with 50 GB free")
    parser.add_argument("--layers", type=int, default=12, metavar="N", help="12 (default) or more")
    parser.add_argument("--limit", type=float, default=2.0, metavar="X", help="RLIMIT_DATA in layers (default 2)")
    options = parser.parse_args()
    if options.layers < 12:
        parser.error(f"--layers {options.layers}: expected 12 or more")
    work = options.folder / "out-of-core"
    work.mkdir(parents=True)
    try:
        return _measure(work, options.layers, options.limit)
    finally:
        shutil.rmtree(work)


def _measure(work: Path, layers: int, limit: float) -> int:
    source, out = work / "dense", work / "small"
    _make_checkpoint(source, layers)
    stored = StoredModel(source)
    layer_bytes = sum(p.nbytes for p in stored.decoder.layers[0].parameters())
    size = sum(tensor.size for tensor in stored.tensors.values())
    removed = [layers // 4 + 2 * i for i in range(5)]
    fingerprint = stored.decoder.fingerprint(content=True, samples=stored.samples)
    plan = Plan(layers, drop=removed[:3], merge=removed[3:], model=fingerprint)
    plan.save(work / "plan.json")
    _igia(stored.decoder, removed[3:], fingerprint).save(work / "igia.safetensors")
    command = [
        sys.executable,
        "-m",
        "gradpruner.cli",
        "apply",
        "--model",
        str(source),
        "--plan",
        str(work / "plan.json"),
        "--igia",
        str(work / "igia.safetensors"),
        "--out",
        str(out),
    ]
    allowed = int(limit * layer_bytes)
    print(f"{layers} layers of {layer_bytes / 1e9:.2f} GB, {size / 1e9:.1f} GB in all; {plan.summary()}")
    rows = [_run("whole", command, out, allowed, size, layer_bytes)]
    print(f"merged weights against the reference: {_check_merged(stored, plan, work)}", flush=True)
    half = sum(tensor.size for tensor in read_folder(out).values()) // 2
    shutil.rmtree(out)
    rows.append(_run("killed half way", command, out, allowed, size, layer_bytes, kill_at=half))
    rows.append(_run("again", command, out, allowed, size, layer_bytes))
    print(table([_shown(row) for row in rows]))
    machine = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "torch": torch.__version__,
        "layers": layers,
        "layer_bytes": layer_bytes,
        "checkpoint_bytes": size,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_dicts(RESULTS, [{**asdict(row), **machine} for row in rows])
    print(RESULTS)
    good = [(row.exit, row.out_exists, row.out_loads, row.leftovers) for row in rows]
    return 0 if good == [(0, True, True, 0), (-signal.SIGKILL, False, False, 1), (0, True, True, 0)] else 1


def _make_checkpoint(folder: Path, layers: int) -> None:
    folder.mkdir()
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    tensors = [Pending(n, t.dtype, tuple(t.shape), _Tiled(n, t.numel())) for n, t in shapes.items()]
    write_folder(folder, tensors, SHARD, {})


@dataclass(frozen=True)
class _Tiled:
    """A weight's bytes: one random block, another for each weight, over and over."""

    name: str
    entries: int

    def __call__(self) -> Iterator[memoryview]:
        block = torch.randn(BLOCK, generator=_seeded(self.name)).mul_(0.02).bfloat16()
        for start in range(0, self.entries, BLOCK):
            yield bytes_of(block[: self.entries - start])


def _seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _igia(decoder: Decoder, merged: list[int], fingerprint: str) -> Igia:
    weights, layers = tuple(decoder.weights), len(decoder.layers)
    return Igia(
        model=fingerprint,
        estimator="lora",
        layers=layers,
        weights=weights,
        square_norms=torch.ones(STEPS, len(weights), dtype=torch.float64),
        structures=tuple(decoder.structure(j) for j in range(layers)),
        **count_parameters(decoder),
        importance={(w.layer, w.name): _factors(w) for w in weights if w.layer in merged},
    )


def _factors(weight: Weight) -> Factors:
    rows, columns = weight.shape
    generator = _seeded(f"{weight.layer}/{weight.name}")
    a = torch.randn(STEPS, RANK, columns, generator=generator)
    return Factors(a, torch.randn(STEPS, rows, RANK, generator=generator))


def _run(
    name: str, command: list[str], out: Path, limit: int, size: int, layer_bytes: int, kill_at: int | None = None
) -> Measured:
    """Run the command under the limit, watching it; kill it once it has written `kill_at` bytes."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)), stdout=sys.stderr
    )
    peaks: dict[str, int] = {}
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        for field, value in _proc(process.pid, "status").items():
            peaks[field] = max(peaks.get(field, 0), value)
        if kill_at is not None and _proc(process.pid, "io").get("wchar", 0) >= kill_at:
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        time.sleep(0.02)
    seconds, passed = time.perf_counter() - begun, _proc(process.pid, "io")
    code = process.wait()
    return Measured(
        name,
        code,
        round(seconds, 1),
        limit,
        round(limit / size, 4),
        round(limit / layer_bytes, 2),
        peaks["VmData"] * 1024,
        peaks["RssAnon"] * 1024,
        peaks["VmHWM"] * 1024,
        passed["rchar"],
        passed["wchar"],
        passed["read_bytes"],
        passed["write_bytes"],
        out.exists(),
        _loads(out),
        sum(p.name.startswith(f".{out.name}.") for p in out.parent.iterdir()),
    )


def _proc(process: int, file: str) -> dict[str, int]:
    """Numbers of /proc/<pid>/<file>; none once the process is gone."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/{file}").read_text().splitlines():
            name, _, value = line.partition(":")
            if value.split() and value.split()[0].isdigit():
                found[name] = int(value.split()[0])
    return found


def _loads(folder: Path) -> bool:
    """Whether the stock class finds a whole model there, read as names and shapes only."""
    kind: Any = AutoModelForCausalLM
    try:
        _, info = kind.from_pretrained(folder, device_map={"": "meta"}, output_loading_info=True)
    except (OSError, ValueError):
        return False
    return holds_safetensors(folder) and not any(info.values())


def _check_merged(stored: StoredModel, plan: Plan, work: Path) -> str:
    """Entries of merged weights that differ from the reference; they must lie within 1e-5 of the threshold."""
    written, igia = read_folder(work / "small"), Igia.load(work / "igia.safetensors", lazy=True)
    said = []
    for target, donors in plan.donors.items():
        for name in CHECKED:
            expected = stored.one_to_one[f"model.layers.{target}.{name}"].read()
            values = [stored.one_to_one[f"model.layers.{donor}.{name}"].read() for donor in donors]
            factors = [igia.importance[donor, name] for donor in donors]
            a, b = [f.a for f in factors if isinstance(f, Factors)], [f.b for f in factors if isinstance(f, Factors)]
            before, k = expected.clone(), int(TOP * expected.numel())
            edges = [reference.factor_threshold(*pair, k) for pair in zip(a, b, strict=True)]
            reference.factor_sign_merge_(
                expected, values, a, b, [v for v, _ in edges], [i for _, i in edges], [1.0] * len(values)
            )
            actual = written[f"model.layers.{plan.kept.index(target)}.{name}"].read()
            different, changed = expected != actual, int((expected != before).sum())
            if bool((different & ~_near(a, b, [v for v, _ in edges])).any()):
                raise SystemExit(f"layer {target} {name} differs from the reference away from the threshold")
            said.append(f"layer {target} {name}: {int(different.sum())} of {changed} changed entries differ")
    return "; ".join(said)


def _near(a: list[Tensor], b: list[Tensor], edges: list[Tensor]) -> Tensor:
    close = [
        (reference.factor_importance(x, y) / edge - 1).abs() < 1e-5 for x, y, edge in zip(a, b, edges, strict=True)
    ]
    return torch.stack(close).any(0)


def _shown(row: Measured) -> dict[str, Any]:
    gigabytes = {
        "VmData peak GB": row.peak_vmdata,
        "RssAnon peak GB": row.peak_rssanon,
        "VmHWM GB": row.peak_vmhwm,
        "limit GB": row.limit,
        "read GB": row.read,
        "written GB": row.written,
    }
    return {
        "run": row.run,
        "exit": row.exit,
        "seconds": row.seconds,
        "limit of checkpoint": row.limit_of_checkpoint,
        **{name: round(value / 1e9, 2) for name, value in gigabytes.items()},
        "--out exists": str(row.out_exists),
        "loads": str(row.out_loads),
        "leftovers": row.leftovers,
    }


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
