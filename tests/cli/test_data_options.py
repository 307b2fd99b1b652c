"""The options of the data that lead to files."""

from __future__ import annotations

from argparse import ArgumentParser

import pytest

from gradpruner.cli import data_options
from gradpruner.cli import options as given
from gradpruner.errors import InvalidArgument


def parsed(*arguments):
    parser = ArgumentParser()
    data_options.add(parser, testing=False)
    return parser.parse_args(["--data", "x", *arguments])


def test_a_chat_template_is_the_content_of_its_file(tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    assert given.chat_template(parsed("--chat-template", str(tmp_path / "chat.jinja"))) == "{{ messages }}"
    assert given.chat_template(parsed()) is None


def test_a_chat_template_that_cannot_be_read(tmp_path):
    for file in (tmp_path, tmp_path / "no.jinja"):
        with pytest.raises(InvalidArgument, match=r"--chat-template .* cannot be read"):
            given.chat_template(parsed("--chat-template", str(file)))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InvalidArgument, match=r"--chat-template .* cannot be read"):
        given.chat_template(parsed("--chat-template", str(tmp_path / "bytes")))


def test_what_is_accepted(capsys):
    assert parsed("--too-long", "skip", "--train-on", "last").too_long == "skip"
    assert parsed().too_long is None
    with pytest.raises(SystemExit):
        parsed("--too-long", "trim")
    assert "cut" in capsys.readouterr().err
