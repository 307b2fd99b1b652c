"""What the probe's steps trained: kept by `apply`, written and read again, and the settings that say so."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from module_states import same_state, snapshot
from probing import run
from tiny_llama import LAYERS, batch, llama, lora
from torch import nn

import gradpruner
from gradpruner.errors import CheckpointError, GradPrunerError, InvalidArgument, UnsupportedModel
from gradpruner.presets import PRESETS, Preset
from gradpruner.probe.igia import Igia
from gradpruner.run import probe_folder as probed
from gradpruner.run.job import Job
from gradpruner.run.probe_folder import load_probed_model, save_probe


def trained(model=None, **options):
    """Adapters that do something, and what a probe saw."""
    model = lora(model or llama())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return model


def close(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-6, atol=1e-7) for k in a)


def test_keep_is_merge_and_unload_then_cut():
    plan = gradpruner.Plan(LAYERS, drop=[1, 4, 5])
    model = trained()
    expected = gradpruner.apply(copy.deepcopy(model).merge_and_unload(), plan)
    thrown_away = gradpruner.apply(copy.deepcopy(model), plan, adapters="discard")
    base = model.get_base_model()
    kept = gradpruner.apply(model, plan, adapters="keep")
    assert kept is base and close(kept, expected) and not close(thrown_away, expected)
    assert all(p.requires_grad for p in kept.parameters()) and not any("lora" in n for n, _ in kept.named_parameters())
    assert not any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in kept.modules())
    ids = batch(0)
    with torch.no_grad():
        assert torch.allclose(kept(ids).logits, expected(ids).logits, atol=1e-5)


def test_discard_leaves_no_trace():
    plan, plain = gradpruner.Plan(LAYERS, drop=[1, 4, 5]), llama()
    want = gradpruner.apply(plain, plan).state_dict()
    for options in ({"preset": "paper"}, {"adapters": "discard"}):
        assert same_state(gradpruner.apply(trained(), plan, **options), want)


def test_keep_adds_to_what_was_merged():
    model = trained()
    igia = run(copy.deepcopy(model))
    plan = gradpruner.Plan(LAYERS, drop=[4], merge=[2, 6])
    deltas = {
        name: module.get_delta_weight("default").detach()
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "get_delta_weight")
    }
    merged = gradpruner.apply(copy.deepcopy(model), plan, igia, adapters="discard")
    kept = gradpruner.apply(model, plan, igia, adapters="keep")
    for new, old in enumerate(plan.kept):
        for name, got in kept.model.layers[new].named_parameters():
            want = merged.model.layers[new].get_parameter(name).detach().clone()
            want += deltas.get(f"model.layers.{old}.{name.removesuffix('.weight')}", torch.zeros_like(want))
            assert torch.allclose(got, want, rtol=1e-6, atol=1e-7), (old, name)
    assert len(deltas) == 7 * LAYERS


def test_keep_leaves_a_plain_model_as_it_is():
    plan = gradpruner.Plan(LAYERS, drop=[3])
    assert same_state(gradpruner.apply(llama(), plan, adapters="keep"), gradpruner.apply(llama(), plan).state_dict())


def with_saved_modules():
    return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))


def quantised():
    model = trained()
    model.get_base_model().model.layers[3].mlp.up_proj.base_layer.weight.quant_state = object()  # as bitsandbytes
    return model


def prompt_tuning():
    return peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def not_finite():
    model = trained()
    with torch.no_grad():
        model.get_base_model().model.layers[6].mlp.up_proj.lora_A["default"].weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (with_saved_modules, UnsupportedModel, 'modules_to_save.*accepted: adapters="discard"'),
        (quantised, UnsupportedModel, "adapters of a quantised or sharded model cannot be added"),
        (prompt_tuning, UnsupportedModel, "adapters of LlamaForCausalLM cannot be added to the weights"),
        (not_finite, InvalidArgument, r"layers\.6\.mlp\.up_proj\.lora_A\.default\.weight is not finite"),
    ],
)
def test_what_cannot_be_kept_is_refused_and_nothing_changed(make, error, message):
    model = make()
    before, config = snapshot(model)
    modules = [id(m) for m in model.modules()]
    with pytest.raises(error, match=message):
        gradpruner.apply(model, gradpruner.Plan(LAYERS, drop=[1, 4]), adapters="keep")
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[k].nan_to_num(7.0), v.nan_to_num(7.0)) for k, v in before.items())
    assert model.config.to_dict() == config and [id(m) for m in model.modules()] == modules
    discarded = gradpruner.apply(model, gradpruner.Plan(LAYERS, drop=[1, 4]), adapters="discard")
    assert discarded.config.num_hidden_layers == LAYERS - 2


def test_another_word_is_refused():
    with pytest.raises(InvalidArgument, match="adapters = 'merge'; accepted are keep, discard"):
        gradpruner.apply(trained(), gradpruner.Plan(LAYERS, drop=[1]), adapters="merge")


def test_a_failed_cut_keeps_the_adapters_where_they_are(monkeypatch):
    from gradpruner.pruning import apply as apply_module

    model = trained()
    before, config = snapshot(model)
    monkeypatch.setattr(apply_module, "differ", lambda a, b, dtype: 1.0)
    with pytest.raises(UnsupportedModel, match="nothing was changed"):
        gradpruner.apply(model, gradpruner.Plan(LAYERS, drop=[1]), adapters="keep")
    assert same_state(model, before) and model.config.to_dict() == config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_written_and_read_again(tmp_path, dtype):
    model = trained(llama(dtype))
    igia, before = run(copy.deepcopy(model)), snapshot(model)[0]
    save_probe(tmp_path / "probe", igia, model)
    assert sorted(p.name for p in (tmp_path / "probe").iterdir()) == ["adapters", "igia.safetensors"]
    read = Igia.load(tmp_path / "probe" / probed.IGIA)
    assert torch.equal(read.layer_scores(), igia.layer_scores()) and read.model == igia.model
    plain = llama(dtype)
    again = load_probed_model(plain, tmp_path / "probe")
    assert again.get_base_model() is plain and same_state(again, before)
    plan = gradpruner.Plan(LAYERS, drop=[1, 5])
    kept = gradpruner.apply(again, plan, adapters="keep")
    assert same_state(kept, gradpruner.apply(model, plan, adapters="keep").state_dict())


def test_a_model_trained_in_full_is_written_and_read_again(tmp_path):
    model = llama()
    igia = run(model)
    save_probe(tmp_path / "probe", igia, model)
    assert sorted(p.name for p in (tmp_path / "probe").iterdir()) == ["igia.safetensors", "model"]
    dense = llama()
    dense.set_attn_implementation("eager")
    again = load_probed_model(dense, tmp_path / "probe")
    assert same_state(again, model.state_dict()) and not same_state(again, llama().state_dict())
    assert type(again) is type(model) and again is not dense
    assert again.config._attn_implementation == "eager"  # as the dense model was loaded
    half = load_probed_model(llama(torch.bfloat16), tmp_path / "probe")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_nothing_is_left_of_a_probe_that_cannot_be_written(tmp_path, monkeypatch):
    model = trained()
    igia = run(model)

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(type(model), "save_pretrained", fail)
    with pytest.raises(CheckpointError, match="could not write"):
        save_probe(tmp_path / "probe", igia, model)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_probe_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither adapters nor a model of a probe"):
        load_probed_model(llama(), tmp_path)


def test_presets():
    assert Preset.of() == Preset() == PRESETS["default"]
    assert Preset().adapters == "keep" and Preset().patch is True and Preset().rank_factor == 4
    paper = Preset.of("paper")
    assert (paper.kind, paper.merge, paper.top, paper.weight) == ("squared", "auto", 0.2, 1.0)
    assert paper.patch is False and paper.adapters == "discard" and paper.rank_factor == 1  # the paper has none


def test_what_differs_from_a_preset():
    assert Preset.of("paper", patch=True, top=None) == Preset("squared", "auto", 0.2, 1.0, True, "discard", 1)
    assert Preset.of("default", merge=0, adapters="discard") == Preset(merge=0, adapters="discard")
    assert Preset.of("default", patch=False).patch is False  # false is said, none is not


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Preset.of("papers"), "preset = 'papers'; accepted are default, paper"),
        (lambda: Preset(adapters="both"), "adapters = 'both'; accepted are keep, discard"),
        (lambda: Preset.of("paper", patch=1), "patch = 1; accepted are True and False"),
        (lambda: Job("model", 40, preset="papers"), "preset = .papers.; accepted are default, paper"),
    ],
)
def test_wrong_settings_are_refused_before_time_is_spent(make, message):
    with pytest.raises(InvalidArgument, match=message) as caught:
        make()
    assert isinstance(caught.value, GradPrunerError)


def test_a_job_says_what_its_preset_comes_to():
    job = Job("model", 40, preset=Preset.of("paper", weight=0.5))
    assert job.preset == Preset("squared", "auto", 0.2, 0.5, False, "discard", 1)
    assert job.to_dict()["preset"] == vars(job.preset)


class Odd(nn.Module):
    """An adapter layer of another library: no PeftModel around it."""

    adapter_layer_names = ("odd",)


def test_adapters_without_a_peft_model_are_refused():
    model = llama()
    model.model.layers[2].odd = Odd()
    with pytest.raises(UnsupportedModel, match="without a PeftModel around it"):
        gradpruner.apply(model, gradpruner.Plan(LAYERS, drop=[1]), adapters="keep")
