"""Layer after layer gives what one forward of the whole model gives, whatever its layers are called with."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.model.decoder import Decoder
from gradpruner.sparsity import sparsify
from gradpruner.sparsity.layerwise import Layerwise

SIZES = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES)),
    # two kinds of layers: each with masks and positions of its own
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **SIZES,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )
    ),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1, 0], pad_token_id=0)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=67, n_embd=16, n_layer=4, n_head=2)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(
            vocab_size=67, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2
        )
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=67,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        )
    ),
}


def batches_of(count=3):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 67, (1 + i % 2, 9 + i), generator=generator)} for i in range(count)]


@pytest.mark.parametrize("name", MODELS)
def test_layers_alone_compute_what_the_model_does(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    decoder, batches = Decoder(model), batches_of()
    entered = {}
    for j, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, j=j: entered.setdefault(j, []).append(
                (args[0] if args else kwargs["hidden_states"]).clone()
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    expected, walk = {j: list(of) for j, of in entered.items()}, Layerwise(decoder, batches)
    for j in range(len(decoder.layers)):
        for found, wanted in zip(walk._hidden, expected[j], strict=True):
            assert torch.allclose(found, wanted, atol=1e-6), j
        walk.advance()
    assert all("forward" not in vars(layer) for layer in decoder.layers)


@pytest.mark.parametrize("method", ["gblm", "sparsegpt", "dsnot"])
def test_transposed_weights_are_pruned_along_their_inputs(method):
    torch.manual_seed(0)
    model = MODELS["gpt2"]()
    masks = sparsify(model, batches_of(), method=method, pattern="2:4")
    masks.check(model)
    weight = model.transformer.h[1].mlp.c_fc.weight  # (in, out)
    assert ((weight != 0).t().reshape(-1, 4).sum(1) == 2).all()


def test_the_model_may_wait_elsewhere_and_comes_back():
    torch.manual_seed(0)
    here, there = MODELS["llama"](), MODELS["llama"]()
    there.load_state_dict(here.state_dict())
    sparsify(here, batches_of())
    sparsify(there, batches_of(), device="cpu")
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.equal(p, q)


def test_nothing_to_see_and_layers_that_cannot_run_alone():
    with pytest.raises(InvalidArgument, match="batches is empty"):
        Layerwise(Decoder(MODELS["llama"]()), [])
    model = MODELS["llama"]()
    between = model.model.layers[1]
    between.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with pytest.raises(UnsupportedModel, match="between its layers"):
        Layerwise(Decoder(model), batches_of())
    assert all("forward" not in vars(layer) for layer in model.model.layers)
