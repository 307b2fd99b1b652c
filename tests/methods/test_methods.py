"""What all methods have in common: the model stays as it was, and what they cannot work on is refused."""

from __future__ import annotations

import model_families
import pytest
import torch
import transformers
from method_inputs import BATCHES, HELD_OUT, PLAIN, clues
from module_states import assert_same, everything
from thinned import every, thinned
from uneven_models import build

from gradpruner import InvalidArgument, Plan, UnsupportedModel
from gradpruner.methods import METHODS, Clues, parse_method
from gradpruner.methods.held_out_loss import held_out_loss
from gradpruner.model.decoder import Decoder

EVERY = [*PLAIN, "laco:combine=2,interval=1"]


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("name", thinned(["llama", "gpt2"], every(2)))
def test_plan_leaves_the_model_as_it_was_and_cut_removes_what_it_says(name, text):
    method = parse_method(text)
    for count in (1, 3, 4):
        model = build(name)
        layers = Decoder(model).layers
        model.train()
        layers[1].eval()
        for index, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(index % 3 > 0)
            parameter.grad = torch.ones_like(parameter) if index % 2 else None
        before, original = everything(model), list(layers)
        plan = method.plan(clues(model), count)
        assert_same(everything(model), before)
        assert len(plan.removed) == count and plan == method.plan(clues(model), count)
        gone = sum(p.numel() for j in plan.removed for p in original[j].parameters())
        assert plan.parameter_ratio == gone / sum(p.numel() for p in model.parameters())
        assert Plan.from_dict(plan.to_dict()) == plan
        ids = model_families.tokens()
        model.eval()
        expected = model_families.skipped_logits(model, plan.removed, ids)
        smaller = method.cut(clues(model), plan)
        assert smaller is model and list(Decoder(model).layers) == [original[j] for j in plan.kept]
        with torch.no_grad():
            same = torch.allclose(smaller(input_ids=ids).logits, expected, atol=1e-5)
        assert same == (not plan.merge)


@pytest.mark.parametrize("text", EVERY)
def test_count_out_of_range(text):
    model, seen = build(), []
    model.model.register_forward_hook(lambda *_: seen.append(1))
    for count in (0, -1, model_families.LAYERS, 99, 2.0):
        with pytest.raises(InvalidArgument, match=r"count|layers to remove"):
            parse_method(text).plan(clues(model), count)
    assert not seen  # nothing is computed first


@pytest.mark.parametrize("text", ["shortgpt", "block", "taylor", "laco", "loss"])
def test_batches_are_wanted(text):
    with pytest.raises(InvalidArgument, match="held_out is empty" if text == "loss" else "batches is empty"):
        parse_method(text).plan(Clues(build(), [], [], 0), 1)


@pytest.mark.parametrize("text", ["taylor", "loss"])
def test_labels_are_wanted(text):
    bare = [{k: v for k, v in inputs.items() if k != "labels"} for inputs in BATCHES]
    model = build()
    before = everything(model)
    with pytest.raises(InvalidArgument, match="labels"):
        parse_method(text).plan(Clues(model, bare, bare, 0), 1)
    assert_same(everything(model), before)


def test_an_answer_is_wanted_to_hold_out():
    unlabelled = {**HELD_OUT[0], "labels": torch.full_like(HELD_OUT[0]["labels"], -100)}
    with pytest.raises(InvalidArgument, match="no token has a label"):
        METHODS["loss"]().plan(Clues(build(), [], [unlabelled], 0), 1)
    decoder = Decoder(build())
    with_and_without = [Clues(decoder.base, [], held_out, 0) for held_out in (HELD_OUT, [*HELD_OUT, unlabelled])]
    assert len({held_out_loss(decoder, given) for given in with_and_without}) == 1


def test_an_encoder_decoder_is_refused():
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    for text in ("shortgpt", "block", "laco:combine=2,low=0", "loss"):
        with pytest.raises(UnsupportedModel, match="an encoder-decoder"):
            parse_method(text).plan(clues(model), 1)


@pytest.mark.parametrize("text", ["magnitude", "taylor", "laco"])
def test_packed_weights_are_refused(text):
    model = build()
    model.model.layers[3].mlp.up_proj.weight.quant_state = object()  # as bitsandbytes marks its own
    with pytest.raises(UnsupportedModel, match=r"mlp.up_proj.weight .*is quantised"):
        parse_method(text).plan(clues(model), 2)


@pytest.mark.parametrize("text", ["shortgpt", "block", "laco", "loss"])
def test_without_a_mask_every_token_is_real(text):
    whole = [{**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])} for inputs in BATCHES]
    bare = [{k: v for k, v in inputs.items() if k != "attention_mask"} for inputs in BATCHES]
    plans = [parse_method(text).plan(Clues(build(), given, given, 0), 2) for given in (whole, bare)]
    assert plans[0] == plans[1]


def test_hidden_states_that_are_not_one_vector_a_token_are_refused():
    wrong = [{**BATCHES[0], "attention_mask": torch.ones(3, 1, 9, 9)}]
    for text in ("shortgpt", "block"):
        with pytest.raises(UnsupportedModel, match="one vector per token"):
            parse_method(text).plan(Clues(build(), wrong, wrong, 0), 1)
