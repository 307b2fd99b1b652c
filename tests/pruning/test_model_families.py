"""Apply, save, reload and generate, on every family, with non-contiguous layers removed and one merged."""

from __future__ import annotations

import copy

import model_families
import pytest
import torch
from model_families import generate, igia_of
from thinned import every, thinned
from transformers import AutoModelForCausalLM

import gradpruner


@pytest.mark.parametrize("name", thinned(model_families.CONFIGS, every(2)))
def test_apply_save_reload_generate(name, tmp_path):
    model, ids = model_families.build(model_families.CONFIGS[name]()), model_families.tokens()
    dense, shared_config = copy.deepcopy(model), model.config
    before = model.config.to_dict()
    plan = gradpruner.Plan(model_families.LAYERS, drop=[1, 3, 4])
    expected = model_families.skipped_logits(model, plan.removed, ids)
    small = gradpruner.apply(model, plan)
    assert small is model and small.config.num_hidden_layers == 3
    assert shared_config.to_dict() == before  # a config that another model may share is left alone
    with torch.no_grad():
        assert torch.equal(small(input_ids=ids, use_cache=False).logits, expected)
    gradpruner.save(small, tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids, use_cache=False).logits, expected)
    wanted = generate(small, ids, cache=True)
    assert torch.equal(wanted, generate(again, ids, cache=True))
    assert torch.equal(wanted, generate(again, ids, cache=False))
    assert len(dense.state_dict()) > len(again.state_dict())


@pytest.mark.parametrize("name", thinned(model_families.CONFIGS, every(2)))
def test_merge_auto_folds_only_into_the_same_structure(name, tmp_path):
    model, ids = model_families.build(model_families.CONFIGS[name]()), model_families.tokens()
    igia = igia_of(model)
    plan = igia.plan(count=3, merge="auto")
    structures = igia.structures
    assert all(structures[layer] == structures[target] for layer, target in plan.merge.items())
    dense = copy.deepcopy(model)
    small = gradpruner.apply(model, plan, igia)
    with torch.no_grad():
        merged = small(input_ids=ids, use_cache=False).logits
    assert torch.equal(merged, model_families.skipped_logits(dense, plan.removed, ids)) == (not plan.merge)
    gradpruner.save(small, tmp_path / "small")


@pytest.mark.parametrize("name", model_families.REFUSED)
def test_a_rule_on_the_index_that_cannot_be_carried_over_is_refused(name):
    model = model_families.build(model_families.REFUSED[name]())
    before = copy.deepcopy(model)
    with pytest.raises(gradpruner.UnsupportedModel, match="depends on the layer's index"):
        gradpruner.apply(model, gradpruner.Plan(model_families.LAYERS, drop=[1, 3]))
    assert model.config.to_dict() == before.config.to_dict()
    for (name_a, a), (name_b, b) in zip(model.state_dict().items(), before.state_dict().items(), strict=True):
        assert name_a == name_b and torch.equal(a, b)


def test_layers_of_different_structure_are_not_merged_by_hand():
    model = model_families.build(model_families.CONFIGS["qwen3-moe-sparse-step"]())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(gradpruner.UnsupportedModel, match="layer 3 differs in structure from layer 2"):
        gradpruner.apply(model, gradpruner.Plan(model_families.LAYERS, merge=[3]), igia_of(model))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("smollm3", "no_rope_layers"),
        ("qwen3", "layer_types"),
        ("gpt2", "layer_idx"),
        ("qwen3-moe-mlp-only", "mlp_only_layers"),
    ],
)
def test_the_checks_see_what_goes_wrong_when_a_step_is_left_out(name, wrong, monkeypatch):
    """Break the surgery in the ways peers do: each must be refused, none may pass in silence."""
    from gradpruner.model import layer_config
    from gradpruner.pruning import surgery

    if wrong == "mlp_only_layers":
        cut = surgery.cut_config

        def keep_rule(config, kept, layers):
            new = cut(config, kept, layers)
            new.mlp_only_layers, new.decoder_sparse_step = config.mlp_only_layers, config.decoder_sparse_step
            return new

        monkeypatch.setattr(surgery, "cut_config", keep_rule)
    elif wrong == "layer_idx":
        monkeypatch.setattr(surgery, "_equal", lambda a, b: True)
    else:
        monkeypatch.setattr(layer_config, "PER_LAYER", tuple(n for n in layer_config.PER_LAYER if n != wrong))
    model = model_families.build(model_families.CONFIGS[name]())
    # unnumbered layers have the right logits: what breaks is the step with a cache
    with pytest.raises(gradpruner.UnsupportedModel):
        gradpruner.apply(model, gradpruner.Plan(model_families.LAYERS, drop=[1, 3]))
