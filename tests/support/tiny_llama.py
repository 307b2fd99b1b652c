"""A tiny Llama, its adapters and its batches."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

LAYERS, STEPS, RANK = 8, 5, 4


NAMES = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=52,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype)


def lora(model):
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0))


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def batch(seed):
    return torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(seed))
