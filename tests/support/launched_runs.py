"""Run the command line under launchers, and compare with one process: rows, losses, plan and weights.

`python tests/support/launched_runs.py FOLDER` prints the table for run and finetune, DDP and FSDP2.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from cli_home import make_home
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
CLI = str(Path(__file__).with_name("launched_cli.py"))
FINETUNE = ("--steps", "6", "--batch-size", "4", "--accumulation", "2", "--save-steps", "2")
RUN = ("--steps", "12", "--probe-steps", "4", "--save-steps", "2", "--batch-size", "4", "--ratio", "0.5")
SAME = ("--lr", "1e-3", "--rank", "2", "--json")
ENGINES = ("ddp", "fsdp2")
FSDP2 = (
    *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
)


def launcher(engine: str | None) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if engine is None:
        return [sys.executable]
    if engine == "ddp":
        return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", port]
    return [*launch, *FSDP2]


def command(home: Path, name: str, out: Path) -> list[str]:
    own = RUN if name == "run" else FINETUNE
    return [name, "--model", str(home / "model"), "--data", str(home / "data.jsonl"), *own, *SAME, "--out", str(out)]


def launched(
    engine: str | None, notes: Path, arguments: list[str], *, die: tuple[int, int] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command. `die` is a step and the rank of the process that kills itself after it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    if die is not None:
        environment |= {"DIE_AT": str(die[0]), "DIE_RANK": str(die[1])}
    return subprocess.run(
        [*launcher(engine), CLI, str(notes), *arguments], env=environment, capture_output=True, text=True, timeout=500
    )


def trainings(notes: Path, rank: int) -> list[dict[int, list[tuple[int, ...]]]]:
    """Of each training, the rows that one process saw, by step."""
    found: list[dict[int, list[tuple[int, ...]]]] = []
    last = 10**9
    for line in map(json.loads, (notes / f"{rank}.jsonl").read_text().splitlines()):
        if line["step"] < last:
            found.append(defaultdict(list))
        last = line["step"]
        found[-1][last] += map(tuple, line["rows"])
    return found


def sharded(notes: Path) -> bool:
    lines = [json.loads(line) for file in notes.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert len({line["sharded"] for line in lines}) == 1
    return bool(lines[0]["sharded"])


def check_rows(one: Path, two: Path) -> tuple[int, set[tuple[int, int]]]:
    """Check that two processes together saw in every step what one sees. Returns the steps, and the rows of each."""
    alone, parts = trainings(one, 0), [trainings(two, rank) for rank in (0, 1)]
    assert len(alone) == len(parts[0]) == len(parts[1])
    steps, shares = 0, set()
    for whole, *halves in zip(alone, *parts, strict=True):
        assert whole.keys() == halves[0].keys() == halves[1].keys()
        for step, rows in whole.items():
            assert sorted(halves[0][step] + halves[1][step]) == sorted(rows), step
            shares.add((len(halves[0][step]), len(halves[1][step])))
            steps += 1
    return steps, shares


def weights_apart(one: Path, two: Path) -> float:
    """The largest difference of a weight."""
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def losses_apart(one: list[float], two: list[float]) -> float:
    assert len(one) == len(two) and len(set(one)) > 1
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


def result_of(name: str, out: Path, said: str) -> tuple[list[float], Any, Path]:
    """The losses, the plan and the folder of the trained model."""
    if name == "finetune":
        return json.loads(said)["losses"], None, out
    pruned = json.loads((out / "pruned.json").read_text())["training"]
    plan = {key: value for key, value in json.loads((out / "plan.json").read_text()).items() if key != "made_from"}
    return pruned["losses"], plan, out / "model"


def print_table(folder: Path) -> None:
    (folder / "home").mkdir(parents=True)
    with contextlib.redirect_stdout(sys.stderr):
        inputs = make_home(folder / "home")
    print(
        "| command | engine | sharded | steps with the same rows | rows of the two processes | plan equal | losses: "
        "largest difference | weights: largest difference |\n|---|---|---|---|---|---|---|---|"
    )
    for name in ("finetune", "run"):
        base = launched(None, folder / f"{name}-notes", command(inputs, name, folder / name))
        losses, plan, model = result_of(name, folder / name, base.stdout)
        for engine in ENGINES:
            out, notes = folder / f"{name}-{engine}", folder / f"{name}-{engine}-notes"
            done = launched(engine, notes, command(inputs, name, out))
            others, other_plan, other = result_of(name, out, done.stdout)
            steps, shares = check_rows(folder / f"{name}-notes", notes)
            rows = ", ".join(f"{a} + {b}" for a, b in sorted(shares))
            print(
                f"| {name} | {engine} | {'yes' if sharded(notes) else 'no'} | {steps} | "
                f"{rows} | {'-' if plan is None else plan == other_plan} | "
                f"{losses_apart(losses, others):.1e} | {weights_apart(model, other):.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    print_table(Path(sys.argv[1]))
