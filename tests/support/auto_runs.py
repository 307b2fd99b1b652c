"""Tiny runs that choose their ratio themselves."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from word_tokenizers import make_tokenizer

from gradpruner.data.examples import Example
from gradpruner.presets import Preset
from gradpruner.run.job import Job
from gradpruner.run.run import Run
from gradpruner.training.recipe import Recipe


def make_source(folder):
    folder = folder / "model"
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


EXAMPLES = [Example(f"word {i % 13}", "red" if i % 13 < 6 else "green") for i in range(40)]  # each three times


RECIPE = Recipe(batch_size=4, learning_rate=1e-2)
SETTINGS = vars(Preset()).keys()


def run(source, folder, **options):
    preset = Preset.of(**{name: options.pop(name) for name in SETTINGS & options.keys()})
    terms = {"ratio": "auto", "probe_steps": 3, "check_steps": 2, "check_rows": 3, **options}
    job = Job(source, 9, RECIPE, preset=preset, **terms)
    return Run(job, EXAMPLES, [Example("word 99", "blue")], folder, quiet=True)
