"""Batches and clues for the methods, and plain computations on a whole model: no hooks, deep copies."""

from __future__ import annotations

import copy

import torch
from uneven_models import batch

from gradpruner.methods import Clues

PLAIN = ["drop-last", "shortgpt", "block", "random", "magnitude", "taylor", "loss"]
BATCHES = [batch([9, 4, 6], 1), batch([5, 11], 2), batch([3, 8], 3, left=True)]
HELD_OUT = [batch([12, 6], 4), batch([3, 7, 5], 5)]


def clues(model, seed=0):
    return Clues(model, BATCHES, HELD_OUT, seed)


def lowest(scores, count):
    return tuple(sorted(sorted(range(len(scores)), key=lambda j: (scores[j], -j))[:count]))


def states(model, inputs):
    """What enters each layer, what leaves the last one, and what leaves the norm; by running layers one by one."""
    given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    with torch.no_grad():
        out = model(**given, use_cache=False, output_hidden_states=True)
        # transformers gives the last layer's only after the norm: take the norm away for the rest
        body, norm = model.model, model.model.norm
        body.norm = torch.nn.Identity()
        kept = model(**given, use_cache=False, output_hidden_states=True).hidden_states
        body.norm = norm
    return kept, out.hidden_states[-1]


def without(model, removed):
    smaller = copy.deepcopy(model)
    smaller.model.layers = torch.nn.ModuleList([m for j, m in enumerate(smaller.model.layers) if j not in removed])
    smaller.config.num_hidden_layers = len(smaller.model.layers)
    return smaller
