"""Training loops as a user writes them: a probe, a plan and a cut around steps of one's own."""

from __future__ import annotations

from torch.utils.data import DataLoader
from training_runs import rows

import gradpruner

PROBE = 4


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def probe_and_cut(model, optimizer, step, **options):
    """What a user writes, around a step of his own."""
    probe = gradpruner.Probe(model)
    with probe.watching(optimizer, PROBE):
        for i in range(PROBE):
            step(i)
    plan = probe.igia.plan(0.4, preset="paper")
    gradpruner.cut(model, optimizer, plan, probe.igia, preset="paper", **options)
    return plan, probe.igia


def stepper(model, optimizer):
    batches = list(DataLoader(rows(40), batch_size=4))

    def step(i):
        loss = model(**batches[i]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step
