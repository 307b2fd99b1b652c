"""The card and the upload, with the real huggingface_hub client against a hub of a few endpoints on this machine."""

from __future__ import annotations

import json

import model_families
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from model_families import igia_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from word_tokenizers import word_tokenizer

import gradpruner
from gradpruner.checkpoint import card
from gradpruner.checkpoint.other_files import uploaded_files
from gradpruner.cli.main import main

BASE = "acme/dense-1B"
ROWS = [
    {"": "layers", "dense": "6", "pruned": "3", "pruned / dense": "50.0%"},
    {"": "exact | match", "dense": "0.510", "pruned": "0.355", "pruned / dense": "69.6%"},
]


@pytest.fixture
def pruned():
    model = model_families.build(model_families.CONFIGS["llama"]())
    igia = igia_of(model)
    plan = igia.plan(count=3, merge=1)
    return gradpruner.apply(model, plan, igia), plan, igia


@pytest.fixture
def folder(pruned, tmp_path):
    model, plan, _ = pruned
    return gradpruner.save(model, tmp_path / "small", plan=plan)


def dense_folder(tmp_path, metadata):
    folder = tmp_path / "dense"
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n# Dense\n")
    return folder


def test_the_card_says_what_was_done(pruned, folder):
    model, plan, igia = pruned
    text = gradpruner.model_card(
        folder, base_model=BASE, license="mit", scores=igia, results=ROWS, name="acme/dense-1B-pruned"
    )
    metadata = ModelCard(text).data
    assert (metadata.base_model, metadata.license) == (BASE, "mit")
    assert (metadata.library_name, metadata.pipeline_tag) == ("transformers", "text-generation")
    assert {"gradpruner", "pruned"} <= set(metadata.tags)
    assert "arXiv 2601.19503" in text and gradpruner.__version__ in text
    assert f"kept: {list(plan.kept)}" in text and f"dropped: {list(plan.drop)}" in text
    ((layer, target),) = plan.merge.items()
    assert f"| {layer} | {igia.layer_scores()[layer]:.4g} | merged into {target} |" in text
    total = sum(p.numel() for p in model_families.build(model_families.CONFIGS["llama"]()).parameters())
    small = sum(p.numel() for p in model.parameters())
    assert "| decoder layers | 6 | 3 | 50.0% |" in text
    assert f"| {total / 1e6:.1f} | {small / 1e6:.1f} | {1 - small / total:.1%} |" in text
    assert "| exact \\| match | 0.510 | 0.355 | 69.6% |" in text
    assert "model='acme/dense-1B-pruned'" in text
    of_model = gradpruner.model_card(
        model,
        plan,
        base_model=BASE,
        license="mit",
        scores=igia.layer_scores().tolist(),
        results=ROWS,
        name="acme/dense-1B-pruned",
    )
    assert of_model == text


def test_both_ratios_or_that_one_is_not_known(pruned):
    model, plan, igia = pruned
    by_hand = gradpruner.Plan(plan.layers, plan.drop, plan.merge)
    assert "| 50.0% |" in gradpruner.model_card(model, by_hand)
    assert "not recorded" in gradpruner.model_card(model, by_hand)
    assert f"{plan.parameter_ratio:.1%}" in gradpruner.model_card(model, by_hand, scores=igia, kind="squared")


def test_the_license_of_the_base_model_is_carried_over(pruned, folder, tmp_path, monkeypatch):
    model, plan, _ = pruned
    dense = dense_folder(tmp_path, "license: other\nlicense_name: llama\nlicense_link: LICENSE\nbase_model: up/stream")
    metadata = ModelCard(gradpruner.model_card(folder, base_model=dense)).data
    assert (metadata.license, metadata.license_name, metadata.license_link) == ("other", "llama", "LICENSE")
    assert metadata.base_model == "up/stream"  # a folder has no hub id
    given = ModelCard(gradpruner.model_card(folder, base_model=dense, license="mit")).data
    assert given.license == "mit" and given.license_name is None

    model.config._name_or_path = str(dense)  # a model in memory knows where it was loaded from
    assert ModelCard(gradpruner.model_card(model, plan)).data.license == "other"

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(dense / "README.md"))
    cached = ModelCard(gradpruner.model_card(folder, base_model=BASE)).data
    assert (cached.base_model, cached.license) == (BASE, "other")

    # apply_folder takes the dense model's card along
    (folder / "README.md").write_bytes((dense / "README.md").read_bytes())
    assert not card.is_ours(folder)
    card.write_card(folder, gradpruner.model_card(folder))
    assert card.is_ours(folder) and ModelCard.load(folder / "README.md").data.license == "other"


def test_what_a_card_can_and_cannot_be_made_of(pruned, folder, tmp_path):
    model, _, _ = pruned
    with pytest.raises(gradpruner.InvalidArgument, match="plan = None"):
        gradpruner.model_card(model)
    with pytest.raises(gradpruner.ModelMismatch, match="3 decoder layers; the plan keeps 4"):
        gradpruner.model_card(model, gradpruner.Plan(6, drop=[1, 2]))
    with pytest.raises(gradpruner.InvalidArgument, match="scores has 2 values; expected 6"):
        gradpruner.model_card(folder, scores=[1.0, 2.0])
    assert ModelCard(gradpruner.model_card(folder, base_model="gpt2")).data.base_model == "gpt2"
    with pytest.raises(gradpruner.InvalidArgument, match="base_model = 'no such model'"):
        gradpruner.model_card(folder, base_model="no such model")
    dense = dense_folder(tmp_path, "license: [not, : yaml")
    assert "license" not in ModelCard(gradpruner.model_card(folder, base_model=dense)).data.to_dict()


def downloaded(hub, path):
    path.mkdir()
    for name, content in hub.files.items():
        (path / name).write_bytes(content)
    return path


def test_a_folder_is_uploaded_with_its_card_and_nothing_that_runs(folder, hub, tmp_path):
    for name in ("optimizer.pt", "pytorch_model.bin", "modeling_evil.py", ".secret", "data.model"):
        (folder / name).write_bytes(b"x")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    (folder / "LICENSE").write_text("free")
    for stray in ("igia.safetensors", "model-00001-of-00002.safetensors"):  # servers would take them for weights
        save_file({"model.norm.weight": torch.zeros(2)}, folder / stray)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    hub.files = {"model-00002-of-00002.safetensors": b"old", "notes.md": b"kept"}
    url = gradpruner.push_to_hub(
        folder, "me/small", base_model=BASE, license="mit", private=True, token="hf_secret", api=HfApi(hub.url)
    )
    assert url == f"{hub.url}/me/small/commit/1"
    assert hub.created["name"] == "small" and hub.created["visibility"] == "private"
    assert hub.tokens == {"Bearer hf_secret"}
    assert set(hub.files) == {
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "gradpruner.json",
        "model.safetensors",
        "notes.md",
    }
    assert hub.validated == hub.files["README.md"].decode() == (folder / "README.md").read_text()
    assert "model='me/small'" in hub.validated and "license: mit" in hub.validated
    again = AutoModelForCausalLM.from_pretrained(downloaded(hub, tmp_path / "again"))
    assert again.num_parameters() == sum(t.numel() for t in load_file(folder / "model.safetensors").values())


def test_a_model_in_memory_is_saved_verified_and_uploaded(pruned, hub):
    model, plan, igia = pruned
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), eos_token="</s>")
    gradpruner.push_to_hub(model, "me/small", plan=plan, tokenizer=tokenizer, scores=igia, api=HfApi(hub.url))
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= set(hub.files)
    assert hub.created.get("visibility") is None  # as the account has it
    assert "Scores (`norm`)" in hub.files["README.md"].decode()


def test_a_card_of_ours_is_kept(folder, hub):
    card.write_card(folder, gradpruner.model_card(folder, results=ROWS) + "\nWritten by hand.\n")
    gradpruner.push_to_hub(folder, "me/small", api=HfApi(hub.url))
    assert b"Written by hand." in hub.files["README.md"] and b"0.355" in hub.files["README.md"]


def damage_missing(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def damage_surplus(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def damage_nan(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def damage_truncated(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])


@pytest.mark.parametrize("damage", [damage_missing, damage_surplus, damage_nan, damage_truncated])
def test_nothing_unverified_is_uploaded(damage, folder, hub):
    damage(folder)
    with pytest.raises(gradpruner.CheckpointError):
        gradpruner.push_to_hub(folder, "me/small", api=HfApi(hub.url))
    assert hub.created is None and not hub.files


def test_refusals_come_before_the_hub_is_asked(pruned, folder, hub, tmp_path):
    model, _, _ = pruned
    with pytest.raises(gradpruner.InvalidArgument, match="repo_id = 'a/b/c'"):
        gradpruner.push_to_hub(folder, "a/b/c", api=HfApi(hub.url))
    with pytest.raises(gradpruner.InvalidArgument, match="plan = None"):
        gradpruner.push_to_hub(model, "me/small", api=HfApi(hub.url))
    with pytest.raises(gradpruner.InvalidArgument, match="not a folder with"):
        gradpruner.push_to_hub(tmp_path / "nowhere", "me/small", api=HfApi(hub.url))
    assert hub.created is None


def test_a_hub_that_cannot_be_reached_is_one_line(folder):
    with pytest.raises(gradpruner.GradPrunerError, match="me/small was not uploaded"):
        gradpruner.push_to_hub(folder, "me/small", api=HfApi("http://127.0.0.1:9"))


def test_push_on_the_command_line(folder, hub, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(hub.url))
    arguments = ["push", str(folder), "me/small", "--base-model", BASE, "--license", "mit", "--private"]
    assert main(arguments) == 0
    assert f"{hub.url}/me/small/commit/1" in capsys.readouterr().out
    assert hub.created["visibility"] == "private" and b"license: mit" in hub.files["README.md"]


def test_help_of_push_teaches_it(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["push", "--help"])
    assert stop.value.code == 0 and "example:\n  gradpruner push" in capsys.readouterr().out


def test_a_run_leaves_a_card(pruned, tmp_path, monkeypatch):
    from gradpruner.data.examples import Example
    from gradpruner.model.identity import Identity
    from gradpruner.presets import Preset
    from gradpruner.run import run as pipeline
    from gradpruner.run.job import Job
    from gradpruner.run.run import Run
    from gradpruner.run.summary import OF_THE_MACHINE, comparison
    from gradpruner.training.recipe import Recipe

    model, plan, igia = pruned
    monkeypatch.setattr(pipeline, "identify", lambda source, **options: Identity(source, {"commit": "a" * 40}, {}))
    run = Run(
        Job("acme/dense-1B", 4, Recipe(), preset=Preset.of(kind="squared")),
        [Example("a", "b")],
        [Example("a", "b")],
        tmp_path / "out",
    )
    gradpruner.save(model, run.folder / "model", plan=plan)
    (run.folder / "probe").mkdir()
    igia.save(run.folder / "probe" / "igia.safetensors")
    (run.folder / "probe" / "made_from.json").write_text(json.dumps(run._stages.settings))
    row = dict.fromkeys(("exact_match", "perplexity", "step_seconds", "tokens_per_second", "peak_bytes"), 0.5)
    rows = [
        {**row, "name": name, "layers": layers, "parameters": 10**7, "checkpoint_bytes": 10**7}
        for name, layers in (("dense", 6), ("pruned", 3))
    ]
    monkeypatch.setattr(run, "train_dense", lambda: rows[0])
    monkeypatch.setattr(run, "make_plan", lambda: plan)
    monkeypatch.setattr(run, "cut", lambda plan: None)
    monkeypatch.setattr(run, "train_pruned", lambda plan: rows[1])
    monkeypatch.setattr(run, "_with_speeds", lambda rows: rows)
    run.everything()
    text = (run.folder / "model" / "README.md").read_text()
    assert ModelCard(text).data.base_model == "acme/dense-1B"
    assert "| exact match | 0.500 | 0.500 | 100.0% |" in text
    assert plan.kind == "norm" and "Scores (`norm`)" in text  # as this plan was chosen, whatever the job says
    labels = [line[""] for line in comparison(rows)]
    assert set(OF_THE_MACHINE) < set(labels) and not any(label in text for label in OF_THE_MACHINE)


def test_chat_templates_in_their_folder_are_uploaded(tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("x")
    (tmp_path / "additional_chat_templates" / "tools.py").write_text("x")
    assert uploaded_files(tmp_path) == ["additional_chat_templates/tools.jinja"]
