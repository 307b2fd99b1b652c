"""Tiny runs of `gradpruner.run.run`, and a way to interrupt one in the middle of a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from word_tokenizers import make_tokenizer

from gradpruner.data.examples import Example
from gradpruner.run.job import Job
from gradpruner.run.run import Run
from gradpruner.training.recipe import Recipe
from gradpruner.training.row_trainer import StepRecorder

LAYERS, STEPS, PROBE = 4, 16, 4
TRAIN = [Example(f"word {i % 7}:", "abc"[i % 3]) for i in range(30)]
TEST = [Example(f"word {i % 5}:", "abc"[i % 3]) for i in range(6)]


def write_model(folder: Path, seed: int = 0) -> str:
    """A checkpoint whose layers differ, with dropout, so that a resumed run must restore random states."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_dropout=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def job_of(source: str, *, recipe=None, **options) -> Job:
    recipe = Recipe(**{"batch_size": 2, "learning_rate": 1e-2, "rank": 2, **(recipe or {})})
    return Job(source, **{"steps": STEPS, "recipe": recipe, "probe_steps": PROBE, "ratio": 0.5, **options})


def run(source: str, folder: Path, **options) -> Run:
    return Run(job_of(source, **options), TRAIN, TEST, folder, quiet=True)


def interrupting(monkeypatch, at: int | None = None) -> list[int]:
    """Note the number of every optimizer step. Interrupt the training in step `at`, after the step itself."""
    steps: list[int] = []
    real = StepRecorder.on_step_end

    def watched(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        real(self, args, state, control, **kwargs)
        if state.global_step == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(StepRecorder, "on_step_end", watched)
    return steps


def stopped(monkeypatch, at, action) -> None:
    """Call `action` and interrupt its training in step `at`."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupting(patch, at)
        action()
