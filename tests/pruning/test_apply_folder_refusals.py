"""What apply_folder refuses, and that it names no folder that does not read back."""

from __future__ import annotations

import dataclasses
import json

import model_families
import pytest
import torch
from model_families import igia_of
from stored_models import DROP, MERGE, dense, load
from transformers import AutoModelForCausalLM

import gradpruner
from gradpruner.model.decoder import Decoder
from gradpruner.pruning import apply_folder
from gradpruner.storage import tensor_files

# a layer with experts, and one of the same structure before it
EXPERTS = {"mixtral": (4, 3), "qwen3-moe-sparse-step": (5, 3), "qwen3-next": (4, 3), "deepseek-v3": (5, 4)}


@pytest.mark.parametrize("name", EXPERTS)
def test_merging_weights_that_are_stored_in_another_form_is_refused(name, tmp_path):
    source = dense(name, tmp_path / "dense")
    igia = igia_of(load(source))
    last, before = EXPERTS[name]
    assert any(w.layer == last and len(w.shape) == 3 for w in igia.weights)
    plan = gradpruner.Plan(model_families.LAYERS, merge={last: before})
    with pytest.raises(gradpruner.UnsupportedModel, match="another form than the model has it: load the model in"):
        gradpruner.apply_folder(source, tmp_path / "stream", plan, igia)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_another_model_of_experts_is_told_by_its_content(tmp_path):
    source = dense("mixtral", tmp_path / "dense")
    model = load(source)
    gradpruner.apply_folder(source, tmp_path / "right", dataclasses.replace(DROP, model=Decoder(model).fingerprint()))
    model.model.layers[5].mlp.experts.gate_up_proj[3, 0, 0] += 1  # 4 samples an expert, this the first of one
    other = Decoder(model).fingerprint()
    with pytest.raises(gradpruner.ModelMismatch, match="other weights"):
        gradpruner.apply_folder(source, tmp_path / "wrong", dataclasses.replace(DROP, model=other))


def test_a_checkpoint_without_a_head_that_is_not_tied_is_refused(tmp_path):
    model_families.build(model_families.CONFIGS["llama"]()).model.save_pretrained(tmp_path / "dense")
    with pytest.raises(gradpruner.CheckpointError, match=r"missing_keys \['lm_head.weight'\]"):
        gradpruner.apply_folder(tmp_path / "dense", tmp_path / "stream", DROP)


@pytest.mark.parametrize("name", model_families.REFUSED)
def test_what_cannot_be_carried_over_is_refused_as_in_memory(name, tmp_path):
    model_families.build(model_families.REFUSED[name]()).save_pretrained(tmp_path / "dense")
    with pytest.raises(gradpruner.UnsupportedModel, match="depends on the layer's index"):
        gradpruner.apply_folder(
            tmp_path / "dense", tmp_path / "stream", gradpruner.Plan(model_families.LAYERS, drop=[1, 3])
        )
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_plans_of_other_models_adapters_and_quantised_models_are_refused(tmp_path):
    source, out = dense("llama", tmp_path / "dense"), tmp_path / "stream"
    model = load(source)
    igia = igia_of(model)
    with pytest.raises(gradpruner.ModelMismatch, match="is for 7 decoder layers"):
        gradpruner.apply_folder(source, out, gradpruner.Plan(7, drop=[1]))
    with pytest.raises(gradpruner.InvalidArgument, match="igia is None"):
        gradpruner.apply_folder(source, out, MERGE)
    with pytest.raises(gradpruner.InvalidArgument, match="top = 0"):
        gradpruner.apply_folder(source, out, DROP, top=0)
    model.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(gradpruner.ModelMismatch, match="other weights"):
        gradpruner.apply_folder(source, out, MERGE, dataclasses.replace(igia, model=Decoder(model).fingerprint()))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(gradpruner.UnsupportedModel, match="is quantised"):
        gradpruner.apply_folder(source, out, DROP)
    (source / "config.json").write_text(json.dumps(config))
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(gradpruner.UnsupportedModel, match="holds adapters"):
        gradpruner.apply_folder(source, out, DROP)
    with pytest.raises(gradpruner.InvalidArgument, match=r"not a folder with a config.json"):
        gradpruner.apply_folder(tmp_path / "nowhere", out, DROP)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def flip_a_byte(folder, *args):
    checksums = tensor_files.write_folder(folder, *args)
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    return checksums


def lose_a_tensor(folder, tensors, *args):
    return tensor_files.write_folder(folder, tensors[:-1], *args)


def widen_a_tensor(folder, tensors, *args):
    norm = next(i for i, t in enumerate(tensors) if t.name == "model.norm.weight")
    wide = tensor_files.Pending("model.norm.weight", torch.float32, (33,), lambda: [b"\0" * 132])
    return tensor_files.write_folder(folder, [*tensors[:norm], wide, *tensors[norm + 1 :]], *args)


def swap_two_layers(folder, tensors, *args):
    content = {t.name: t.content for t in tensors}
    norms = ("model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight")
    other = dict(zip(norms, reversed(norms), strict=True))
    swapped = [dataclasses.replace(t, content=content[other.get(t.name, t.name)]) for t in tensors]
    return tensor_files.write_folder(folder, swapped, *args)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("how", [flip_a_byte, lose_a_tensor, widen_a_tensor, swap_two_layers])
def test_what_does_not_read_back_is_never_named(how, large, tmp_path, monkeypatch):
    source = dense("llama", tmp_path / "dense")
    monkeypatch.setattr(apply_folder, "write_folder", how)
    if large:
        monkeypatch.setattr(apply_folder, "free_memory", lambda: 0)
    if large and how is swap_two_layers:  # only the logits tell
        gradpruner.apply_folder(source, tmp_path / "stream", DROP)
        return
    with pytest.raises((gradpruner.CheckpointError, gradpruner.UnsupportedModel)):
        gradpruner.apply_folder(source, tmp_path / "stream", DROP)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_wrong_merged_values_and_a_config_that_changes_the_logits_are_seen(tmp_path, monkeypatch):
    source = dense("smollm3", tmp_path / "dense")
    real = apply_folder._write_config

    def reversed_rope(model, folder):
        real(model, folder)
        config = json.loads((folder / "config.json").read_text())
        config["no_rope_layers"] = config["no_rope_layers"][::-1]
        (folder / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(apply_folder, "_write_config", reversed_rope)
    plan = gradpruner.Plan(model_families.LAYERS, drop=[1, 4])
    with pytest.raises(gradpruner.UnsupportedModel, match="logits are not those"):
        gradpruner.apply_folder(source, tmp_path / "stream", plan)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own-llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_that_brings_its_code_is_read_only_if_that_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = dense("llama", tmp_path / "dense")
    config = json.loads((source / "config.json").read_text())
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    own = {**config, "model_type": "own-llama", "architectures": ["OwnForCausalLM"], "auto_map": code}
    (source / "config.json").write_text(json.dumps(own))
    (source / "modeling_own.py").write_text(CODE)
    with pytest.raises(gradpruner.InvalidArgument, match="contains custom code"):
        gradpruner.apply_folder(source, tmp_path / "stream", DROP)
    gradpruner.apply_folder(source, tmp_path / "stream", DROP, trust_remote_code=True)
    again, ids = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "stream", trust_remote_code=True),
        model_families.tokens(),
    )
    assert type(again).__name__ == "OwnForCausalLM"
    (source / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        actual = again.eval()(input_ids=ids, use_cache=False).logits
    assert torch.equal(actual, model_families.skipped_logits(load(source), DROP.removed, ids))
