"""GradPruner and drop-last as methods: what they keep, merge and patch."""

from __future__ import annotations

import copy
import itertools

import peft
import pytest
import torch
from method_inputs import BATCHES, HELD_OUT, without
from thinned import IN_CI
from uneven_models import batch, build

from gradpruner import Probe, apply
from gradpruner.methods import Clues, parse_method
from gradpruner.model.decoder import Decoder
from gradpruner.pruning.patch import fit_patches


@pytest.fixture(scope="module")
def probed():
    """A model with adapters that do something, and what a probe saw of it."""
    torch.manual_seed(3)
    model = peft.get_peft_model(build(), peft.LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    watched = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([p for p in watched.parameters() if p.requires_grad], lr=1e-3)
    probe = Probe(watched)
    with probe.watching(optimizer, len(BATCHES)):
        for inputs in BATCHES:
            watched(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, probe.igia


MANY = [*BATCHES, batch([9, 12, 6, 7], 6), batch([5, 11, 8], 7)]  # rows enough to hold some out


def seen(probed):
    model, igia = probed
    return Clues(copy.deepcopy(model), MANY, HELD_OUT, 0, lambda: igia)


def by_hand(probed, plan, *, keep, patch, igia=None, top=0.2, weight=1.0):
    """The cut model, in steps: patches as the model with its adapters has them, merge, patch, drop, adapters."""
    model = copy.deepcopy(probed[0])
    merged = copy.deepcopy(model).merge_and_unload()
    patches = fit_patches(merged, plan, MANY) if patch else []
    base = copy.deepcopy(model).unload()
    learned = {name: value - base.state_dict()[name] for name, value in merged.state_dict().items()}
    for position, layer in enumerate(Decoder(apply(copy.deepcopy(base), plan, igia, top=top, weight=weight)).layers):
        base.model.layers[plan.kept[position]].load_state_dict(layer.state_dict())
    state = base.state_dict()
    with torch.no_grad():
        for p in patches:
            state[f"model.layers.{p.weight.layer}.{p.weight.name}"] += p.change
        for name, delta in learned.items():
            state[name] += delta * keep
    return without(base, plan.removed)


def assert_close(smaller, expected):
    got, want = smaller.state_dict(), expected.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[name], want[name], atol=2e-4) for name in want)


OPTIONS = [
    ("merge=1", True, True),
    pytest.param("merge=1,patch=true,adapters=keep", True, True, marks=IN_CI),
    ("merge=1,adapters=discard", False, True),
    pytest.param("merge=1,patch=false", True, False, marks=IN_CI),
    ("preset=paper", False, False),
    pytest.param("preset=paper,patch=true", False, True, marks=IN_CI),
]


@pytest.mark.parametrize(("text", "keep", "patch"), OPTIONS)
def test_gradpruner_keeps_and_patches_as_told(probed, text, keep, patch):
    method, given = parse_method(f"gradpruner:{text}"), seen(probed)
    assert method.settled("adapters") == ("keep" if keep else "discard")
    plan = method.plan(given, 3)
    assert plan.removed and len(plan.merge) == 1  # what is above 0.3 of the layers is folded
    smaller = method.cut(given, plan)
    assert not any("lora" in name for name, _ in smaller.named_parameters())
    expected = by_hand(probed, plan, keep=keep, patch=patch, igia=probed[1])
    assert_close(smaller, expected)
    others = [
        by_hand(probed, plan, keep=a, patch=b, igia=probed[1])
        for a, b in itertools.product((0, 1), (0, 1))
        if (a, b) != (keep, patch)
    ]
    for other in others:  # every option makes another model
        with pytest.raises(AssertionError):
            assert_close(smaller, other)


def test_gradpruner_passes_on_how_it_merges(probed):
    for text, options in [("top=0.6", {"top": 0.6}), ("weight=0.5", {"weight": 0.5})]:
        method, given = parse_method(f"gradpruner:preset=paper,{text}"), seen(probed)
        plan = method.plan(given, 3)
        smaller = method.cut(given, plan)
        assert_close(smaller, by_hand(probed, plan, keep=False, patch=False, igia=probed[1], **options))
        with pytest.raises(AssertionError):
            assert_close(smaller, by_hand(probed, plan, keep=False, patch=False, igia=probed[1]))


def test_gradpruner_plans_by_its_score_and_merging(probed):
    igia = probed[1]
    for kind, merge in itertools.product(("squared", "norm", "normalized"), (0, 2)):
        plan = parse_method(f"gradpruner:kind={kind},merge={merge}").plan(seen(probed), 3)
        scores = igia.layer_scores(kind).tolist()
        assert set(plan.removed) == set(sorted(range(1, len(scores)), key=lambda j: scores[j])[:3])
        assert len(plan.merge) == merge


@pytest.mark.parametrize(
    ("text", "keep", "patch"),
    [
        ("", False, False),
        ("patch=true", False, True),
        ("adapters=keep", True, False),
        ("patch=true,adapters=keep", True, True),
    ],
)
@pytest.mark.parametrize("name", [pytest.param("drop-last", marks=IN_CI), "shortgpt"])
def test_dropping_keeps_and_patches_where_asked_to(probed, name, text, keep, patch):
    method, given = parse_method(f"{name}:{text}"), seen(probed)
    assert method.settled("adapters") == ("keep" if keep else "discard")
    plan = method.plan(given, 2)
    smaller = method.cut(given, plan)
    assert_close(smaller, by_hand(probed, plan, keep=keep, patch=patch))
    for a, b in {(0, 0), (0, 1), (1, 0), (1, 1)} - {(keep, patch)}:
        with pytest.raises(AssertionError):
            assert_close(smaller, by_hand(probed, plan, keep=a, patch=b))
