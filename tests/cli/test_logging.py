"""What the commands print of the library's log: bare messages on standard error, only warnings with --json."""

from __future__ import annotations

import logging

import pytest

from gradpruner.cli import main

logger = logging.getLogger("gradpruner.room.file")


@pytest.fixture
def talking(monkeypatch):
    """The command `backends`, which logs something and works on."""

    def talk(options):
        logger.info("two steps")
        logger.warning("the third is missing")
        return {"json": {"done": True}, "line": "done"}

    from gradpruner.cli import backends

    monkeypatch.setattr(backends, "_backends", talk)


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [(["backends"], ["two steps", "the third is missing"]), (["backends", "--json"], ["the third is missing"])],
    ids=["for people", "for programs"],
)
def test_messages_go_to_standard_error(arguments, lines, talking, capsys):
    for _ in range(2):  # a second command prints nothing twice
        assert main(arguments) == 0
        printed = capsys.readouterr()
        assert printed.err.splitlines() == lines and "steps" not in printed.out
    package = logging.getLogger("gradpruner")
    assert package.handlers == [] and package.level == logging.NOTSET  # as it was before


def test_finetune_says_that_it_reads_a_large_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("gradpruner.model.identity.LARGE", 0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    options = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "none.jsonl"), "--steps", "2"]
    assert main(["finetune", *options, "--out", str(tmp_path / "out")]) == 2  # there is no data
    assert "model: reading 0.0 GiB of" in capsys.readouterr().err
