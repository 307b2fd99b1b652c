"""A short probe of a tiny model."""

from __future__ import annotations

import torch
from tiny_llama import batch, trainable

import gradpruner


def step(model, optimizer, seed, scale=1.0):
    ids = batch(seed)
    (model(input_ids=ids, labels=ids).loss * scale).backward()
    optimizer.step()
    optimizer.zero_grad()


def run(model, steps=4, watch=None, estimator="auto", optimizer=None, **options):
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=1e-3)
    probe = gradpruner.Probe(model, estimator=estimator, **options)
    with probe.watching(optimizer, watch or steps):
        for i in range(steps):
            step(model, optimizer, i)
    return probe.igia
