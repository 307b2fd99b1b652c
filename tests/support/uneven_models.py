"""Models whose layers do unequal work, and batches with answers."""

from __future__ import annotations

import model_families
import torch

from gradpruner.model.decoder import Decoder

SHARES = [1.0, 2.0, 1.1, 3.0, 6.0, 1.5]


def batch(lengths, seed, left=False):
    """Rows of these lengths, padded; the last third of each is the answer."""
    width, generator = max(lengths), torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (len(lengths), width), generator=generator)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        first = width - length if left else 0
        mask[row, first : first + length] = 1
        answer = slice(first + length - length // 3, first + length)
        labels[row, answer] = ids[row, answer]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def build(name="llama", seed=0):
    model = model_families.build(model_families.CONFIGS[name](), seed)
    with torch.no_grad():  # layers that do more, each its own share: nothing is nearly equal
        for index, layer in enumerate(Decoder(model).layers):
            for parameter in layer.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(SHARES[index])
    return model
