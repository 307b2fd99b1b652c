"""Tiny random models of the families the package promises to prune. Layers 1, 3 and 4 of 6 are removed in tests."""

from __future__ import annotations

import torch
import transformers as hf

from gradpruner.model.decoder import Decoder
from gradpruner.model.parameter_counts import count_parameters
from gradpruner.probe.igia import Igia
from gradpruner.probe.importance import Dense

LAYERS = 6
BASE = dict(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    bos_token_id=1,
    eos_token_id=2,
)
GQA = dict(**BASE, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64, pad_token_id=0)
MIXED = [
    "sliding_attention",
    "full_attention",
    "sliding_attention",
    "full_attention",
    "full_attention",
    "sliding_attention",
]

CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**GQA, attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: hf.LlamaConfig(**GQA, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**GQA, sliding_window=5),
    "qwen2": lambda: hf.Qwen2Config(**GQA, use_sliding_window=True, sliding_window=5, max_window_layers=3),
    "qwen3": lambda: hf.Qwen3Config(**GQA, head_dim=8, use_sliding_window=True, sliding_window=5, layer_types=MIXED),
    "gemma2": lambda: hf.Gemma2Config(**GQA, head_dim=8, sliding_window=5),
    "gemma3": lambda: hf.Gemma3TextConfig(**GQA, head_dim=8, sliding_window=5, layer_types=MIXED),
    "phi3": lambda: hf.Phi3Config(**GQA, sliding_window=5),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**BASE, intermediate_size=64, max_position_embeddings=64),
    "opt": lambda: hf.OPTConfig(**BASE, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0),
    "mixtral": lambda: hf.MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "falcon": lambda: hf.FalconConfig(**BASE, new_decoder_architecture=True, num_kv_heads=2),
    "olmo2": lambda: hf.Olmo2Config(**GQA),
    "smollm3": lambda: hf.SmolLM3Config(**GQA, no_rope_layers=[1, 1, 1, 0, 1, 1], use_sliding_window=False),
    "gpt-oss": lambda: hf.GptOssConfig(**GQA, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=5),
    "qwen3-moe-sparse-step": lambda: hf.Qwen3MoeConfig(
        **GQA, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=2
    ),
    "qwen3-moe-mlp-only": lambda: hf.Qwen3MoeConfig(
        **GQA, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[4, 5]
    ),
    "qwen3-next": lambda: hf.Qwen3NextConfig(
        **GQA,
        head_dim=8,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_conv_kernel_dim=2,
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
    ),
    "cohere2": lambda: hf.Cohere2Config(**GQA, sliding_window=5, layer_types=MIXED),
    "deepseek-v3": lambda: hf.DeepseekV3Config(
        **{**GQA, "num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=3,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        v_head_dim=8,
        qk_nope_head_dim=8,
        n_shared_experts=1,
    ),
}

# a rule on the layer's index that no config can carry over to fewer layers
REFUSED = {
    "gpt2-inverse-index": lambda: hf.GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "diffllama": lambda: hf.DiffLlamaConfig(**GQA),
}


def build(config, seed: int = 0):
    """A random model whose norms, biases and weights are all different, so that a mix-up shows."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tokens(rows: int = 2, length: int = 14, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def skipped_logits(model, removed, ids):
    """The oracle: the dense model with those layers' outputs replaced by their inputs, nothing renumbered."""
    import re

    handles = []
    count = model.config.get_text_config().num_hidden_layers
    layers = next(
        m
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.ModuleList) and len(m) == count and not re.search(r"\d", n)
    )

    def hook(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if torch.is_tensor(output) else (hidden, *output[1:])

    for index in removed:
        handles.append(layers[index].register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def igia_of(model, seed=0):
    """Random importance of every weight: what is under test here is the surgery."""
    decoder = Decoder(model)
    generator = torch.Generator().manual_seed(seed)
    return Igia(
        model=decoder.fingerprint(),
        estimator="gradient",
        layers=len(decoder.layers),
        weights=tuple(decoder.weights),
        square_norms=torch.rand(2, len(decoder.weights), generator=generator, dtype=torch.float64),
        structures=tuple(decoder.structure(j) for j in range(len(decoder.layers))),
        **count_parameters(decoder),
        importance={(w.layer, w.name): Dense(torch.rand(w.shape, generator=generator)) for w in decoder.weights},
    )


def generate(model, ids, cache):
    torch.manual_seed(0)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        use_cache=cache,
        pad_token_id=0,
    )
