"""Tokens and rows that a model cannot take are refused before training."""

from __future__ import annotations

import pytest
from preflight_runs import RECIPE, TEST, config_of, run, write
from transformers import AutoModelForCausalLM, GPT2Config
from word_tokenizers import make_tokenizer

import gradpruner
from gradpruner.cli.main import main
from gradpruner.data.examples import Example
from gradpruner.data.tokens import tokenize
from gradpruner.errors import InvalidArgument
from gradpruner.run import preflight, stages


def test_a_padding_token_that_the_model_has_no_embedding_of(base_home, tmp_path, trained):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    assert tokenizer.pad_token_id == len(make_tokenizer())
    source = write(tmp_path / "model", config_of(make_tokenizer()), tokenizer)
    for call in (
        lambda: run(source, tmp_path / "out").everything(),
        lambda: stages.tune(*gradpruner.model.load.load_model(source), [], RECIPE),
        lambda: stages.watch(*gradpruner.model.load.load_model(source), [], RECIPE),
        lambda: stages.measure(
            *gradpruner.model.load.load_model(source), TEST, max_length=48, train_on="answer", batch_size=2
        ),
    ):
        with pytest.raises(InvalidArgument, match=r"pads with token \d+, but the model has embeddings for \d+ tokens"):
            call()
    assert not trained


def test_tokens_that_the_model_has_no_embedding_of(base_home, tmp_path, trained):
    tokenizer = make_tokenizer()
    source = write(tmp_path / "model", config_of(tokenizer, vocab_size=100), tokenizer)  # ids of letters are above
    with pytest.raises(InvalidArgument, match=r"data has the token .*embeddings for 100 tokens, 0 to 99"):
        run(source, tmp_path / "out").everything()
    data = tmp_path / "data.txt"
    data.write_text("words and words " * 40)
    for command in (
        ["probe", "--steps", "2", "--out", str(tmp_path / "igia")],
        ["finetune", "--steps", "2", "--out", str(tmp_path / "tuned")],
        ["evaluate"],
        ["evaluate", "--window", "16"],
        ["sparsify", "--max-length", "16", "--samples", "2", "--out", str(tmp_path / "sparse")],
    ):
        assert main([command[0], "--model", str(source), "--data", str(data), *command[1:]]) == 2, command
    assert not trained


def test_tokens_that_never_occur_do_no_harm(base_home):
    """Gemma 3's tokenizer knows one image token more than its text model."""
    model, tokenizer = gradpruner.model.load.load_model(base_home / "model")
    tokenizer.add_tokens(["<image>"])
    assert len(tokenizer) > model.config.vocab_size
    preflight.check_rows(model, tokenizer, tokenize(TEST, tokenizer, max_length=48))
    with pytest.raises(InvalidArgument, match="data has the token '<image>'"):
        preflight.check_rows(model, tokenizer, tokenize([Example("<image>", "a")], tokenizer, max_length=48))


@pytest.mark.parametrize("length", [30, 33])
def test_rows_longer_than_a_table_of_positions(length):
    """30 positions are enough for 30 tokens, and not for their padding to a multiple of 8; RoPE has no table."""
    tokenizer = make_tokenizer()
    rows = [{"input_ids": [5] * length, "labels": [5] * length}]
    sizes = dict(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2)
    table = AutoModelForCausalLM.from_config(GPT2Config(**sizes, n_positions=30))
    with pytest.raises(InvalidArgument, match="positions for 30; expected 24 or less"):
        preflight.check_rows(table, tokenizer, rows)
    preflight.check_rows(AutoModelForCausalLM.from_config(GPT2Config(**sizes, n_positions=40)), tokenizer, rows)
    rope = AutoModelForCausalLM.from_config(config_of(tokenizer, max_position_embeddings=8))
    preflight.check_rows(rope, tokenizer, rows)


def test_an_answer_without_a_token_is_refused():
    class Deaf:
        """Knows no digits, as a tokenizer without an unknown token drops what it does not know."""

        eos_token_id, bos_token_id = 2, 1

        def __call__(self, texts, add_special_tokens=True, verbose=True):
            one = isinstance(texts, str)
            ids = [[3 for c in text if not c.isdigit()] for text in ([texts] if one else texts)]
            return {"input_ids": ids[0] if one else ids}

        def tokenize(self, text):
            return list(text)

    with pytest.raises(InvalidArgument, match=r"the answer of example 2 \('7'\) has no tokens"):
        tokenize([Example("a ", "b"), Example("a ", "7")], Deaf(), max_length=9)
