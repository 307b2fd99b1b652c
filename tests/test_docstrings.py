"""Docstrings: a purpose in one short line, and a line per argument wherever a caller could need it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import gradpruner

ROOT = Path(__file__).parents[1]
LONGEST_LINE = 90  # characters of the first line, so that it fits a list of names
ENDS = (".", "?", "!", ":")
OBVIOUS = 1  # parameters: a function with one is explained by its first line
FACES = ("gradpruner", "gradpruner.ops", "gradpruner.methods", "gradpruner.sparsity")


def documented(tree, where=""):
    """Every class and function of a module outside functions: name, node, whether it belongs to a class."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield f"{where}{node.name}", node, bool(where)
            yield from documented(node, f"{where}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield f"{where}{node.name}", node, bool(where)


def sources():
    for folder in ("gradpruner", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def parameters(node, method):
    found = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    return found[1:] if method and not static else found


def explained(docstring):
    """The arguments that a docstring has a line for."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", docstring or "", re.MULTILINE)
    if section is None:
        return set()
    lines = re.findall(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \(.*?\))?:", section.group(1), re.MULTILINE)
    return {name.strip("* ") for line in lines for name in line.split(",")}


def test_first_lines_are_short():
    long = []
    for path, tree in sources():
        nodes = [("", tree, False), *documented(tree)]
        for name, node, _ in nodes:
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            if len(first) >= LONGEST_LINE or (first and not first.endswith(ENDS)):
                long.append(f"{path.relative_to(ROOT)}: {name or 'module'}: {first}")
    assert not long, f"{len(long)} first lines are too long or do not end:\n" + "\n".join(long)


def test_arguments_are_explained():
    """Public functions and methods with more than one parameter, wherever they are."""
    missing = []
    for path, tree in sources():
        for name, node, method in documented(tree):
            if not isinstance(node, ast.FunctionDef) or any(part.startswith("_") for part in name.split(".")):
                continue
            wanted = [p for p in parameters(node, method) if not p.startswith("_")]
            if is_event(name):
                continue
            if path.is_relative_to(ROOT / "kernels") and any("jit" in ast.dump(d) for d in node.decorator_list):
                continue  # Triton kernels: the launcher explains what it passes
            told = explained(ast.get_docstring(node))
            if len(wanted) > OBVIOUS and not set(wanted) <= told:
                missing.append(f"{path.relative_to(ROOT)}: {name}: {sorted(set(wanted) - told)}")
    assert not missing, f"{len(missing)} functions:\n" + "\n".join(missing)


def is_event(name):
    """Whether a method is an event of a transformers.TrainerCallback, which transformers calls and explains."""
    return name.rpartition(".")[2].startswith("on_")


def public():
    for face in FACES:
        module = importlib.import_module(face)
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing) or (inspect.isclass(thing) and not issubclass(thing, Exception)):
                yield pytest.param(thing, id=f"{face}.{name}")


def needs(function, name):
    signature = inspect.signature(function)
    docstring = inspect.getdoc(function) or ""
    wanted = {
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.name not in ("self", "cls") and not parameter.name.startswith("_")
    }
    assert wanted <= explained(docstring), (name, wanted - explained(docstring))
    returned = signature.return_annotation
    if returned not in (None, "None", inspect.Signature.empty):
        assert re.search(r"^(Returns|Yields):\n", docstring, re.MULTILINE), f"{name} does not say what it returns"
    if re.search(r"\braise (InvalidArgument|\w+Error|UnsupportedModel|ModelMismatch)", inspect.getsource(function)):
        assert re.search(r"^Raises:\n", docstring, re.MULTILINE), f"{name} does not say what it raises"


@pytest.mark.parametrize("thing", public())
def test_the_public_face_is_explained_in_full(thing):
    """Arguments, what comes back, what is raised: of what users import, and of the methods of what they import."""
    if inspect.isfunction(thing):
        needs(thing, thing.__qualname__)
        return
    own = {name for name in vars(thing) if not name.startswith("_")}
    if "__init__" in vars(thing):
        wanted = set(inspect.signature(thing).parameters)
        assert wanted <= explained(inspect.getdoc(thing)), (thing, wanted - explained(inspect.getdoc(thing)))
    for name in own:
        member = inspect.getattr_static(thing, name)
        member = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if inspect.isfunction(member) and not is_event(name):
            needs(member, member.__qualname__)


def test_the_public_names_have_docstrings():
    for name in gradpruner.__all__:
        thing = getattr(gradpruner, name)
        assert isinstance(thing, str) or inspect.getdoc(thing), name
