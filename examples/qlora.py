"""QLoRA: probe the 4-bit model, cut the full-precision checkpoint, and fine-tune the smaller model in 4 bit.

TEXTS.jsonl has one JSON object per line, with a column "text".

    pip install bitsandbytes
    python examples/qlora.py MODEL_FOLDER TEXTS.jsonl OUT
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import gradpruner


def train(model_name: str, data: str, steps: int, probed: bool):
    """Train LoRA on the 4-bit model. Return the probe's gradients if `probed`, otherwise the trained model."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(model_name, quantization_config=packed)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    texts = load_dataset("json", data_files=data, split="train").shuffle(seed=0)["text"]
    probe = gradpruner.Probe(model)
    if probed:
        probe.start(optimizer, steps)
    for step in range(steps):
        row = tokenizer(texts[step % len(texts)], return_tensors="pt", truncation=True, max_length=256)
        model(**row, labels=row.input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return probe.igia if probed else model


def main(folder: str, data: str, out: str) -> None:
    igia = train(folder, data, steps=20, probed=True)
    plan = igia.plan(ratio=0.4)
    print(plan.summary())
    gradpruner.apply_folder(folder, out, plan, igia, overwrite=True)  # file by file, in full precision
    train(out, data, steps=20, probed=False).save_pretrained(f"{out}-adapter")


if __name__ == "__main__":
    main(*sys.argv[1:4])
