"""What trackers are told. The calls are recorded; TensorBoard, MLflow, trackio and Weights & Biases run for real."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import ClassVar

import pytest
import small_runs
from training_rows import plain, rows
from training_runs import llama
from word_tokenizers import make_tokenizer

from gradpruner.run.stages import tune
from gradpruner.training import tracker_callback
from gradpruner.training.recipe import Recipe
from gradpruner.training.schedule import schedule
from gradpruner.training.trackers import Tracker, tracked

RECIPE = Recipe(batch_size=2, learning_rate=1e-2, rank=2)


class Recorder:
    """Stands for the callback of a tracker."""

    calls: ClassVar[list[tuple[object, ...]]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        groups = os.environ.get("WANDB_RUN_GROUP"), os.environ.get("WANDB_JOB_TYPE")
        self.calls.append(("begin", args.run_name, state.global_step, *groups))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.calls.append(("log", state.global_step, logs))

    def on_train_end(self, args, state, control, **kwargs):
        self.calls.append(("end",))


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(tracker_callback, "get_reporting_integration_callbacks", lambda name: [Recorder])
    monkeypatch.setattr(Recorder, "calls", [])
    return Recorder.calls


def reporting(**fields):
    made = dataclasses.replace(RECIPE)
    object.__setattr__(made, "trainer_arguments", {"report_to": ["recorder"], **fields})  # no tracker of this name
    return made


def test_a_training_and_its_evaluation_are_one_run(calls, tmp_path):
    ordered = plain(schedule(rows(), 3, RECIPE))
    with tracked(reporting(run_name="mine"), tmp_path, "pruned", first_step=5) as tracker:
        tune(llama(), make_tokenizer(), ordered, RECIPE, quiet=True, callbacks=tracker.callbacks)
        assert ("end",) not in calls  # the Trainer has ended, the evaluation comes
        tracker.log({"test_perplexity": 2.0, "test_rouge_l": None, "failed": "x", "right": True})
    assert calls[0] == ("begin", "mine/pruned", 5, "mine", "pruned")
    assert "WANDB_RUN_GROUP" not in os.environ
    losses = [(step, logs["loss"]) for kind, step, logs in calls[1:-1] if "loss" in logs]
    assert [step for step, _ in losses] == [6, 7, 8] and all("learning_rate" in c[2] for c in calls[1:4])
    assert calls[-2:] == [("log", 8, {"test_perplexity": 2.0}), ("end",)]


def test_numbers_without_a_training(calls, tmp_path):
    with tracked(reporting(), tmp_path, "cut", name="out", first_step=4) as tracker:
        tracker.log({"gradpruner/removed_layers": 3})
    assert calls == [("begin", "out/cut", 4, "out", "cut"), ("log", 4, {"gradpruner/removed_layers": 3}), ("end",)]


def test_a_run_ends_when_its_training_fails(calls, tmp_path):
    with pytest.raises(KeyboardInterrupt), tracked(reporting(), tmp_path, "dense") as tracker:
        tracker.log({"a": 1})
        raise KeyboardInterrupt
    assert calls[-1] == ("end",)


@pytest.mark.parametrize("arguments", [{}, {"report_to": "none"}, {"report_to": []}])
def test_no_tracker(arguments, calls, tmp_path):
    with tracked(Recipe(trainer_arguments=arguments), tmp_path, "dense") as tracker:
        tracker.log({"a": 1})
        assert tracker == Tracker() and tracker.callbacks == [] and calls == []


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.slow
@pytest.mark.in_ci
def test_tensorboard_has_the_whole_run(tmp_path):
    pytest.importorskip("tensorboard")
    source = small_runs.write_model(tmp_path / "model")
    recipe = {"trainer_arguments": {"report_to": "tensorboard", "lr_scheduler_type": "cosine"}}
    results = small_runs.run(source, tmp_path / "out", recipe=recipe).everything()
    logs = {folder.name: scalars(folder) for folder in (tmp_path / "out" / "logs").iterdir()}
    assert set(logs) == {"probe", "dense", "cut", "pruned"}
    for row in results["rows"]:
        found = logs[row["name"]]
        assert [value for _, value in found["train/loss"]] == pytest.approx(row["training"]["losses"], abs=1e-3)
        assert found["test/perplexity"][0][1] == pytest.approx(row["perplexity"], rel=1e-5)
    assert [step for step, _ in logs["pruned"]["train/loss"]] == list(range(small_runs.PROBE + 1, small_runs.STEPS + 1))
    assert logs["dense"]["train/loss"][: small_runs.PROBE] == logs["probe"]["train/loss"]
    scores = results["probe"]["layer_scores"]
    assert [logs["cut"][f"train/gradpruner/score/{i:02d}"][0][1] for i in range(len(scores))] == pytest.approx(scores)
    removed = {i for i in range(len(scores)) if logs["cut"][f"train/gradpruner/fate/{i:02d}"][0][1]}
    assert removed == {*results["plan"]["drop"], *map(int, results["plan"]["merge"])}


def train_with(name, tmp_path):
    """Two stages that report to a real tracker."""
    recipe = dataclasses.replace(RECIPE, trainer_arguments={"report_to": [name], "run_name": "mine"})
    ordered = plain(schedule(rows(), 3, RECIPE))
    for stage in ("dense", "pruned"):
        with tracked(recipe, tmp_path / "logs", stage) as tracker:
            tune(llama(), make_tokenizer(), ordered, recipe, quiet=True, callbacks=tracker.callbacks)
            tracker.log({"test_perplexity": 2.0})


@pytest.mark.slow
def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    monkeypatch.chdir(tmp_path)
    train_with("mlflow", tmp_path)
    client = mlflow.MlflowClient()
    found = {run.info.run_name: run for run in client.search_runs(["0"])}
    assert set(found) == {"mine/dense", "mine/pruned"} and {r.info.status for r in found.values()} == {"FINISHED"}
    assert found["mine/pruned"].data.metrics["test_perplexity"] == 2.0
    assert len(client.get_metric_history(found["mine/dense"].info.run_id, "loss")) == 3


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train_with("wandb", tmp_path)
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 2


@pytest.mark.slow
def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    import sqlite3

    train_with("trackio", tmp_path)
    (database,) = tmp_path.glob("*.db")
    with sqlite3.connect(database) as connection:
        found = connection.execute("select run_name, metrics from metrics").fetchall()
    logged = [(name, json.loads(metrics)) for name, metrics in found]
    assert {name for name, _ in logged} == {"mine/dense", "mine/pruned"}
    assert sum("train/loss" in metrics for _, metrics in logged) == 6
    assert sum("test/perplexity" in metrics for _, metrics in logged) == 2
