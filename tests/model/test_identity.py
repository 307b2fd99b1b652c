"""Results belong to the content of a model and to package versions, not to a name."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from small_runs import TEST, TRAIN, interrupting, job_of, run, write_model
from transformers import AutoModelForCausalLM

from gradpruner.cli.main import main
from gradpruner.compare.experiment import Compare
from gradpruner.errors import InvalidArgument
from gradpruner.model import identity
from gradpruner.model.identity import differences, identify
from gradpruner.model.load import load_model

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def source(original, tmp_path):
    shutil.copytree(original, tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def steps(monkeypatch):
    """Numbers of the optimizer steps that are taken."""
    return interrupting(monkeypatch)


def comparison(source, folder):
    return Compare(job_of(source), TRAIN, TEST, folder / "compared", methods=["drop-last"], held_out=4, dense=False)


def retrain(source, monkeypatch):
    weights = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        weights.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    weights.save_pretrained(source)


def other_tokenizer(source, monkeypatch):
    file = Path(source, "tokenizer.json")
    content = json.loads(file.read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    file.write_text(json.dumps(content))


def other_library(source, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "transformers" else real(name))


CHANGES = {
    r"content of model\.safetensors": retrain,
    r"content of tokenizer\.json": other_tokenizer,
    r"version of transformers \(\d.*, now 9\.9\)": other_library,
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_run_of_another_model_is_refused_by_what_differs(changed, source, tmp_path, monkeypatch, steps):
    run(source, tmp_path / "out")
    run(source, tmp_path / "out")  # the same is taken
    (tmp_path / "out" / "dense.json").touch()  # something was made of it
    CHANGES[changed](source, monkeypatch)
    with pytest.raises(InvalidArgument, match=f"holds a run with another {changed}; expected a new folder"):
        run(source, tmp_path / "out")
    assert steps == []


@pytest.mark.parametrize("changed", CHANGES)
def test_a_comparison_with_another_model_is_refused_by_what_differs(changed, source, tmp_path, monkeypatch):
    comparison(source, tmp_path)
    comparison(source, tmp_path)
    (tmp_path / "compared" / "model.json").touch()  # something was made of it
    CHANGES[changed](source, monkeypatch)
    with pytest.raises(InvalidArgument, match=f"holds a comparison with another {changed}; expected a new folder"):
        comparison(source, tmp_path)


def test_what_loading_does_not_read_does_not_count(source, tmp_path):
    before = identify(source)
    for name in ("README.md", "pytorch_model.bin", ".gitattributes", "modeling_own.py"):
        Path(source, name).write_text("something else")
    assert identify(source).to_dict() == before.to_dict()
    assert differences(before.to_dict(), identify(source, trust_remote_code=True).to_dict()) == [
        "content of modeling_own.py"
    ]
    Path(source, "chat_template.jinja").write_text("{{ messages }}")
    assert differences(before.to_dict(), identify(source).to_dict()) == ["content of chat_template.jinja"]


def test_a_gguf_file_is_identified_by_its_bytes(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF1")
    (tmp_path / "other.gguf").write_bytes(b"GGUF2")
    (tmp_path / "notes.json").write_text("{}")
    before = identify(tmp_path / "model.gguf")
    assert list(before.content) == ["model.gguf"] and "gguf" in before.versions
    (tmp_path / "generation_config.json").write_text("{}")  # transformers reads it too
    (tmp_path / "model.gguf").write_bytes(b"GGUF3")
    assert differences(before.to_dict(), identify(tmp_path / "model.gguf").to_dict()) == [
        "content of generation_config.json",
        "content of model.gguf",
    ]


def test_a_model_that_is_replaced_between_two_stages_is_refused(source, tmp_path, monkeypatch, steps):
    made = run(source, tmp_path / "out")
    weights = Path(source, "model.safetensors")
    weights.write_bytes(weights.read_bytes())  # the same content with another time
    made.run_probe()
    retrain(source, monkeypatch)
    steps.clear()
    with pytest.raises(InvalidArgument, match=r"model\.safetensors was replaced while it was in use"):
        made.train_dense()
    weights.unlink()
    with pytest.raises(InvalidArgument, match=r"model\.safetensors was replaced while it was in use"):
        made.train_dense()
    assert steps == []


def test_large_models_are_announced(source, monkeypatch):
    said = []
    monkeypatch.setattr(identity, "LARGE", 1000)
    identify(source, say=said.append)
    assert len(said) == 1 and "to identify its content" in said[0]


def test_adapters_are_no_model(source):
    Path(source, "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidArgument, match="is adapters on another model; expected a plain model"):
        identify(source)


def test_an_older_folder_is_not_continued_but_can_be_read(source, tmp_path, capsys):
    made = comparison(source, tmp_path)
    made.work()
    for file in [made.folder / "comparison.json", *made.folder.glob("*/*.json")]:
        content = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in content.items() if k not in ("model", "made_from")}))
    with pytest.raises(InvalidArgument, match=r"another content of .*version of torch \(none, now"):
        comparison(source, tmp_path)
    assert main(["report", str(made.folder)]) == 0
    assert "drop-last" in capsys.readouterr().out


# on the hub


@pytest.fixture
def hub(original, tmp_path, monkeypatch):
    """A cache with two commits of one model; `main` is at the first. Nothing is asked of the network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--acme--tiny"
    shutil.copytree(original, repository / "snapshots" / OLD)
    write_model(repository / "snapshots" / NEW, seed=1)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(OLD)
    return repository


def weight_of(load):
    return load()[0].model.layers[0].mlp.up_proj.weight[0].tolist()


def weight(commit):
    return weight_of(lambda: load_model("acme/tiny", revision=commit))


def test_a_run_keeps_the_commit_that_it_began_with(hub, tmp_path, steps, caplog):
    run("acme/tiny", tmp_path / "out").run_probe()
    (hub / "refs" / "main").write_text(NEW)
    caplog.set_level("INFO", "gradpruner")
    made = run("acme/tiny", tmp_path / "out")
    assert made.run_probe() and len(steps) == 4  # it is the same run
    assert weight_of(made.models.load_dense) == weight(OLD) != weight(NEW)
    assert f"acme/tiny is now at commit {NEW}; this folder goes on with {OLD}" in caplog.messages[0]
    assert weight_of(run("acme/tiny", tmp_path / "new").models.load_dense) == weight(NEW)


def test_a_comparison_keeps_the_commit_that_it_began_with(hub, tmp_path):
    assert comparison("acme/tiny", tmp_path).revision == OLD
    (hub / "refs" / "main").write_text(NEW)
    again = comparison("acme/tiny", tmp_path)
    assert again.revision == OLD and weight_of(again._load) == weight(OLD)


def test_another_hub_id_is_told_as_such(hub, tmp_path):
    run("acme/tiny", tmp_path / "out")
    (tmp_path / "out" / "dense.json").touch()
    shutil.copytree(hub, hub.parent / "models--acme--other")
    (hub.parent / "models--acme--other" / "refs" / "main").write_text(NEW)
    shutil.rmtree(hub.parent / "models--acme--other" / "snapshots" / OLD)
    with pytest.raises(InvalidArgument, match=rf"another commit \({OLD}, now {NEW}\), source;"):
        run("acme/other", tmp_path / "out")


def test_a_commit_that_cannot_be_had_is_told_before_anything_is_trained(hub, tmp_path, steps):
    run("acme/tiny", tmp_path / "out")
    (hub / "refs" / "main").write_text(NEW)
    shutil.rmtree(hub / "snapshots" / OLD)
    with pytest.raises(InvalidArgument, match=f"source 'acme/tiny@{OLD}': no model could be loaded"):
        run("acme/tiny", tmp_path / "out")
    with pytest.raises(InvalidArgument, match="source 'acme/none': no model could be loaded"):
        run("acme/none", tmp_path / "none")
    assert not (tmp_path / "none").exists() and steps == []


def test_code_of_another_repository_counts(hub, original, tmp_path):
    code = hub.parent / "models--acme--code"
    for commit in (OLD, NEW):
        (code / "snapshots" / commit).mkdir(parents=True)
        (code / "snapshots" / commit / "modeling_own.py").write_text(commit)
    (code / "refs").mkdir()
    (code / "refs" / "main").write_text(OLD)
    source = tmp_path / "model"
    shutil.copytree(original, source)
    content = json.loads((source / "config.json").read_text())
    content["auto_map"] = {"AutoModelForCausalLM": "acme/code--modeling_own.Own"}
    (source / "config.json").write_text(json.dumps(content))
    before = identify(source, trust_remote_code=True).to_dict()
    (code / "refs" / "main").write_text(NEW)
    assert differences(before, identify(source, trust_remote_code=True).to_dict()) == [
        f"code of acme/code ({OLD}, now {NEW})"
    ]
    assert "code of acme/code" not in identify(source).content
