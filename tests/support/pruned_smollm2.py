"""SmolLM2-135M without four of its layers, its gaps patched on real text: small, and still a language model."""

from __future__ import annotations

from pathlib import Path

import torch

import gradpruner
from gradpruner.model.load import load_model
from gradpruner.run.demo_data import paragraphs

DROP = [8, 9, 17, 18]
PROMPT = "The list type in Python is"
ROW = 128  # tokens


def text_rows(tokenizer, count: int, start: int = 0) -> torch.Tensor:
    """Rows of `ROW` tokens out of the reference manual of Python. `start`: how many rows before them are left out."""
    ids = tokenizer("\n\n".join(text for text, _ in paragraphs()))["input_ids"]
    return torch.tensor(ids[start * ROW : (start + count) * ROW]).view(count, ROW)


def write_pruned(folder: Path) -> Path:
    """Write the checkpoint in float32."""
    model, tokenizer = load_model("smollm2", dtype=torch.float32)
    plan = gradpruner.Plan(model.config.num_hidden_layers, drop=DROP)
    rows = text_rows(tokenizer, 12)
    patches = gradpruner.fit_patches(model, plan, [{"input_ids": row[None], "labels": row[None]} for row in rows])
    return gradpruner.save(gradpruner.apply(model, plan, patches=patches), folder, tokenizer=tokenizer, plan=plan)
