"""The tiny models, and the words in which a way of fine-tuning is described: Case, Loop, Refusal, Row."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import peft.optimizers
import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import gradpruner

LAYERS, STEPS, VOCABULARY = 6, 4, 31
KEPT, REMOVED, TARGET, DONOR = (0, 2, 5), (1, 3, 4), 2, 3
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Loop:
    """How the training loop around the probe looks."""

    micro_batches: int = 1
    clip: float | None = 1.0
    autocast: torch.dtype | None = None
    scaler: str | None = None  # "unscaled": by the loop, before clipping; "fused": by the optimizer, in its step
    overflow: bool = False  # one more step, with a loss that overflows
    record: bool = False  # probe.record() before each step in place of hooks
    compiled: str | None = None  # the backend of torch.compile
    switch: Callable[[nn.Module, int], None] = lambda model, step: None


@dataclass(frozen=True)
class Refusal:
    """Where a case is refused, and with which error; reason: the part of its message that is always the same."""

    when: str  # "probe" or "apply"
    error: type[Exception]
    reason: str | None = None


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.1)


def lora(base: nn.Module, **options: Any) -> nn.Module:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **options}
    return peft.get_peft_model(base, peft.LoraConfig(**settings))


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**settings, **changes})).to(dtype)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=LAYERS,
        n_head=2,
        n_positions=32,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    return AutoModelForCausalLM.from_config(config)


def is_here(need: str) -> bool:
    """Whether this environment has "an accelerator", a module by its name, or "peft>=0.20" and the like."""
    if need == "an accelerator":
        return torch.accelerator.is_available()
    name, _, least = need.partition(">=")
    if importlib.util.find_spec(name) is None:
        return False
    return not least or Version(importlib.metadata.version(name)) >= Version(least)


@dataclass(frozen=True)
class Case:
    """A row of the table. adapt: what wraps the base model; active: the adapters whose gradients count."""

    group: str
    name: str
    adapt: Callable[[nn.Module], nn.Module] = lora
    base: Callable[[], nn.Module] = llama
    optimizer: Callable[[nn.Module], Any] = adamw
    loop: Loop = Loop()
    active: tuple[str, ...] = ("default",)
    estimator: str = "auto"
    found: str = "lora"  # the estimator that the igia says it was
    refused: Refusal | None = None
    quantise: Callable[[], Any] | None = None  # a transformers quantization_config
    inputs: Callable[[], dict[str, Any]] = dict  # more than input_ids and labels
    after: Callable[[nn.Module], None] = lambda model: None  # between the training and apply
    needs: tuple[str, ...] = ()
    rel: float = 1e-6  # of the scores
    uneven: bool = False  # not every layer is measured alike: there are scores, but no plan by them
    slow: bool = False

    @property
    def missing(self) -> str | None:
        """What this case needs and is not here: a package, or an accelerator."""
        need = next((need for need in self.needs if not is_here(need)), None)
        return need if need in (None, "an accelerator") else f"the package {need}"


@dataclass
class Row:
    """What was checked of a case, in words."""

    scores: str = "-"
    merged: str = "-"
    dropped: str = "-"
    result: str = "works"


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def plain(model: nn.Module) -> Any:
    """The transformers model inside."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def layers_of(model: Any) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def linears_of(model: Any) -> list[str]:
    found = layers_of(model)[0].named_modules()
    return [name for name, m in found if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]


def is_transposed(model: Any) -> bool:
    return hasattr(model, "transformer")


def batch(seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(seed))


def bare(module: Any) -> Any:
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


PROBE = Refusal("probe", gradpruner.ProbeError)
START = Refusal("probe", gradpruner.InvalidArgument)
APPLY = Refusal("apply", gradpruner.UnsupportedModel)


def options(**settings: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda base: lora(base, **settings)


def itself(base: nn.Module) -> nn.Module:
    return base


def same(*names: str) -> dict[str, Any]:
    return {"target_modules": list(names)}


RANKS = {"q_proj": 2, r"layers\.3\.mlp\.up_proj": 7, r"layers\.[45]\..*o_proj": 3}
ALPHAS = {"down_proj": 32, r"layers\.3\..*": 1}


def two(active: list[str], **second: Any) -> Callable[[nn.Module], nn.Module]:
    """Adapters "default" and "other", the named ones active."""

    def adapt(base: nn.Module) -> nn.Module:
        model = lora(base)
        model.add_adapter("other", peft.LoraConfig(**{"r": 3, "target_modules": LINEARS, **second}))
        model.base_model.set_adapter(active)
        return model

    return adapt


def loraplus(model: nn.Module) -> torch.optim.Optimizer:
    return peft.optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16)
