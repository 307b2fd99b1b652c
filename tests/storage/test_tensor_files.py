"""Damaged safetensors files and wrong indices are refused, each with its own message."""

from __future__ import annotations

import json
import struct

import pytest
from stored_models import DROP, dense

import gradpruner
from gradpruner.storage import tensor_files


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
    index = json.loads((folder / tensor_files.INDEX).read_text())
    change(index["weight_map"])
    (folder / tensor_files.INDEX).write_text(json.dumps(index))


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
    "no map": (lambda f: (f / tensor_files.INDEX).write_text("{}"), "no weight_map"),
}


@pytest.mark.parametrize("how", WRONG_INDEX)
def test_a_wrong_index_is_refused(how, tmp_path):
    source = dense("llama", tmp_path / "dense", max_shard_size="30KB")
    damage, message = WRONG_INDEX[how]
    damage(source)
    with pytest.raises(gradpruner.CheckpointError, match=message):
        gradpruner.apply_folder(source, tmp_path / "stream", DROP)
