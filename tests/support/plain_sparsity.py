"""The criteria of single-weight pruning again, as plainly as they can be said: whole forwards, float64, Python loops.

Nothing of the package is used. A weight's inputs are those of the whole model with all earlier layers pruned.
"""

from __future__ import annotations

import torch

ROWS = {"row": None, "2:4": (2, 4), "4:8": (4, 8)}


def linears_of(model, layer):
    prefix = f"model.layers.{layer}."
    return {n: m for n, m in model.named_modules() if n.startswith(prefix) and isinstance(m, torch.nn.Linear)}


def inputs_of(model, batches, layer):
    """By name of linear: its inputs in every batch, (tokens, in), float64."""
    found, handles = {}, []
    for name, module in linears_of(model, layer).items():
        handles.append(
            module.register_forward_hook(
                lambda module, args, output, name=name: found.setdefault(name, []).append(
                    args[0].detach().flatten(0, 1).double()
                )
            )
        )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return found


def sample_gradients(model, batches):
    """By name of linear weight: the gradient of every sample, float64 (samples, out, in)."""
    found = {}
    for batch in batches:
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.ndim == 2:
                found.setdefault(name.removesuffix(".weight"), []).append(parameter.grad.double().clone())
    model.zero_grad()
    return {name: torch.stack(of) for name, of in found.items()}


def keep_largest(metric, pattern, ratio):
    """Which entries stay, one group after the other, by sorting; of equals the lower index."""
    out, width = metric.shape
    if pattern == "matrix":
        groups, kept = [[(i, j) for i in range(out) for j in range(width)]], out * width - int(ratio * out * width)
    else:
        n, m = ROWS[pattern] or (width - int(ratio * width), width)
        groups = [[(i, j) for j in range(s, s + m)] for i in range(out) for s in range(0, width, m)]
        kept = n
    stays = torch.zeros(out, width, dtype=torch.bool)
    for group in groups:
        for i, j in sorted(group, key=lambda at: -float(metric[at]))[:kept]:  # sorted is stable
            stays[i, j] = True
    return stays


def metric_of(criterion, weight, inputs, gradients):
    w, x = weight.double().abs(), torch.cat(inputs)
    norms = (x.square().sum(0) / len(inputs)).sqrt()
    if criterion == "magnitude":
        return w
    if criterion == "wanda":
        return w * norms
    alpha, by_sample = 100.0, gradients.abs()
    size = by_sample.sum(0) if criterion in ("gblm:p=1",) else by_sample.square().sum(0).sqrt()
    return w * size if criterion == "gblm:activations=false" else w * norms + alpha * w * size


def refine(stays, weight, inputs, pattern, cycles, threshold, overshoot):
    """DSnoT, a row at a time."""
    w, x = weight.double(), torch.cat(inputs)
    sums, variances = x.sum(0) / len(inputs), x.var(0, unbiased=False)
    norms = (x.square().sum(0) / len(inputs)).sqrt()
    m = (ROWS[pattern] or (0, weight.shape[1]))[1]
    for i in range(len(w)):
        given, moved = w[i] * sums, set()
        error = float(given[~stays[i]].sum())
        for _ in range(cycles):
            if abs(error) <= threshold:
                break
            sign = 1 if error > 0 else -1
            backs = [j for j in range(len(given)) if not stays[i, j] and j not in moved and given[j] * sign > 0]
            if not backs:
                break
            back = max(backs, key=lambda j: float(given[j] * sign / variances[j]))
            moved.add(back)
            goers = [
                j
                for j in range(len(given))
                if stays[i, j] and j not in moved and given[j] * sign < 0 and j // m == back // m
            ]
            if not goers:
                continue
            gone = min(goers, key=lambda j: float(w[i, j].abs() * norms[j]))
            after = error + float(given[gone] - given[back])
            if not overshoot and after * error < 0:
                break
            moved.add(gone)
            stays[i, back], stays[i, gone] = True, False
            error = after
    return stays


def surgeon(weight, inputs, pattern, ratio, block, damping):
    """SparseGPT by its definition: after every column the inverse of the Hessian of the columns that are left.

    Returns what stays and the updated weight, float64.
    """
    x, w = torch.cat(inputs), weight.double().clone()
    out, width = w.shape
    hessian = x.T @ x
    hessian += damping * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    stays = torch.ones(out, width, dtype=torch.bool)
    step = (ROWS[pattern] or (0, block))[1] if pattern != "matrix" else block
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(width)]
    for start in range(0, width, step):
        stop = min(start + step, width)
        importance = torch.stack([w[:, j].square() / inverses[j][0, 0] for j in range(start, stop)], 1)
        if pattern == "matrix":
            gone = int(ratio * out * stop) - int(ratio * out * start)
            order = sorted(((i, j) for i in range(out) for j in range(stop - start)), key=lambda at: importance[at])
            for i, j in order[:gone]:
                stays[i, start + j] = False
        else:
            n_of_m = ROWS[pattern]
            gone = n_of_m[1] - n_of_m[0] if n_of_m else int(ratio * stop) - int(ratio * start)
            for i in range(out):
                for j in importance[i].argsort()[:gone].tolist():
                    stays[i, start + j] = False
        for j in range(start, stop):
            for i in (~stays[:, j]).nonzero().flatten().tolist():
                w[i, j:] -= w[i, j] / inverses[j][0, 0] * inverses[j][0]
    return stays, w * stays
