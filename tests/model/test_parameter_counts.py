"""The share of all parameters that a plan states is the share that really goes."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from architecture_matrix import build, igia_of, size_of
from model_families import CONFIGS
from model_families import build as build_family
from tiny_llama import lora

import gradpruner
from gradpruner.methods.base import plan_lowest
from gradpruner.methods.patched_gaps import plan_gaps
from gradpruner.model.decoder import Decoder
from gradpruner.model.parameter_counts import count_parameters

SHARING = ("zamba", "zamba2", "gemma3n_text", "gemma4_text")  # weights that layers share; embeddings with parts


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.filterwarnings("ignore")
def test_the_share_is_what_goes_where_layers_share_weights(name):
    refused = 0
    for removed in ((1, 4), (2, 4), (2,), (1, 3), (1, 2, 3, 4, 5)):
        model = build("causal", name)
        dense, igia = size_of(model), igia_of(model)
        try:
            small = gradpruner.apply(model, gradpruner.Plan(6, removed))
        except gradpruner.UnsupportedModel:
            refused += 1
            continue
        scores = [0.0 if layer in removed else 1.0 for layer in range(6)]
        plan = plan_lowest(Decoder(build("causal", name)), scores, len(removed))
        assert plan.removed == removed
        assert plan.parameter_ratio == igia.parameter_ratio(removed) == (dense - size_of(small)) / dense
    assert refused < 5


@pytest.mark.filterwarnings("ignore")
def test_a_share_of_parameters_is_reached():
    model = build("causal", "zamba")
    dense, igia = size_of(model), igia_of(model)
    plan = igia.plan(0.15, of="parameters", merge=0)
    assert (dense - size_of(gradpruner.apply(model, plan))) / dense == plan.parameter_ratio >= 0.15


@pytest.mark.parametrize("name", CONFIGS)
def test_the_share_of_every_family(name):
    model = build_family(CONFIGS[name]())
    dense, igia = size_of(model), igia_of(model)
    plan = gradpruner.Plan(6, [1, 3, 4])
    assert igia.parameter_ratio(plan.removed) == (dense - size_of(gradpruner.apply(model, plan))) / dense


def test_adapters_are_not_counted_and_counting_draws_no_random_number():
    plain = count_parameters(Decoder(build_family(CONFIGS["llama"]())))
    model, state = lora(build_family(CONFIGS["llama"]())), torch.get_rng_state()
    assert count_parameters(Decoder(model)) == plain
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore")
def test_a_plan_of_gaps_states_it_too():
    model = build("causal", "gemma3n_text")
    dense = size_of(model)
    ids = torch.randint(3, 60, (2, 12))
    plan = plan_gaps(model, [{"input_ids": ids, "labels": ids}], count=2)
    assert plan.parameter_ratio == igia_of(model).parameter_ratio(plan.removed)
    assert 0 < plan.parameter_ratio < 1 and dense == size_of(model)


def test_a_file_without_what_layers_share_states_no_share(tmp_path):
    igia = igia_of(build_family(CONFIGS["llama"]()))
    igia.save(tmp_path / "igia.safetensors")
    assert gradpruner.Igia.load(tmp_path / "igia.safetensors").plan(0.5) == igia.plan(0.5)
    # as an earlier version wrote it
    content = (tmp_path / "igia.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    about = json.loads(header["__metadata__"]["gradpruner"])
    del about["shared_parameters"]
    header["__metadata__"] = {"gradpruner": json.dumps(about)}
    text = json.dumps(header).encode()
    (tmp_path / "old.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    old = gradpruner.Igia.load(tmp_path / "old.safetensors")
    assert old.plan(0.5).removed == igia.plan(0.5).removed and old.plan(0.5).parameter_ratio is None
    with pytest.raises(gradpruner.InvalidArgument, match="probe again"):
        old.plan(0.5, of="parameters")
