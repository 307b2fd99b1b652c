"""2:4 models on torch's semi-structured tensors, which are CUDA's; elsewhere it is refused and nothing is changed."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.sparsity import sparsify, to_semi_structured_


def model_of(pattern):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    sparsify(model, [], method="magnitude", pattern=pattern)
    return model


def test_another_pattern_is_refused():
    model = model_of("4:8")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(InvalidArgument, match=r"model\.layers\.0\..* is not 2:4"):
        to_semi_structured_(model)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_processor_is_refused():
    model = model_of("2:4")
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\..*CUDA"):
        to_semi_structured_(model)
    assert all(type(p) is torch.nn.Parameter and p.requires_grad for p in model.parameters())


def test_transposed_weights_are_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    sparsify(model, [], method="magnitude", pattern="2:4")
    with pytest.raises(UnsupportedModel, match="stored as"):
        to_semi_structured_(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's semi-structured tensors are CUDA's")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_computes_what_the_zeros_do(dtype):
    model = model_of("2:4").to("cuda", dtype)
    packed = copy.deepcopy(model)
    assert len(to_semi_structured_(packed)) == 14
    ids = torch.arange(1, 33, device="cuda")[None]
    with torch.no_grad():
        assert torch.allclose(packed(ids).logits, model(ids).logits, atol=2e-2)
