"""Patches by plain linear algebra in float64, from recorded inputs and outputs."""

from __future__ import annotations

import copy

import model_families
import pytest
import torch
from torch import nn
from uneven_models import batch

from gradpruner.model.decoder import Decoder

LAYERS = model_families.LAYERS
BATCHES = [batch([9, 12, 6, 7], 1), batch([5, 11, 8], 2), batch([10, 8, 13, 12, 6], 3)]
WRITERS = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "falcon": "mlp.dense_4h_to_h"}


class Recorder(nn.Module):
    """In the place of a linear: keeps what enters it."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.entered = linear, []

    def forward(self, x):
        self.entered.append(x)
        return self.linear(x)


def recorded(model, path, layer, end, batches):
    """Of every row: the writer's input, the layer's output, the target; real tokens only, in float64."""
    copied = copy.deepcopy(model).double().eval()
    decoder = Decoder(copied)
    parent, _, leaf = path.rpartition(".")
    recorder = Recorder(decoder.layers[layer].get_submodule(path))
    setattr(decoder.layers[layer].get_submodule(parent), leaf, recorder)
    body = copied.get_submodule(decoder.path.rpartition(".")[0])
    setattr(body, next(n for n in ("norm", "ln_f") if hasattr(body, n)), nn.Identity())  # states as layers leave them
    rows = []
    for inputs in batches:
        with torch.no_grad():
            states = copied(
                input_ids=inputs["input_ids"],
                attention_mask=inputs.get("attention_mask"),
                use_cache=False,
                output_hidden_states=True,
            ).hidden_states
        for row, ids in enumerate(inputs["input_ids"]):
            real = inputs["attention_mask"][row].bool() if "attention_mask" in inputs else torch.ones(len(ids)).bool()
            rows.append([t[row][real] for t in (recorder.entered[-1], states[layer + 1], states[end + 1])])
    return rows


def weighted(rows):
    x, error = [], []
    for entered, left, target in rows:
        for position in range(len(target)):
            size = target[position].norm()
            x.append(entered[position] / size)
            error.append((target[position] - left[position]) / size)
    return torch.stack(x), torch.stack(error)


def least_squares(x, error, ridge):
    """(in, out)"""
    inputs = x.shape[1]
    penalty = ridge * float(x.square().sum()) / inputs  # times the mean square of an input, over all tokens
    stacked = torch.cat([x, penalty**0.5 * torch.eye(inputs, dtype=x.dtype)])
    return torch.linalg.lstsq(stacked, torch.cat([error, torch.zeros(inputs, error.shape[1], dtype=x.dtype)])).solution


def plain_patch(model, path, layer, end, batches):
    """The change (in, out) and the share left on every fifth row."""
    rows = recorded(model, path, layer, end, batches)
    fitted = weighted([row for number, row in enumerate(rows) if number % 5 != 4])
    x, error = weighted([row for number, row in enumerate(rows) if number % 5 == 4])
    shares = {}
    for ridge in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
        change = least_squares(*fitted, ridge)
        shares[ridge] = float((error - x @ change).square().sum() / error.square().sum())
    best = min(shares, key=shares.get)
    return least_squares(*weighted(rows), best), shares[best]


def check(patch, model, path, layer, end, batches):
    change, left = plain_patch(model, path, layer, end, batches)
    assert (patch.weight.layer, patch.weight.name, patch.end) == (layer, f"{path}.weight", end)
    assert patch.change.dtype == torch.float32 and patch.change.shape == patch.weight.shape
    got = (patch.change if patch.weight.transposed else patch.change.T).double()
    assert float((got - change).norm()) < 1e-3 * float(change.norm())
    assert patch.unexplained == pytest.approx(left, rel=1e-3) and 0 < left < 1
