"""A model folder, data, an igia and a plan, made by the commands themselves."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from word_tokenizers import make_tokenizer

from gradpruner.cli.main import main


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkpoint, data, an igia and a plan, made by the commands themselves."""
    return make_home(tmp_path_factory.mktemp("home"))


def make_home(folder):
    """Fill a folder as `home` does."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"text": f"word {i % 7}", "category": WORDS[i % 3]} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, data = str(folder / "model"), str(folder / "data.jsonl")
    assert (
        main(
            [
                "probe",
                "--model",
                model,
                "--data",
                data,
                "--steps",
                "4",
                "--batch-size",
                "4",
                "--lr",
                "1e-2",
                "--out",
                str(folder / "igia.safetensors"),
                "--json",
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "plan",
                str(folder / "igia.safetensors"),
                "--count",
                "3",
                "--merge",
                "1",
                "--out",
                str(folder / "plan.json"),
                "--json",
            ]
        )
        == 0
    )
    return folder


WORDS = ["red", "green", "blue"]
