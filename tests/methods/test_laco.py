"""LaCo against its merges done by state dicts, in copies, with every candidate tried."""

from __future__ import annotations

import copy

import model_families
import pytest
import torch
from method_inputs import BATCHES, clues, states, without
from module_states import assert_same, everything, same_state
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cosine_similarity
from uneven_models import build

from gradpruner import InvalidArgument, ModelMismatch, Plan, UnsupportedModel
from gradpruner.methods import Laco, parse_method
from gradpruner.methods.laco import similarity_to_dense
from gradpruner.model.decoder import Decoder


def folded(model, merge):
    """LaCo's merge by state dicts, in a copy; the donors are still there."""
    copied, dense = copy.deepcopy(model), model.model.layers
    for target in set(merge.values()):
        donors = [j for j in merge if merge[j] == target]
        total = {name: value.float() for name, value in dense[target].state_dict().items()}
        for j in sorted(donors):
            for name, value in dense[target].state_dict().items():
                total[name] = total[name] + (dense[j].state_dict()[name].float() - value.float())
        copied.model.layers[target].load_state_dict(total)
    return copied


def similarity(model, merge):
    smaller, cosines = without(folded(model, merge), merge), []
    for inputs in BATCHES:
        (_, a), (_, b) = states(model, inputs), states(smaller, inputs)
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            cosines.append(float(cosine_similarity(a[row][mask].flatten(), b[row][mask].flatten(), dim=0)))
    return sum(cosines) / len(cosines)


def walked(model, count, method, threshold, known):
    groups, at, seen = {}, model_families.LAYERS - method.combine, []
    while at >= method.low:
        gone = {d for donors in groups.values() for d in donors}
        room = min(method.combine - 1, count - len(gone))
        above = [j for j in range(at + 1, model_families.LAYERS) if j not in gone]
        tried, mine = dict(groups), []
        for j in above[:room]:
            mine += [j, *tried.pop(j, [])]
        tried[at] = mine
        merge = {d: target for target, donors in tried.items() for d in donors}
        key = tuple(sorted(merge.items()))
        known[key] = known[key] if key in known else similarity(model, merge)
        seen.append(known[key])
        if seen[-1] > threshold:
            groups = tried
            if len(merge) == count:
                return merge, seen
            at -= method.interval
        else:
            at -= 1
    return None, seen


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("laco", 2),
        ("laco:combine=2,interval=1", 2),
        ("laco:combine=3,low=0,interval=2", 4),
        ("laco:combine=3,low=0,interval=3", 4),
        ("laco:combine=2,interval=1", 4),
    ],
)
def test_laco(text, count):
    model, method, known = build(), parse_method(text), {}
    for k in range(19, -21, -1):
        expected, seen = walked(model, count, method, k / 20, known)
        assert all(abs(s - k / 20) > 1e-5 for s in seen)  # rounding decides nothing
        if expected:
            break
    assert k < 19
    plan = method.plan(clues(model), count)
    assert plan.merge == expected and plan.drop == () and len(plan.removed) == count
    shared = folded(model, expected)
    smaller = method.cut(clues(model), plan)
    for new, old in enumerate(plan.kept):
        for name, value in shared.model.layers[old].state_dict().items():
            assert torch.equal(smaller.model.layers[new].state_dict()[name], value), (old, name)
    assert smaller.config.num_hidden_layers == model_families.LAYERS - count


@pytest.mark.parametrize("merge", [{5: 4}, {3: 2, 4: 2}, {1: 0, 2: 0, 5: 3}])
def test_similarity_of_a_merged_model(merge):
    model = build()
    found = similarity_to_dense(Decoder(model), BATCHES)
    assert found({}) == pytest.approx(1) and found(merge) == pytest.approx(similarity(model, merge), abs=1e-6)


@pytest.mark.parametrize("threshold", [0.05, 0.19])
def test_laco_at_a_given_threshold(threshold):
    model, method = build(), Laco(threshold, combine=2, interval=1)
    expected, seen = walked(model, 2, method, threshold, {})
    assert expected and min(abs(s - threshold) for s in seen) < 0.05
    assert method.plan(clues(model), 2).merge == expected


def test_laco_takes_in_what_was_merged_before():
    model = build()
    for count, expected, options in (
        (3, {3: 2, 4: 2, 5: 2}, {}),
        (4, {2: 1, 3: 1, 4: 1, 5: 1}, {"combine": 3, "interval": 2}),
        (4, {1: 0, 2: 0, 4: 3, 5: 3}, {"combine": 3, "interval": 3, "low": 0}),
        (2, {3: 2, 5: 4}, {"combine": 2, "interval": 2}),
    ):
        assert Laco(threshold=-1, **options).plan(clues(model), count).merge == expected


def test_laco_adds_in_float32_and_stores_once():
    model = build().to(torch.bfloat16)
    plan = Plan(model_families.LAYERS, merge={3: 2, 4: 2, 5: 2})
    expected = folded(model, plan.merge).model.layers[2].state_dict()
    smaller = Laco().cut(clues(model), plan)
    for name, value in smaller.model.layers[2].state_dict().items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, expected[name]), name


def test_laco_throws_away_what_a_probe_trained():
    """Its `adapters` says so: the smaller model is that of the model without adapters."""
    plan = Plan(model_families.LAYERS, merge={3: 2})
    expected = Laco().cut(clues(build()), plan).state_dict()
    config = LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    smaller = Laco().cut(clues(get_peft_model(build(), config)), plan)
    assert same_state(smaller, expected)


def test_laco_says_what_it_cannot_do():
    model = build()
    with pytest.raises(InvalidArgument, match=r"laco merges 0 at most \(threshold 1, combine 4, interval 4, low 1\)"):
        Laco(threshold=1).plan(clues(model), 2)
    with pytest.raises(InvalidArgument, match="4 of 6 layers to remove; laco merges 3 at most"):
        Laco().plan(clues(model), 4)


def test_laco_refuses_layers_of_unequal_structure():
    model = build("qwen3-moe-sparse-step")
    before = everything(model)
    with pytest.raises(InvalidArgument, match="layer 5 differs in structure from layer 4"):
        Laco(combine=2).plan(clues(model), 1)
    with pytest.raises(InvalidArgument, match="layer 2 differs in structure from layer 1"):
        Laco().cut(clues(model), Plan(model_families.LAYERS, merge={5: 3, 2: 1}))
    assert_same(everything(model), before)


def test_laco_puts_back_what_a_refused_cut_merged():
    model = model_families.build(model_families.REFUSED["gpt2-inverse-index"]())
    before = everything(model)
    with pytest.raises(UnsupportedModel, match="scal"):
        Laco().cut(clues(model), Plan(model_families.LAYERS, merge={3: 2}))
    assert_same(everything(model), before)


def test_laco_puts_back_what_a_failed_search_merged():
    model, calls = build(), []
    before = everything(model)

    def fail(*_):
        calls.append(1)
        if len(calls) > len(BATCHES) + 1:
            raise RuntimeError("no memory")

    handle = model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        Laco().plan(clues(model), 2)
    handle.remove()
    assert_same(everything(model), before)


def test_laco_cuts_only_the_model_that_was_planned_for():
    model, other = build(), build(seed=1)
    for parameter in [*model.parameters(), *other.parameters()]:
        parameter.requires_grad_(False)  # now the plan knows the weights, which a merge changes
    plan = Laco().plan(clues(model), 2)
    with pytest.raises(ModelMismatch, match="other weights"):
        Laco().cut(clues(other), plan)
    assert len(Laco().cut(clues(model), plan).model.layers) == 4


def test_no_threshold_is_spelled_none_and_is_the_default():
    assert Laco() == parse_method("laco") == parse_method("laco:threshold=none")
    assert Laco().threshold is None and parse_method("laco:threshold=0.5") != Laco()
