"""A tiny configuration of any architecture that transformers registers for text: fields shrunk by their names."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import transformers as hf
from transformers.models.auto import modeling_auto as auto

LAYERS = 6
VOCABULARY = 97
REGISTERED = {
    "causal": (hf.AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "image-text": (hf.AutoModelForImageTextToText, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    "seq2seq": (hf.AutoModelForSeq2SeqLM, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
}

KEEP = object()
# the first pattern that matches a whole field name gives its value
RULES: tuple[tuple[str, Any], ...] = (
    (r"(num_hidden|n|num|decoder|num_decoder|encoder|num_encoder)_layers?", LAYERS),
    (r"(lm_head_|output_)?vocab_size|vocab_size_per_layer_input|decoder_vocab_size|char_vocab_size", VOCABULARY),
    (r"hidden_size_per_layer_input|.*_rank|rotary_dim|qk_rope_head_dim|num_buckets", 8),
    (r"(ssm_)?state_size|mamba_d_state", 8),
    (r"(backbone_|decoder_|text_)?hidden_size|d_model|n_embd|emb(ed)?_dim|embedding_(size|dim)", 32),
    (r"word_embed_proj_dim", 32),
    (r"(input|output)_embedding_size|out(put)?_dim|projection_dim|mm_hidden_size|out_hidden_size|lru_width", 32),
    (r"(swa_)?num_(key_value|kv)_heads|linear_num_key_heads|.*_num_key_value_heads", 2),
    (r"(encoder_|decoder_|num_encoder_|num_decoder_|num_|n_|swa_num_|global_num_)?(attention_)?heads?", 4),
    (r"linear_num_(value_)?heads|num_head", 4),
    (r"\w*head_dim(ension)?|d_kv|kv_channels|d_head|dim_head|attention_head_size|linear_\w+_head_dim", 8),
    (r"\w*(intermediate|ffn|ff|feed_forward|inner|mlp)_(size|dim|hidden_size)|d_ff|n_inner|dim_ff|dff|d_inner", 64),
    (r"\w*experts_per_tok(en)?|moe_topk|top_k_experts|moe_k|num_experts_per_token", 2),
    (r"(n_routed|num_local|num|moe_num|n|num_routed)_experts", 4),
    (r"n_group|topk_group", 1),
    (r"index_topk", 8),
    (r"max_position_embeddings|n_positions|max_\w*_?positions|n_ctx", 64),
    (r"max_seq_len\w*|max_sequence_length|context_length", 64),
    (r"(sliding_window(_size)?|attention_window_size|local_attention|window_size|attention_chunk_size)", 5),
    (r"(chunk_size|mamba_chunk_size)", 8),
    (r"(image_size|force_image_size)", 16),
    (r"\w*(patch|tubelet)_size", 8),
)

BERT = dict(
    model_type="bert",
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
)
HALF = ["sliding_attention", "full_attention"] * 3
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [2, 1, 1]}
# by model type: what the rules on names cannot know
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [2, 5]},
    "blip_2_qformer": {"encoder_hidden_size": 32},
    "blt_local_encoder": {"hidden_size_global": 64},
    "blt_local_decoder": {"hidden_size_global": 32},
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "chameleon_vqgan": {"base_channels": 32},
    "cohere_compass_text": {"layer_types": HALF, "rope_parameters": {kind: ROPE for kind in HALF[:2]}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [16, 32]},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "emu3": {"vocabulary_map": {"<image>": 90}},
    "emu3_vqgan": {"base_channels": 32},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [16, 16]},
    "encoder-decoder": {
        "encoder": BERT,
        "decoder": {**BERT, "is_decoder": True, "add_cross_attention": True},
        "decoder_start_token_id": 1,
        "pad_token_id": 0,
    },
    "glm5_next_text": {"qk_rope_head_dim": 0, "index_kpool": 2},
    "granite4_vision": {"deepstack_layer_map": [[-1, 1], [-2, 2]], "spatial_target_layers": [0, 1, 2, 3]},
    "janus_vqgan": {"base_channels": 32},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h_omni": {"video_temporal_patch_size": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 91, "vision_end_token_id": 92},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 91, "vision_end_token_id": 92},
    "radio": {"video_temporal_patch_size": 2},
    "step3p5": {"sliding_window": 5, "layer_types": HALF},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "udop": {"decoder_start_token_id": 0},
    "wavtokenizer_encoder": {"codebook_dim": 32},
    "cosmos3_edge_text": {"rope_parameters": MROPE},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"n_input_layers": 2, "n_output_layers": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 3},
    "fsmt": {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": HALF},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": HALF},
    "gemma4_unified_text": {"num_kv_shared_layers": 2, "layer_types": HALF},
    "glm4v_text": {"rope_parameters": MROPE},
    "glm4v_moe_text": {"rope_parameters": MROPE, "head_dim": 16},
    "glm_ocr_text": {"rope_parameters": MROPE, "head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2},
    "hunyuan_vl_text": {"head_dim": 8, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 1, 1]}},
    "hy_v4_vl_text": {"rope_parameters": MROPE},
    "inkling2_loop_text": {"n_layers_per_attn_res_block": 2, "loop_layer_index_start": 2, "loop_layer_index_end": 4},
    "kosmos_2_5_text_model": {"layers": LAYERS},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention"] * 2},
    "paddleocr_vl_text": {"rope_parameters": MROPE},
    "qwen2_vl_text": {"rope_parameters": MROPE},
    "qwen2_5_vl_text": {"rope_parameters": MROPE},
    "qwen2_5_omni_text": {"rope_parameters": MROPE},
    "reformer": {"is_decoder": True, "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16)},
    "rwkv": {"rescale_every": 2},
    "t5": {"decoder_start_token_id": 0},
    "longt5": {"decoder_start_token_id": 0},
    "switch_transformers": {
        "decoder_start_token_id": 0,
        "num_sparse_decoder_layers": 3,
        "num_sparse_encoder_layers": 3,
    },
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 3},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 3, "mamba_ngroups": 1},
}


def tiny_config(kind: type[hf.PreTrainedConfig]) -> hf.PreTrainedConfig:
    """A configuration of this class with every size made small."""
    values: dict[str, Any] = {}
    nested = sub_configs(kind)
    for field in dataclasses.fields(kind):
        default = field.default
        if field.name == "head_dim" and default is None:
            values[field.name] = 8
        if field.name == "is_decoder" and kind.model_type in REGISTERED["causal"][1]:
            values[field.name] = True
        if field.name in nested or field.name == "chunk_size_feed_forward":
            continue
        if field.name.endswith(("token_id", "token_index")) and isinstance(default, int):
            values[field.name] = min(default, token(field.name))
        elif isinstance(default, int) and not isinstance(default, bool):
            small = shrunk(field.name, default)
            if small is not KEEP:
                values[field.name] = small
    if "kv_lora_rank" in values:  # latent attention has no grouped heads
        values["num_key_value_heads"] = values.get("num_attention_heads")
    values |= {name: tiny_config(sub) for name, sub in nested.items()}
    values |= OVERRIDES.get(kind.model_type, {})
    return kind(**values)


def token(name: str) -> int:
    return {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1}.get(name.rpartition("_token")[0], 90 - len(name))


def shrunk(name: str, default: int) -> Any:
    for pattern, value in RULES:
        if re.fullmatch(pattern, name):
            return value
    return 16 if default > 96 else KEEP


def sub_configs(kind: type[hf.PreTrainedConfig]) -> dict[str, type[hf.PreTrainedConfig]]:
    """Nested configurations and their default classes."""
    if not kind.sub_configs:
        return {}
    default = kind()
    found = {name: getattr(default, name, None) for name in kind.sub_configs}
    return {name: type(sub) for name, sub in found.items() if isinstance(sub, hf.PreTrainedConfig)}
