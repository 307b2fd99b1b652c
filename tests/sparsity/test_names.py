"""The names of criteria, and the public names of the folder."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import gradpruner.sparsity as face
import gradpruner.sparsity.criteria.base as base
from gradpruner.sparsity.criteria import CRITERIA, parse_criterion
from gradpruner.sparsity.names import CRITERION_MODULES, CRITERION_NAMES
from gradpruner.sparsity.pattern import Pattern
from gradpruner.sparsity.statistics import LinearStatistics


def test_every_name_is_that_of_a_registered_criterion():
    assert tuple(CRITERIA) == CRITERION_NAMES
    assert [CRITERIA[name].name for name in CRITERION_NAMES] == list(CRITERION_NAMES)
    assert [CRITERIA[name].__module__ for name in CRITERION_NAMES] == list(CRITERION_MODULES.values())


def test_every_criterion_of_the_folder_has_its_name_listed():
    files = {path.stem for path in (Path(face.__file__).parent / "criteria").glob("*.py")} - {"__init__", "base"}
    assert {f"gradpruner.sparsity.criteria.{name}" for name in files} == set(CRITERION_MODULES.values())


def test_every_public_name_can_be_had():
    assert all(getattr(face, name) is not None for name in face.__all__) and set(face.__all__) <= set(dir(face))
    assert inspect.isfunction(face.sparsify)  # and no module of this name
    with pytest.raises(AttributeError, match="has no attribute 'prune'"):
        face.prune  # noqa: B018


def test_the_criterion_in_the_docstring_works(monkeypatch):
    monkeypatch.setattr(CRITERIA, "_classes", dict(CRITERIA._classes))
    lines = base.__doc__.split('"tempered-wanda:power=0.5":\n')[1].split("\nDerive from")[0]
    code = "\n".join(line.removeprefix("    ") for line in lines.splitlines())
    exec(compile(code, "docstring", "exec", dont_inherit=True), {"__name__": __name__})
    weight, norms = torch.tensor([[3.0, 2.0, -1.0, 0.5]]), torch.tensor([1.0, 4.0, 16.0, 1.0])
    mask = parse_criterion("tempered-wanda:power=0.5").prune_(
        weight, LinearStatistics(norms=norms), Pattern("row", 0.5)
    )
    assert weight.tolist() == [[0.0, 2.0, -1.0, 0.0]] and mask.tolist() == [[0b0110]]
