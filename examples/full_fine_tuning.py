"""Full fine-tuning without adapters. The weights of the kept layers keep their optimizer state.

MODEL is a folder or a hub id. TEXTS.jsonl has one JSON object per line, with a column "text".

    python examples/full_fine_tuning.py MODEL TEXTS.jsonl OUT
"""

import sys

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import gradpruner


def main(model_name: str, data: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto")
    rows = load_dataset("json", data_files=data, split="train")
    rows = rows.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns=rows.column_names
    )
    arguments = TrainingArguments(
        output_dir=f"{out}-run",
        max_steps=60,
        per_device_train_batch_size=4,
        learning_rate=1e-5,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)

    # The gradients of all weights are watched. With plain AdamW they are read from its second moment: no extra memory.
    pruning = gradpruner.attach(trainer, steps=20, ratio=0.4)

    trainer.train()
    print(pruning.plan.summary())
    gradpruner.save(trainer.model, out, tokenizer=tokenizer, plan=pruning.plan)


if __name__ == "__main__":
    main(*sys.argv[1:4])
