"""What a write leaves behind: permissions, and nothing that somebody else has put there."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat

import model_families
import pytest
import torch
from model_families import igia_of
from stored_models import content

import gradpruner
from gradpruner.checkpoint.masks import Masks
from gradpruner.storage import files


@pytest.fixture(params=[0o022, 0o077, 0o007], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_every_file_and_folder_has_the_permissions_of_new_ones(umask, tmp_path):
    model = model_families.build(model_families.CONFIGS["llama"]())
    plan = gradpruner.Plan(model_families.LAYERS, drop=[1, 3])
    igia_of(model).save(tmp_path / "igia.safetensors")
    plan.save(tmp_path / "plan.json")
    Masks({"a": torch.zeros(2, 1, dtype=torch.uint8)}, {"a": 8}).save(tmp_path / "masks.safetensors")
    model.save_pretrained(tmp_path / "dense")
    gradpruner.apply_folder(tmp_path / "dense", tmp_path / "stream", plan)
    gradpruner.save(gradpruner.apply(model, plan), tmp_path / "small", plan=plan)
    with files.atomic_folder(tmp_path / "nested") as temporary:
        (temporary / "inside").mkdir()
        (temporary / "inside" / "file").touch()
    ours = [p for p in tmp_path.rglob("*") if tmp_path / "dense" not in (p, p.parent)]
    assert len(ours) > 12
    assert {p.name: mode(p) for p in ours} == {p.name: (0o777 if p.is_dir() else 0o666) & ~umask for p in ours}


def plant(folder, proof=b"", permissions=0o700):
    """What looks like the work folder of a killed process, with an older folder that it had moved away."""
    folder.mkdir(mode=permissions)
    (folder / files.LOCK).write_bytes(proof)
    (folder / files.OLD).mkdir()
    (folder / files.OLD / "model.safetensors").write_text("planted")


@pytest.mark.parametrize("how", ["unpacked", "copied proof", "others may write", "a link as its lock", "a link"])
def test_a_planted_work_folder_never_becomes_the_target(how, tmp_path):
    place = tmp_path / "work"
    place.mkdir()
    planted = place / ".small.abcd1234"
    if how == "a link":
        plant(tmp_path / "elsewhere")
        planted.symlink_to(tmp_path / "elsewhere")
    else:
        plant(planted)
    lock = planted / files.LOCK
    if how == "copied proof":
        lock.write_bytes(f"{tmp_path.stat().st_ino} {lock.stat().st_ino}".encode())
    elif how == "others may write":
        with lock.open("r+b") as file:
            file.write(files._proof(planted, file.fileno()))
        planted.chmod(0o777)
    elif how == "a link as its lock":
        lock.rename(tmp_path / "lock")
        lock.symlink_to(tmp_path / "lock")
        with (tmp_path / "lock").open("r+b") as file:
            file.write(files._proof(planted, file.fileno()))
    with files.atomic_folder(place / "small") as temporary:
        assert not (place / "small").exists() and temporary.parent != planted
        (temporary / "model.safetensors").write_text("ours")
    assert (place / "small" / "model.safetensors").read_text() == "ours"
    assert (planted / files.OLD / "model.safetensors").read_text() == "planted"  # not ours to remove either


def test_a_folder_that_cannot_be_written_to_is_told_as_such(tmp_path):
    with pytest.raises(gradpruner.CheckpointError, match="could not write"):
        files.write_json(tmp_path / ("x" * 250), {})


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
