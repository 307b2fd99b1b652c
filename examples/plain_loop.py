"""Your own training loop: probe the first steps, cut the model, and let the same loop go on.

MODEL is a folder or a hub id. TEXTS.jsonl has one JSON object per line, with a column "text".

    python examples/plain_loop.py MODEL TEXTS.jsonl OUT
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradpruner


def main(model_name: str, data: str, out: str, steps: int = 60, probe_steps: int = 20) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto")
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)

    texts = load_dataset("json", data_files=data, split="train").shuffle(seed=0)["text"]
    probe = gradpruner.Probe(model, importance=False)  # a cut needs layer scores only
    probe.start(optimizer, probe_steps)
    plan, probe_batches = None, []
    for step in range(steps):
        texts_now = [texts[(4 * step + i) % len(texts)] for i in range(4)]
        batch = tokenizer(texts_now, return_tensors="pt", padding=True, truncation=True, max_length=256)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if plan is None:
            probe_batches.append(batch)
        if plan is None and probe.finished:
            plan = probe.igia.plan(ratio=0.4)
            # each removed stretch of layers is replaced by its best linear map on these batches
            patches = gradpruner.fit_patches(model, plan, probe_batches)
            # model, adapters, optimizer and scheduler stay the same objects, so the loop goes on
            gradpruner.cut(model, optimizer, plan, patches=patches)
            print(plan.summary())
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    gradpruner.save(model.merge_and_unload(), out, tokenizer=tokenizer, plan=plan)


if __name__ == "__main__":
    main(*sys.argv[1:4])
