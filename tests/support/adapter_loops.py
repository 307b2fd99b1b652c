"""The rows of docs/adapters.md that are optimizers and training loops, and all the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from adapter_cases import LORA, OTHERS, QLORA
from adapter_models import (
    APPLY,
    RANKS,
    START,
    Case,
    Loop,
    adamw,
    gpt2,
    itself,
    llama,
    lora,
    loraplus,
    options,
    same,
    trained,
    two,
)
from torch import nn
from transformers import Adafactor
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer


class WithoutHooks:
    """An optimizer that is none of torch's: plain descent."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def step(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def full(name: str, optimizer: Callable[[list[nn.Parameter]], Any], found: str = "gradient", **settings: Any) -> Case:
    return Case(
        "full fine-tuning",
        name,
        itself,
        optimizer=lambda model: optimizer(trained(model)),
        found=found,
        active=(),
        **settings,
    )


def eight_bit(parameters: list[nn.Parameter]) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.Adam8bit(parameters, lr=1e-2, min_8bit_size=64)


def schedule_free(parameters: list[nn.Parameter]) -> Any:
    import schedulefree

    optimizer = schedulefree.AdamWScheduleFree(parameters, lr=1e-2)
    optimizer.train()
    return optimizer


def lomo(name: str) -> Callable[[nn.Module], Any]:
    def make(model: nn.Module) -> Any:
        import lomo_optim

        return getattr(lomo_optim, name)(model, lr=1e-2)

    return make


def per_layer(model: nn.Module) -> Any:
    """As transformers makes layer-wise GaLore and APOLLO: an optimizer a parameter, stepped by a hook on it."""
    optimizers = {p: torch.optim.SGD([p], lr=1e-2) for p in trained(model)}

    def hook(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(hook)
    return LayerWiseDummyOptimizer(optimizer_dict=optimizers)


def overlapped(model: nn.Module) -> Any:
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.SGD, trained(model), {"lr": 1e-2})
    return torch.optim.SGD(trained(model), lr=1e-2)


ADAM: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
FULL = [
    full("AdamW, foreach", lambda p: torch.optim.AdamW(p, foreach=True, **ADAM), "adam"),
    full("AdamW, fused", lambda p: torch.optim.AdamW(p, fused=True, **ADAM), "adam"),
    full("AdamW, amsgrad", lambda p: torch.optim.AdamW(p, amsgrad=True, **ADAM), "adam"),
    full("AdamW, estimator gradient", lambda p: torch.optim.AdamW(p, **ADAM), estimator="gradient"),
    full("AdamW, beta2 = 0.95", lambda p: torch.optim.AdamW(p, betas=(0.9, 0.95), **ADAM)),
    full("Adam", lambda p: torch.optim.Adam(p, lr=1e-2), "adam"),
    full("Adam, coupled weight decay", lambda p: torch.optim.Adam(p, **ADAM)),
    full("SGD, momentum", lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)),
    full("Adafactor of torch", lambda p: torch.optim.Adafactor(p, lr=1e-2)),
    full("Adafactor of transformers", lambda p: Adafactor(p, lr=1e-2, relative_step=False)),
    full("8-bit Adam of bitsandbytes", eight_bit, needs=("bitsandbytes>=0.50",)),
    full("AdamWScheduleFree", schedule_free, needs=("schedulefree",)),
    full("an optimizer without hooks, probe.record()", WithoutHooks, loop=Loop(record=True)),
    full("an optimizer without hooks, watched", WithoutHooks, refused=START),
    dataclasses.replace(full("LOMO", list, refused=START, needs=("lomo_optim",)), optimizer=lomo("Lomo")),
    dataclasses.replace(
        full("AdaLOMO", list, refused=START, needs=("lomo_optim", "an accelerator")), optimizer=lomo("AdaLomo")
    ),
    dataclasses.replace(full("layer-wise GaLore, APOLLO", list, refused=START), optimizer=per_layer),
    dataclasses.replace(full("torch's optimizer in backward", list, refused=START), optimizer=overlapped),
]


def checkpointing(reentrant: bool, adapt: Callable[[nn.Module], nn.Module] = lora) -> Callable[[nn.Module], nn.Module]:
    def wrap(base: nn.Module) -> nn.Module:
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            base.enable_input_require_grads()
        return adapt(base)

    return wrap


def half(dtype: torch.dtype) -> Callable[[], nn.Module]:
    return lambda: llama(dtype)


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=1e-2, fused=True)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(model), lr=1e-2, momentum=0.9)


BF16, FP16 = torch.bfloat16, torch.float16
LOOPS = [
    Case("loop", "8 micro-batches", loop=Loop(micro_batches=8)),
    Case("loop", "no clipping", loop=Loop(clip=None)),
    Case(
        "loop",
        "8 micro-batches, no clipping, full fine-tuning",
        itself,
        optimizer=sgd,
        found="gradient",
        active=(),
        loop=Loop(micro_batches=8, clip=None),
    ),
    Case("loop", "gradient checkpointing, reentrant", checkpointing(True)),
    Case("loop", "gradient checkpointing, not reentrant", checkpointing(False)),
    Case("loop", "bfloat16 model", base=half(BF16)),
    Case("loop", "bfloat16 model and adapters", lambda base: lora(base).to(BF16), half(BF16)),
    Case("loop", "bfloat16 model, full fine-tuning, SGD", itself, half(BF16), sgd, found="gradient", active=()),
    Case("loop", "bfloat16 autocast", loop=Loop(autocast=BF16)),
    Case(
        "loop",
        "bfloat16 autocast, full fine-tuning",
        itself,
        optimizer=sgd,
        found="gradient",
        active=(),
        loop=Loop(autocast=BF16),
    ),
    Case(
        "loop",
        "float16, GradScaler, unscaled and clipped",
        base=half(FP16),
        loop=Loop(autocast=FP16, scaler="unscaled"),
    ),
    Case(
        "loop",
        "float16, GradScaler, fused optimizer, one overflow",
        base=half(FP16),
        optimizer=fused,
        loop=Loop(autocast=FP16, scaler="fused", overflow=True),
    ),
    Case(
        "loop",
        "float16, GradScaler, full fine-tuning, fused AdamW",
        itself,
        optimizer=fused,
        found="adam",
        active=(),
        loop=Loop(autocast=FP16, scaler="fused"),
    ),
    Case("loop", "torch.compile, eager", loop=Loop(compiled="eager")),
    Case("loop", "torch.compile, aot_eager", loop=Loop(compiled="aot_eager"), slow=True),
    Case("loop", "torch.compile, inductor", loop=Loop(compiled="inductor"), slow=True),
    Case(
        "loop",
        "torch.compile, full fine-tuning, AdamW",
        itself,
        optimizer=adamw,
        found="adam",
        active=(),
        loop=Loop(compiled="eager"),
        slow=True,
    ),
    Case(
        "pairs", "DoRA, bfloat16 model, 4 micro-batches", options(use_dora=True), half(BF16), loop=Loop(micro_batches=4)
    ),
    Case(
        "pairs",
        "rank pattern, two active adapters",
        two(["default", "other"], rank_pattern=RANKS),
        active=("default", "other"),
        uneven=True,
    ),
    Case(
        "pairs",
        "rsLoRA, alpha pattern, transposed weights",
        options(
            **same("c_attn", "c_proj"),
            fan_in_fan_out=True,
            use_rslora=True,
            alpha_pattern={"c_attn": 1, r"h\.3\..*": 32},
        ),
        gpt2,
        uneven=True,
    ),
    Case("pairs", "LoRA+, bfloat16 autocast, no clipping", optimizer=loraplus, loop=Loop(autocast=BF16, clip=None)),
    Case(
        "pairs",
        "modules_to_save, checkpointing, 4 micro-batches",
        checkpointing(False, options(modules_to_save=["lm_head"])),
        loop=Loop(micro_batches=4),
    ),
    Case(
        "pairs",
        "two active adapters, float16, fused GradScaler",
        two(["default", "other"]),
        half(FP16),
        fused,
        Loop(autocast=FP16, scaler="fused"),
        ("default", "other"),
    ),
    Case(
        "pairs",
        "DoRA, rank pattern, torch.compile",
        options(use_dora=True, rank_pattern=RANKS),
        loop=Loop(compiled="eager"),
        slow=True,
        uneven=True,
    ),
    Case(
        "pairs",
        "bfloat16 model, torch.compile, 4 micro-batches",
        base=half(BF16),
        loop=Loop(compiled="eager", micro_batches=4),
        slow=True,
    ),
    Case(
        "pairs",
        "attention only, DoRA, reentrant checkpointing",
        checkpointing(True, options(use_dora=True, **same("q_proj", "k_proj", "v_proj", "o_proj"))),
    ),
    Case("pairs", "pissa, bfloat16 model", options(init_lora_weights="pissa"), half(BF16), refused=APPLY),
    Case(
        "pairs",
        "probe.record(), float16, GradScaler, one overflow",
        base=half(FP16),
        loop=Loop(autocast=FP16, scaler="unscaled", record=True, overflow=True),
    ),
]

# A default run has one of each sort; the rest is run with the slow ones.
RARE = (
    "rank pattern, by name, layer and expression",
    "alpha pattern",
    "MLP only",
    "rsLoRA",
    "dropout",
    "two adapters, one active",
    "two adapters, the second active",
    "adapters on tied embeddings",
    "modules_to_save: lm_head",
    "modules_to_save, checkpointing, 4 micro-batches",
    "False (B not zero)",
    "rank pattern, two active adapters",
    "modules_to_save: embeddings and head, tied",
    "adapters on embeddings and head",
    "gaussian",
    "eva",
    "pissa_niter_4",
    "corda",
    "lora_ga",
    "KaSA",
    "aLoRA",
    "4 bits, nf4",
    "4 bits, fp4",
    "4 bits, rank pattern, modules_to_save",
    "AdamW, amsgrad",
    "AdamW, beta2 = 0.95",
    "8 micro-batches, no clipping, full fine-tuning",
    "bfloat16 model and adapters",
    "bfloat16 autocast",
    "gradient checkpointing, not reentrant",
    "attention only, DoRA, reentrant checkpointing",
    "LoRA+, bfloat16 autocast, no clipping",
    "two active adapters, float16, fused GradScaler",
    "pissa, bfloat16 model",
)
CASES = [
    dataclasses.replace(case, slow=case.slow or case.name in RARE) for case in (*LORA, *QLORA, *OTHERS, *FULL, *LOOPS)
]
