"""apply_folder: the same bytes as through memory, in bounded memory, or nothing at all."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib
import json
import resource
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import model_families as families
import pytest
import torch
from model_families import generate, igia_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import gradpruner
from gradpruner.checkpoint import save as checkpoint
from gradpruner.cli.main import main
from gradpruner.model import load as models
from gradpruner.model.decoder import Decoder
from gradpruner.probe.igia import Igia
from gradpruner.probe.importance import Factors
from gradpruner.pruning import apply_folder as streaming
from gradpruner.storage import files
from gradpruner.storage import tensor_files as shards

DROP = gradpruner.Plan(families.LAYERS, drop=[1, 3, 4])
MERGE = gradpruner.Plan(families.LAYERS, drop=[1], merge={3: 2, 4: 2})  # two donors into one target
# a layer with experts, and one of the same structure before it
EXPERTS = {"mixtral": (4, 3), "qwen3-moe-sparse-step": (5, 3), "qwen3-next": (4, 3), "deepseek-v3": (5, 4)}


def dense(name, folder, dtype=torch.float32, **options):
    families.build(families.CONFIGS[name]()).to(dtype).save_pretrained(folder, **options)
    return folder


def load(folder):
    """Frozen, so that its fingerprint is of the content too."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").requires_grad_(False)


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same_checkpoint(a, b):
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape, name
        flat = [t.contiguous().view(-1).view(torch.uint8) for t in (tensor, theirs[name])]
        assert torch.equal(*flat), name
    for name in ("config.json", "generation_config.json", "gradpruner.json"):
        assert json.loads((a / name).read_text()) == json.loads((b / name).read_text()), name


def through_memory(source, out, plan, igia=None):
    return gradpruner.save(gradpruner.apply(load(source), plan, igia), out, plan=plan)


@pytest.mark.parametrize(
    ("name", "sharded"),
    [(name, False) for name in families.CONFIGS] + [(name, True) for name in ("llama-tied", "gpt2", "mixtral")],
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
    equal = [j for j in range(families.LAYERS) if igia.structures[j] == igia.structures[2]]
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
    plan = gradpruner.Plan(families.LAYERS, drop=[5], merge={2: 1, 4: 3})
    through_memory(source, tmp_path / "memory", plan, igia)
    gradpruner.apply_folder(source, tmp_path / "stream", plan, igia)
    same_checkpoint(tmp_path / "stream", tmp_path / "memory")


def test_the_written_folder_generates_with_stock_classes(tmp_path):
    source = dense("qwen3", tmp_path / "dense", max_shard_size="30KB")
    gradpruner.apply_folder(source, tmp_path / "stream", DROP)
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "stream").eval(), families.tokens()
    expected = families.skipped_logits(load(source), DROP.removed, ids)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids, use_cache=False).logits, expected)
    assert torch.equal(generate(again, ids, cache=True), generate(again, ids, cache=False))


@pytest.mark.parametrize("name", EXPERTS)
def test_merging_weights_that_are_stored_in_another_form_is_refused(name, tmp_path):
    source = dense(name, tmp_path / "dense")
    igia = igia_of(load(source))
    last, before = EXPERTS[name]
    assert any(w.layer == last and len(w.shape) == 3 for w in igia.weights)
    plan = gradpruner.Plan(families.LAYERS, merge={last: before})
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


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_a_checkpoint_of_the_base_class_gets_the_names_of_the_whole_model(name, tmp_path):
    families.build(families.CONFIGS[name]()).base_model.save_pretrained(tmp_path / "dense")
    igia = igia_of(load(tmp_path / "dense"))
    through_memory(tmp_path / "dense", tmp_path / "memory", MERGE, igia)
    gradpruner.apply_folder(tmp_path / "dense", tmp_path / "stream", MERGE, igia)
    assert not any(k.startswith(("h.", "layers.")) for k in tensors(tmp_path / "stream"))
    ours, theirs = tensors(tmp_path / "stream"), tensors(tmp_path / "memory")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_checkpoint_without_a_head_that_is_not_tied_is_refused(tmp_path):
    families.build(families.CONFIGS["llama"]()).model.save_pretrained(tmp_path / "dense")
    with pytest.raises(gradpruner.CheckpointError, match=r"missing_keys \['lm_head.weight'\]"):
        gradpruner.apply_folder(tmp_path / "dense", tmp_path / "stream", DROP)


@pytest.mark.parametrize("name", families.REFUSED)
def test_what_cannot_be_carried_over_is_refused_as_in_memory(name, tmp_path):
    families.build(families.REFUSED[name]()).save_pretrained(tmp_path / "dense")
    with pytest.raises(gradpruner.UnsupportedModel, match="depends on the layer's index"):
        gradpruner.apply_folder(tmp_path / "dense", tmp_path / "stream", gradpruner.Plan(families.LAYERS, drop=[1, 3]))
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


def test_dropped_layers_are_never_read(tmp_path, monkeypatch):
    source = dense("llama", tmp_path / "dense")
    igia = igia_of(load(source))
    igia.save(tmp_path / "igia.safetensors")
    read, real = {}, shards.Stored._fill

    def fill(self, file, part, offset):
        if tmp_path in self.file.parents and self.file.parent.name != "new":  # what is written is read again
            read[self.name] = read.get(self.name, 0) + len(part)
        real(self, file, part, offset)

    monkeypatch.setattr(shards.Stored, "_fill", fill)
    monkeypatch.setattr(streaming, "free_memory", lambda: 0)
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


def rewrite_header(file, change):
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def overlap(header):
    name = next(k for k, v in header.items() if k != "__metadata__" and v["data_offsets"][0] > 8)
    header[name]["data_offsets"] = [x - 8 for x in header[name]["data_offsets"]]


def beyond(header):
    name = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"][1])
    header[name]["data_offsets"][1] += 4
    header[name]["shape"] = [(header[name]["data_offsets"][1] - header[name]["data_offsets"][0]) // 4]


def shape(header):
    header["model.norm.weight"]["shape"] = [31]


DAMAGE = {
    "offsets overlap": (lambda f: rewrite_header(f / "model.safetensors", overlap), "begins at byte"),
    "offsets beyond the file": (lambda f: rewrite_header(f / "model.safetensors", beyond), "its header describes"),
    "size and shape differ": (lambda f: rewrite_header(f / "model.safetensors", shape), "its shape needs"),
    "unknown dtype": (
        lambda f: rewrite_header(f / "model.safetensors", lambda h: h["model.norm.weight"].update(dtype="F3")),
        "F3",
    ),
    "cut short": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-5]),
        "its header describes",
    ),
    "no header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), "not a safetensors file"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "not a safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has neither"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_files_are_refused(how, tmp_path):
    source = dense("llama", tmp_path / "dense")
    damage, message = DAMAGE[how]
    damage(source)
    with pytest.raises(gradpruner.CheckpointError, match=message):
        gradpruner.apply_folder(source, tmp_path / "stream", DROP)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def change_index(folder, change):
    index = json.loads((folder / shards.INDEX).read_text())
    change(index["weight_map"])
    (folder / shards.INDEX).write_text(json.dumps(index))


WRONG_INDEX = {
    "a shard missing": (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "which its index names"),
    "another file": (
        lambda f: change_index(f, lambda m: m.update({min(m, key=m.get): max(m.values())})),
        "the index says",
    ),
    "a name too many": (lambda f: change_index(f, lambda m: m.update(x=max(m.values()))), "does not hold 'x'"),
    "a name too few": (lambda f: change_index(f, lambda m: m.pop("model.norm.weight")), "the index says nothing"),
    "another folder": (
        lambda f: change_index(f, lambda m: m.update({"lm_head.weight": "../x.safetensors"})),
        "in the same folder",
    ),
    "no map": (lambda f: (f / shards.INDEX).write_text("{}"), "no weight_map"),
}


@pytest.mark.parametrize("how", WRONG_INDEX)
def test_a_wrong_index_is_refused(how, tmp_path):
    source = dense("llama", tmp_path / "dense", max_shard_size="30KB")
    damage, message = WRONG_INDEX[how]
    damage(source)
    with pytest.raises(gradpruner.CheckpointError, match=message):
        gradpruner.apply_folder(source, tmp_path / "stream", DROP)


def flip_a_byte(folder, *args):
    checksums = shards.write_folder(folder, *args)
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    return checksums


def lose_a_tensor(folder, tensors, *args):
    return shards.write_folder(folder, tensors[:-1], *args)


def widen_a_tensor(folder, tensors, *args):
    norm = next(i for i, t in enumerate(tensors) if t.name == "model.norm.weight")
    wide = shards.Pending("model.norm.weight", torch.float32, (33,), lambda: [b"\0" * 132])
    return shards.write_folder(folder, [*tensors[:norm], wide, *tensors[norm + 1 :]], *args)


def swap_two_layers(folder, tensors, *args):
    content = {t.name: t.content for t in tensors}
    norms = ("model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight")
    other = dict(zip(norms, reversed(norms), strict=True))
    swapped = [dataclasses.replace(t, content=content[other.get(t.name, t.name)]) for t in tensors]
    return shards.write_folder(folder, swapped, *args)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("how", [flip_a_byte, lose_a_tensor, widen_a_tensor, swap_two_layers])
def test_what_does_not_read_back_is_never_named(how, large, tmp_path, monkeypatch):
    source = dense("llama", tmp_path / "dense")
    monkeypatch.setattr(streaming, "write_folder", how)
    if large:
        monkeypatch.setattr(streaming, "free_memory", lambda: 0)
    if large and how is swap_two_layers:  # only the logits tell
        gradpruner.apply_folder(source, tmp_path / "stream", DROP)
        return
    with pytest.raises((gradpruner.CheckpointError, gradpruner.UnsupportedModel)):
        gradpruner.apply_folder(source, tmp_path / "stream", DROP)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_wrong_merged_values_and_a_config_that_changes_the_logits_are_seen(tmp_path, monkeypatch):
    source = dense("smollm3", tmp_path / "dense")
    real = streaming._write_config

    def reversed_rope(model, folder):
        real(model, folder)
        config = json.loads((folder / "config.json").read_text())
        config["no_rope_layers"] = config["no_rope_layers"][::-1]
        (folder / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(streaming, "_write_config", reversed_rope)
    plan = gradpruner.Plan(families.LAYERS, drop=[1, 4])
    with pytest.raises(gradpruner.UnsupportedModel, match="logits are not those"):
        gradpruner.apply_folder(source, tmp_path / "stream", plan)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


# a checkpoint is half written, and the process says so and stops there until it is killed
HALF_WAY = """
import sys
from pathlib import Path
import gradpruner
from gradpruner import shards
real, done = shards._write, []
def write(file, tensor):
    done.append(tensor)
    if len(done) == 20:
        file.flush()
        print("half way", flush=True)
        sys.stdin.read()
    return real(file, tensor)
shards._write = write
from gradpruner.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old one"])
def test_killed_half_way_leaves_nothing_that_loads_and_a_rerun_clears_up(old, tmp_path, capsys):
    source, out = dense("llama", tmp_path / "dense"), tmp_path / "stream"
    DROP.save(tmp_path / "plan.json")
    options = ["apply", "--model", str(source), "--plan", str(tmp_path / "plan.json"), "--out", str(out)]
    if old:
        out.mkdir()
        (out / "precious.txt").write_text("precious")
        options.append("--overwrite")
    process = subprocess.Popen(
        [sys.executable, "-c", HALF_WAY, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "half way\n"
    left = [p for p in tmp_path.iterdir() if p.name.startswith(".stream.")]
    assert len(left) == 1 and any(p.stat().st_size > 10_000 for p in left[0].rglob("*.safetensors"))
    # as long as it lives, nobody takes its folder away
    gradpruner.apply_folder(source, tmp_path / "other", DROP)
    with files.atomic_folder(out, overwrite=True) as temporary:
        assert left[0].is_dir() and temporary.parent != left[0]
        (temporary / "precious.txt").write_text("precious")
    assert left[0].is_dir()
    if not old:
        shutil.rmtree(out)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (content(out) == {"precious.txt": b"precious"}) if old else not out.exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(out)
    assert left[0].is_dir()
    assert main(options) == 0
    assert "stream: verified; removes 3 of 6 decoder layers" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "other", "plan.json", "stream"]
    assert content(out) == content(tmp_path / "other")


def test_only_leftovers_that_are_ours_and_dead_are_removed(tmp_path):
    def leftover(name, lock=True, **inside):
        (tmp_path / name).mkdir(mode=0o700)
        if lock:
            with (tmp_path / name / files.LOCK).open("w+b") as file:
                file.write(files._proof(tmp_path / name, file.fileno()))
        for folder in inside:
            (tmp_path / name / folder).mkdir()
            (tmp_path / name / folder / "file").write_text(name)
        return tmp_path / name

    dead, alive = leftover(".small.aaaaaaaa", new=True), leftover(".small.bbbbbbbb", new=True)
    strange, other = leftover(".small.cccccccc", lock=False), leftover(".small.x.dddddddd")
    with (alive / files.LOCK).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with files.atomic_folder(tmp_path / "small") as temporary:
            (temporary / "x").touch()
    assert not dead.exists() and alive.exists() and strange.exists() and other.exists()
    # killed between moving the old folder away and naming the new one: the old one comes back
    shutil.rmtree(tmp_path / "small")
    leftover(".small.eeeeeeee", new=True, old=True)
    with (
        pytest.raises(gradpruner.InvalidArgument, match="not empty"),
        files.atomic_folder(tmp_path / "small"),
    ):
        pass
    assert content(tmp_path / "small") == {"file": b".small.eeeeeeee"}
    # killed after that: the old one goes
    leftover(".small.ffffffff", old=True)
    with files.atomic_folder(tmp_path / "small", overwrite=True) as temporary:
        (temporary / "y").touch()
    assert content(tmp_path / "small") == {"y": b""}
    assert not [p for p in tmp_path.iterdir() if p.name[-1] in "aef"]


def test_the_command_streams_a_folder_and_loads_anything_else(tmp_path, monkeypatch, capsys):
    source = dense("llama", tmp_path / "dense")
    DROP.save(tmp_path / "plan.json")
    options = ["apply", "--model", str(source), "--plan", str(tmp_path / "plan.json")]

    def loaded(*args, **kwargs):
        raise gradpruner.InvalidArgument("it was loaded")

    importlib.import_module("gradpruner.run.run")  # which would keep the replacement, were it imported later
    monkeypatch.setattr(models, "load_model", loaded)
    assert main([*options, "--out", str(tmp_path / "stream"), "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text[text.index("{\n") :]) == {"folder": str(tmp_path / "stream"), "plan": DROP.to_dict()}
    assert main([*options, "--out", str(tmp_path / "other"), "--dtype", "bfloat16"]) == 2
    assert "it was loaded" in capsys.readouterr().err


LIMITED = """
import resource, sys, threading
from pathlib import Path
import gradpruner, torch
from gradpruner import streaming
from gradpruner.probe.igia import Igia
torch.set_num_threads(1)
torch.ones(1) + 1
source, out, plan, igia, limits = sys.argv[1:]
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
used = int(status["VmData"].split()[0]) * 1024
for limit in limits.split(","):
    resource.setrlimit(resource.RLIMIT_DATA, (used + int(limit), -1))
    try:
        gradpruner.apply_folder(source, out, gradpruner.Plan.load(plan), Igia.load(igia, lazy=True))
        print("done")
    except MemoryError:
        print("MemoryError", Path(out).exists())
"""


def test_memory_stays_under_three_layers_weights(tmp_path):
    """Six layers of 48 MiB, an embedding of 96: three of them, beyond what importing takes, must do."""
    config = LlamaConfig(
        vocab_size=24576,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        dtype="float32",
    )
    source = tmp_path / "dense"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(source)
    sizes, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in model.state_dict().items():
        sizes[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    header = json.dumps(sizes).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)  # holes: nothing of it takes disk
    decoder = Decoder(model)
    layer = sum(p.nbytes for p in decoder.layers[0].parameters())
    generator = torch.Generator().manual_seed(0)
    factors = {
        (w.layer, w.name): Factors(
            torch.randn(1, 2, w.shape[1], generator=generator), torch.randn(1, w.shape[0], 2, generator=generator)
        )
        for w in decoder.weights
        if w.layer in (2, 3) and "down_proj" in w.name
    }
    norms = torch.ones(1, len(decoder.weights), dtype=torch.float64)
    Igia(decoder.fingerprint(), "lora", 6, tuple(decoder.weights), norms, ("",) * 6, (0,) * 6, 0, factors).save(
        tmp_path / "igia.safetensors"
    )
    gradpruner.Plan(6, drop=[4, 5], merge={2: 1, 3: 1}).save(tmp_path / "plan.json")
    arguments = [str(source), str(tmp_path / "small"), str(tmp_path / "plan.json"), str(tmp_path / "igia.safetensors")]

    assert end > 6 * layer
    # the first shows that the limit is one: a weight of 16 MiB and its two donors do not fit in it
    limits = f"{20 << 20},{3 * layer}"
    run = subprocess.run([sys.executable, "-c", LIMITED, *arguments, limits], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "MemoryError False\ndone\n", run.stderr[-2000:]
    assert {p.name for p in tmp_path.iterdir()} == {"dense", "small", "plan.json", "igia.safetensors"}


@contextlib.contextmanager
def soft_limit(which, value):
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


@pytest.mark.parametrize(("which", "field"), [(resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")])
def test_free_memory_honours_the_limits_of_the_process(which, field):
    used = checkpoint._kilobytes(Path("/proc/self/status"), field)
    with soft_limit(which, used + (64 << 20)):
        free = checkpoint.free_memory()
    assert 0 < free <= 40 << 20 < checkpoint.free_memory()


def test_free_memory_honours_the_limit_of_a_cgroup(tmp_path):
    group = tmp_path / "sys" / "slice" / "job"
    group.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/slice/job\n")
    for folder, limit in ((group, "max"), (group.parent, "1000")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("700\n")
        (folder / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    assert checkpoint._cgroup_left(tmp_path / "cgroup", tmp_path / "sys") == 500
    memory = tmp_path / "sys" / "memory" / "job"
    memory.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("5:cpu:/job\n4:memory:/job\n")
    (memory / "memory.limit_in_bytes").write_text("900")
    (memory / "memory.usage_in_bytes").write_text("300")
    (memory / "memory.stat").write_text("total_inactive_file 100\n")
    assert checkpoint._cgroup_left(tmp_path / "cgroup", tmp_path / "sys") == 700
    assert checkpoint._cgroup_left(tmp_path / "nothing", tmp_path / "sys") is None


def test_lazy_importance_is_read_when_asked_for_and_its_checksum_compared(tmp_path):
    igia = igia_of(load(dense("llama", tmp_path / "dense")))
    path = tmp_path / "igia.safetensors"
    igia.save(path)
    lazy = Igia.load(path, lazy=True)
    assert set(lazy.importance) == set(igia.importance) and len(lazy.importance) == len(igia.importance)
    key = next(iter(lazy.importance))
    where = shards.read_header(path)[0][f"{key[0]}/{key[1]}/f"].offset
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    again = Igia.load(path, lazy=True)
    with pytest.raises(gradpruner.CheckpointError, match="checksum of"):
        again.importance[key]
    other = list(igia.importance)[-1]
    assert torch.equal(again.importance[other].f, igia.importance[other].f)
    with pytest.raises(gradpruner.CheckpointError, match="checksum of"):
        Igia.load(path)


def test_a_full_disk_leaves_nothing(tmp_path):
    source = dense("llama", tmp_path / "dense", max_shard_size="30KB")
    before = content(tmp_path)
    with soft_limit(resource.RLIMIT_FSIZE, 20_000), pytest.raises(gradpruner.CheckpointError, match="could not write"):
        gradpruner.apply_folder(source, tmp_path / "stream", DROP)
    assert content(tmp_path) == before


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
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "stream", trust_remote_code=True), families.tokens()
    assert type(again).__name__ == "OwnForCausalLM"
    (source / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        actual = again.eval()(input_ids=ids, use_cache=False).logits
    assert torch.equal(actual, families.skipped_logits(load(source), DROP.removed, ids))
