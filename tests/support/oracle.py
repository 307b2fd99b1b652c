"""docs/method.md, written plainly and independently of the package: float64, dense, full sorts, one entry at a time.

Nothing in here may import gradpruner. Slow on purpose.
"""

from __future__ import annotations

import torch
from torch import Tensor


def importance(a: Tensor, b: Tensor) -> Tensor:
    """F = sum_i (gB_i gA_i)^2 for a (t, r, in), b (t, out, r): float64 (out, in). P eq. 2 and 3, without 1/t."""
    return torch.einsum("tor,tri->toi", b.double(), a.double()).square().sum(0)


def mask_of(f: Tensor, k: int) -> Tensor:
    """The k largest entries of F, lower flat index first among equals, never a zero or NaN."""
    values = [(-float(v), j) for j, v in enumerate(f.flatten().tolist()) if v > 0]
    mask = torch.zeros(f.numel(), dtype=torch.bool)
    for _, j in sorted(values)[:k]:
        mask[j] = True
    return mask.view(f.shape)


def merge(weight: Tensor, donors: list[Tensor], masks: list[Tensor], scale: float = 1.0) -> Tensor:
    """W' = W + sum_k mask_k [sign(V_k) = sign(W)] V_k, in float32 (float64 for float64), stored once."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    out = weight.clone().flatten()
    for j, w in enumerate(weight.flatten().to(wide)):
        total, touched = w.clone(), False
        for donor, mask in zip(donors, masks, strict=True):
            v = donor.flatten()[j].to(wide)
            if bool(mask.flatten()[j]) and ((v > 0 and w > 0) or (v < 0 and w < 0)):
                total = total + scale * v
                touched = True
        if touched:
            out[j] = total.to(weight.dtype)
    return out.view(weight.shape)


def square_norms(steps: list[list[list[tuple[Tensor, Tensor]]]]) -> Tensor:
    """n_ij from steps[i][layer] = list of (gA, gB): float64 (t, L), the products built densely."""
    return torch.tensor(
        [[sum(float((b.double() @ a.double()).square().sum()) for a, b in layer) for layer in step] for step in steps],
        dtype=torch.float64,
    )


def layer_scores(steps: list[list[list[tuple[Tensor, Tensor]]]], kind: str) -> list[float]:
    """The three layer scores of docs/method.md, section 1 over the given (usable) steps."""
    n = square_norms(steps)
    t, layers = n.shape
    if kind == "squared":
        return [float(n[:, j].sum()) / t for j in range(layers)]
    if kind == "norm":
        return [
            sum(float((b.double() @ a.double()).norm()) for step in steps for a, b in step[j]) for j in range(layers)
        ]
    usable = [i for i in range(t) if float(n[i].sum()) > 0]
    return [sum(float(n[i, j] / n[i].sum()) for i in usable) / len(usable) for j in range(layers)]
