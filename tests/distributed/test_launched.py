"""`run` and `finetune` under torchrun (DDP) and accelerate launch (FSDP2): the same as in one process."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from cli_home import home
from launched_runs import (
    ENGINES,
    check_rows,
    command,
    launched,
    losses_apart,
    result_of,
    sharded,
    trainings,
    weights_apart,
)

pytestmark = pytest.mark.slow
__all__ = ["home"]

ROUNDING = 1e-3  # of weights that AdamW moves by up to 1e-3 in each step, also where the gradient is rounding alone


@pytest.fixture(scope="module")
def alone(home, tmp_path_factory):
    """Both commands in one process: where they wrote, what they printed, and the rows that they saw."""
    found = {}
    for name in ("finetune", "run"):
        folder = tmp_path_factory.mktemp(name)
        done = launched(None, folder / "notes", command(home, name, folder / "out"))
        assert done.returncode == 0, done.stderr
        found[name] = folder / "notes", *result_of(name, folder / "out", done.stdout)
    return found


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        pytest.param("finetune", "ddp", marks=pytest.mark.in_ci),
        ("finetune", "fsdp2"),
        ("run", "ddp"),
        ("run", "fsdp2"),
    ],
)
def test_two_processes_do_what_one_does(name, engine, home, alone, tmp_path):
    notes, losses, plan, model = alone[name]
    done = launched(engine, tmp_path / "notes", command(home, name, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"losses"') == (1 if name == "finetune" else 2)  # one process prints
    steps, shares = check_rows(notes, tmp_path / "notes")
    assert steps == (6 if name == "finetune" else 4 + 12 + 8)
    assert shares == ({(4, 4)} if name == "finetune" else {(2, 2)})
    assert sharded(tmp_path / "notes") == (engine == "fsdp2")
    together = result_of(name, tmp_path / "out", done.stdout)
    assert losses_apart(losses, together[0]) < 2e-3 and together[1] == plan
    assert 0 < weights_apart(model, together[2]) < ROUNDING
    assert name == "run" or weights_apart(home / "model", together[2]) > ROUNDING  # training has changed it by more
    assert not list(tmp_path.glob("out-checkpoints")) and not list((tmp_path / "out").glob("checkpoints"))


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_and_resumed_by_one_process(engine, home, alone, tmp_path):
    """One process is killed in the dense training; the other ends, and one process goes on from the checkpoint."""
    start = time.monotonic()
    died = launched(engine, tmp_path / "two", command(home, "run", tmp_path / "out"), die=(9, 1))
    assert died.returncode == 1 and "SIGKILL" in died.stderr
    assert time.monotonic() - start < 300
    left = tmp_path / "out" / "checkpoints" / "dense"
    assert [path.name for path in left.glob("checkpoint-*")] == ["checkpoint-8"]
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    done = launched(None, tmp_path / "one", command(home, "run", tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert min(trainings(tmp_path / "one", 0)[0]) == 8
    as_in_one_process(tmp_path / "out", alone)
    assert json.loads((tmp_path / "out" / "dense.json").read_text())["training"]["processes"] == 2
    # and, the other way round, the other engine goes on from what this one left
    other = launched(ENGINES[engine == "ddp"], tmp_path / "other", command(home, "run", tmp_path / "again"))
    assert other.returncode == 0, other.stderr
    assert min(trainings(tmp_path / "other", 1)[0]) == 8
    as_in_one_process(tmp_path / "again", alone)


def test_killed_in_one_process_and_resumed_by_two(home, alone, tmp_path):
    died = launched(None, tmp_path / "one", command(home, "finetune", tmp_path / "out"), die=(5, 0))
    assert died.returncode < 0
    done = launched("fsdp2", tmp_path / "two", command(home, "finetune", tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert list(trainings(tmp_path / "two", 0)[0]) == [4, 5]
    _, losses, _, model = alone["finetune"]
    assert losses_apart(losses, json.loads(done.stdout)["losses"]) < 2e-3
    assert weights_apart(model, tmp_path / "out") < ROUNDING


def test_adapters_in_float32_on_a_model_in_bfloat16_are_sharded(home, tmp_path):
    """FSDP2 computes all of it in bfloat16; one process leaves some of it in float32."""
    arguments = [*command(home, "finetune", tmp_path / "out"), "--dtype", "bfloat16"]
    alone = launched(None, tmp_path / "one", [*command(home, "finetune", tmp_path / "alone"), "--dtype", "bfloat16"])
    done = launched("fsdp2", tmp_path / "two", arguments)
    assert alone.returncode == done.returncode == 0, done.stderr
    assert losses_apart(json.loads(alone.stdout)["losses"], json.loads(done.stdout)["losses"]) < 0.05


def as_in_one_process(out, alone):
    _, losses, plan, model = alone["run"]
    again = result_of("run", out, "")
    assert losses_apart(losses, again[0]) < 2e-3 and again[1] == plan
    assert weights_apart(model.parent / "dense", out / "dense") < ROUNDING


@pytest.mark.parametrize("engine", ENGINES)
def test_an_error_is_said_once_and_before_time_is_spent(engine, home, tmp_path):
    arguments = command(home, "finetune", tmp_path / "out")
    arguments[arguments.index("--batch-size") + 1] = "3"
    arguments[arguments.index("--accumulation") + 1] = "3"
    done = launched(engine, tmp_path / "notes", arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("the 9 rows of a step cannot be divided evenly over 2 processes") == 1
    assert not (tmp_path / "out").exists() and not list((tmp_path / "notes").glob("*.jsonl"))
