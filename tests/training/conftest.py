"""Runs that several files look at, made once."""

from __future__ import annotations

import pytest
from attached_runs import trainer
from training_runs import tensors


@pytest.fixture(scope="module")  # some tests go on with a run of theirs
def finished(tmp_path_factory):
    """Of each kind and settings, one run that nothing interrupted: its folder, callback, Trainer and final tensors."""
    runs = {}

    def get(kind, chosen="default"):
        key = kind, chosen
        if key not in runs:
            out = tmp_path_factory.mktemp(kind)
            made, callback = trainer(out, kind, chosen=chosen)
            made.train()
            runs[key] = out, callback, made, tensors(made.model)
        return runs[key]

    return get
