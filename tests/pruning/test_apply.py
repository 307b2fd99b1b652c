from __future__ import annotations

import copy

import model_families
import pytest
import torch
from model_families import igia_of
from module_states import same_state, snapshot
from probing import run
from tiny_llama import LAYERS, batch, llama, lora, trainable
from torch import nn

import gradpruner
from gradpruner.pruning import apply, merge


def test_peft_in_plain_model_out():
    model = lora(llama())
    base = model.get_base_model()
    igia = run(model)
    smaller = gradpruner.apply(model, igia.plan(0.4, preset="paper"), igia, preset="paper")
    assert smaller is base and not any("lora" in name for name, _ in smaller.named_parameters())
    assert all(p.requires_grad for p in smaller.parameters())
    assert smaller.config.num_hidden_layers == len(smaller.model.layers) == 5
    ids = batch(0)
    smaller(input_ids=ids, labels=ids).loss.backward()


def test_probe_adapters_are_discarded_not_merged():
    model = lora(llama())
    igia = run(model, steps=6)
    plan = igia.plan(0.4, merge=0)
    smaller = gradpruner.apply(model, plan, igia, adapters="discard")
    original = llama()
    for new, old in enumerate(plan.kept):
        for (n, a), (_, b) in zip(
            smaller.model.layers[new].named_parameters(), original.model.layers[old].named_parameters(), strict=True
        ):
            assert torch.equal(a, b), n


def test_training_goes_on_with_a_rebuilt_optimizer():
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gradpruner.Probe(model).watching(optimizer, 3) as probe:
        for i in range(3):
            ids = batch(i)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    smaller = gradpruner.apply(model, probe.igia.plan(0.4, preset="paper"), probe.igia)
    rebuilt = gradpruner.rebuild_optimizer(optimizer, smaller)
    assert type(rebuilt) is torch.optim.AdamW and rebuilt.param_groups[0]["lr"] == 1e-2
    assert {id(p) for p in rebuilt.param_groups[0]["params"]} == {id(p) for p in smaller.parameters()}
    assert len(rebuilt.state) == len(list(smaller.parameters()))
    ids, losses = batch(9), []
    for _ in range(8):
        loss = smaller(input_ids=ids, labels=ids).loss
        loss.backward()
        rebuilt.step()
        rebuilt.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_rebuilt_optimizer_takes_fresh_adapters():
    model = lora(llama())
    igia = run(model)
    old = torch.optim.AdamW(trainable(model), lr=3e-4, weight_decay=0.05)
    fresh = lora(gradpruner.apply(model, igia.plan(0.4, preset="paper"), igia, preset="paper"))
    rebuilt = gradpruner.rebuild_optimizer(old, fresh)
    assert {id(p) for p in rebuilt.param_groups[0]["params"]} == {id(p) for p in trainable(fresh)}
    assert rebuilt.param_groups[0]["lr"] == 3e-4 and rebuilt.param_groups[0]["weight_decay"] == 0.05
    for p in fresh.parameters():
        p.requires_grad_(False)
    with pytest.raises(gradpruner.InvalidArgument, match="no trainable parameter"):
        gradpruner.rebuild_optimizer(old, fresh)


@pytest.mark.parametrize("stage", ["second merge", "cut", "logits"])
def test_all_or_nothing(stage, monkeypatch):
    model = lora(llama())
    igia = run(model)
    plan = gradpruner.Plan(LAYERS, drop=[4], merge=[2, 6])
    before, config = snapshot(model)
    layers = list(model.get_base_model().model.layers)
    if stage == "second merge":
        calls, real = [], merge._merge_matrix

        def fail_later(*args):
            calls.append(1)
            if len(calls) == 9:
                raise torch.OutOfMemoryError("out of memory")
            real(*args)

        monkeypatch.setattr(merge, "_merge_matrix", fail_later)
    elif stage == "cut":

        def interrupted(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(apply, "_check_logits", interrupted)
    else:
        monkeypatch.setattr(apply, "differ", lambda a, b, dtype: 1.0)
    with pytest.raises((torch.OutOfMemoryError, KeyboardInterrupt, gradpruner.UnsupportedModel)):
        gradpruner.apply(model, plan, igia)
    assert same_state(model, before) and model.config.to_dict() == config
    assert list(model.get_base_model().model.layers) == layers
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(LAYERS))
    monkeypatch.undo()
    assert gradpruner.apply(model, plan, igia).config.num_hidden_layers == 5


def test_a_plan_or_igia_of_another_model_is_refused():
    model = lora(llama())
    igia = run(model)
    plan = igia.plan(0.4, preset="paper")
    other = llama()
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight.add_(0.01)
    before, _ = snapshot(other)
    with pytest.raises(gradpruner.ModelMismatch, match="the plan was made from a model with other weights"):
        gradpruner.apply(other, plan, igia)
    by_hand = gradpruner.Plan(LAYERS, merge=list(plan.merge))
    with pytest.raises(gradpruner.ModelMismatch, match="the igia was made from"):
        gradpruner.apply(other, by_hand, igia)
    with pytest.raises(gradpruner.ModelMismatch, match="another shape"):
        gradpruner.apply(
            model_families.build(model_families.CONFIGS["gpt2"]()), gradpruner.Plan(6, drop=[1], model=plan.model)
        )
    with pytest.raises(gradpruner.ModelMismatch, match="30 decoder layers; the model has 8"):
        gradpruner.apply(llama(), gradpruner.Plan(30, drop=[6]))
    assert same_state(other, before)
    gradpruner.apply(llama(torch.bfloat16).float(), gradpruner.Plan(LAYERS, drop=[3]))
    # the same checkpoint in another precision is the same model
    gradpruner.apply(llama().bfloat16(), plan, igia)


def test_unknown_importance_and_missing_igia_are_refused():
    model, igia = lora(llama()), None
    igia = run(model, importance=False)
    plan = igia.plan(0.4, preset="paper")
    assert plan.merge
    with pytest.raises(gradpruner.InvalidArgument, match="igia is None"):
        gradpruner.apply(model, plan)
    with pytest.raises(gradpruner.InvalidArgument, match="no element importance"):
        gradpruner.apply(model, plan, igia)
    assert gradpruner.apply(model, igia.plan(0.4)).config.num_hidden_layers == 5


def test_experts_are_merged_expert_by_expert():
    model = model_families.build(model_families.CONFIGS["mixtral"]())
    dense, igia = copy.deepcopy(model), igia_of(model)
    smaller = gradpruner.apply(model, gradpruner.Plan(model_families.LAYERS, merge=[2]), igia, top=0.25)
    name = "mlp.experts.down_proj"
    w, v = (dense.model.layers[j].get_parameter(name) for j in (1, 2))
    f = igia.importance[2, name].f
    import oracle

    for expert in range(4):
        mask = oracle.mask_of(f[expert], f[expert].numel() // 4)
        want = oracle.merge(w[expert].detach(), [v[expert].detach()], [mask])
        assert torch.equal(smaller.model.layers[1].get_parameter(name)[expert], want)
    router = "mlp.gate.weight"
    assert torch.equal(smaller.model.layers[1].get_parameter(router), dense.model.layers[1].get_parameter(router))


class Plain(nn.Module):
    """Nobody's decoder: no config, its own names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(61, 16)
        self.trunk = nn.Module()
        self.trunk.stages = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(5))
        self.head = nn.Linear(16, 61)

    def forward(self, ids):
        x = self.embed(ids)
        for stage in self.trunk.stages:
            x = x + stage(x)
        return self.head(x)


def test_a_model_that_is_not_hugging_faces():
    torch.manual_seed(0)
    model = Plain()
    with pytest.raises(gradpruner.UnsupportedModel, match=r"name its ModuleList .* layers=.*trunk\.stages"):
        gradpruner.Probe(model)
    probe, optimizer = gradpruner.Probe(model, layers="trunk.stages"), torch.optim.SGD(model.parameters(), lr=0.1)
    with probe.watching(optimizer, 2):
        for i in range(2):
            model(batch(i)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    plan = probe.igia.plan(count=2, merge=1)
    smaller = gradpruner.apply(model, plan, probe.igia, layers="trunk.stages")
    assert len(smaller.trunk.stages) == 3 and smaller(batch(0)).shape == (3, 9, 61)


def test_prune_in_one_call():
    model = llama()
    batches = [{"input_ids": batch(i), "labels": batch(i)} for i in range(6)]
    smaller = gradpruner.prune(model, batches, ratio=0.4, steps=5)
    assert smaller is model and smaller.config.num_hidden_layers == 5
    assert smaller.gradpruner_plan.layer_ratio == 3 / 8
    assert not any("lora" in name for name, _ in smaller.named_parameters())


@pytest.mark.parametrize(
    ("batches", "options", "error"),
    [
        ([], {}, gradpruner.InvalidArgument),
        ([{"input_ids": batch(0)}], {}, gradpruner.InvalidArgument),
        ([{"input_ids": batch(0), "labels": batch(0)}], {}, gradpruner.ProbeError),  # B = 0: no usable step
        ([{"input_ids": batch(i), "labels": batch(i)} for i in range(3)], {"ratio": 1.5}, gradpruner.InvalidArgument),
    ],
)
def test_prune_leaves_the_model_as_it_was_when_it_cannot(batches, options, error):
    model = llama()
    before, config = snapshot(model)
    with pytest.raises(error):
        gradpruner.prune(model, batches, **options)
    assert same_state(model, before) and model.config.to_dict() == config
    assert all(p.requires_grad for p in model.parameters())
