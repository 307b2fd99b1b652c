"""Layers that a config counts and the loaded model does not have: the written config says that they are gone."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import transformers as hf
from adapter_models import is_here
from model_families import igia_of
from safetensors.torch import load_file, save_file
from tiny_configs import tiny_config
from torch import nn

import gradpruner
from gradpruner.model.extra_layers import extra_counts

PLAN = gradpruner.Plan(6, drop=[1, 3, 4])
# by model type: the name that its configuration has for the count, in the JSON too
COUNTED = {
    "bailing_hybrid": "num_nextn_predict_layers",
    "deepseek_v3": "num_nextn_predict_layers",
    "deepseek_v4": "num_nextn_predict_layers",
    "glm4_moe": "num_nextn_predict_layers",
    "mellum": "num_nextn_predict_layers",
    "nemotron_h": "num_nextn_predict_layers",
    "qwen3_next": "mtp_num_hidden_layers",  # of the checkpoint's own JSON
    "llama": "num_mtp_modules",
}


def build(kind, **fields):
    torch.manual_seed(0)
    config = tiny_config(hf.CONFIG_MAPPING[kind])
    for name, value in fields.items():
        setattr(config, name, value)
    return hf.AutoModelForCausalLM.from_config(config)


def written(folder, file="config.json"):
    return json.loads((folder / file).read_text())


@pytest.mark.parametrize(("kind", "name"), COUNTED.items(), ids=COUNTED)
@pytest.mark.filterwarnings("ignore")
def test_the_config_of_a_cut_model_counts_none(kind, name, tmp_path, caplog):
    if kind not in hf.CONFIG_MAPPING:
        pytest.skip(f"transformers {hf.__version__} is older than {kind}")
    model = build(kind, **{name: 1})
    with caplog.at_level(logging.WARNING):
        small = gradpruner.apply(model, gradpruner.Plan(6, drop=[1, 2, 4]))
    assert f"config.{name} = 1: the model has no such layers" in caplog.text
    assert extra_counts(small.config) == []
    gradpruner.save(small, tmp_path / "small")
    assert written(tmp_path / "small")[name] == 0
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert extra_counts(again.config) == []


def test_a_model_that_is_saved_uncut_is_written_rightly_and_left_alone(tmp_path, caplog):
    model = build("deepseek_v3", num_nextn_predict_layers=1)
    model.generation_config.use_mtp = True
    with caplog.at_level(logging.WARNING):
        gradpruner.save(model, tmp_path / "dense")
    assert written(tmp_path / "dense")["num_nextn_predict_layers"] == 0
    assert not written(tmp_path / "dense", "generation_config.json").get("use_mtp")
    assert "config.num_nextn_predict_layers = 1" in caplog.text
    assert model.config.num_nextn_predict_layers == 1 and model.generation_config.use_mtp is True


def test_a_refused_cut_leaves_the_count(monkeypatch):
    model = build("deepseek_v3", num_nextn_predict_layers=1)
    before = model.config.to_dict()
    monkeypatch.setattr(gradpruner.pruning.apply, "differ", lambda a, b, dtype: 1.0)
    with pytest.raises(gradpruner.UnsupportedModel):
        gradpruner.apply(model, PLAN)
    assert model.config.to_dict() == before


def test_a_folder_with_such_a_layer_becomes_one_without(tmp_path, caplog):
    """As DeepSeek-V3's: one layer behind the last one, stored like a decoder layer."""
    source, out = tmp_path / "dense", tmp_path / "small"
    build("deepseek_v3", num_nextn_predict_layers=1).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    behind = {name.replace("layers.5.", "layers.6."): t.clone() for name, t in tensors.items() if "layers.5." in name}
    save_file(
        {**tensors, **behind, "model.layers.6.eh_proj.weight": torch.ones(2, 4)},
        source / "model.safetensors",
        {"format": "pt"},
    )
    fields = written(source, "generation_config.json")
    (source / "generation_config.json").write_text(json.dumps({**fields, "use_mtp": True, "assistant_early_exit": 3}))
    with caplog.at_level(logging.WARNING):
        gradpruner.apply_folder(source, out, PLAN)
    assert "config.num_nextn_predict_layers = 1" in caplog.text
    assert f"{len(behind) + 1} tensors of {source} stay behind" in caplog.text and "model.layers.6." in caplog.text
    assert written(out)["num_nextn_predict_layers"] == 0 and written(out)["num_hidden_layers"] == 3
    assert not any("layers.3." in name for name in load_file(out / "model.safetensors"))
    generation = written(out, "generation_config.json")
    assert generation["use_mtp"] is None and generation["assistant_early_exit"] == 2  # of layers 0, 1, 2 two are kept


class Predicting(hf.LlamaForCausalLM):
    """A class that does have such layers, and uses them."""

    def __init__(self, config):
        super().__init__(config)
        self.predictors = nn.ModuleList(nn.Linear(32, 32) for _ in range(config.num_mtp_layers))
        self.post_init()

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + self.predictors[0].weight.sum()
        return output


def test_a_model_that_has_such_layers_keeps_them_and_their_count():
    torch.manual_seed(0)
    config = tiny_config(hf.LlamaConfig)
    config.num_mtp_layers = 1
    model = Predicting(config)
    small = gradpruner.apply(model, gradpruner.Plan(6, drop=[1, 4], merge=[3]), igia_of(model))
    assert small.config.num_mtp_layers == 1 and len(small.predictors) == 1


@pytest.mark.skipif(not is_here("bitsandbytes"), reason="needs the package bitsandbytes")
@pytest.mark.filterwarnings("ignore")
def test_names_of_layers_that_are_not_quantised_are_renumbered(tmp_path):
    """As in folders of "dynamic" quantisation; else the names would be those of other layers."""
    build("llama").save_pretrained(tmp_path / "dense")
    left = ["lm_head", "model.layers.5.mlp.down_proj", "layers.1.mlp", "layers.2.self_attn.q_proj"]
    chosen = hf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=chosen)
    small = gradpruner.apply(model, gradpruner.Plan(6, drop=[1, 3]))
    now = ["lm_head", "model.layers.3.mlp.down_proj", "layers.1.self_attn.q_proj"]
    assert small.config.quantization_config.llm_int8_skip_modules == now and chosen.llm_int8_skip_modules == left


def test_an_early_exit_is_after_as_many_of_the_layers_as_are_left():
    model = build("llama")
    model.generation_config.assistant_early_exit = 4
    small = gradpruner.apply(model, PLAN)  # of layers 0 to 3 two are kept
    assert small.generation_config.assistant_early_exit == 2


@pytest.mark.parametrize("way", ["memory", "folder"])
def test_code_that_does_not_come_along_is_not_named(way, tmp_path, caplog):
    source, out = tmp_path / "dense", tmp_path / "small"
    build("llama").save_pretrained(source)
    elsewhere = {"AutoModel": "somebody/model--modeling_x.XModel"}
    code = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM", **elsewhere}
    (source / "config.json").write_text(json.dumps({**written(source), "auto_map": code}))
    for file in ("configuration_x.py", "modeling_x.py"):
        (source / file).write_text("raise RuntimeError")
    with caplog.at_level(logging.WARNING):
        if way == "folder":
            gradpruner.apply_folder(source, out, PLAN)
        else:
            gradpruner.save(gradpruner.apply(hf.AutoModelForCausalLM.from_pretrained(source), PLAN), out)
    assert written(out)["auto_map"] == elsewhere
    assert "code that does not come along: ['AutoConfig', 'AutoModelForCausalLM']" in caplog.text
