"""Rows of tokens to train on."""

from __future__ import annotations

import torch


def rows(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 30, (count,), generator=generator).tolist()
    made = [torch.randint(3, 61, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": ids, "labels": ids, "number": number} for number, ids in enumerate(made)]


def plain(ordered):
    return [{k: row[k] for k in ("input_ids", "labels")} for row in ordered]
