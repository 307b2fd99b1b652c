"""Masks in a file and back, training that keeps to them, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from gradpruner.checkpoint.hold_sparsity import HoldSparsity
from gradpruner.checkpoint.masks import Masks
from gradpruner.checkpoint.save_sparse import MASKS, save_sparse
from gradpruner.cli.main import main
from gradpruner.errors import CheckpointError, InvalidArgument, ModelMismatch
from gradpruner.sparsity import sparsify
from gradpruner.training.finetune import add_adapters
from gradpruner.training.recipe import Recipe


def model_of(layers=2):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=20,
            intermediate_size=28,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=10,
        )
    )


def rows_of(count=8):
    return [{"input_ids": list(range(1 + i, 13 + i)), "labels": list(range(1 + i, 13 + i))} for i in range(count)]


@pytest.fixture
def sparse():
    model = model_of()
    return model, sparsify(model, [{"input_ids": torch.arange(1, 13)[None]}])


def test_file_and_back(sparse, tmp_path):
    model, masks = sparse
    masks.save(tmp_path / "m.safetensors")
    again = Masks.load(tmp_path / "m.safetensors")
    assert again.bits.keys() == masks.bits.keys() and again.widths == masks.widths and again.about == masks.about
    assert all(torch.equal(again.bits[name], masks.bits[name]) for name in masks.bits)
    assert again.about["method"] == "wanda" and again.sparsity() == 0.5
    dense = model_of()
    with pytest.raises(ModelMismatch, match="entries that its mask has taken out"):
        again.check(dense)
    again.apply_(dense)
    for p, q in zip(dense.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ModelMismatch, match="no weight"):
        again.apply_(model_of(layers=1))


def test_files_that_are_none(sparse, tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(InvalidArgument, match="does not exist"):
        Masks.load(path)
    sparse[1].save(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        Masks.load(path)


@pytest.mark.parametrize("hold", [True, False])
def test_training_keeps_to_the_masks(sparse, tmp_path, hold):
    model, masks = sparse
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(
        model=model, args=arguments, train_dataset=rows_of(), callbacks=[HoldSparsity(masks)] if hold else []
    ).train()
    if hold:
        masks.check(model)
        assert float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == 0.5
    else:
        with pytest.raises(ModelMismatch):
            masks.check(model)


def test_masks_of_what_is_zero(sparse):
    model, masks = sparse
    found = Masks.of(model)
    assert found.widths == masks.widths and all(torch.equal(found.bits[name], masks.bits[name]) for name in masks.bits)


def test_masks_under_adapters_and_after_them(sparse):
    model, masks = sparse
    wrapped = add_adapters(model, Recipe(rank=2))
    masks.check(wrapped)
    masks.apply_(wrapped)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
    plain = wrapped.merge_and_unload()
    with pytest.raises(ModelMismatch):
        masks.check(plain)
    masks.apply_(plain)
    masks.check(plain)


def test_a_checkpoint_is_written_only_if_the_model_keeps_to_its_masks(sparse, tmp_path):
    model, masks = sparse
    folder = save_sparse(model, masks, tmp_path / "sparse")
    again = AutoModelForCausalLM.from_pretrained(folder)
    Masks.load(folder / MASKS).check(again)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1)
    with pytest.raises(ModelMismatch):
        save_sparse(model, masks, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_command(home, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("red green blue word 1 word 2 " * 40)
    out = str(tmp_path / "sparse")
    command = [
        "sparsify",
        "--model",
        str(home / "model"),
        "--data",
        str(text),
        "--max-length",
        "16",
        "--samples",
        "4",
        "--method",
        "gblm:p=1",
        "--pattern",
        "2:4",
        "--out",
        out,
    ]
    assert main(command) == 0
    assert "50.00% of 42 weights is zero (gblm:p=1, 2:4)" in capsys.readouterr().out
    assert main(command) == 2 and "exists and is not empty" in capsys.readouterr().err
    unread = [*command, "--model", str(tmp_path / "no model")]  # refused before anything is read
    assert main(unread) == 2 and "exists and is not empty" in capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(out)
    Masks.load(f"{out}/{MASKS}").check(model)
    assert ((model.model.layers[0].mlp.down_proj.weight != 0).view(-1, 4).sum(1) == 2).all()

    assert main(["evaluate", "--model", out, "--data", str(text), "--window", "16", "--json"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed[printed.index("{\n") :])
    assert found["tokens"] == 16 and found["windows"] > 2 and found["perplexity"] > 1
    ids = torch.tensor(_tokens(home, text.read_text())[: 16 * found["windows"]]).view(-1, 16)
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in ids]
    assert found["perplexity"] == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-4)
    for rank in ("0", "4"):  # all weights, and adapters
        tuned = str(tmp_path / f"tuned-{rank}")
        recipe = ["--steps", "3", "--batch-size", "4", "--lr", "1e-2", "--rank", rank]
        data = ["--data", str(home / "data.jsonl"), "--masks", f"{out}/{MASKS}"]
        assert main(["finetune", "--model", out, *data, *recipe, "--out", tuned]) == 0
        trained = AutoModelForCausalLM.from_pretrained(tuned)
        Masks.load(f"{tuned}/{MASKS}").check(trained)
        assert not torch.equal(trained.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    capsys.readouterr()
    assert main(["evaluate", "--model", out, "--data", str(text), "--window", "16000"]) == 2
    assert "expected 16000 or more" in capsys.readouterr().err


def _tokens(home, text):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(home / "model")(text)["input_ids"]
