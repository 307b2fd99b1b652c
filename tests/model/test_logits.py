"""When two models' answers count as the same."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import gradpruner
from gradpruner.model.logits import LONGEST, PADDING, TOKENS, differ, logits_of, longer_input, windows_of


@pytest.mark.parametrize(
    ("gap", "dtype", "same"),
    [
        (1.1e-5, torch.float32, True),  # what a weight's place in memory was seen to do
        (1e-4, torch.float32, False),  # what a rule of attention was seen to do
        (2e-3, torch.bfloat16, True),
        (2e-2, torch.bfloat16, False),
    ],
)
def test_rounding_is_told_from_another_answer(gap, dtype, same):
    expected = torch.linspace(-1, 1, 50)[None]
    actual = expected.clone()
    actual[0, 7] += gap
    assert (differ(expected, actual, dtype) is None) is same


def test_what_is_not_finite_must_be_so_in_both():
    expected = torch.tensor([[1.0, float("-inf")]])
    assert differ(expected, expected.clone(), torch.float32) is None
    assert differ(expected, torch.tensor([[1.0, 2.0]]), torch.float32) == float("inf")


class Layer(LlamaDecoderLayer):
    """Every other layer, by its index in the attention: sees a window only, or sees what is padded too."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        if self.self_attn.layer_idx % 2:
            rows, columns = attention_mask.shape[-2:]
            distance = torch.arange(columns - rows, columns)[:, None] - torch.arange(columns)
            least = torch.finfo(torch.float32).min
            if self.rule == "window":
                attention_mask = attention_mask.masked_fill(distance >= self.window, least)
            else:
                attention_mask = torch.zeros_like(attention_mask).masked_fill(distance < 0, least)
        return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)


class Ruled(LlamaForCausalLM):
    """A model whose config shows nothing of the rule."""

    def __init__(self, config):
        super().__init__(config)
        for i in range(config.num_hidden_layers):
            layer = Layer(config, i)
            layer.rule, layer.window = config.rule, config.sliding_window
            self.model.layers[i] = layer
        self.post_init()


def ruled(rule="window", window=20, positions=64, kind=Ruled):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        attn_implementation="eager",
        initializer_range=0.5,
    )
    config.rule, config.sliding_window = rule, window
    return kind(config)


@pytest.mark.parametrize("rule", ["window", "padding"])
def test_a_rule_on_the_index_that_is_felt_past_a_window_is_refused(rule):
    model = ruled(rule)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(gradpruner.UnsupportedModel, match="depends on its layers in a way its configuration does not"):
        gradpruner.apply(model, gradpruner.Plan(6, drop=[1]))
    assert len(model.model.layers) == 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert gradpruner.apply(model, gradpruner.Plan(6, drop=[1, 2])).config.num_hidden_layers == 4  # even stays even


def test_an_input_is_longer_and_padded_only_where_the_config_names_a_window():
    plain = ruled(window=None, kind=LlamaForCausalLM)
    assert logits_of(plain).shape[1] == TOKENS + 1  # and one with a cache
    seen = []
    windowed = ruled(kind=LlamaForCausalLM)
    windowed.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["input_ids"].shape[1], kwargs["attention_mask"])),
        with_kwargs=True,
    )
    assert logits_of(windowed).shape[1] == 2 * TOKENS + 1
    tokens, mask = seen[-1]
    assert tokens == 20 + PADDING + TOKENS
    assert mask[0, :PADDING].tolist() == [0] * PADDING and mask[0, PADDING:].all()


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"sliding_window": 20}, {"sliding_window": 20}),
        ({"attention_chunk_size": 16, "sliding_windows": [4, 8]}, {"attention_chunk_size": 16, "sliding_windows": 8}),
        ({"sliding_window": 64}, {}),  # as long as the longest input
        ({"max_window_layers": 3, "num_local_experts": 4, "local_layer_ids": [1, 3]}, {}),  # counts of other things
    ],
)
def test_windows_are_known_by_their_names(fields, found):
    config = LlamaConfig(max_position_embeddings=64)
    for name, value in fields.items():
        setattr(config, name, value)
    assert windows_of(config) == found


def test_a_window_that_is_too_long_to_be_passed_is_said(caplog):
    model = ruled(window=2 * LONGEST, positions=4 * LONGEST, kind=LlamaForCausalLM)
    with caplog.at_level(logging.WARNING):
        gradpruner.apply(model, gradpruner.Plan(6, drop=[1]))
    assert f"The windows {{'sliding_window': {2 * LONGEST}}} of the config are longer" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        gradpruner.apply(ruled(kind=LlamaForCausalLM), gradpruner.Plan(6, drop=[1]))
    assert not caplog.records


def test_models_with_other_windows_are_asked_the_same():
    """A cut to layers of full attention alone takes the window out of the config."""
    dense, small = ruled(kind=LlamaForCausalLM), ruled(kind=LlamaForCausalLM)
    small.config.sliding_window = small.config.max_position_embeddings
    tokens = longer_input(dense.config)
    assert tokens == 20 + PADDING + TOKENS and longer_input(small.config) == 0
    assert differ(logits_of(dense, tokens), logits_of(small, tokens), torch.float32) is None
    assert differ(logits_of(dense), logits_of(small), torch.float32) == float("inf")
