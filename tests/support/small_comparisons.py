"""A tiny model and data to compare methods on."""

from __future__ import annotations

import json

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from word_tokenizers import make_tokenizer

from gradpruner.compare.experiment import Compare
from gradpruner.run.job import Job
from gradpruner.training.data import Example
from gradpruner.training.recipe import Recipe

LAYERS, STEPS, PROBE, BATCH, HELD_OUT = 6, 8, 3, 2, 6


TRAIN = [Example(f"word {i % 7} of {i}:", "abc"[i % 3]) for i in range(50)]


TEST = [Example(f"word {i % 5} of {i}:", "abc"[i % 3]) for i in range(100, 121)]


def make_home(folder):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):  # no two of them nearly equal
            for parameter in layer.parameters():
                parameter.mul_(1 + 0.5 * (index * 5 % 4) * (parameter.ndim == 2))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [json.dumps({"text": e.prompt, "label": e.answer}) for e in (*TRAIN, *TEST)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


def job(home, **changed):
    recipe = Recipe(**{"batch_size": BATCH, "learning_rate": 1e-2, "rank": 4, **changed.pop("recipe", {})})
    return Job(str(home / "model"), **{"steps": STEPS, "recipe": recipe, "probe_steps": PROBE, **changed})


USED, SEEDS = ["gradpruner", "drop-last", "shortgpt"], (0, 1)


def comparison(home, out, methods=USED, seeds=SEEDS, train=TRAIN, test=TEST, **changed):
    options = {k: changed.pop(k) for k in ("ratios", "held_out", "dense") if k in changed}
    return Compare(
        job(home, **changed), train, test, out, methods=methods, seeds=seeds, **{"held_out": HELD_OUT, **options}
    )
