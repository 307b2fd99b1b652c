"""Which models are moved to the accelerator. Torch's meta device stands for a GPU."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_llama import llama
from torch import nn
from word_tokenizers import make_tokenizer

from gradpruner.cli.main import main
from gradpruner.errors import InvalidArgument
from gradpruner.model import accelerator as module
from gradpruner.model.accelerator import accelerator, to_accelerator

META = torch.device("meta")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: META)


def device_of(model):
    return model.weight.device


def test_a_model_is_moved_to_the_gpu(gpu):
    model = nn.Linear(2, 2)
    to_accelerator(model)
    assert accelerator() == device_of(model) == META


def test_without_a_gpu_or_with_a_launcher_that_wants_the_cpu_it_stays(gpu, monkeypatch):
    model = nn.Linear(2, 2)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    to_accelerator(model)
    assert accelerator() is None and device_of(model).type == "cpu"
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    to_accelerator(model)
    assert accelerator() is None and device_of(model).type == "cpu"


def test_a_model_that_fsdp2_will_shard_stays(gpu, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    model = nn.Linear(2, 2)
    to_accelerator(model, trains=True)
    assert device_of(model).type == "cpu"
    to_accelerator(model)
    assert device_of(model) == META


@pytest.mark.parametrize("attribute", [{"hf_device_map": {"": "cpu"}}, {"is_quantized": True}])
def test_a_model_that_its_loader_has_placed_stays(attribute, gpu):
    model = nn.Linear(2, 2)
    vars(model).update(attribute)
    to_accelerator(model)
    assert device_of(model).type == "cpu"


def test_a_model_that_does_not_fit_stays_and_this_is_said(gpu, monkeypatch, caplog):
    model = nn.Sequential(one := nn.Linear(10, 10, bias=False), one)  # 400 bytes, shared
    monkeypatch.setattr(module, "_free", lambda device: 400)
    to_accelerator(model)
    assert device_of(one).type == "cpu" and "it stays on the CPU, which is slow" in caplog.text
    monkeypatch.setattr(module, "_free", lambda device: 500)
    to_accelerator(model, room=100)
    assert device_of(one).type == "cpu"
    to_accelerator(model)
    assert device_of(one) == META


def test_evaluate_measures_on_the_gpu(gpu, monkeypatch, tmp_path, capsys):
    from gradpruner.cli import options
    from gradpruner.run import stages
    from gradpruner.training.evaluate import Evaluation

    seen = []

    def measure(model, *_, **__):
        seen.append(device_of(model))
        return Evaluation(None, 1.0, None, 1)

    monkeypatch.setattr(options, "load", lambda _: (nn.Linear(2, 2), None))
    monkeypatch.setattr(stages, "measure", measure)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "a text"}) + "\n")
    assert main(["evaluate", "--model", "any", "--data", str(data)]) == 0, capsys.readouterr().err
    assert seen == [META]


@pytest.mark.parametrize(("method", "moved"), [("wanda", False), ("gblm", True)])
def test_sparsify_computes_on_the_gpu_and_moves_the_model_for_gradients_alone(
    method, moved, gpu, monkeypatch, tmp_path
):
    from gradpruner.cli import options
    from gradpruner.sparsity import zero_weights

    seen = []

    def sparsify(model, *_, device, **__):
        seen.append((device, next(model.parameters()).device == META))
        raise InvalidArgument("seen")

    tokenizer, model = make_tokenizer(), llama()
    model.resize_token_embeddings(len(tokenizer))
    monkeypatch.setattr(options, "load", lambda _: (model, tokenizer))
    monkeypatch.setattr(zero_weights, "sparsify", sparsify)
    (tmp_path / "text.txt").write_text("red green blue " * 40)
    given = ["--model", str(tmp_path), "--data", str(tmp_path / "text.txt"), "--max-length", "8", "--samples", "2"]
    assert main(["sparsify", *given, "--method", method, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert main(["sparsify", *given, "--method", method, "--out", str(tmp_path / "out")]) == 2
    assert seen == [("cpu", False), (META, moved)]


def test_a_cut_is_made_on_the_gpu(gpu, monkeypatch):
    from gradpruner.run import models
    from gradpruner.run.models import RunModels

    monkeypatch.setattr(models, "apply", lambda model, *_, **__: model)
    preset = SimpleNamespace(patch=False, top=1.0, weight=1.0, adapters="keep")
    run = SimpleNamespace(job=SimpleNamespace(preset=preset), load_probed=lambda: (nn.Linear(2, 2), None))
    model, _ = RunModels.cut(run, SimpleNamespace(merge=None))
    assert device_of(model) == META
