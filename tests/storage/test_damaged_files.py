"""Every reader either gives a result that can be used or says what is wrong, whatever happened to the file.

An error of the package's own is right; any other is not, and neither is a result that fails when it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import struct
import warnings
import zlib

import pytest
import torch
from model_families import igia_of
from mutations import json_mutations, mutants, table_mutations, tensor_mutations
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import gradpruner
from gradpruner.checkpoint import stored_model as stored
from gradpruner.checkpoint.masks import Masks
from gradpruner.compare.cells import finished
from gradpruner.compare.results import Cost, Result, read_costs, read_results, write_costs, write_results
from gradpruner.errors import CheckpointError, GradPrunerError
from gradpruner.probe.igia import Igia
from gradpruner.probe.importance import Factors
from gradpruner.run import auto_ratio, page
from gradpruner.storage import tensor_files as shards
from gradpruner.data import load as data
from gradpruner.training import resume as training_files
from gradpruner.training.probe_batches import load_batches, save_batches

SOME, MANY = 100, 2000


def igia(folder):
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=16,
            hidden_size=4,
            intermediate_size=4,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    seen = igia_of(model)
    factors = {
        key: Factors(torch.ones(2, 1, f.f.shape[1]), torch.ones(2, f.f.shape[0], 1))
        for key, f in seen.importance.items()
        if key[0] == 1
    }
    seen = dataclasses.replace(seen, importance={**seen.importance, **factors}, shared_parameters=(((1, 2), 8),))
    seen.save(folder / "igia.safetensors")
    return folder / "igia.safetensors"


def use_igia(path):
    for lazy in (False, True):
        seen = Igia.load(path, lazy=lazy)
        for weight in seen.weights:
            if (weight.layer, weight.name) in seen.importance:
                assert seen.importance[weight.layer, weight.name].dense().f.shape == weight.shape
        seen.save(path.with_name("again.safetensors"))
        plan = seen.plan(0.5)
        seen.margin(plan), seen.stability(plan), plan.summary(), seen.parameter_ratio(plan.removed)


def plan(folder):
    gradpruner.Plan(8, [1, 5], {3: 2, 7: 6}, "abc-def", 0.25).save(folder / "plan.json")
    return folder / "plan.json"


def use_plan(path):
    found = gradpruner.Plan.load(path)
    found.save(path)
    assert gradpruner.Plan.load(path) == found and found.summary() and len(found.kept) + len(found.removed)


def masks(folder):
    bits = {"a.weight": torch.ones(4, 2, dtype=torch.uint8), "b.weight": torch.ones(3, 1, dtype=torch.uint8)}
    Masks(bits, {"a.weight": 12, "b.weight": 8}, {"method": "wanda"}).save(folder / "masks.safetensors")
    return folder / "masks.safetensors"


def use_masks(path):
    found = Masks.load(path)
    if found.bits:
        assert 0 <= found.sparsity() <= 1
    found.save(path)


def inputs(folder):
    save_batches([{"input_ids": torch.ones(2, 3, dtype=torch.int64)}, {"x": torch.ones(2)}], folder, None)
    return folder / "gradpruner_inputs-00000.state"


def tensors(folder):
    some = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.ones(()), "d": torch.ones(0, 2)}
    save_file(some, folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def use_tensors(path):
    for tensor in shards.read_folder(path.parent).values():
        assert tensor.read().shape == tensor.shape


def index(folder):
    for number, name in enumerate("ab"):
        save_file({name: torch.ones(2)}, folder / f"model-{number}.safetensors")
    content = {"metadata": {"total_size": 16}, "weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}
    (folder / shards.INDEX).write_text(json.dumps(content))
    return folder / shards.INDEX


def config(folder):
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=16,
            hidden_size=4,
            intermediate_size=4,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    return folder / "config.json"


def use_config(path):
    found = stored.StoredModel(path.parent)
    assert found.decoder.fingerprint(content=True, samples=found.samples)


def results(folder):
    row = Result("gradpruner", 2, 0.5, 0, 0.5, None, 3.5, 10, 2, 1000, "1 3", "3>2", 20, 3.0, 2.0, 60.5)
    write_results(folder / "results.csv", [row, dataclasses.replace(row, method="dense", count=0)])
    return folder / "results.csv"


def costs(folder):
    write_costs(folder / "costs.csv", [Cost(2, 2, 0.5, 100, 0.25, 50, 1000, 1e9)])
    return folder / "costs.csv"


def auto(folder):
    checked = {"exact_match": 0.5, "perplexity": 3.0, "rouge_l": None, "examples": 8}
    content = {"checked": {str(n): {**checked, "exact_match": 0.5 - n / 100} for n in range(7)}}
    (folder / "auto.json").write_text(json.dumps(content))
    return folder / "auto.json"


def use_auto(path):
    def again(count):
        raise gradpruner.ProbeError("a check that the file does not hold would be made")

    auto_ratio.choose([float(n) for n in range(10)], again, path, bound=0.05, steps=4)


def cell(folder):
    for name in ("cells", "trained"):
        (folder / name).mkdir()
    (folder / "trained" / "key.json").write_text('{"exact_match": 0.5}')
    content = {"method": "gradpruner", "options": {"top": 0.2}, "count": 2, "seed": 0, "trained": "key"}
    for name in "ab":
        (folder / "cells" / f"{name}.json").write_text(json.dumps(content))
    return folder / "cells" / "a.json"


def report(folder):
    row = {
        "name": "dense",
        "layers": 4,
        "parameters": 100,
        "exact_match": 0.5,
        "perplexity": None,
        "step_seconds": 0.5,
        "tokens_per_second": 2.0,
        "peak_bytes": 100,
        "checkpoint_bytes": 100,
    }
    probe = {"layer_scores": [1.0, 2.0, 3.0, 4.0], "stability": [0.5, 1.0], "margin": 0.5}
    content = {"rows": [row, {**row, "name": "pruned"}], "probe": probe, "plan": gradpruner.Plan(4, [1]).to_dict()}
    (folder / "results.json").write_text(json.dumps(content))
    (folder / "run.json").write_text('{"source": "m", "steps": 2, "probe_steps": 1}')
    return folder / "results.json"


def rows(suffix, text):
    def write(folder):
        (folder / f"rows{suffix}").write_text(text)
        return folder / f"rows{suffix}"

    return write


def trainer_state(folder):
    (folder / training_files.TRAINER_STATE).write_text('{"epoch": 1.5, "log_history": [{"loss": 1.0}]}')
    return folder / training_files.TRAINER_STATE


def use_trainer_state(path):
    if not training_files.is_complete(path.parent):
        raise CheckpointError("not complete")


def use_rows(path):
    for row in data._read_file(path, "train"):
        assert isinstance(row, dict)


READERS = {
    "igia": (igia, use_igia, tensor_mutations),
    "plan": (plan, use_plan, json_mutations),
    "masks": (masks, use_masks, tensor_mutations),
    "inputs": (inputs, lambda path: load_batches(path.parent, None), tensor_mutations),
    "safetensors": (tensors, use_tensors, tensor_mutations),
    "index": (index, use_tensors, json_mutations),
    "config": (config, use_config, json_mutations),
    "results": (results, read_results, table_mutations),
    "costs": (costs, read_costs, table_mutations),
    "auto": (auto, use_auto, json_mutations),
    "cell": (cell, lambda path: finished(path.parents[1]), json_mutations),
    "report": (report, lambda path: page.write_report(path.parent), json_mutations),
    "trainer state": (trainer_state, use_trainer_state, json_mutations),
    "jsonl": (rows(".jsonl", '{"a": "x", "b": 1}\n{"a": "y", "b": 2}\n'), use_rows, table_mutations),
    "json": (rows(".json", '[{"a": "x", "b": 1}, {"a": "y", "b": 2}]'), use_rows, json_mutations),
    "csv": (rows(".csv", "a,b\nx,1\ny,2\n"), use_rows, table_mutations),
}


def survive(name, count, folder, monkeypatch):
    write, use, how = READERS[name]
    path = write(folder)
    content = path.read_bytes()
    use(path)  # what is not damaged is accepted
    if name == "report":  # drawing takes longer than everything else
        monkeypatch.setattr(page, "plot_layer_scores", lambda scores, plan, file: file.write_bytes(b"\x89PNG"))
        monkeypatch.setattr(page, "png_of", lambda figure: b"\x89PNG")
    # transformers repeats what it reads, and pytest's workers cannot send half a surrogate pair to each other
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    accepted = 0
    for seed, mutant in enumerate(mutants(content, how, count)):
        path.write_bytes(mutant)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                use(path)
            accepted += 1
        except GradPrunerError as error:
            str(error).encode()
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {error!r} of {mutant[:300]!r}") from error
    assert accepted < count


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_refused_or_read(name, tmp_path, monkeypatch):
    survive(name, SOME, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_files_damaged_in_two_thousand_ways(name, tmp_path, monkeypatch):
    survive(name, MANY, tmp_path, monkeypatch)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "text", [DEEP, '{"a": ' * 100_000, "9" * 5000, '{"a": 1, "a": 2}', '{"a\\ud800": 1}', "[]", "\ufeff{}"]
)
def test_json_that_python_reads_badly_or_not_at_all(text, tmp_path):
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not a plan file"):
        gradpruner.Plan.load(tmp_path / "x.json")


@pytest.mark.parametrize(("layers", "accepted"), [(10**18, False), (100_001, False), (400, True)])
def test_a_plan_of_more_layers_than_any_model_has_costs_no_memory(layers, accepted):
    with contextlib.nullcontext() if accepted else pytest.raises(gradpruner.InvalidArgument, match="layers ="):
        gradpruner.Plan(layers)


def test_a_header_of_a_shape_that_no_tensor_can_have(tmp_path):
    entry = {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match="no tensor can have"):
        shards.read_header(tmp_path / "x.safetensors")


def test_a_flipped_letter_of_a_weights_name_is_seen(tmp_path):
    """The importance of that weight would be left out of the merge without a word."""
    path = igia(tmp_path)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    about = header["__metadata__"]["gradpruner"].replace("q_proj.weight", "r_proj.weight", 1)
    for checksum in (
        {},
        {"gradpruner_crc32": header["__metadata__"]["gradpruner_crc32"]},
        {"gradpruner_crc32": str(zlib.crc32(about.encode()))},
    ):
        text = json.dumps({**header, "__metadata__": {"gradpruner": about, **checksum}}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
        with pytest.raises(CheckpointError, match="corrupted"):
            Igia.load(path)


def test_a_config_that_claims_more_layers_than_are_stored_builds_none_of_them(tmp_path):
    path = config(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match="1000000000 decoder layers"):
        stored.StoredModel(tmp_path)


def test_a_config_that_claims_heads_wider_than_what_is_stored_builds_no_table(tmp_path):
    path = config(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "head_dim": 2**31}))
    with pytest.raises(CheckpointError, match="head_dim = 2147483648; no stored tensor is so wide"):
        stored.StoredModel(tmp_path)
