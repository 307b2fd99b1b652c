"""The rows of docs/adapters.md that are kinds of adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import peft
import peft.optimizers
import torch
from adapter_models import (
    ALPHAS,
    APPLY,
    LAYERS,
    LINEARS,
    PROBE,
    RANKS,
    VOCABULARY,
    Case,
    Loop,
    batch,
    gpt2,
    llama,
    lora,
    loraplus,
    options,
    same,
    two,
)
from torch import nn
from transformers import BitsAndBytesConfig, MixtralConfig


def in_turn(model: nn.Module, step: int) -> None:
    model.base_model.set_adapter("other" if step % 2 else "default")
    for name, parameter in model.named_parameters():  # the optimizer keeps both
        parameter.requires_grad_("lora_" in name)


def lora_fa(model: nn.Module) -> torch.optim.Optimizer:
    return peft.optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)


def eva(base: nn.Module) -> nn.Module:
    model = lora(base, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    data = [{"input_ids": batch(i), "attention_mask": torch.ones_like(batch(i))} for i in range(4)]
    peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    return model


def corda(base: nn.Module) -> nn.Module:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=LINEARS,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm"),
    )
    preprocess_corda(base, config, run_model=lambda: base(input_ids=batch(1)[:1]))
    return peft.get_peft_model(base, config)


def lora_ga(base: nn.Module) -> nn.Module:
    from peft.tuners.lora import LoraGAConfig, preprocess_loraga

    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=LINEARS, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
    )
    preprocess_loraga(base, config, lambda: base(input_ids=batch(1), labels=batch(1)).loss.backward())
    base.zero_grad()
    return peft.get_peft_model(base, config)


def injected(base: nn.Module) -> nn.Module:
    return peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS), base)


def velora(base: nn.Module) -> nn.Module:
    return lora(base, velora_config=peft.VeloraConfig(num_groups=2))


def monteclora(base: nn.Module) -> nn.Module:
    return lora(base, monteclora_config=peft.MontecloraConfig())


def bd_lora(base: nn.Module) -> nn.Module:
    config = peft.tuners.lora.BdLoraConfig(
        target_modules_bd_a=["q_proj"], target_modules_bd_b=["o_proj"], nblocks=2, match_strict=False
    )
    return lora(base, use_bdlora=config)


def kasa(base: nn.Module) -> nn.Module:
    return lora(base, kasa_config=peft.KasaConfig())


def mixtral() -> nn.Module:
    from transformers import AutoModelForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    return AutoModelForCausalLM.from_config(config)


LORA = [
    Case("LoRA", "every linear, r = 4"),
    Case("LoRA", "rank pattern, by name, layer and expression", options(rank_pattern=RANKS), uneven=True),
    Case("LoRA", "alpha pattern", options(alpha_pattern=ALPHAS), uneven=True),
    Case("LoRA", "rank and alpha pattern", options(rank_pattern=RANKS, alpha_pattern=ALPHAS), uneven=True),
    Case("LoRA", "attention only", options(**same("q_proj", "k_proj", "v_proj", "o_proj"))),
    Case("LoRA", "MLP only", options(**same("gate_proj", "up_proj", "down_proj"))),
    Case("LoRA", "three layers only", options(layers_to_transform=[1, 3, 4]), uneven=True),
    Case("LoRA", "rsLoRA", options(use_rslora=True)),
    Case("LoRA", "LoRA+", optimizer=loraplus),
    Case("LoRA", "LoRA-FA (A frozen)", optimizer=lora_fa, refused=PROBE),
    Case("LoRA", "DoRA", options(use_dora=True)),
    Case("LoRA", "lora_bias", options(lora_bias=True)),
    Case("LoRA", "dropout", options(lora_dropout=0.3)),
    Case(
        "LoRA",
        "transposed weights (GPT-2, fan_in_fan_out)",
        options(**same("c_attn", "c_proj", "c_fc"), fan_in_fan_out=True),
        gpt2,
    ),
    Case("LoRA", "two adapters, one active", two(["default"])),
    Case("LoRA", "two adapters, the second active", two(["other"]), active=("other",)),
    Case("LoRA", "two adapters, both active", two(["default", "other"]), active=("default", "other")),
    Case(
        "LoRA",
        "two adapters of other ranks in turn",
        two(["default", "other"]),
        loop=Loop(switch=in_turn),
        active=("default", "other"),
    ),
    Case("LoRA", "modules_to_save: lm_head", options(modules_to_save=["lm_head"])),
    Case(
        "LoRA",
        "modules_to_save: embeddings and head, tied",
        options(modules_to_save=["embed_tokens", "lm_head"]),
        lambda: llama(tie_word_embeddings=True),
    ),
    Case(
        "LoRA",
        "modules_to_save: tied embeddings alone",
        options(modules_to_save=["embed_tokens"]),
        lambda: llama(tie_word_embeddings=True),
    ),
    Case("LoRA", "adapters on embeddings and head", options(**same(*LINEARS, "embed_tokens", "lm_head"))),
    Case(
        "LoRA",
        "adapters on tied embeddings",
        options(**same(*LINEARS, "embed_tokens")),
        lambda: llama(tie_word_embeddings=True),
    ),
    Case("LoRA", "trainable_token_indices", options(trainable_token_indices=[1, 2])),
    Case(
        "LoRA",
        "target_parameters (experts)",
        options(**same("q_proj"), target_parameters=["experts.down_proj"]),
        mixtral,
        refused=PROBE,
    ),
    Case(
        "LoRA",
        "bias of the base model (bias='all')",
        options(**same("c_attn", "c_proj", "c_fc"), fan_in_fan_out=True, bias="all"),
        gpt2,
        refused=APPLY,
    ),
    Case("LoRA", "adapters injected without a PeftModel", injected, refused=APPLY),
    Case("LoRA", "adapters merged when apply is called", after=lambda model: model.merge_adapter(), refused=APPLY),
    Case("LoRA variants", "aLoRA", options(alora_invocation_tokens=[3]), inputs=lambda: {"alora_offsets": [5, 5]}),
    Case("LoRA variants", "VeLoRA", velora, slow=True, needs=("peft>=0.20",)),
    Case("LoRA variants", "MonteCLoRA", monteclora, slow=True, needs=("peft>=0.20",)),
    Case("LoRA variants", "BD-LoRA", bd_lora, refused=PROBE, needs=("peft>=0.19",)),
    Case("LoRA variants", "KaSA", kasa, refused=APPLY, needs=("peft>=0.21",)),
    Case("init_lora_weights", "False (B not zero)", options(init_lora_weights=False)),
    Case("init_lora_weights", "gaussian", options(init_lora_weights="gaussian")),
    Case("init_lora_weights", "orthogonal", options(init_lora_weights="orthogonal"), rel=1e-2),
    Case("init_lora_weights", "eva", eva),
    Case(
        "init_lora_weights", "mica (B frozen)", options(init_lora_weights="mica"), refused=PROBE, needs=("peft>=0.20",)
    ),
    Case("init_lora_weights", "pissa", options(init_lora_weights="pissa"), refused=APPLY),
    Case("init_lora_weights", "pissa_niter_4", options(init_lora_weights="pissa_niter_4"), refused=APPLY),
    Case("init_lora_weights", "olora", options(init_lora_weights="olora"), refused=APPLY),
    Case("init_lora_weights", "corda", corda, refused=APPLY, needs=("attr",)),
    Case("init_lora_weights", "lora_ga", lora_ga, refused=APPLY, needs=("peft>=0.19",)),
    Case(
        "init_lora_weights",
        "loftq",
        options(init_lora_weights="loftq", loftq_config=peft.LoftQConfig()),
        lambda: llama(hidden_size=64, intermediate_size=64),
        refused=APPLY,
        needs=("scipy", "an accelerator"),
    ),
]

FOUR_BIT: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}


def wide() -> nn.Module:
    return llama(hidden_size=64, intermediate_size=64)


def qlora(name: str, config: Callable[[], Any], **settings: Any) -> Case:
    return Case("QLoRA", name, base=wide, quantise=config, needs=("bitsandbytes",), **settings)


QLORA = [
    qlora("4 bits, nf4", lambda: BitsAndBytesConfig(bnb_4bit_quant_type="nf4", **FOUR_BIT)),
    qlora(
        "4 bits, nf4, double quantisation",
        lambda: BitsAndBytesConfig(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **FOUR_BIT),
    ),
    qlora("4 bits, fp4", lambda: BitsAndBytesConfig(bnb_4bit_quant_type="fp4", **FOUR_BIT)),
    qlora(
        "4 bits, nf4, stored as bfloat16", lambda: BitsAndBytesConfig(bnb_4bit_quant_storage=torch.bfloat16, **FOUR_BIT)
    ),
    qlora("8 bits", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    qlora(
        "4 bits, DoRA, 4 micro-batches",
        lambda: BitsAndBytesConfig(**FOUR_BIT),
        adapt=options(use_dora=True),
        loop=Loop(micro_batches=4),
    ),
    qlora(
        "4 bits, rank pattern, modules_to_save",
        lambda: BitsAndBytesConfig(**FOUR_BIT),
        adapt=options(rank_pattern=RANKS, modules_to_save=["lm_head"]),
        uneven=True,
    ),
]

# What each kind needs to be built at all; target_modules where nothing is said.
EVERY = {"target_modules": LINEARS}
OTHER_KINDS: dict[str, dict[str, Any]] = {
    "ADALORA": {**EVERY, "total_step": 100},
    "ADAMSS": EVERY,
    "BEFT": EVERY,
    "BOFT": {**EVERY, "boft_block_size": 4},
    "C3A": {**EVERY, "block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "CPT": {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    "DEFT": EVERY,
    "DELORA": EVERY,
    "FOURIERFT": {**EVERY, "n_frequency": 20},
    "FROD": EVERY,
    "GLORA": EVERY,
    "GRALORA": EVERY,
    "HIRA": EVERY,
    "HRA": EVERY,
    "IA3": {**EVERY, "feedforward_modules": ["down_proj"]},
    "LILY": EVERY,
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LOHA": EVERY,
    "LOKR": EVERY,
    "MISS": {**EVERY, "r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2},
    "OFT": {**EVERY, "oft_block_size": 4},
    "OSF": EVERY,
    "PEANUT": EVERY,
    "POLY": {**EVERY, "poly_type": "poly", "r": 4, "n_tasks": 2, "n_skills": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PSOFT": {**EVERY, "r": 4},
    "PVERA": EVERY,
    "P_TUNING": {"num_virtual_tokens": 3},
    "RANDLORA": EVERY,
    "ROAD": {**EVERY, "group_size": 8},
    "SHIRA": {**EVERY, "r": 2},
    "SUPERTUNING": EVERY,
    "TINYLORA": EVERY,
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
    "UNILORA": EVERY,
    "VBLORA": {**EVERY, "vector_length": 4, "num_vectors": 16},
    "VERA": EVERY,
    "WAVEFT": {**EVERY, "n_frequency": 20},
}

SINCE = {
    "0.19": ("ADAMSS", "CARTRIDGE", "GRALORA", "LILY", "PEANUT", "PSOFT", "PVERA", "TINYLORA"),
    "0.20": ("BEFT", "DEFT", "FROD", "GLORA", "HIRA", "UNILORA"),
    "0.21": ("SUPERTUNING",),
}  # the peft that brought a kind, where it is later than the package's lower bound
PEFT_OF_KIND = {kind: f"peft>={version}" for version, kinds in SINCE.items() for kind in kinds}


def of_kind(kind: str) -> Callable[[nn.Module], nn.Module]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    def adapt(base: nn.Module) -> nn.Module:
        return peft.get_peft_model(base, PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **OTHER_KINDS[kind]))

    return adapt


COMMON = ("ADALORA", "IA3", "OFT", "PREFIX_TUNING", "VERA")  # run by default
PAST_THE_BASE = ("CPT", "FROD", "GLORA", "HRA", "SHIRA", "SUPERTUNING")  # no gradient reaches a base layer


def tasks() -> dict[str, Any]:
    return {"task_ids": torch.zeros(2, dtype=torch.long)}


def other_kind(kind: str) -> tuple[Case, Case]:
    auto = Case(
        "other PEFT kinds",
        f"{kind}, estimator auto",
        of_kind(kind),
        refused=PROBE,
        inputs=tasks if kind in ("MULTITASK_PROMPT_TUNING", "POLY") else dict,
        needs=(PEFT_OF_KIND.get(kind, "peft"), *(["sklearn"] if kind == "ADAMSS" else [])),
        slow=kind not in COMMON,
    )
    refused = PROBE if kind in PAST_THE_BASE else None
    name = f"{kind}, estimator exact"
    return auto, dataclasses.replace(auto, name=name, estimator="exact", found="exact", refused=refused)


OTHERS = [case for kind in OTHER_KINDS for case in other_kind(kind)]
