"""transformers.Trainer: with one more line, a run that starts with the dense model ends with a pruned one.

MODEL is a folder or a hub id. TEXTS.jsonl has one JSON object per line, with a column "text".

    python examples/trainer.py MODEL TEXTS.jsonl OUT [--resume]
"""

import sys

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import gradpruner


def main(model_name: str, data: str, out: str, resume: str = "") -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto")
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"))
    rows = load_dataset("json", data_files=data, split="train")
    rows = rows.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns=rows.column_names
    )
    arguments = TrainingArguments(
        output_dir=f"{out}-run",
        max_steps=60,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        logging_steps=10,
        save_steps=20,
        report_to=[],
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)

    pruning = gradpruner.attach(trainer, steps=20, ratio=0.4)  # the one additional line

    trainer.train(resume_from_checkpoint=resume == "--resume")
    print(pruning.plan.summary())
    smaller = trainer.model.merge_and_unload()
    gradpruner.save(smaller, out, tokenizer=tokenizer, plan=pruning.plan)


if __name__ == "__main__":
    main(*sys.argv[1:5])
