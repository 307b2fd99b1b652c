"""An optimizer whose model has become smaller: the same object, so its scheduler, hooks and options go on with it."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator
from architecture_matrix import build
from tiny_llama import LAYERS, batch, llama, lora, trainable

import gradpruner
from gradpruner.model.decoder import Decoder

PLAN = gradpruner.Plan(LAYERS, drop=[2, 5])


def step(model, optimizer, seed=0):
    ids = batch(seed)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def snapshot(optimizer):
    return [{**group, "params": list(group["params"])} for group in optimizer.param_groups], dict(optimizer.state)


@pytest.mark.parametrize("adapters", ["keep", "discard"])
def test_the_scheduler_goes_on(adapters):
    """As in the README's own loop: apply, new adapters, the optimizer and its scheduler."""
    model = lora(llama())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 8)
    for i in range(4):
        step(model, optimizer, i)
        scheduler.step()
    model = lora(gradpruner.apply(model, PLAN, adapters=adapters))
    optimizer = gradpruner.rebuild_optimizer(optimizer, model)
    rates = []
    for i in range(4, 8):
        step(model, optimizer, i)
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.00375, 0.0025, 0.00125, 0.0])
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer, 8)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())  # the rate is 0


def test_hooks_and_the_wrapper_of_accelerate_go_on():
    accelerator, calls = Accelerator(cpu=True), []
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    model, prepared = accelerator.prepare(model, optimizer)
    small = gradpruner.apply(model, PLAN)
    assert gradpruner.rebuild_optimizer(prepared, small) is prepared
    step(small, prepared)
    assert calls == [1]
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in small.parameters()}


def test_names_stay_with_their_parameters_and_new_ones_have_their_own():
    model = llama()
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    gradpruner.rebuild_optimizer(optimizer, gradpruner.apply(model, PLAN))
    (group,) = optimizer.param_groups
    assert group["param_names"] == [names[id(p)] for p in group["params"]]
    assert len(group["params"]) == len(list(model.parameters())) < len(names)

    model = lora(llama())
    optimizer = torch.optim.SGD([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=0.1)
    fresh = lora(gradpruner.apply(model, PLAN))
    gradpruner.rebuild_optimizer(optimizer, fresh)
    names = {id(p): name for name, p in fresh.named_parameters()}
    (group,) = optimizer.param_groups
    assert group["param_names"] == [names[id(p)] for p in group["params"]] and len(group["params"]) == 14 * 6


def test_every_group_stays_for_the_scheduler():
    """A scheduler has one rate a group: one that became empty must not shift the others."""
    model = llama()
    gone = list(model.model.layers[2].parameters())
    rest = [p for p in model.parameters() if not any(p is q for q in gone)]
    optimizer = torch.optim.AdamW([{"params": gone, "lr": 1e-3}, {"params": rest, "lr": 1e-2}])
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
    small = gradpruner.apply(model, PLAN)
    gradpruner.rebuild_optimizer(optimizer, small)
    step(small, optimizer)
    scheduler.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, len(list(small.parameters()))]
    assert optimizer.param_groups[1]["lr"] == pytest.approx(9.1e-3)


def test_base_weights_do_not_join_the_adapters():
    model = lora(llama())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    step(model, optimizer)
    before = snapshot(optimizer)
    small = gradpruner.apply(model, PLAN, adapters="keep")
    with pytest.raises(gradpruner.InvalidArgument, match=r"trainable base weights .* model\.embed_tokens\.weight"):
        gradpruner.rebuild_optimizer(optimizer, small)
    assert snapshot(optimizer) == before


def test_new_adapters_join_no_group_by_chance():
    model = lora(llama())
    sides = [[p for n, p in model.named_parameters() if f"lora_{side}" in n] for side in "AB"]
    optimizer = torch.optim.AdamW([{"params": sides[0]}, {"params": sides[1], "lr": 1e-2}])  # LoRA+
    before = snapshot(optimizer)
    fresh = lora(gradpruner.apply(model, PLAN))
    with pytest.raises(gradpruner.InvalidArgument, match="groups with a different lr"):
        gradpruner.rebuild_optimizer(optimizer, fresh)
    assert snapshot(optimizer) == before


def test_an_optimizer_that_keeps_parameters_elsewhere_is_refused_first():
    model = llama()
    optimizer = torch.optim.LBFGS(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(gradpruner.InvalidArgument, match="LBFGS keeps parameters in its attribute '_params'"):
        gradpruner.cut(model, optimizer, PLAN)
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)
    with pytest.raises(gradpruner.InvalidArgument, match="LBFGS"):
        gradpruner.rebuild_optimizer(optimizer, gradpruner.apply(model, PLAN))


@pytest.mark.parametrize("way", ["cut", "rebuild"])
def test_options_of_single_parameters_stay_with_them_in_bitsandbytes(way, monkeypatch):
    manager = bnb.optim.GlobalOptimManager.get_instance()
    for name, value in {"pid2config": {}, "index2config": {}, "module_weight_config_triple": []}.items():
        monkeypatch.setattr(manager, name, value)
    model = llama()
    chosen, lost = model.model.layers[7].mlp.up_proj, model.model.layers[2].mlp.up_proj
    for module in (chosen, lost):
        manager.register_module_override(module, "weight", {"optim_bits": 32})
    optimizer = bnb.optim.Adam8bit(model.parameters(), min_8bit_size=1)
    optimizer.check_overrides()  # as its first step does
    if way == "cut":
        gradpruner.cut(model, optimizer, PLAN)
    else:
        optimizer = gradpruner.rebuild_optimizer(optimizer, gradpruner.apply(model, PLAN))
    assert optimizer.args.min_8bit_size == 1
    (group,) = optimizer.param_groups
    bits = [optimizer.get_config(0, i, group)["optim_bits"] for i in range(len(group["params"]))]
    assert [p is chosen.weight for p in group["params"]] == [b == 32 for b in bits]
    assert list(manager.pid2config) == [id(chosen.weight)]


@pytest.mark.filterwarnings("ignore")
def test_embeddings_with_a_part_a_layer_train_on():
    """Gemma 3n's are replaced by smaller ones, and with them what the optimizer knows of them."""
    model = build("causal", "gemma3n_text").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(3, 60, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    whole = model.model.embed_tokens_per_layer.weight
    moments = optimizer.state[whole]["exp_avg"]
    gradpruner.cut(model, optimizer, gradpruner.Plan(6, drop=[1, 4]))
    small = model.model.embed_tokens_per_layer.weight
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert len(Decoder(model).layers) == 4 and small.shape != whole.shape
    kept = moments.unflatten(1, (6, -1))[:, [0, 2, 3, 5]].flatten(1)
    assert torch.equal(optimizer.state[small]["exp_avg"], kept) and whole not in optimizer.state
    before = small.detach().clone()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(before, small)
