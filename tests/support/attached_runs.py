"""Trainer runs with gradpruner attached, of each kind and with each settings."""

from __future__ import annotations

import functools

import training_runs
from training_runs import PROBE, SETTINGS
from training_runs import trainer as plain_trainer
from transformers import TrainerCallback

import gradpruner

RUNS = [*((kind, "default") for kind in training_runs.KINDS), ("full", "merging"), ("lora", "paper"), ("full", "paper")]


def trainer(out, kind="lora", *, attached=True, chosen="default", **options):
    made, _ = plain_trainer(out, kind, attached=False, **options)
    return made, gradpruner.attach(made, steps=PROBE, ratio=0.4, **SETTINGS[chosen]) if attached else None


def run_and_die(out, chosen, moment):
    """As training_runs does, with other settings; target of a process of its own."""
    training_runs.trainer = functools.partial(trainer, chosen=chosen)
    training_runs.run_and_die(out, "lora", moment)


class Stop(TrainerCallback):
    """Ends training after some steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.steps
