"""Adapters taken off a cut model: what is kept of them acts as before, or nothing has changed."""

from __future__ import annotations

import logging

import pytest
import torch
from adapter_cases import PEFT_OF_KIND, of_kind
from adapter_matrix import skipping
from adapter_models import LINEARS, batch, gpt2, is_here, llama, lora, options, two
from model_families import igia_of
from peft.helpers import disable_input_dtype_casting
from tiny_configs import tiny_config
from transformers import AutoModelForCausalLM, MixtralConfig, ZambaConfig

import gradpruner
from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.pruning import adapter_removal
from gradpruner.training.finetune import finish

PLAN = gradpruner.Plan(6, drop=[1, 3, 4])
TIED = {"tie_word_embeddings": True}


def shaken(model, size=0.05):
    """Every trained parameter moved, so that the adapters do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def state(model):
    """Values, modules, attributes of modules, and what trains."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: id(module) for name, module in model.named_modules(remove_duplicate=False)},
        {name: list(vars(module)) for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        model.get_base_model().config.to_dict(),
        [list(getattr(module, "merged_adapters", ())) for module in model.modules()],
    )


def assert_as_before(model, before):
    now = state(model)
    assert now[1:] == before[1:]
    assert now[0].keys() == before[0].keys()
    assert [name for name, value in before[0].items() if not torch.equal(now[0][name], value)] == []


def zamba():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(ZambaConfig))


SHARED = {
    "the embeddings, tied": (lambda: lora(llama(**TIED), target_modules=[*LINEARS, "embed_tokens"]), "embed_tokens"),
    "the head, tied": (lambda: lora(llama(**TIED), target_modules=["lm_head"]), "lm_head"),
    "both, with adapters that are tied too": (
        lambda: lora(llama(**TIED), target_modules=["embed_tokens"], ensure_weight_tying=True),
        "embed_tokens",
    ),
    "a block that layers share": (lambda: lora(zamba(), target_modules=["q_proj"]), r"layers\.1\.shared_transf"),
    "replicated layers": (
        lambda: lora(llama(num_hidden_layers=4), layer_replication=[[0, 3], [1, 4]]),
        r"layers\.1\.self_attn\.q_proj",
    ),
}


@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_a_weight_that_modules_share_cannot_be_kept(make):
    model = shaken(make[0]())
    before = state(model)
    with pytest.raises(UnsupportedModel, match=rf"{make[1]}.* are one weight.*accepted: adapters=\"discard\""):
        gradpruner.apply(model, PLAN, adapters="keep")
    assert_as_before(model, before)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (options(lora_bias=True), "base layer has no bias"),
        (options(alora_invocation_tokens=[3]), "aLoRA does not support"),
        (of_kind("POLY"), "peft cannot merge a Linear"),
        pytest.param(
            of_kind("LILY"),
            "not supported for Lily",
            marks=pytest.mark.skipif(not is_here(PEFT_OF_KIND["LILY"]), reason="an older peft"),
        ),
    ],
)
def test_what_peft_cannot_merge_is_refused_by_name_and_nothing_changed(make, reason):
    model = shaken(make(llama()))
    before = state(model)
    with pytest.raises(UnsupportedModel, match=rf"adapter of model\.layers\.0\.self_attn\.q_proj .*{reason}"):
        gradpruner.apply(model, PLAN, adapters="keep")
    assert_as_before(model, before)


def test_a_bias_of_lora_is_kept_where_the_base_has_one():
    model = shaken(lora(gpt2(), target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, lora_bias=True))
    check_kept(model)


def check_kept(model):
    ids = batch(3)
    expected = skipping(model.get_base_model(), ids)
    small = gradpruner.apply(model, PLAN, adapters="keep")
    assert not any(hasattr(module, "base_layer") for module in small.modules())
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lora(llama(), target_modules=[*LINEARS, "embed_tokens", "lm_head"]),
        lambda: lora(llama(), use_dora=True),
        lambda: two(["default", "other"])(llama()),
        lambda: of_kind("TRAINABLE_TOKENS")(llama(**TIED)),  # puts rows of the weight in another's place
        lambda: of_kind("IA3")(llama()),
    ],
)
def test_what_is_kept_acts_as_before(make):
    check_kept(shaken(make()))


def test_only_active_adapters_are_kept_and_the_others_are_named(caplog):
    model = shaken(two(["other"])(llama()))
    with caplog.at_level(logging.WARNING):
        check_kept(model)
    assert "the adapters ['default'] are not active" in caplog.text


def test_adapters_that_are_switched_off_are_not_kept():
    model = shaken(lora(llama()))
    model.base_model.disable_adapter_layers()
    before = state(model)
    with pytest.raises(InvalidArgument, match=r"switched off, in model\.layers\.0.*enable_adapter_layers"):
        gradpruner.apply(model, PLAN, adapters="keep")
    assert_as_before(model, before)
    model.base_model.enable_adapter_layers()
    check_kept(model)


@pytest.mark.parametrize("adapters", ["keep", "discard"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, ValueError])
def test_a_failure_after_the_cut_undoes_everything(adapters, error, monkeypatch):
    model = shaken(lora(llama(), use_dora=True))
    plan, igia = gradpruner.Plan(6, drop=[1, 4], merge=[3]), igia_of(model)
    before = state(model)
    tuner, name = type(model.base_model), "merge_and_unload" if adapters == "keep" else "unload"
    whole = getattr(tuner, name)

    def fails_at_the_end(self, *args, **kwargs):
        whole(self, *args, **kwargs)
        raise error("too late")

    monkeypatch.setattr(tuner, name, fails_at_the_end)
    with pytest.raises(UnsupportedModel if error is ValueError else error, match="too late"):
        gradpruner.apply(model, plan, igia, adapters=adapters)
    assert_as_before(model, before)
    monkeypatch.undo()
    assert gradpruner.apply(model, plan, igia, adapters=adapters).config.num_hidden_layers == 3


def test_other_logits_after_the_last_change_are_refused(monkeypatch):
    model = shaken(lora(llama()))
    before, unload = state(model), adapter_removal._unload

    def unload_and_damage(peft_model, base, *, keep):
        unload(peft_model, base, keep=keep)
        with torch.no_grad():
            base.model.layers[0].self_attn.q_proj.weight.mul_(3)

    monkeypatch.setattr(adapter_removal, "_unload", unload_and_damage)
    with pytest.raises(UnsupportedModel, match="does not have the logits"):
        gradpruner.apply(model, PLAN, adapters="keep")
    assert_as_before(model, before)


def test_prune_refuses_before_it_trains():
    model = lora(llama(**TIED), target_modules=[*LINEARS, "embed_tokens"])

    def batches():
        raise AssertionError("a batch was asked for")
        yield

    with pytest.raises(UnsupportedModel, match="are one weight"):
        gradpruner.prune(model, batches())
    with pytest.raises(UnsupportedModel, match="took a part of the base weights"):
        gradpruner.prune(lora(llama(), init_lora_weights="pissa"), batches())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finishing_says_when_the_model_became_another(dtype, caplog):
    with caplog.at_level(logging.WARNING):
        finish(shaken(lora(llama(dtype))))
        assert not caplog.records
        finish(shaken(lora(llama(dtype, **TIED), target_modules=["embed_tokens"]), 1.0))
    assert "changed the model's logits" in caplog.text


@pytest.mark.parametrize("way", ["cut", "apply"])
def test_adapters_that_leave_casting_to_autocast_are_compared_too(way):
    """As `finetune.train` has it: float32 adapters on a bfloat16 model, and peft told not to widen their inputs."""
    model = lora(llama().to(torch.bfloat16))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    shaken(model)
    with disable_input_dtype_casting(model):
        if way == "cut":
            gradpruner.cut(model, None, PLAN, adapters="keep")
            assert not any(getattr(module, "cast_input_dtype_enabled", False) for module in model.modules())
        else:
            model = gradpruner.apply(model, PLAN, adapters="keep")
    assert len(model.get_decoder().layers) == 3


@pytest.mark.parametrize("adapters", ["keep", "discard"])
@pytest.mark.filterwarnings("ignore")
def test_adapters_on_both_weights_of_experts_are_taken_off(adapters):
    """peft nests one wrapper in the other."""
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(tiny_config(MixtralConfig))
    weights = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = shaken(lora(dense, target_modules=["q_proj"], target_parameters=weights))
    ids = batch(1) % dense.config.vocab_size
    expected = skipping(model.get_base_model(), ids)
    small = gradpruner.apply(model, PLAN, adapters=adapters)
    assert not any("base_layer" in name for name, _ in small.named_modules())
    with torch.no_grad():
        found = small.eval()(input_ids=ids).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4) is (adapters == "keep")
