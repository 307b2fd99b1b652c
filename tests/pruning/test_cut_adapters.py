"""cut and adapters: which ones start anew, which ones go on, and from what."""

from __future__ import annotations

import copy

import pytest
import torch
from own_loops import probe_and_cut, stepper, trainable
from peft import AutoPeftModelForCausalLM, IA3Config, get_peft_model
from torch.utils.data import DataLoader
from training_runs import LAYERS, llama, lora, rows, same, tensors

import gradpruner
from gradpruner.model.decoder import Decoder, Weight
from gradpruner.pruning.adapters import describe, without_adapters
from gradpruner.pruning.patch import Patch, fit_patches


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [0, 2, 5, 7], "target_modules": ["q_proj", "up_proj"]},
        {"rank_pattern": {"model.layers.7.self_attn.q_proj": 2}, "alpha_pattern": {r".*\.5\.mlp\.up_proj": 3}},
        {"target_modules": r".*\.[1357]\.self_attn\.(q|v)_proj"},
        {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["model.layers.6.self_attn.q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True},
        {"init_lora_weights": "gaussian", "lora_bias": False},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_adapter_config_says_where_the_layers_are_now(options, tmp_path):
    model = lora(llama(), **options)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    step = stepper(model, optimizer)
    plan = gradpruner.Plan(LAYERS, drop=[1, 3, 6])
    for i in range(3):
        step(i)
    gradpruner.cut(model, optimizer, plan, adapters="discard")
    base = without_adapters(model.get_base_model())
    gradpruner.save(base, tmp_path / "base")
    describe(model, str(tmp_path / "base"))
    for i in range(3, 6):
        step(i)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids = rows(1)[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, again(input_ids=ids).logits)


def test_what_adapters_learned_stays_and_gaps_are_patched():
    model = lora(llama(), modules_to_save=["lm_head"])
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    step = stepper(model, optimizer)
    for i in range(3):
        step(i)
    plan, batches = gradpruner.Plan(LAYERS, drop=[3, 4, 6]), list(DataLoader(rows(40), batch_size=4))
    patches = fit_patches(model, plan, batches)
    assert [patch.weight.layer for patch in patches] == [2, 5]
    other = copy.deepcopy(model)  # cut without patches and patched by hand
    gradpruner.cut(model, optimizer, plan, patches=patches, adapters="keep")
    gradpruner.cut(other, None, plan, adapters="keep")
    decoder = Decoder(other)
    with torch.no_grad():
        for patch in patches:
            decoder.parameter(Weight(plan.kept.index(patch.weight.layer), patch.weight.name, ())).add_(patch.change)
    assert same(model.state_dict(), other.state_dict())
    ids = rows(1)[0]["input_ids"][None]
    with torch.no_grad():
        kept = model.eval()(input_ids=ids).logits
        with model.disable_adapter():
            assert not torch.allclose(kept, model(input_ids=ids).logits)
    step(3)


@pytest.mark.parametrize("target", ["down_proj", "embed_tokens"])
def test_a_kept_dora_scales_what_is_added_as_before(target):
    model = lora(llama(), use_dora=True, target_modules=[target, "q_proj"])
    optimizer = torch.optim.SGD(trainable(model), lr=10.0)
    step = stepper(model, optimizer)
    for i in range(2):
        step(i)
    weight = next(w for w in Decoder(model).weights if w.layer == 2 and w.name.endswith("down_proj.weight"))
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))

    def rows_of_it():
        """What each unit of its input, or each token, becomes."""
        layers, given = Decoder(model).layers, torch.eye(weight.shape[1])
        if target == "down_proj":
            return layers[2].mlp.down_proj(given).T
        return model.get_base_model().get_input_embeddings()(torch.arange(61)[None])[0]

    model.eval()
    with torch.no_grad():
        before = rows_of_it()
        adapter = dict(Decoder(model).layers[2].mlp.down_proj.named_modules()).get("lora_magnitude_vector.default")
        known = None if adapter is None else adapter.weight.clone()
        gradpruner.cut(
            model,
            optimizer,
            gradpruner.Plan(LAYERS, drop=[3]),
            adapters="keep",
            patches=[Patch(weight, 3, change, 0.5)],
        )
        after = rows_of_it()
    if known is None:  # nothing was added to it
        assert torch.equal(before, after)
        return
    factors = (after - before) / change
    assert not torch.allclose(factors[:, 0], torch.ones(len(factors)), rtol=1e-3)  # else nothing is shown
    torch.testing.assert_close(factors, factors.median(dim=1, keepdim=True).values.expand_as(factors), rtol=0.1, atol=0)
    assert bool((known * 2 < adapter.weight).all())


def test_adapters_of_other_kinds_are_refused():
    torch.manual_seed(1)
    model = get_peft_model(llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    for adapters in ("keep", "discard"):
        with pytest.raises(gradpruner.UnsupportedModel, match="of type IA3"):
            gradpruner.cut(model, None, gradpruner.Plan(LAYERS, drop=[3]), adapters=adapters)
    with pytest.raises(gradpruner.InvalidArgument, match="adapters = 'merge'; accepted are keep, discard"):
        gradpruner.cut(lora(llama()), None, gradpruner.Plan(LAYERS, drop=[3]), adapters="merge")


def test_two_adapters_only_the_trained_one_starts_anew():
    model = lora(llama())
    model.add_adapter("kept", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".kept." in name:
                parameter.fill_(0.25)
    model.set_adapter("default")
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    probe_and_cut(model, optimizer, stepper(model, optimizer))
    for name, parameter in model.named_parameters():
        if ".kept." in name:
            assert bool((parameter == 0.25).all())
        elif "lora_B" in name:
            assert not parameter.any()


def test_dora_starts_from_the_norms_of_the_merged_weights():
    model = lora(llama(), use_dora=True)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    plan, _ = probe_and_cut(model, optimizer, stepper(model, optimizer))
    assert plan.merge
    ids = rows(1)[0]["input_ids"][None]
    with torch.no_grad():
        fresh = model.eval()(input_ids=ids).logits
        with model.disable_adapter():
            torch.testing.assert_close(fresh, model(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_dora_on_an_embedding():
    model = lora(llama(), use_dora=True, target_modules=["embed_tokens", "q_proj"])
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    probe_and_cut(model, optimizer, stepper(model, optimizer))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainable(model)}


def test_fresh_adapters_hang_on_the_seed_and_on_nothing_else():
    def values(seed):
        model = lora(llama())
        optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
        torch.manual_seed(seed * 7)  # the global generator neither matters nor moves
        state = torch.get_rng_state()
        gradpruner.cut(model, optimizer, gradpruner.Plan(LAYERS, drop=[1, 3]), adapters="discard", seed=seed)
        assert torch.equal(state, torch.get_rng_state())
        return tensors(model)

    assert same(values(1), values(1)) and not same(values(1), values(2))
