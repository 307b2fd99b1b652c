"""Stages that train go on in the middle: of a run, of a comparison, and of the command `finetune`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import STEPS, TEST, TRAIN, interrupting, job_of, run, stopped, write_model

from gradpruner.cli.main import main
from gradpruner.compare.experiment import Compare


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def test_a_stage_of_a_run_goes_on(source, tmp_path, monkeypatch):
    whole, resumed = run(source, tmp_path / "whole"), run(source, tmp_path / "out")
    stopped(monkeypatch, 12, run(source, tmp_path / "out").train_dense)
    with monkeypatch.context() as patch:
        steps = interrupting(patch)
        found = resumed.train_dense()
    assert steps == list(range(11, STEPS + 1))  # saved every 10 steps by default
    expected = whole.train_dense()
    assert found["training"]["losses"] == expected["training"]["losses"]
    assert found["perplexity"] == expected["perplexity"]
    weights = [(tmp_path / name / "dense" / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "out" / "checkpoints" / "dense").exists()


def test_a_model_of_a_comparison_goes_on(source, tmp_path, monkeypatch):
    def comparison(name):
        return Compare(job_of(source), TRAIN, TEST, tmp_path / name, methods=["drop-last"], held_out=4, dense=False)

    stopped(monkeypatch, 11, comparison("out").work)
    with monkeypatch.context() as patch:
        steps = interrupting(patch)
        comparison("out").work()
    assert steps == [11, 12]  # 12 steps after the probe's
    (found,) = comparison("out").finished()
    assert len(found["training"]["losses"]) == found["training"]["steps"] == 12
    assert found["training_seconds"] == found["training"]["seconds"]
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []


def test_finetune_goes_on(source, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": e.prompt, "completion": e.answer}) + "\n" for e in TRAIN))

    def command(name, *more):
        return main(
            [
                "finetune",
                "--model",
                source,
                "--data",
                str(data),
                "--steps",
                "12",
                "--batch-size",
                "2",
                "--rank",
                "2",
                "--lr",
                "1e-2",
                "--out",
                str(tmp_path / name),
                *more,
            ]
        )

    with monkeypatch.context() as patch:
        interrupting(patch, 11)
        assert command("tuned") == 1
    assert "the same command goes on from there" in capsys.readouterr().err
    assert not (tmp_path / "tuned").exists() and (tmp_path / "tuned-checkpoints" / "checkpoint-10").is_dir()
    assert command("tuned", "--seed", "1") == 2
    assert "was made from another rows, recipe;" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        steps = interrupting(patch)
        assert command("tuned") == 0
    assert steps == [11, 12] and not (tmp_path / "tuned-checkpoints").exists()
    assert (tmp_path / "tuned" / "model.safetensors").is_file()


DYING = """
import os, signal, sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
from small_runs import run
from gradpruner.training.row_trainer import CheckpointCompleter, StepRecorder
if {moment!r} == "step":
    real = StepRecorder.on_step_end
    def dying(self, args, state, control, **kwargs):
        if state.global_step == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, args, state, control, **kwargs)
    StepRecorder.on_step_end = dying
else:
    real = CheckpointCompleter.on_save
    def dying(self, args, state, control, **kwargs):
        if state.global_step == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, args, state, control, **kwargs)
    CheckpointCompleter.on_save = dying
run({source!r}, Path({out!r}), save_steps=3, recipe={recipe!r}).train_dense()
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 0])
@pytest.mark.parametrize("moment", ["step", "save"])
def test_a_killed_run_goes_on(moment, rank, source, tmp_path, monkeypatch):
    out, recipe = tmp_path / "out", {"rank": rank}
    code = DYING.format(
        path=[str(Path(__file__).parent), *sys.path], source=source, out=str(out), recipe=recipe, moment=moment
    )
    died = subprocess.run(
        [sys.executable, "-c", code], env=os.environ.copy(), capture_output=True, text=True, timeout=300
    )
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    steps = interrupting(monkeypatch)
    found = run(source, out, recipe=recipe, save_steps=3).train_dense()
    assert steps[0] == (13 if moment == "step" else 7)
    expected = run(source, tmp_path / "whole", recipe=recipe).train_dense()
    assert found["training"]["losses"] == expected["training"]["losses"]
    weights = [(tmp_path / name / "dense" / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]
