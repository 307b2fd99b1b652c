"""Every example runs as it stands, on a tiny model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_data import make_tokenizer
from training_runs import LAYERS
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import gradpruner

EXAMPLES = Path(__file__).parent.parent / "examples"
README = EXAMPLES.parent / "README.md"
NEEDS = {"sft_trainer": "trl", "qlora": "bitsandbytes"}


@pytest.fixture
def inputs(tmp_path):
    return write_inputs(tmp_path)


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


def test_the_loop_of_the_readme(inputs, tmp_path, monkeypatch):
    """The block under "In your own loop", word for word: its scheduler goes on after the cut."""
    section = README.read_text().partition("\n## In your own loop\n")[2]
    block = section.partition("```python\n")[2].partition("```")[0]
    tokenizer = AutoTokenizer.from_pretrained(inputs[0])
    dense = AutoModelForCausalLM.from_pretrained(inputs[0])
    model = get_peft_model(dense, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
    batch = dict(tokenizer("row 1 says that 1 and 1 are 2", return_tensors="pt"))
    batch["labels"] = batch["input_ids"]
    monkeypatch.chdir(tmp_path)
    known = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "tokenizer": tokenizer,
        "loader": [batch] * 45,
        "batches": [batch] * 5,
    }
    exec(block, known)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (1 - 90 / 100))
    checked("smaller")
