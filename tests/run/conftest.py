"""What the tests of a run share."""

from __future__ import annotations

import json

import pytest
from preflight_runs import TRAIN, config_of, write
from word_tokenizers import make_tokenizer

from gradpruner.run import stages
from gradpruner.training import finetune


@pytest.fixture(scope="module")
def base_home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    write(folder / "model", config_of(make_tokenizer()))
    (folder / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": e.prompt, "completion": e.answer}) + "\n" for e in TRAIN)
    )
    return folder


@pytest.fixture
def trained(monkeypatch):
    """Every training that begins, each refused: what is checked before must not come so far."""
    begun = []

    def train(*args, **options):
        begun.append(args)
        raise AssertionError("trained")

    for module in (finetune, stages):
        monkeypatch.setattr(module, "train", train)
    return begun
