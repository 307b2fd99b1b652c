"""TRL's trainers with a tiny model: what each needs to be made, and short texts."""

from __future__ import annotations

import random
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig
from word_tokenizers import make_tokenizer

LAYERS, STEPS, PROBE = 6, 9, 5
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endif %}{% endfor %}"
)
ARGUMENTS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "save_steps": 3,
    "logging_steps": 3,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def tokenizer():
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


def model(kind: Any = AutoModelForCausalLM, seed: int = 0, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=24,
        intermediate_size=52,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **options,
    )
    return kind.from_config(config)


def adapters(task: str = "CAUSAL_LM", **options) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type=task, **options)


def texts(seed: int = 0, count: int = 60) -> list[str]:
    chosen = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta"]
    return [" ".join(chosen.choice(words) for _ in range(chosen.randint(1, 9))) for _ in range(count)]


def rows(kind: str) -> Dataset:
    first, second, third = texts(0), texts(1), texts(2)
    columns: dict[str, dict[str, Any]] = {
        "text": {"text": first},
        "completion": {"prompt": first, "completion": second},
        "prompt": {"prompt": first},
        "preference": {"prompt": first, "chosen": second, "rejected": third},
        "pairs": {"chosen": second, "rejected": third},
        "judged": {"prompt": first, "completion": second, "label": [i % 2 == 0 for i in range(len(first))]},
        "messages": {
            "messages": [
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                for question, answer in zip(first, second, strict=True)
            ]
        },
    }
    return Dataset.from_dict(columns[kind])


def different_characters(completions, **_):
    """A reward."""
    return [float(len(set(completion))) for completion in completions]


def classes(name: str) -> tuple[Any, Any]:
    """The trainer of that name and the class of its arguments."""
    import importlib

    import trl

    homes = {"ORPO": "orpo", "CPO": "cpo", "OnlineDPO": "online_dpo", "GKD": "gkd"}
    home = importlib.import_module(f"trl.experimental.{homes[name]}") if name in homes else trl
    return getattr(home, f"{name}Trainer"), getattr(home, f"{name}Config")


DATA = {
    "SFT": "text",
    "DPO": "preference",
    "KTO": "judged",
    "ORPO": "preference",
    "CPO": "preference",
    "Reward": "pairs",
    "GRPO": "prompt",
    "RLOO": "prompt",
    "OnlineDPO": "prompt",
    "GKD": "messages",
}


def trainer(name: str, out, *, lora: bool = True, data: Any = None, extra: Any = (), callbacks: Any = (), **options):
    """Make a trainer.

    Args:
        name: of its class, without "Trainer".
        out: its output folder.
        lora: whether adapters train.
        data: a kind of rows, or the rows. Default: what it usually gets.
        extra: further arguments of the trainer.
        callbacks: its callbacks.
        **options: fields of its arguments.
    """
    kind, config = classes(name)
    defaults = {**ARGUMENTS, "output_dir": str(out)}
    if name in ("GRPO", "RLOO"):
        defaults |= {"num_generations": 4, "max_completion_length": 8}
    elif name in ("OnlineDPO", "GKD"):
        defaults |= {"max_new_tokens": 8, "max_length": 100}
    else:
        defaults |= {"max_length": 64}
    reward = name == "Reward"
    made = model(AutoModelForSequenceClassification, num_labels=1) if reward else model()
    peft = adapters("SEQ_CLS", modules_to_save=["score"]) if reward else adapters()
    data = rows(DATA[name]) if data is None else rows(data) if isinstance(data, str) else data
    more = dict(extra)
    if name in ("GRPO", "RLOO", "OnlineDPO"):
        more["reward_funcs"] = different_characters
    if name == "GKD":
        more["teacher_model"] = model(seed=1)
    if more.pop("wrapped", False):
        made, lora = get_peft_model(made, peft), False
    return kind(
        model=made,
        args=config(**{**defaults, **options}),
        train_dataset=data,
        processing_class=tokenizer(),
        callbacks=list(callbacks) or None,
        **({"peft_config": peft} if lora else {}),
        **more,
    )
