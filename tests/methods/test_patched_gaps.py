"""Gaps against plain computations: every subset for the plan, one layer after the other for the costs."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gradpruner.errors import InvalidArgument
from gradpruner.methods import Clues, parse_method
from gradpruner.methods.patched_gaps import KINDS, LONGEST, RIDGE, cheapest, gap_costs, plan_gaps
from gradpruner.model.decoder import Decoder

LAYERS = 5


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="eager",
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # as made, layers do next to nothing
        parameter.data.mul_(3.0)
    return model


def batches(rows: int = 8, length: int = 12) -> list[dict[str, torch.Tensor]]:
    source = torch.Generator().manual_seed(1)
    found = []
    for _ in range(2):
        ids = torch.randint(1, 50, (rows, length), generator=source)
        mask = torch.ones_like(ids)
        for row in range(rows):
            mask[row, length - row % 4 :] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


def gaps_of(removed: tuple[int, ...]) -> list[tuple[int, int]]:
    gone, found = set(removed), []
    for layer in removed:
        if layer - 1 not in gone:
            end = layer
            while end + 1 in gone:
                end += 1
            found.append((layer - 1, end))
    return found


@pytest.mark.parametrize("count", range(1, 7))
@pytest.mark.parametrize("protect", [(0,), (0, 3), (0, 1, 7)], ids=str)
def test_the_plan_is_the_cheapest_of_all(count, protect):
    layers, source = 8, random.Random(count)
    costs = {(j, e): source.random() for j in range(layers) for e in range(j + 1, min(layers, j + 5))}
    allowed = [
        removed
        for removed in itertools.combinations(sorted(set(range(layers)) - set(protect)), count)
        if all(gap in costs for gap in gaps_of(removed))
    ]
    if not allowed:
        with pytest.raises(InvalidArgument, match=f"{count} of 8"):
            cheapest(costs, layers, count, protect)
        return
    best = min(allowed, key=lambda removed: sum(costs[gap] for gap in gaps_of(removed)))
    assert tuple(cheapest(costs, layers, count, protect)) == best


def test_a_gap_that_cannot_be_is_not_taken():
    costs = {(0, 1): math.inf, (1, 2): 1.0, (0, 2): math.inf, (2, 3): 3.0, (1, 3): 9.0, (0, 3): math.inf}
    assert cheapest(costs, 4, 1) == [2]
    assert cheapest(costs, 4, 2) == [2, 3]
    with pytest.raises(InvalidArgument, match="3 of 4"):
        cheapest(costs, 4, 3)


def plainly(model: LlamaForCausalLM, given: list[dict[str, torch.Tensor]], kind: str) -> dict[tuple[int, int], float]:
    """The same costs from the layers called one after the other, in float64."""
    model = model.double().eval()
    parts: list[dict[str, list[torch.Tensor]]] = [
        {f"{letter}{j}": [] for letter in "xhg" for j in range(LAYERS)} for _ in range(2)
    ]
    row_number = 0
    for batch in given:
        mean_over = int((batch["labels"][:, 1:] != -100).sum())
        for row in range(len(batch["input_ids"])):
            length = int(batch["attention_mask"][row].sum())
            ids = batch["input_ids"][row : row + 1, :length]
            hidden = model.model.embed_tokens(ids)
            positions = torch.arange(length)[None]
            rope = model.model.rotary_emb(hidden, positions)
            mask = torch.full((length, length), -math.inf, dtype=torch.float64).triu(1)[None, None]
            inputs, states = [], []
            for layer in model.model.layers:
                attended, _ = layer.self_attn(
                    hidden_states=layer.input_layernorm(hidden), attention_mask=mask, position_embeddings=rope
                )
                hidden = hidden + attended
                normed = layer.post_attention_layernorm(hidden)
                x = torch.nn.functional.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
                hidden = hidden + layer.mlp.down_proj(x)
                inputs.append(x)
                states.append(hidden)
            logits = model.lm_head(model.model.norm(hidden))[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum") / mean_over
            gradients = torch.autograd.grad(loss, states)
            part = parts[row_number % 2]
            for j in range(LAYERS):
                part[f"x{j}"].append(inputs[j][0].detach())
                part[f"h{j}"].append(states[j][0].detach())
                part[f"g{j}"].append(gradients[j][0])
            row_number += 1
    fit, judge = ({key: torch.cat(values) for key, values in part.items()} for part in parts)
    costs = {}
    for j in range(LAYERS - 1):
        weight = fit[f"h{j}"].norm(dim=1, keepdim=True).reciprocal()
        x = fit[f"x{j}"] * weight
        ridge = RIDGE * x.square().sum() / x.shape[1]
        for e in range(j + 1, min(LAYERS, j + 1 + LONGEST)):
            wanted = (fit[f"h{e}"] - fit[f"h{j}"]) * weight
            stacked = torch.cat([x, ridge.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])
            target = torch.cat([wanted, torch.zeros(x.shape[1], wanted.shape[1], dtype=torch.float64)])
            change = torch.linalg.lstsq(stacked, target).solution
            rest = judge[f"h{e}"] - judge[f"h{j}"] - judge[f"x{j}"] @ change
            if kind == "gap":
                costs[j, e] = float((judge[f"g{e}"] * rest).sum(1).abs().sum())
            else:
                costs[j, e] = float((rest.square().sum(1) / judge[f"h{e}"].square().sum(1)).sqrt().sum())
    return costs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [8, 3], ids=["more tokens than inputs", "fewer"])
def test_costs_are_those_of_a_plain_computation(rows, kind):
    model, given = llama(), batches(rows, length=12 if rows == 8 else 6)
    found = gap_costs(Decoder(model), given, kind)
    expected = plainly(model, given, kind)
    assert found.keys() == expected.keys()
    for gap, cost in expected.items():
        assert found[gap] == pytest.approx(cost, rel=2e-3), gap


@pytest.mark.parametrize("kind", KINDS)
def test_planning_changes_nothing_and_the_method_does_the_same(kind):
    model, given = llama().train(), batches()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = plan_gaps(model, given, count=2, kind=kind)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["lm_head.weight"]
    assert bool((model.lm_head.weight.grad == 1).all())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert len(plan.removed) == 2 and 0 in plan.kept and plan.model == Decoder(model).fingerprint()
    clues = Clues(model, given, given, 0)
    method = parse_method(f"gradpruner:kind={kind}")
    assert method.plan(clues, 2) == plan
    assert method.cut(clues, plan).config.num_hidden_layers == LAYERS - 2


def test_what_is_refused():
    model, given = llama(), batches()
    with pytest.raises(InvalidArgument, match="5 of 5"):
        plan_gaps(model, given, count=5)
    with pytest.raises(InvalidArgument, match="accepted are residual, gap"):
        plan_gaps(model, given, count=2, kind="norm")
    with pytest.raises(InvalidArgument, match="no loss"):
        plan_gaps(model, [{k: v for k, v in b.items() if k != "labels"} for b in given], count=2, kind="gap")
    with pytest.raises(InvalidArgument, match="two rows"):
        plan_gaps(model, [{k: v[:1] for k, v in given[0].items()}], count=2)
    with pytest.raises(InvalidArgument, match="two rows"):
        plan_gaps(model, [], count=2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
