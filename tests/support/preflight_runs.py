"""A small base, rows, and a run that stops at its first training step."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from word_tokenizers import make_tokenizer

from gradpruner.data.examples import Example
from gradpruner.run.job import Job
from gradpruner.run.run import Run
from gradpruner.training.recipe import Recipe

TRAIN = [Example(f"word {i % 7}:", "abc"[i % 3]) for i in range(30)]
TEST = [Example("word 9:", "b"), Example("word 8:", "c")]
LONG = [*TEST, Example("word 7:", "a long answer of many tokens " * 9)]
RECIPE = Recipe(batch_size=4, learning_rate=1e-3, rank=2)


def config_of(tokenizer, **changed):
    given = dict(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaConfig(**{**given, **changed})


def write(folder, config, tokenizer=None):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


def run(source, out, test=TEST, train=TRAIN, **options):
    job = Job(str(source), 6, RECIPE, **{"probe_steps": 2, "ratio": 0.5, "max_length": 48, **options})
    return Run(job, train, test, out, quiet=True)
