"""accelerate in your own loop, sharded by FSDP2. The same script runs with DDP and in one process.

MODEL is a folder or a hub id. TEXTS.jsonl has one JSON object per line, with a column "text".

    accelerate launch --num_processes 4 --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \
        examples/accelerate_fsdp2.py MODEL TEXTS.jsonl OUT
"""

import sys

import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradpruner


def main(model_name: str, data: str, out: str, steps: int = 60, probe_steps: int = 20) -> None:
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)

    def collate(rows):
        batch = tokenizer(
            [row["text"] for row in rows], return_tensors="pt", padding=True, truncation=True, max_length=256
        )
        return {**batch, "labels": batch.input_ids.masked_fill(batch.attention_mask == 0, -100)}

    texts = load_dataset("json", data_files=data, split="train")
    loader = DataLoader(texts, batch_size=2, shuffle=True, collate_fn=collate)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    probe, plan, step = gradpruner.Probe(model), None, 0
    probe.start(optimizer, probe_steps)
    while step < steps:
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            if plan is None and probe.finished:  # true on every process at the same step
                plan = probe.igia.plan(ratio=0.4)
                gradpruner.cut(model, optimizer, plan, probe.igia)
                accelerator.print(plan.summary())

    gradpruner.save(accelerator.unwrap_model(model), out, tokenizer=tokenizer, plan=plan)  # one process writes


if __name__ == "__main__":
    main(*sys.argv[1:4])
