"""Models of a known shape with random weights, and training steps that are timed one by one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.session import Session
from gradpruner.training.finetune import add_adapters
from gradpruner.training.recipe import Recipe


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, and the batch that it trains on: rows of so many tokens."""

    hidden: int
    inner: int
    layers: int
    heads: int
    narrow_heads: int
    vocabulary: int
    rows: int
    length: int
    tied: bool = False


LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128256, 4, 1024)
LLAMA_1B = Shape(2048, 8192, 16, 32, 8, 128256, 8, 1024, tied=True)
TINY = Shape(64, 160, 5, 4, 2, 199, 2, 16)


def llama(session: Session, shape: Shape) -> Any:
    """A Llama in bfloat16 on the device, random and the same every time."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.narrow_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with session.device:
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def adapted(model: nn.Module) -> nn.Module:
    """With LoRA of rank 8 on every linear of every layer, ready to train."""
    return add_adapters(model, Recipe(rank=8)).train()


class Steps:
    """A LoRA run under bfloat16 autocast, step by step, on random tokens.

    Args:
        before_step: called with the number of the step and the optimizer, between backward and step.
    """

    def __init__(
        self,
        session: Session,
        model: nn.Module,
        shape: Shape,
        before_step: Callable[[int, Optimizer], None] = lambda number, optimizer: None,
    ) -> None:
        self._session, self._model, self._shape, self.before_step = session, model, shape, before_step
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=session.on_cuda)
        self._random = torch.Generator().manual_seed(0)

    def run(self, count: int) -> list[float]:
        """Seconds of each of `count` steps, every one waited for."""
        session, shape, seconds = self._session, self._shape, []
        with disable_input_dtype_casting(self._model):
            for number in range(count):
                ids = torch.randint(3, shape.vocabulary, (shape.rows, shape.length), generator=self._random)
                ids = ids.to(session.device)
                session.wait()
                began = time.perf_counter()
                with torch.autocast(session.device.type, torch.bfloat16):
                    loss = self._model(input_ids=ids, labels=ids).loss
                loss.backward()
                self.before_step(number, self.optimizer)
                self.optimizer.step()
                self.optimizer.zero_grad()
                session.wait()
                seconds.append(time.perf_counter() - began)
        if not bool(loss.isfinite()):
            raise ArithmeticError(f"the loss is {float(loss)} after {count} steps; expected a finite one")
        return seconds
