"""ShortGPT, block, loss, magnitude, Taylor and random, each against a plain computation of its own."""

from __future__ import annotations

import itertools
import math

import model_families
import pytest
import torch
from method_inputs import BATCHES, HELD_OUT, clues, lowest, states, without
from torch.nn.functional import cross_entropy
from uneven_models import build

from gradpruner.methods import METHODS
from gradpruner.methods.block import distances
from gradpruner.methods.held_out_loss import held_out_loss
from gradpruner.model.decoder import Decoder

LINEARS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


def test_block_influence():
    model = build()
    totals, tokens = [0.0] * model_families.LAYERS, 0
    for inputs in BATCHES:
        hidden, _ = states(model, inputs)
        for row in range(len(inputs["input_ids"])):
            for place in range(inputs["input_ids"].shape[1]):
                if inputs["attention_mask"][row, place]:
                    tokens += 1
                    for j in range(model_families.LAYERS):
                        x, y = hidden[j][row, place].double(), hidden[j + 1][row, place].double()
                        totals[j] += float(x @ y / x.norm() / y.norm())
    expected = [1 - total / tokens for total in totals]
    assert METHODS["shortgpt"]().scores(clues(model)) == pytest.approx(expected, rel=1e-4)
    assert METHODS["shortgpt"]().plan(clues(model), 3).drop == lowest(expected, 3)
    assert lowest(expected, 3) != (3, 4, 5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_block_of_least_angle(count):
    model, starts = build(), range(model_families.LAYERS - count + 1)
    angles = {start: [] for start in starts}
    for inputs in BATCHES:
        hidden, _ = states(model, inputs)
        for row, mask in enumerate(inputs["attention_mask"].tolist()):
            last = max(place for place, real in enumerate(mask) if real)
            for start in starts:
                x, y = hidden[start][row, last].double(), hidden[start + count][row, last].double()
                angles[start].append(math.acos(float(x @ y / x.norm() / y.norm())) / math.pi)
    expected = [sum(a) / len(a) for a in angles.values()]
    assert distances(Decoder(model), clues(model), count) == pytest.approx(expected, rel=1e-5)
    first = expected.index(min(expected))
    assert METHODS["block"]().plan(clues(model), count).drop == tuple(range(first, first + count))


def test_of_equal_blocks_the_later_one_goes():
    model = build()
    for parameter in model.model.layers.parameters():  # layers that add nothing at all
        parameter.data.zero_()
    assert METHODS["block"]().plan(clues(model), 2).drop == (4, 5)
    assert METHODS["loss"]().plan(clues(model), 2).drop == (4, 5)


def test_held_out_loss_step_by_step():
    model, removed = build(), []

    def loss(smaller):
        total, tokens = 0.0, 0
        for inputs in HELD_OUT:
            with torch.no_grad():
                logits = smaller(**{**inputs, "labels": None}, use_cache=False).logits
            for row, labels in enumerate(inputs["labels"].tolist()):
                for place, label in enumerate(labels):
                    if label != -100:
                        total += float(cross_entropy(logits[row, place - 1].double(), torch.tensor(label)))
                        tokens += 1
        return total / tokens

    for count in range(1, 5):
        tried = {j: loss(without(model, {*removed, j})) for j in range(model_families.LAYERS) if j not in removed}
        removed.append(min(tried, key=tried.get))
        assert METHODS["loss"]().plan(clues(model), count).drop == tuple(sorted(removed))
    alone = [loss(without(model, {j})) for j in range(model_families.LAYERS)]
    assert tuple(sorted(removed[:3])) != lowest(alone, 3)  # what is removed already counts
    assert held_out_loss(Decoder(model), clues(model)) == pytest.approx(loss(model), rel=1e-6)


def test_magnitude():
    model = build()
    expected = []
    for layer in model.model.layers:
        entries = torch.cat([layer.get_submodule(name).weight.detach().flatten() for name in LINEARS])
        expected.append(math.sqrt(sum(x * x for x in entries.tolist())))
    assert METHODS["magnitude"]().scores(clues(model)) == pytest.approx(expected, rel=1e-9)
    assert METHODS["magnitude"]().plan(clues(model), 2).drop == lowest(expected, 2)


def test_taylor():
    model = build()
    weights = [[layer.get_submodule(name).weight for name in LINEARS] for layer in model.model.layers]
    loss = sum(model(**inputs).loss for inputs in BATCHES) / len(BATCHES)
    gradients = iter(torch.autograd.grad(loss, [w for layer in weights for w in layer]))
    expected = [
        sum(float((w.detach().double() * next(gradients).double()).abs().sum()) for w in layer) for layer in weights
    ]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # of a step before; does not count
    with torch.no_grad():
        assert METHODS["taylor"]().scores(clues(model)) == pytest.approx(expected, rel=1e-4)
    assert METHODS["taylor"]().plan(clues(model), 3).drop == lowest(expected, 3)


def test_random_is_seeded_and_nested():
    model, method = build(), METHODS["random"]()
    drawn = {seed: [set(method.plan(clues(model, seed), n).drop) for n in range(1, 6)] for seed in range(8)}
    assert drawn[3] == [set(method.plan(clues(model, 3), n).drop) for n in range(1, 6)]
    assert all(small < large for sets in drawn.values() for small, large in itertools.pairwise(sets))
    assert len({frozenset(sets[2]) for sets in drawn.values()}) > 3
