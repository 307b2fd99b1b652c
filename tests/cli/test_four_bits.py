"""`gradpruner probe --load-in-4bit`, and the cut of the full-precision checkpoint by its plan."""

from __future__ import annotations

import pytest
import torch
from example_runs import LAYERS, write_inputs
from transformers import AutoModelForCausalLM

from gradpruner.cli.main import main
from gradpruner.probe.igia import Igia


@pytest.mark.slow
def test_the_plan_of_a_probe_in_4_bits_cuts_the_full_precision_checkpoint(home, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    igia, plan, out = (str(tmp_path / name) for name in ("igia.safetensors", "plan.json", "small"))
    model, data = write_inputs(tmp_path)[0], str(home / "data.jsonl")  # its widths are whole blocks of bitsandbytes
    words = ["--model", model, "--data", data, "--steps", "3", "--batch-size", "4", "--lr", "1e-2", "--json"]
    assert main(["probe", *words, "--load-in-4bit", "--out", igia]) == 0
    usual = str(tmp_path / "usual.safetensors")
    assert main(["probe", *words, "--out", usual]) == 0
    four, full = Igia.load(igia), Igia.load(usual)
    assert four.steps == full.steps == 3 and four.watched == full.watched
    assert not torch.equal(four.layer_scores(), full.layer_scores())  # the weights were rounded to 4 bits
    assert main(["plan", igia, "--ratio", "0.5", "--out", plan]) == 0
    assert main(["apply", "--model", model, "--plan", plan, "--out", out]) == 0
    small, dense = (AutoModelForCausalLM.from_pretrained(place) for place in (out, model))
    assert small.config.num_hidden_layers == LAYERS // 2 and small.dtype == torch.float32
    first = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(small.get_parameter(first), dense.get_parameter(first))


def test_4_bits_do_not_train_without_adapters(home, tmp_path, capsys):
    words = ["--model", str(home / "model"), "--data", str(home / "data.jsonl"), "--steps", "3", "--rank", "0"]
    assert main(["probe", *words, "--load-in-4bit", "--out", str(tmp_path / "igia.safetensors")]) == 2
    assert "weights of 4 bits do not train" in capsys.readouterr().err
    assert main(["probe", "--model", "smollm2", *words[2:-2], "--load-in-4bit", "--out", str(tmp_path / "i")]) == 2
    assert "does not go with a .gguf file" in capsys.readouterr().err
