"""Stored importance that is read tensor by tensor."""

from __future__ import annotations

import json

import pytest
import torch
from model_families import igia_of
from stored_models import dense, load

import gradpruner
from gradpruner.probe.igia import Igia
from gradpruner.storage import tensor_files


def test_lazy_importance_is_read_when_asked_for_and_its_checksum_compared(tmp_path):
    igia = igia_of(load(dense("llama", tmp_path / "dense")))
    path = tmp_path / "igia.safetensors"
    igia.save(path)
    lazy = Igia.load(path, lazy=True)
    assert set(lazy.importance) == set(igia.importance) and len(lazy.importance) == len(igia.importance)
    key = next(iter(lazy.importance))
    where = tensor_files.read_header(path)[0][f"{key[0]}/{key[1]}/f"].offset
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


def test_the_name_of_the_format_is_the_one_that_files_have(tmp_path):
    """Files that were written before keep loading. The name does not follow the module's."""
    igia_of(load(dense("llama", tmp_path / "dense"))).save(tmp_path / "igia.safetensors")
    metadata = tensor_files.read_header(tmp_path / "igia.safetensors")[1]
    assert json.loads(metadata["gradpruner"])["format"] == "gradpruner.igia/1"
