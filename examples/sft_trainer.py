"""TRL's SFTTrainer: one additional line, as for transformers.Trainer.

MODEL is a folder or a hub id. TEXTS.jsonl has one JSON object per line, with a column "text".

    pip install trl
    python examples/sft_trainer.py MODEL TEXTS.jsonl OUT
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import gradpruner


def main(model_name: str, data: str, out: str) -> None:
    trainer = SFTTrainer(
        model=model_name,
        processing_class=AutoTokenizer.from_pretrained(model_name),
        train_dataset=load_dataset("json", data_files=data, split="train"),
        peft_config=LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=f"{out}-run",
            max_steps=60,
            per_device_train_batch_size=4,
            max_length=256,
            learning_rate=1e-4,
            bf16=torch.cuda.is_available(),
            logging_steps=10,
            save_steps=20,
            report_to=[],
        ),
    )

    pruning = gradpruner.attach(trainer, steps=20, ratio=0.4)  # the one additional line

    trainer.train()
    print(pruning.plan.summary())
    smaller = trainer.model.merge_and_unload()
    gradpruner.save(smaller, out, tokenizer=trainer.processing_class, plan=pruning.plan)


if __name__ == "__main__":
    main(*sys.argv[1:4])
