"""Tiny Trainer runs with gradpruner attached, which can be told to die at a certain moment."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

import gradpruner
from gradpruner.checkpoint import save as checkpoint
from gradpruner.pruning import apply as apply_module

LAYERS, STEPS, PROBE = 8, 12, 5


def llama(dtype=torch.float32, hidden=24, intermediate=52):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype)


def lora(model, **options):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": "all-linear", **options}))


def rows(count=200):
    ids = torch.randint(0, 61, (count, 9), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in ids]


KINDS = {
    "lora": lambda: lora(llama()),
    "dora": lambda: lora(llama(), use_dora=True, target_modules=["q_proj", "down_proj"]),
    "full": llama,
}


def trainer(out, kind="lora", *, max_steps=STEPS, attached=True, callbacks=(), eval_dataset=None, **options):
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=max_steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=3,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    made = Trainer(
        model=KINDS[kind](), args=arguments, train_dataset=rows(), eval_dataset=eval_dataset, callbacks=list(callbacks)
    )
    return made, gradpruner.attach(made, steps=PROBE, ratio=0.4) if attached else None


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run_and_die(out: str, kind: str, moment: str) -> None:
    """Train until the moment comes, then SIGKILL; also target of a process of its own."""

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    made, callback = trainer(out, kind)
    if moment == "probe":  # after the snapshot of step 3
        before = callback.on_step_end
        callback.on_step_end = lambda args, state, control, **rest: (
            die() if state.global_step == 4 else before(args, state, control, **rest)
        )
    elif moment == "apply":  # some weights are folded already
        fold, calls = apply_module.merge_into, []
        apply_module.merge_into = lambda *args: die() if len(calls) == 3 else (calls.append(1), fold(*args))[1]
    elif moment == "save of the base":  # files are written, and have no name yet
        checkpoint.verify = die
    elif moment in ("save of step 3", "save of step 6"):  # the model's file is there, the optimizer's is not
        optimizer = made._save_optimizer_and_scheduler
        made._save_optimizer_and_scheduler = lambda folder: die() if folder.endswith(moment[-1]) else optimizer(folder)
    made.train()
    Path(out, "survived").touch()


SETTINGS = {
    "default": {},
    "merging": {"kind": "squared", "merge": "auto"},  # patches and keeps too
    "paper": {"preset": "paper"},
}
