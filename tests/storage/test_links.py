"""Symbolic links in a checkpoint folder: none that leads out of it is loaded, copied or published."""

from __future__ import annotations

import os
import shutil

import model_families
import pytest
from huggingface_hub import HfApi
from word_tokenizers import make_tokenizer

import gradpruner
from gradpruner.checkpoint.other_files import uploaded_files
from gradpruner.model.load import load_model
from gradpruner.storage.links import check_links

PLAN = gradpruner.Plan(6, drop=[1, 2])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    plan = gradpruner.Plan(7, drop=[6])  # for the card
    model = model_families.build(model_families.CONFIGS["llama"]())
    return gradpruner.save(model, folder, tokenizer=make_tokenizer(), plan=plan)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def secret_file(folder, outside):
    (outside / "key").write_text("secret")
    (folder / "notes.txt").symlink_to(outside / "key")


def chat_template(folder, outside):
    (outside / "key").write_text("secret")
    (folder / "chat_template.jinja").symlink_to(outside / "key")


def relative_link(folder, outside):
    (outside / "key").write_text("secret")
    (folder / "LICENSE").symlink_to(os.path.relpath(outside / "key", folder))


def linked_folder(folder, outside):
    (outside / "tools.jinja").write_text("secret")
    (folder / "additional_chat_templates").symlink_to(outside)


def link_in_a_folder(folder, outside):
    (outside / "key").write_text("secret")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").symlink_to(outside / "key")


def weights(folder, outside):
    shutil.move(folder / "model.safetensors", outside / "private.safetensors")
    (folder / "model.safetensors").symlink_to(outside / "private.safetensors")


def config(folder, outside):
    shutil.move(folder / "config.json", outside / "config.json")
    (folder / "config.json").symlink_to(outside / "config.json")


def code(folder, outside):
    (outside / "code.py").write_text("")
    (folder / "modeling_own.py").symlink_to(outside / "code.py")


def link_to_a_link(folder, outside):
    (outside / "key").write_text("secret")
    (folder / "first").symlink_to(outside / "key")
    (folder / "notes.txt").symlink_to(folder / "first")


def hidden_file(folder, outside):
    (folder / ".env").write_text("secret")
    (folder / "notes.txt").symlink_to(folder / ".env")


@pytest.mark.parametrize(
    "plant",
    [
        secret_file,
        chat_template,
        relative_link,
        linked_folder,
        link_in_a_folder,
        weights,
        config,
        code,
        link_to_a_link,
        hidden_file,
    ],
)
def test_a_link_out_of_the_folder_is_refused(plant, folder, hub, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    plant(folder, outside)
    with pytest.raises(gradpruner.CheckpointError, match="is a symbolic link"):
        gradpruner.push_to_hub(folder, "me/small", api=HfApi(hub.url))
    assert hub.created is None and not hub.files
    with pytest.raises(gradpruner.CheckpointError, match="is a symbolic link"):
        gradpruner.apply_folder(folder, tmp_path / "out", PLAN, trust_remote_code=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(gradpruner.CheckpointError, match="is a symbolic link"):
        load_model(folder)
    with pytest.raises(gradpruner.CheckpointError, match="is a symbolic link"):
        gradpruner.model_card(folder)


def test_the_card_reads_no_base_model_through_a_link(folder, tmp_path):
    dense = tmp_path / "dense"
    dense.mkdir()
    (tmp_path / "private.md").write_text("---\nlicense: mit\n---\n")
    (dense / "README.md").symlink_to(tmp_path / "private.md")
    with pytest.raises(gradpruner.CheckpointError, match="is a symbolic link"):
        gradpruner.model_card(folder, base_model=dense)


def test_links_that_stay_in_the_folder_are_followed(folder, hub, tmp_path):
    (folder / "LICENSE").write_text("free")
    (folder / "NOTICE").symlink_to("LICENSE")
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "state.json").symlink_to("optimizer.pt")  # a pickle under another name
    (folder / ".cache").symlink_to(tmp_path)  # nobody looks at what is hidden
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    gradpruner.push_to_hub(linked, "me/small", api=HfApi(hub.url))
    assert hub.files["NOTICE"] == b"free" and "state.json" not in hub.files
    out = gradpruner.apply_folder(linked, tmp_path / "out", PLAN)
    assert (out / "NOTICE").read_text() == "free" and not (out / "NOTICE").is_symlink()
    assert not (out / "state.json").exists()
    load_model(linked)


def cached(folder, cache):
    """The folder as the hub's cache holds it."""
    repository = cache / "models--acme--dense"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_blobs_of_the_hubs_cache_belong_to_the_folder(folder, tmp_path):
    snapshot = cached(folder, tmp_path / "hub")
    load_model(snapshot)
    assert "tokenizer.json" in uploaded_files(snapshot)
    out = gradpruner.apply_folder(snapshot, tmp_path / "out", PLAN)
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()

    other = tmp_path / "hub" / "models--me--private" / "blobs"
    other.mkdir(parents=True)
    (other / "0").write_text("secret")
    (snapshot / "notes.txt").symlink_to("../../../models--me--private/blobs/0")
    with pytest.raises(gradpruner.CheckpointError, match=r"notes\.txt is a symbolic link"):
        check_links(snapshot)


def test_blobs_that_are_a_link_themselves_are_refused(folder, tmp_path):
    snapshot = cached(folder, tmp_path / "hub")
    blobs = snapshot.parent.parent / "blobs"
    shutil.move(blobs, tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(gradpruner.CheckpointError, match="is a symbolic link"):
        load_model(snapshot)


def test_a_folder_that_only_looks_like_the_cache_is_refused(folder, tmp_path):
    snapshot = cached(folder, tmp_path / "hub")
    renamed = tmp_path / "hub" / "downloads"
    snapshot.parent.parent.rename(renamed)
    with pytest.raises(gradpruner.CheckpointError, match="is a symbolic link"):
        load_model(renamed / "snapshots" / "0123")
