from __future__ import annotations

import json
import os
import subprocess
import sys

import model_families
import pytest
import torch
from model_families import generate
from probing import run
from safetensors.torch import load_file, save_file
from tiny_llama import LAYERS, llama, lora

import gradpruner
from gradpruner.checkpoint import save as checkpoint

STOCK = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "gradpruner":
            raise ImportError("gradpruner cannot be imported here")
sys.meta_path.insert(0, Refuse())
try:
    import gradpruner
except ImportError:
    pass
else:
    sys.exit("gradpruner could be imported")
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor(json.loads(sys.argv[2]))
out = [model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, use_cache=cache,
                      pad_token_id=0).tolist() for cache in (True, False)]
print(json.dumps(out))
"""


@pytest.mark.slow
@pytest.mark.in_ci
def test_stock_transformers_alone_generates_token_for_token(tmp_path):
    model = lora(llama())
    igia = run(model)
    plan = igia.plan(0.4, preset="paper")
    smaller = gradpruner.apply(model, plan, igia, preset="paper").eval()
    gradpruner.save(smaller, tmp_path / "small", plan=plan)
    ids = model_families.tokens() % 61
    stock = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path / "small"), json.dumps(ids.tolist())],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=300,
    )
    assert stock.returncode == 0, stock.stderr[-2000:]
    cached, uncached = json.loads(stock.stdout)
    assert cached == uncached == generate(smaller, ids, cache=True).tolist()
    assert gradpruner.Plan.from_dict(json.loads((tmp_path / "small" / "gradpruner.json").read_text())).kept


def test_generation_config_is_kept(tmp_path):
    model = llama()
    model.generation_config.max_new_tokens = 77
    smaller = gradpruner.apply(model, gradpruner.Plan(LAYERS, drop=[3]))
    gradpruner.save(smaller, tmp_path / "small")
    assert json.loads((tmp_path / "small" / "generation_config.json").read_text())["max_new_tokens"] == 77


def test_sharded_checkpoints_are_verified_too(tmp_path, monkeypatch):
    model = gradpruner.apply(llama(), gradpruner.Plan(LAYERS, drop=[3]))
    real = type(model).save_pretrained
    monkeypatch.setattr(type(model), "save_pretrained", lambda s, f: real(s, f, max_shard_size="50KB"))
    gradpruner.save(model, tmp_path / "small")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1


BREAK = {
    "a tensor lost": lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"),
    "a tensor changed": lambda tensors: tensors["model.norm.weight"].mul_(1.001),
    "a tensor too many": lambda tensors: tensors.update({"model.layers.9.extra.weight": torch.zeros(2)}),
    "a shape changed": lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3, 24)}),
}


@pytest.mark.parametrize("how", BREAK)
@pytest.mark.parametrize("large", [False, True])
def test_what_does_not_read_back_is_never_named(how, large, tmp_path, monkeypatch):
    if large and how == "a tensor changed":
        return  # a model too large for a second copy is checked by keys and shapes
    if large:
        monkeypatch.setattr(checkpoint, "free_memory", lambda: 0)
    model = gradpruner.apply(llama(), gradpruner.Plan(LAYERS, drop=[3]))
    real = type(model).save_pretrained

    def broken(self, folder):
        real(self, folder)
        file = os.path.join(folder, "model.safetensors")
        tensors = load_file(file)
        BREAK[how](tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(type(model), "save_pretrained", broken)
    with pytest.raises(gradpruner.CheckpointError):
        gradpruner.save(model, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_changes_the_logits_is_never_named(tmp_path, monkeypatch):
    model = model_families.build(model_families.CONFIGS["smollm3"]())
    real = type(model).save_pretrained

    def broken(self, folder):
        real(self, folder)
        file = os.path.join(folder, "config.json")
        with open(file) as stream:
            config = json.load(stream)
        config["no_rope_layers"] = config["no_rope_layers"][::-1]
        with open(file, "w") as stream:
            json.dump(config, stream)

    monkeypatch.setattr(type(model), "save_pretrained", broken)
    with pytest.raises(gradpruner.CheckpointError, match="other logits"):
        gradpruner.save(model, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_overwriting_keeps_the_old_checkpoint_until_the_new_one_is_verified(tmp_path, monkeypatch):
    old, new = llama(), gradpruner.apply(llama(), gradpruner.Plan(LAYERS, drop=[3]))
    gradpruner.save(old, tmp_path / "small")
    before = {p.name: p.read_bytes() for p in (tmp_path / "small").iterdir()}
    with pytest.raises(gradpruner.InvalidArgument, match="not empty"):
        gradpruner.save(new, tmp_path / "small")
    monkeypatch.setattr(checkpoint, "verify", lambda *a: (_ for _ in ()).throw(gradpruner.CheckpointError("no")))
    with pytest.raises(gradpruner.CheckpointError):
        gradpruner.save(new, tmp_path / "small", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "small").iterdir()} == before
    monkeypatch.undo()
    gradpruner.save(new, tmp_path / "small", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["small"]
    assert json.loads((tmp_path / "small" / "config.json").read_text())["num_hidden_layers"] == 7


def test_adapters_and_strangers_are_refused(tmp_path):
    with pytest.raises(gradpruner.InvalidArgument, match="still has adapters"):
        gradpruner.save(lora(llama()), tmp_path / "small")
    with pytest.raises(gradpruner.InvalidArgument, match="expected a transformers model"):
        gradpruner.save(torch.nn.Linear(2, 2), tmp_path / "small")
