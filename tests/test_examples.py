"""Every example runs as it stands, on a tiny model."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from example_runs import checked, write_inputs
from peft import LoraConfig, get_peft_model
from thinned import IN_CI
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
README = EXAMPLES.parent / "README.md"
NEEDS = {"sft_trainer": "trl", "qlora": "bitsandbytes"}


@pytest.fixture
def inputs(tmp_path):
    return write_inputs(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "trainer",
        *(pytest.param(name, marks=IN_CI) for name in ("plain_loop", "sft_trainer", "full_fine_tuning", "qlora")),
    ],
)
def test_example(name, inputs, tmp_path, monkeypatch):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*inputs)
    checked(inputs[2])


@pytest.mark.slow
@pytest.mark.in_ci
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


def python_block(heading: str) -> str:
    """The first Python block under a heading of the README."""
    section = README.read_text().partition(f"\n## {heading}\n")[2]
    return section.partition("```python\n")[2].partition("```")[0]


def test_the_quickstart_of_the_readme(tmp_path, monkeypatch, capsys):
    """Word for word, in an empty folder; and the README shows what it prints."""
    monkeypatch.chdir(tmp_path)
    exec(python_block("Quickstart"), {})
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line.split(" ")[0] for line in printed] == ["dense:", "removes", "pruned:"]
    shown = README.read_text().partition("\n## Quickstart\n")[2].split("```")[3].strip().splitlines()
    assert printed[0] == shown[0] and printed[2] == shown[2]  # which layers are removed may differ by the machine
    assert [line.partition(": drops")[0] for line in printed] == [line.partition(": drops")[0] for line in shown]


def test_the_loop_of_the_readme(inputs, tmp_path, monkeypatch):
    """The block under "In your own loop", word for word: its scheduler goes on after the cut."""
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
    }
    exec(python_block("In your own loop"), known)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (1 - 45 / 100))
    checked("smaller")
