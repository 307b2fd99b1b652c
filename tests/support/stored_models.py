"""Small models in folders: written, loaded, read tensor by tensor, and compared with what goes through memory."""

from __future__ import annotations

import contextlib
import json
import resource

import model_families
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gradpruner

DROP = gradpruner.Plan(model_families.LAYERS, drop=[1, 3, 4])
MERGE = gradpruner.Plan(model_families.LAYERS, drop=[1], merge={3: 2, 4: 2})  # two donors into one target


def dense(name, folder, dtype=torch.float32, **options):
    model_families.build(model_families.CONFIGS[name]()).to(dtype).save_pretrained(folder, **options)
    return folder


def load(folder):
    """Frozen, so that its fingerprint is of the content too."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").requires_grad_(False)


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same_checkpoint(a, b):
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape, name
        flat = [t.contiguous().view(-1).view(torch.uint8) for t in (tensor, theirs[name])]
        assert torch.equal(*flat), name
    for name in ("config.json", "generation_config.json", "gradpruner.json"):
        assert json.loads((a / name).read_text()) == json.loads((b / name).read_text()), name


def through_memory(source, out, plan, igia=None):
    return gradpruner.save(gradpruner.apply(load(source), plan, igia), out, plan=plan)


@contextlib.contextmanager
def soft_limit(which, value):
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))
