"""A training that was interrupted goes on from its newest checkpoint and ends as one that was not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import interrupting, run, stopped, write_model
from training_rows import plain, rows
from training_runs import llama
from word_tokenizers import make_tokenizer

from gradpruner.data.collator import Collator
from gradpruner.errors import CheckpointError, InvalidArgument, ModelMismatch
from gradpruner.training import checkpoints, row_trainer
from gradpruner.training.checkpoints import Checkpoints
from gradpruner.training.finetune import add_adapters, train
from gradpruner.training.recipe import Recipe
from gradpruner.training.schedule import schedule

RECIPE = Recipe(batch_size=2, learning_rate=1e-2, warmup=0.25, rank=4)
KINDS = {
    "adapters in float32 on bfloat16": (RECIPE, torch.bfloat16),
    "all weights, accumulation": (dataclasses.replace(RECIPE, rank=0, batch_size=1, accumulation=2), torch.float32),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def model_of(recipe, dtype=torch.float32):
    model = llama(dtype)
    model.config.attention_dropout = 0.1  # the random state matters
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return add_adapters(model, recipe) if recipe.rank else model


def trained(recipe, dtype=torch.float32, checkpoints=None, count=6):
    model = model_of(recipe, dtype)
    ordered = plain(schedule(rows(), count, recipe))
    done = train(model, ordered, Collator(make_tokenizer()), recipe, checkpoints=checkpoints, quiet=True)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, done


def every(folder, steps=2, **made_from):
    return Checkpoints(folder, steps, made_from or {"settings": "0"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_equals_an_uninterrupted_one(kind, tmp_path, monkeypatch):
    recipe, dtype = KINDS[kind]
    expected, whole = trained(recipe, dtype)
    stopped(monkeypatch, 5, lambda: trained(recipe, dtype, every(tmp_path / "kept")))
    assert [path.name for path in (tmp_path / "kept").glob("checkpoint-*")] == ["checkpoint-4"]  # the newest alone
    record = tmp_path / "kept" / "checkpoint-4" / "made_from.json"
    content = json.loads(record.read_text())
    content["watched"] |= {"wall": 1000.0, "peak_bytes": 10**15, "seconds": [50.0] * len(content["watched"]["seconds"])}
    record.write_text(json.dumps(content))
    with monkeypatch.context() as patch:
        steps = interrupting(patch)
        found, resumed = trained(recipe, dtype, every(tmp_path / "kept"))
    assert steps == [5, 6]
    assert resumed.seconds > 1000 and resumed.peak_bytes == 10**15 and resumed.step_seconds == 50  # of both parts
    assert resumed.losses == whole.losses and resumed.steps == len(resumed.losses) == 6
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    again, same = trained(recipe, dtype, every(tmp_path / "kept"))  # nothing is left to train
    assert all(torch.equal(again[name], expected[name]) for name in again) and same.losses == whole.losses
    every(tmp_path / "kept").discard()
    assert not (tmp_path / "kept").exists()


def test_a_checkpoint_that_was_not_completed_is_passed_over(tmp_path, monkeypatch):
    real = row_trainer.write_json

    def dying(path, content):
        if path.parent.name == "checkpoint-4":
            raise KeyboardInterrupt
        real(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(row_trainer, "write_json", dying)
        trained(RECIPE, checkpoints=every(tmp_path / "kept"))
    assert sorted(path.name for path in (tmp_path / "kept").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    with monkeypatch.context() as patch:
        steps = interrupting(patch)
        trained(RECIPE, checkpoints=every(tmp_path / "kept"))
    assert steps[0] == 3


def test_a_checkpoint_of_another_training_is_refused(tmp_path, monkeypatch):
    stopped(monkeypatch, 5, lambda: trained(RECIPE, checkpoints=every(tmp_path / "kept")))
    others = {
        "settings": lambda: trained(RECIPE, checkpoints=every(tmp_path / "kept", settings="1")),
        "recipe": lambda: trained(
            dataclasses.replace(RECIPE, learning_rate=1e-3), checkpoints=every(tmp_path / "kept")
        ),
        "rows, recipe": lambda: trained(RECIPE, checkpoints=every(tmp_path / "kept"), count=7),
    }
    for name, other in others.items():
        with pytest.raises(InvalidArgument, match=rf"checkpoint-4' was made from another {name};.*delete '[^']*kept'"):
            other()
    assert [path.name for path in (tmp_path / "kept").glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_damaged_checkpoint_or_one_of_another_model_changes_nothing(tmp_path):
    model = model_of(RECIPE)
    checkpoints.save_trained(model, tmp_path)
    other = model_of(dataclasses.replace(RECIPE, rank=2))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ModelMismatch, match=r"checkpoint of another model: .*lora_A"):
        checkpoints.load_trained(other, tmp_path)
    (tmp_path / "trained.safetensors").write_bytes((tmp_path / "trained.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.load_trained(other, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_a_disk_without_room_is_told_before_training(tmp_path, monkeypatch):
    steps = interrupting(monkeypatch)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(InvalidArgument, match=r"need 0\.\d+ GB, and the disk has 1e-06 GB left"):
        trained(dataclasses.replace(RECIPE, rank=0), checkpoints=every(tmp_path / "kept"))
    assert steps == []


def test_a_full_disk_in_the_middle_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    real = torch.save

    def full(state, path, *args, **options):
        if "checkpoint-4" in str(path):
            raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")
        real(state, path, *args, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        CheckpointError, match=r"could not write a checkpoint in .*No space left.*earlier ones are kept"
    ):
        trained(RECIPE, checkpoints=every(tmp_path / "kept"))
    newest = every(tmp_path / "kept").folder / "checkpoint-2"
    assert (newest / "made_from.json").is_file() and (newest / "trained.safetensors").is_file()


@pytest.mark.parametrize("save_steps", [0, 1.5, True])
def test_wrong_intervals_are_refused(save_steps, source, tmp_path):
    with pytest.raises(InvalidArgument, match="save_steps = "):
        run(source, tmp_path / "out", save_steps=save_steps)
    assert not (tmp_path / "out").exists()


def test_how_often():
    assert [Checkpoints(Path(), None, {}).interval(steps) for steps in (8, 100, 101, 5000)] == [10, 10, 11, 500]
    assert Checkpoints(Path(), 7, {}).interval(5000) == 7


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path):
    mine = tmp_path / "out-checkpoints" / "checkpoint-500"
    mine.mkdir(parents=True)
    (mine.parent / "notes.txt").write_text("mine")
    checkpoints = Checkpoints(mine.parent, None, {})
    with pytest.raises(InvalidArgument, match=r"is for checkpoints of this training, but other files are in it"):
        checkpoints.newest()
    checkpoints.discard()
    assert mine.is_dir() and (mine.parent / "notes.txt").is_file()


def test_going_on_needs_room_for_one_more_checkpoint(tmp_path, monkeypatch):
    model = torch.nn.Linear(8, 8, bias=False)  # a checkpoint: three times 256 bytes
    checkpoints = Checkpoints(tmp_path / "checkpoints", None, {})
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(InvalidArgument, match=r"need 1.54e-06 GB, and the disk has 1e-06 GB left"):
        checkpoints.make_folder(model)
    assert not checkpoints.folder.exists()
    (checkpoints.folder / "checkpoint-3").mkdir(parents=True)
    checkpoints.make_folder(model)
