"""The names of methods, and what of the package can be read without loading torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from module_states import assert_same, everything
from uneven_models import batch, build

import gradpruner.methods as face
import gradpruner.methods.base as base
from gradpruner.errors import InvalidArgument
from gradpruner.methods import METHODS, Clues, parse_method
from gradpruner.methods.names import METHOD_MODULES, METHOD_NAMES
from gradpruner.model.decoder import Decoder

PACKAGE = Path(face.__file__).parents[1]


def test_every_name_is_that_of_a_registered_method():
    assert tuple(METHODS) == METHOD_NAMES and len(METHODS) == len(METHOD_NAMES) == 10
    assert [METHODS[name].name for name in METHOD_NAMES] == list(METHOD_NAMES)
    assert [METHODS[name].__module__ for name in METHOD_NAMES] == list(METHOD_MODULES.values())


def test_every_method_of_the_folder_has_its_name_listed():
    found = set()
    for path in (PACKAGE / "methods").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any(ast.unparse(d) == "register" for d in node.decorator_list):
                found.add(f"gradpruner.methods.{path.stem}")
    assert found == set(METHOD_MODULES.values())


def test_every_public_name_can_be_had():
    assert all(getattr(face, name) is not None for name in face.__all__) and set(face.__all__) <= set(dir(face))
    with pytest.raises(AttributeError, match="has no attribute 'Grad'"):
        face.Grad  # noqa: B018


@pytest.mark.parametrize("module", ["gradpruner.methods.names", "gradpruner.sparsity.names"])
def test_names_are_read_without_torch(module):
    """Whatever the face of the whole package imports: it is replaced by an empty one."""
    lines = [
        "import sys, types",
        "package = types.ModuleType('gradpruner')",
        f"package.__path__ = [{str(PACKAGE)!r}]",
        "sys.modules['gradpruner'] = package",
        f"import {module}",
        "print({'torch', 'transformers', 'numpy'} & sys.modules.keys())",
    ]
    ran = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=100)
    assert (ran.returncode, ran.stdout) == (0, "set()\n"), ran.stderr


def test_the_method_in_the_docstring_works(monkeypatch):
    monkeypatch.setattr(METHODS, "_classes", dict(METHODS._classes))
    lines = base.__doc__.split('"small-attention:order=1":\n')[1].split("\nWhat to override")[0]
    code = "\n".join(line.removeprefix("    ") for line in lines.splitlines())
    exec(compile(code, "docstring", "exec", dont_inherit=True), {"__name__": __name__})
    assert list(METHODS) == [*METHOD_NAMES, "small-attention"] and len(METHODS) == 11
    with pytest.raises(InvalidArgument, match=r"accepted are .*small-attention"):
        parse_method("smallest")
    method, model = parse_method("small-attention:order=1"), build()
    before, clues = everything(model), Clues(model, [batch([4, 3], 0)], [], 0)
    norms = [float(layer.self_attn.o_proj.weight.abs().sum()) for layer in Decoder(model).layers]
    plan = method.plan(clues, 2)
    assert_same(everything(model), before)
    assert set(plan.removed) == set(sorted(range(len(norms)), key=lambda j: norms[j])[:2])
    assert len(Decoder(method.cut(clues, plan)).layers) == len(norms) - 2
