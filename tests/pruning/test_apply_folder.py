"""apply_folder: the same bytes as through memory."""

from __future__ import annotations

import dataclasses
import importlib
import json

import model_families
import pytest
import torch
from model_families import generate, igia_of
from safetensors.torch import load_file, save_file
from stored_models import DROP, MERGE, content, dense, load, same_checkpoint, tensors, through_memory
from thinned import every, thinned
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

import gradpruner
from gradpruner.cli.main import main
from gradpruner.model import load as load_room
from gradpruner.model.decoder import Decoder
from gradpruner.probe.igia import Igia
from gradpruner.probe.importance import Factors
from gradpruner.pruning import apply_folder
from gradpruner.storage import tensor_files


@pytest.mark.parametrize(
    ("name", "sharded"),
    [
        *thinned([(name, False) for name in model_families.CONFIGS], every(3)),
        *[(name, True) for name in ("llama-tied", "gpt2", "mixtral")],
    ],
)
def test_dropping_gives_the_same_bytes_as_in_memory(name, sharded, tmp_path):
    source = dense(name, tmp_path / "dense", **({"max_shard_size": "30KB"} if sharded else {}))
    plan = dataclasses.replace(DROP, model=Decoder(load(source)).fingerprint())
    assert "-" in plan.model  # of the weights too
    through_memory(source, tmp_path / "memory", plan)
    assert gradpruner.apply_folder(source, tmp_path / "stream", plan) == tmp_path / "stream"
    same_checkpoint(tmp_path / "stream", tmp_path / "memory")
    largest = max(p.stat().st_size for p in source.glob("*.safetensors"))
    written = list((tmp_path / "stream").glob("*.safetensors"))
    assert (len(written) > 1) == sharded and all(p.stat().st_size <= 1.1 * largest for p in written)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "memory", "stream"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in ("llama", "llama-tied", "gpt2", "qwen2", "phi3", "opt", "gpt-oss", "falcon")]
    + [("llama", torch.bfloat16), ("gpt2", torch.bfloat16)],
)
def test_merging_gives_the_same_bytes_as_in_memory(name, dtype, tmp_path):
    source = dense(name, tmp_path / "dense", dtype, max_shard_size="30KB")
    igia = igia_of(load(source))
    equal = [j for j in range(model_families.LAYERS) if igia.structures[j] == igia.structures[2]]
    assert {2, 3, 4} <= set(equal)
    igia.save(tmp_path / "igia.safetensors")
    plan = dataclasses.replace(MERGE, model=igia.model)
    through_memory(source, tmp_path / "memory", plan, igia)
    gradpruner.apply_folder(source, tmp_path / "stream", plan, Igia.load(tmp_path / "igia.safetensors", lazy=True))
    same_checkpoint(tmp_path / "stream", tmp_path / "memory")
    before, after = tensors(source), tensors(tmp_path / "stream")
    assert any(not torch.equal(after[k], before.get(k.replace(".1.", ".2."), after[k])) for k in after)


def test_merging_from_factors_and_from_one_donor(tmp_path):
    source = dense("llama", tmp_path / "dense")
    model = load(source)
    generator = torch.Generator().manual_seed(0)
    factors = {
        (w.layer, w.name): Factors(
            torch.randn(3, 2, w.shape[1], generator=generator), torch.randn(3, w.shape[0], 2, generator=generator)
        )
        for w in Decoder(model).weights
        if "up_proj" not in w.name  # a weight that was not watched is copied
    }
    igia = dataclasses.replace(igia_of(model), importance=factors)
    plan = gradpruner.Plan(model_families.LAYERS, drop=[5], merge={2: 1, 4: 3})
    through_memory(source, tmp_path / "memory", plan, igia)
    gradpruner.apply_folder(source, tmp_path / "stream", plan, igia)
    same_checkpoint(tmp_path / "stream", tmp_path / "memory")


def test_the_written_folder_generates_with_stock_classes(tmp_path):
    source = dense("qwen3", tmp_path / "dense", max_shard_size="30KB")
    gradpruner.apply_folder(source, tmp_path / "stream", DROP)
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "stream").eval(), model_families.tokens()
    expected = model_families.skipped_logits(load(source), DROP.removed, ids)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids, use_cache=False).logits, expected)
    assert torch.equal(generate(again, ids, cache=True), generate(again, ids, cache=False))


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_a_checkpoint_of_the_base_class_gets_the_names_of_the_whole_model(name, tmp_path):
    model_families.build(model_families.CONFIGS[name]()).base_model.save_pretrained(tmp_path / "dense")
    igia = igia_of(load(tmp_path / "dense"))
    through_memory(tmp_path / "dense", tmp_path / "memory", MERGE, igia)
    gradpruner.apply_folder(tmp_path / "dense", tmp_path / "stream", MERGE, igia)
    assert not any(k.startswith(("h.", "layers.")) for k in tensors(tmp_path / "stream"))
    ours, theirs = tensors(tmp_path / "stream"), tensors(tmp_path / "memory")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_classifier_stays_one_and_keeps_its_head(kind, tmp_path):
    model = kind.from_config(model_families.CONFIGS["llama"](), dtype=torch.float32)
    model.save_pretrained(tmp_path / "dense")
    gradpruner.apply_folder(tmp_path / "dense", tmp_path / "stream", DROP)
    again, info = kind.from_pretrained(tmp_path / "stream", output_loading_info=True)
    assert not info["missing_keys"] and torch.equal(again.score.weight, model.score.weight)
    assert len(Decoder(again).layers) == model_families.LAYERS - len(DROP.removed)


def test_dropped_layers_are_never_read(tmp_path, monkeypatch):
    source = dense("llama", tmp_path / "dense")
    igia = igia_of(load(source))
    igia.save(tmp_path / "igia.safetensors")
    read, real = {}, tensor_files.TensorInFile._fill

    def fill(self, file, part, offset):
        if tmp_path in self.file.parents and self.file.parent.name != "new":  # what is written is read again
            read[self.name] = read.get(self.name, 0) + len(part)
        real(self, file, part, offset)

    monkeypatch.setattr(tensor_files.TensorInFile, "_fill", fill)
    monkeypatch.setattr(apply_folder, "free_memory", lambda: 0)
    lazy = Igia.load(tmp_path / "igia.safetensors", lazy=True)
    gradpruner.apply_folder(source, tmp_path / "stream", MERGE, dataclasses.replace(lazy, model=igia.model[:16]))
    model, importance = {}, set()
    for name, count in read.items():
        if "/" in name:
            importance.add(int(name.split("/")[0]))
        elif name.startswith("model.layers."):
            model.setdefault(int(name.split(".")[2]), {})[name.split(".", 3)[3]] = count
    assert importance == {3, 4}
    assert set(model) == {0, 2, 3, 4, 5}
    assert model[3].keys() == {w.name for w in igia.weights}  # of a donor only what is merged: no norm, no bias
    stored_bytes = {name: tensor.nbytes for name, tensor in tensors(source).items()}
    assert {name: read[name] for name in stored_bytes.keys() & read.keys()}.items() <= stored_bytes.items()  # once


def test_other_files_come_along_but_no_pickles_and_no_code(tmp_path):
    source = dense("llama", tmp_path / "dense")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "modeling_x.py",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "optimizer.pt",
        "consolidated.00.pth",
        "x.ckpt",
        ".hidden",
    ):
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (source / "original").mkdir()
    (source / "original" / "x.txt").write_text("x")
    gradpruner.apply_folder(source, tmp_path / "stream", DROP)
    expected = {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "config.json",
        "generation_config.json",
        "gradpruner.json",
        "model.safetensors",
        "additional_chat_templates/tool.jinja",
    }
    assert content(tmp_path / "stream").keys() == expected
    gradpruner.apply_folder(source, tmp_path / "code", DROP, trust_remote_code=True)
    assert content(tmp_path / "code").keys() == expected | {"modeling_x.py"}


@pytest.mark.parametrize(
    ("said", "sharded"), [("float32", False), ("bfloat16", True), ("float64", False), (None, False), (None, True)]
)
def test_every_tensor_is_written_in_the_dtype_that_it_is_loaded_in(said, sharded, tmp_path):
    """As config.json says; without it as the first tensor has it that transformers reads."""
    source = dense("qwen2", tmp_path / "dense", torch.float32, **({"max_shard_size": "30KB"} if sharded else {}))
    for file in source.glob("*.safetensors"):
        mixed = {
            name: t.half() if "down_proj" in name else t.bfloat16() if t.ndim == 1 else t
            for name, t in load_file(file).items()
        }
        save_file(mixed, file, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    (source / "config.json").write_text(json.dumps({**config, "dtype": said}))
    through_memory(source, tmp_path / "memory", DROP)
    gradpruner.apply_folder(source, tmp_path / "stream", DROP)
    same_checkpoint(tmp_path / "stream", tmp_path / "memory")
    igia = igia_of(load(source))
    through_memory(source, tmp_path / "merged", MERGE, igia)
    gradpruner.apply_folder(source, tmp_path / "merged stream", MERGE, igia)
    same_checkpoint(tmp_path / "merged stream", tmp_path / "merged")


def test_tensors_the_model_has_no_place_for_stay_behind(tmp_path):
    source = dense("llama", tmp_path / "dense", torch.bfloat16)
    extra = tensors(source)
    extra["model.layers.9.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    extra["model.norm.weight"] = extra["model.norm.weight"].float()
    save_file(extra, source / "model.safetensors", metadata={"format": "pt"})
    gradpruner.apply_folder(source, tmp_path / "stream", DROP)
    written = tensors(tmp_path / "stream")
    assert "model.layers.9.self_attn.rotary_emb.inv_freq" not in written
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}  # as when it is loaded


def test_the_command_streams_a_folder_and_loads_anything_else(tmp_path, monkeypatch, capsys):
    source = dense("llama", tmp_path / "dense")
    DROP.save(tmp_path / "plan.json")
    options = ["apply", "--model", str(source), "--plan", str(tmp_path / "plan.json")]

    def loaded(*args, **kwargs):
        raise gradpruner.InvalidArgument("it was loaded")

    importlib.import_module("gradpruner.run.run")  # which would keep the replacement, were it imported later
    monkeypatch.setattr(load_room, "load_model", loaded)
    assert main([*options, "--out", str(tmp_path / "stream"), "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text[text.index("{\n") :]) == {"folder": str(tmp_path / "stream"), "plan": DROP.to_dict()}
    assert main([*options, "--out", str(tmp_path / "other"), "--dtype", "bfloat16"]) == 2
    assert "it was loaded" in capsys.readouterr().err
