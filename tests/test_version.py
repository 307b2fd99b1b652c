"""The version is written in one place, and what has to repeat it agrees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gradpruner

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("file", "pattern"),
    [("CITATION.cff", r"^version: (\S+)$"), ("CHANGELOG.md", r"^## (\S+) \((?:unreleased|\d{4}-\d{2}-\d{2})\)$")],
)
def test_files_that_repeat_the_version_agree(file, pattern):
    said = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert said is not None and said[1] == gradpruner.__version__


def test_the_package_takes_its_version_from_one_place():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in settings and 'attr = "gradpruner.version.__version__"' in settings
    assert not re.search(r'^version = "', settings, re.MULTILINE)
