"""What an example is given, and what it must leave."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from training_runs import LAYERS
from transformers import AutoModelForCausalLM, LlamaConfig
from word_tokenizers import make_tokenizer

import gradpruner


def write_inputs(folder):
    """Model folder, data file and output folder of an example, as strings."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(bos=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"text": f"row {i} says that {i} and {i} are {2 * i}"} for i in range(80)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "model"), str(folder / "texts.jsonl"), str(folder / "out")


def checked(folder):
    """The checkpoint that an example wrote, by the stock class."""
    plan = gradpruner.Plan.load(Path(folder) / "gradpruner.json")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert plan.layers == LAYERS and model.config.num_hidden_layers == len(plan.kept) == 5
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    return model
