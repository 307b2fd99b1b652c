"""Masks in a checkpoint folder: no server takes them for weights, and no command loses them."""

from __future__ import annotations

import fnmatch
import json
import shutil

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gradpruner
from gradpruner.checkpoint.masks import Masks
from gradpruner.checkpoint.save_sparse import MASKS
from gradpruner.cli.main import main
from gradpruner.model.load import load_model
from gradpruner.plan import Plan
from gradpruner.probe.igia import Igia
from gradpruner.run.stages import watch
from gradpruner.training.probe_batches import FILES
from gradpruner.training.recipe import Recipe
from gradpruner.training.resume import SNAPSHOT

# what vLLM, SGLang, TGI and the converters of llama.cpp look for in a folder
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.npz", "*.json")


@pytest.fixture(scope="module")
def sparse(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("sparse") / "model"
    assert (
        main(
            [
                "sparsify",
                "--model",
                str(home / "model"),
                "--data",
                str(home / "data.jsonl"),
                "--method",
                "magnitude",
                "--max-length",
                "8",
                "--samples",
                "2",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    return out


@pytest.fixture
def stale(sparse, tmp_path):
    """A model that was trained on after its masks were written."""
    folder = shutil.copytree(sparse, tmp_path / "stale")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.fill_(1)
    model.save_pretrained(folder)
    return folder


def finetune(source, home, out, *more):
    return main(
        [
            "finetune",
            "--model",
            str(source),
            "--data",
            str(home / "data.jsonl"),
            "--steps",
            "2",
            "--batch-size",
            "4",
            "--lr",
            "1e-2",
            "--out",
            str(out),
            *more,
        ]
    )


def zeros(folder):
    weights = [p for n, p in AutoModelForCausalLM.from_pretrained(folder).named_parameters() if "_proj" in n]
    return sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)


def test_no_server_takes_masks_for_weights(sparse):
    assert not any(fnmatch.fnmatch(MASKS, pattern) for pattern in WEIGHTS)
    read = {}
    for file in sparse.glob("*.safetensors"):  # every one of them, as servers do
        read |= load_file(file)
    model = AutoModelForCausalLM.from_pretrained(sparse)
    assert read.keys() <= model.state_dict().keys()
    assert all(torch.equal(read[name], model.state_dict()[name]) for name in read)
    assert not load_file(sparse / MASKS).keys() & read.keys()


@pytest.mark.parametrize("rank", ["0", "4"])
def test_finetune_keeps_to_the_masks_of_its_folder(sparse, home, tmp_path, capsys, rank):
    assert zeros(sparse) == 0.5
    assert finetune(sparse, home, tmp_path / "tuned", "--rank", rank) == 0
    assert "50.00% of 42 weights kept at zero" in capsys.readouterr().out
    assert zeros(tmp_path / "tuned") == 0.5
    Masks.load(tmp_path / "tuned" / MASKS).check(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"))


def test_masks_that_the_model_does_not_keep_to_are_refused(stale, home, hub, tmp_path, capsys):
    assert finetune(stale, home, tmp_path / "tuned") == 1
    assert "model.layers.2.mlp.up_proj.weight has entries that its mask has taken out" in capsys.readouterr().err
    Plan(6, drop=[1]).save(tmp_path / "plan.json")
    for dtype in ("auto", "float32"):  # from file to file, and in memory
        assert (
            main(
                [
                    "apply",
                    "--model",
                    str(stale),
                    "--plan",
                    str(tmp_path / "plan.json"),
                    "--dtype",
                    dtype,
                    "--out",
                    str(tmp_path / "cut"),
                ]
            )
            == 1
        )
        assert "its mask has taken out" in capsys.readouterr().err
    Plan(7, drop=[6]).save(stale / "gradpruner.json")
    with pytest.raises(gradpruner.ModelMismatch, match="its mask has taken out"):
        gradpruner.push_to_hub(stale, "me/small", api=HfApi(hub.url))
    assert hub.created is None and not (tmp_path / "tuned").exists() and not (tmp_path / "cut").exists()


@pytest.fixture(scope="module")
def chosen(sparse, home, tmp_path_factory):
    """An igia of the sparse model and a plan that merges."""
    folder = tmp_path_factory.mktemp("chosen")
    igia, plan = str(folder / "igia.safetensors"), str(folder / "plan.json")
    assert (
        main(
            [
                "probe",
                "--model",
                str(sparse),
                "--data",
                str(home / "data.jsonl"),
                "--steps",
                "2",
                "--batch-size",
                "4",
                "--out",
                igia,
            ]
        )
        == 0
    )
    assert main(["plan", igia, "--count", "3", "--merge", "2", "--out", plan]) == 0
    return igia, plan


@pytest.mark.parametrize("dtype", ["auto", "float32"])  # from file to file, and in memory
def test_apply_carries_the_masks_of_the_layers_that_stay(sparse, chosen, home, tmp_path, dtype):
    igia, plan = chosen
    out = tmp_path / "small"
    assert (
        main(["apply", "--model", str(sparse), "--plan", plan, "--igia", igia, "--dtype", dtype, "--out", str(out)])
        == 0
    )
    masks, before, kept = Masks.load(out / MASKS), Masks.load(sparse / MASKS), Plan.load(plan).kept
    assert len(masks.bits) == 3 * 7 and masks.about == before.about
    for new, old in enumerate(kept):
        for name in ("mlp.up_proj", "self_attn.q_proj"):
            now, then = f"model.layers.{new}.{name}.weight", f"model.layers.{old}.{name}.weight"
            assert torch.equal(masks.bits[now], before.bits[then]) and masks.widths[now] == before.widths[then]
    masks.check(AutoModelForCausalLM.from_pretrained(out))
    if dtype == "auto":
        assert finetune(out, home, tmp_path / "tuned") == 0  # and on from there
        assert zeros(tmp_path / "tuned") >= 0.5


def test_masks_of_layers_of_another_model(sparse):
    masks, model = Masks.load(sparse / MASKS), load_model(sparse)[0]
    strange = Masks({"encoder.0.weight": next(iter(masks.bits.values()))}, {"encoder.0.weight": 32})
    with pytest.raises(gradpruner.ModelMismatch, match="has no weight 'encoder"):
        strange.of_layers(model, [0])


def test_commands_that_would_fill_zeros_in_are_refused(sparse, home, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text((home / "data.jsonl").read_text() * 2)
    data = ["--model", str(sparse), "--data", str(tmp_path / "data.jsonl")]
    steps = ["--steps", "4", "--batch-size", "4"]
    assert main(["run", *data, *steps, "--probe-steps", "2", "--out", str(tmp_path / "run")]) == 2
    assert f"run: source {str(sparse)!r} holds {MASKS}" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["run.json"]
    comparison = ["compare", *data, *steps, "--probe-steps", "2", "--methods", "drop-last"]
    assert main([*comparison, "--out", str(tmp_path / "compare")]) == 2
    assert f"compare: source {str(sparse)!r} holds {MASKS}" in capsys.readouterr().err
    again = ["sparsify", *data, "--method", "magnitude", "--out", str(tmp_path / "again")]
    assert main(again) == 2
    assert f"sparsify: source {str(sparse)!r} holds {MASKS}" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_a_probe_that_trains_all_weights_keeps_to_the_masks(sparse):
    model, tokenizer = load_model(sparse)
    rows = [{"input_ids": list(range(3, 12)), "labels": list(range(3, 12)), "attention_mask": [1] * 9}] * 4
    recipe = Recipe(batch_size=2, learning_rate=1e-2, rank=0)
    masks = Masks.load(sparse / MASKS)
    watched, igia = watch(model, tokenizer, rows, recipe, quiet=True, masks=masks)
    assert isinstance(igia, Igia) and igia.steps == 2
    masks.check(watched)


def test_push_takes_the_masks_along_and_removes_those_of_an_earlier_upload(sparse, home, hub, tmp_path):
    plan = Plan(7, drop=[6])
    folder = shutil.copytree(sparse, tmp_path / "model")
    plan.save(folder / "gradpruner.json")
    gradpruner.push_to_hub(folder, "me/small", api=HfApi(hub.url))
    assert hub.files[MASKS] == (sparse / MASKS).read_bytes()
    dense = shutil.copytree(home / "model", tmp_path / "dense")
    plan.save(dense / "gradpruner.json")
    gradpruner.push_to_hub(dense, "me/small", api=HfApi(hub.url))
    assert MASKS not in hub.files and json.loads(hub.files["gradpruner.json"])["layers"] == 7


def test_what_a_probe_leaves_in_a_training_checkpoint_is_not_taken_for_weights_either():
    for name in (SNAPSHOT, FILES.replace("*", "00000")):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHTS)
