"""A vision-language model as a whole: loaded, trained on text, cut, saved with its vision tower and processor files."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlavaConfig, T5Config, ViTConfig
from word_tokenizers import make_tokenizer

from gradpruner.cli.main import main
from gradpruner.errors import InvalidArgument
from gradpruner.model.load import auto_class, load_model

PROCESSOR = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}}


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """The folder of a tiny model."""
    folder, tokenizer = tmp_path_factory.mktemp("llava"), make_tokenizer()
    torch.manual_seed(0)
    text = {
        **{"model_type": "llama", "vocab_size": len(tokenizer) + 2, "hidden_size": 32, "intermediate_size": 48},
        **{"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    }
    vision = {
        **{"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 16},
    }
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=len(tokenizer))
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.mark.slow
def test_a_fine_tune_on_text_keeps_the_vision_tower(llava, home, tmp_path):
    words = ["--steps", "2", "--batch-size", "2", "--lr", "1e-2", "--out", str(tmp_path / "out"), "--json"]
    assert main(["finetune", "--model", str(llava), "--data", str(home / "data.jsonl"), *words]) == 0
    before, after = load_model(llava).model, load_model(tmp_path / "out").model
    assert type(after) is type(before)
    changed = {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed and all("language_model.layers" in name for name in changed)
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == PROCESSOR


@pytest.mark.slow
@pytest.mark.in_ci
def test_a_run_cuts_the_text_tower(llava, home, tmp_path):
    words = ["--steps", "6", "--probe-steps", "2", "--batch-size", "2", "--ratio", "0.5", "--no-dense", "--json"]
    out = tmp_path / "out"
    assert main(["run", "--model", str(llava), "--data", str(home / "data.jsonl"), *words, "--out", str(out)]) == 0
    small, dense = AutoModelForImageTextToText.from_pretrained(out / "model"), load_model(llava).model
    assert small.config.text_config.num_hidden_layers == 3 and small.config.vision_config.num_hidden_layers == 2
    vision = {n: p for n, p in small.named_parameters() if "vision" in n or "projector" in n}
    assert vision and all(torch.equal(p, dense.get_parameter(n)) for n, p in vision.items())
    for folder in ("cut", "model"):
        assert json.loads((out / folder / "preprocessor_config.json").read_text()) == PROCESSOR


def test_a_model_that_is_neither_is_named():
    assert auto_class(LlavaConfig()) is AutoModelForImageTextToText
    assert auto_class(LlavaConfig().text_config) is AutoModelForCausalLM
    for config in (T5Config(), ViTConfig()):
        with pytest.raises(InvalidArgument, match=type(config).__name__):
            auto_class(config)
