"""Training in 4 bits: adapters beside NF4 weights, added to the full-precision weights in the end."""

from __future__ import annotations

import json

import pytest
import torch
from example_runs import write_inputs
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import gradpruner
from gradpruner.cli.main import main
from gradpruner.errors import InvalidArgument
from gradpruner.model.four_bits import SWITCH
from gradpruner.model.load import load_model
from gradpruner.model.modes import evaluating

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
ROWS = dict(input_ids=torch.arange(8).reshape(1, 8))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def words(inputs, tmp_path):
    return ["--model", inputs[0], "--data", inputs[1], "--batch-size", "2", "--lr", "1e-2", "--json", "--load-in-4bit"]


def gradient_below(model):
    """The gradient that the lowest adapter gets through all layers above it."""
    model(**ROWS, labels=ROWS["input_ids"]).loss.backward()
    return next(p.grad.clone() for name, p in model.named_parameters() if "lora_B" in name)


def adapted(model):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).train()


def test_an_evaluation_leaves_the_gradients_of_4_bit_weights_as_they_are(inputs):
    """On a CPU with AVX512-BF16, bitsandbytes would rearrange the weights, and no gradient would pass."""
    model = adapted(load_model(inputs[0], load_in_4bit=True).model)
    before = gradient_below(model)
    model.zero_grad()
    model.eval()
    with torch.no_grad():
        model(**ROWS)
    assert torch.equal(gradient_below(model.train()), before) and before.any()


@pytest.mark.slow
def test_a_model_of_the_users_own(inputs):
    from transformers import BitsAndBytesConfig

    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = adapted(AutoModelForCausalLM.from_pretrained(inputs[0], quantization_config=packed))
    if not any(getattr(module, SWITCH, False) for module in model.modules()):
        pytest.skip("bitsandbytes rearranges no weights on this CPU")
    before = gradient_below(model)
    model.zero_grad()
    with evaluating(model):
        model(**ROWS)
    assert torch.equal(gradient_below(model), before)
    model.eval()
    with torch.no_grad():
        model(**ROWS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(InvalidArgument, match="no gradient passes through it"):
        gradpruner.Probe(model.train()).start(optimizer, 2)


@pytest.mark.slow
def test_a_run_in_4_bits_ends_in_full_precision(words, inputs, tmp_path, capsys):
    call = ["run", *words, "--steps", "8", "--probe-steps", "3", "--ratio", "0.4", "--out", str(tmp_path / "out")]
    assert main(call) == 0
    results = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in results["rows"]] == ["dense", "pruned"]
    source = AutoModelForCausalLM.from_pretrained(inputs[0])
    for name in ("dense", "cut", "model"):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name)
        assert saved.dtype == torch.float32 and not hasattr(saved.config, "quantization_config")
        # what is in it is the source and adapters of a low rank, not weights that went through 4 bits
        change = saved.get_parameter(WEIGHT) - source.get_parameter(WEIGHT)
        assert 0 < torch.linalg.matrix_rank(change.double(), rtol=1e-4) <= 8 * (1 + 4), name
    for row, name in zip(results["rows"], ("dense", "model"), strict=True):
        again = ["evaluate", "--model", str(tmp_path / "out" / name), "--data", inputs[1], "--batch-size", "2"]
        assert main([*again, "--json"]) == 0 and json.loads(capsys.readouterr().out)["perplexity"] > 0, row
    assert main(call) == 0  # finished: nothing is made again
    assert json.loads(capsys.readouterr().out) == results


@pytest.mark.slow
def test_cuts_are_tried_in_4_bits(words, tmp_path, capsys):
    call = ["run", *words, "--steps", "6", "--probe-steps", "2", "--ratio", "auto", "--max-lost", "1", "--no-dense"]
    assert main([*call, "--out", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["auto"]["trials"]
    assert not list((tmp_path / "out").glob(".gradpruner-*"))


@pytest.mark.slow
def test_a_fine_tune_in_4_bits_ends_in_full_precision(words, inputs, tmp_path):
    out = tmp_path / "out"
    assert main(["finetune", *words, "--steps", "3", "--out", str(out)]) == 0
    saved, source = (AutoModelForCausalLM.from_pretrained(place) for place in (out, inputs[0]))
    change = saved.get_parameter(WEIGHT) - source.get_parameter(WEIGHT)
    assert 0 < torch.linalg.matrix_rank(change.double(), rtol=1e-4) <= 8


@pytest.mark.parametrize(
    ("command", "more", "said"),
    [
        ("run", ["--rank", "0"], "weights of 4 bits do not train"),
        ("run", ["--merge", "1"], "load_in_4bit with merge = 1"),
        ("run", ["--preset", "paper"], "load_in_4bit with merge = 'auto'"),
        ("finetune", ["--rank", "0"], "weights of 4 bits do not train"),
        ("finetune", ["--masks", "masks"], "--masks does not go with --load-in-4bit"),
        ("finetune", ["--model", "smollm2"], "does not go with a .gguf file"),
        ("run", ["--model", "smollm2"], "does not go with a .gguf file"),
    ],
)
def test_what_cannot_be_is_refused(command, more, said, words, tmp_path, capsys):
    assert main([command, *words, "--steps", "4", *more, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
