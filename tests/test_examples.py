"""Every example runs as it stands, on a tiny model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from test_data import make_tokenizer
from training_runs import LAYERS
from transformers import AutoModelForCausalLM, LlamaConfig

import gradpruner

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {"sft_trainer": "trl", "qlora": "bitsandbytes"}


@pytest.fixture
def inputs(tmp_path):
    return write_inputs(tmp_path)


def write_inputs(folder):
    """Model folder, data file and output folder of an example, as strings."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(bos=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
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


@pytest.mark.parametrize("name", ["plain_loop", "trainer", "sft_trainer", "full_fine_tuning", "qlora"])
def test_example(name, inputs, tmp_path, monkeypatch):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*inputs)
    checked(inputs[2])


def test_the_trainer_example_resumes(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(EXAMPLES / "trainer.py"))["main"]
    main(*inputs)
    first = checked(inputs[2]).state_dict()
    (tmp_path / "out").rename(tmp_path / "first")
    for step in (40, 60):  # as if it had been killed while it wrote the second checkpoint
        (tmp_path / "out-run" / f"checkpoint-{step}" / "trainer_state.json").unlink()
    main(*inputs, "--resume")
    again = checked(inputs[2]).state_dict()
    assert all(torch.equal(first[name], tensor) for name, tensor in again.items())


def test_examples_are_short():
    assert all(len(file.read_text().splitlines()) < 60 for file in EXAMPLES.glob("*.py"))
