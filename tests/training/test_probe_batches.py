"""The batches of the probe: how many are kept, and how they come back from a file."""

from __future__ import annotations

import shutil

import pytest
import torch
import training_runs
from attached_runs import trainer

import gradpruner
from gradpruner.storage.checked_tensors import read_described, write_described
from gradpruner.training import probe_batches as inputs


def test_inputs_are_kept_up_to_a_number_of_tokens(monkeypatch):
    monkeypatch.setattr(inputs, "TOKENS", 50)
    model = training_runs.llama()
    watching = inputs.ProbeBatches()
    watching.watch(model)
    for length, count in ((9, 1), (30, 2), (12, 2), (11, 3)):  # 12 more would be 51
        model.train()(input_ids=torch.ones(1, length, dtype=torch.long), labels=torch.ones(1, length, dtype=torch.long))
        assert len(watching.batches) == count
        model.eval()(input_ids=torch.ones(1, 1, dtype=torch.long))
        with torch.no_grad():
            model.train()(input_ids=torch.ones(1, 1, dtype=torch.long))
    assert len(inputs.ProbeBatches(watching.batches).batches) == 3
    again = inputs.ProbeBatches(watching.batches)  # an interrupted run counts what was there
    watching.stop()
    again.watch(model)
    model(input_ids=torch.ones(1, 1, dtype=torch.long))
    assert len(again.batches) == 3 and len(watching.batches) == 3
    again.stop()
    large = inputs.ProbeBatches()
    large.watch(model)
    model(input_ids=torch.ones(1, 60, dtype=torch.long))
    assert len(large.batches) == 1


@pytest.mark.parametrize("damage", ["gone", "bytes", "one of two"])
def test_inputs_that_do_not_come_back_whole_are_refused(damage, finished, tmp_path):
    out, _, _, _ = finished("lora")
    shutil.copytree(out / "checkpoint-3", tmp_path / "checkpoint-3")
    (file,) = (tmp_path / "checkpoint-3").glob(inputs.FILES)
    if damage == "gone":
        file.unlink()
    elif damage == "bytes":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        stored, header = read_described(file, "inputs", inputs.FORMAT)
        tensors = {name: tensor.read() for name, tensor in stored.items()}
        write_described(file, tensors, {**header, "processes": 2})
    reasons = {"gone": "lacks the inputs", "bytes": "checksum of '2/", "one of two": "of 1 processes; 2 have"}
    made, _ = trainer(tmp_path)
    with pytest.raises(gradpruner.CheckpointError, match=reasons[damage]):
        made.train(resume_from_checkpoint=True)


def test_the_name_of_the_format_is_the_one_that_files_have(tmp_path):
    """Checkpoints that were written before can be resumed. The name does not follow the module's."""
    inputs.save_batches([{"input_ids": torch.ones(1, 2, dtype=torch.long)}], tmp_path, None)
    (file,) = tmp_path.glob(inputs.FILES)
    assert read_described(file, "inputs", "gradpruner.inputs/1")[1]["processes"] == 1
