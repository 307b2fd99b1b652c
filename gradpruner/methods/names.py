"""The names of the methods, and where each is defined. Loads nothing else."""

from __future__ import annotations

METHOD_MODULES = {
    "gradpruner": "gradpruner.methods.grad_pruner",
    "shortgpt": "gradpruner.methods.short_gpt",
    "laco": "gradpruner.methods.laco",
    "drop-last": "gradpruner.methods.drop_last",
    "random": "gradpruner.methods.random_layers",
    "magnitude": "gradpruner.methods.magnitude",
    "taylor": "gradpruner.methods.taylor",
    "block": "gradpruner.methods.block",
    "loss": "gradpruner.methods.held_out_loss",
    "sparse": "gradpruner.methods.sparse",
}
METHOD_NAMES = tuple(METHOD_MODULES)
