"""The rooms of the package: which may import which, how many floors there are, and how long a file may be."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gradpruner"
# Bottom to top. A room may import those before it, never those after it. docs/contributing.md says what each is for.
ROOMS = (
    *("version", "errors", "checks", "memory", "named_options", "storage", "kernels", "ops", "distributed", "model"),
    *("plan", "presets", "report", "data", "probe", "checkpoint", "pruning", "sparsity", "methods", "training", "run"),
    *("integrations", "compare", "cli"),
)
FACES = {"ops", "methods", "sparsity", "probe/estimators", "sparsity/criteria", "cli"}  # they hand names on
LONGEST_FILE = 400  # lines
MOST_FILES_IN_THE_ROOT = 8
MOST_FLOORS = 10


def modules():
    """Every module of the package by its dotted name; the kernels, which lie beside the package, too."""
    found = {}
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = ("gradpruner", *parts) if parts[0] == "kernels" else parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def imports():
    """Module to the modules of this package that it imports, inside functions too."""
    known = modules()
    arrows = {}
    for module, path in known.items():
        arrows[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                arrows[module] |= {alias.name for alias in node.names} & known.keys()
            elif isinstance(node, ast.ImportFrom) and node.module:
                named = {f"{node.module}.{alias.name}" for alias in node.names} & known.keys()
                arrows[module] |= named or ({node.module} & known.keys())
    return arrows


def room_of(module):
    return module.split(".")[1] if "." in module else "gradpruner"


def room_arrows():
    arrows = {}
    for module, targets in imports().items():
        own = room_of(module)
        arrows.setdefault(own, set()).update({room_of(target) for target in targets} - {own})
    face = arrows.pop("gradpruner")
    assert face <= set(ROOMS)
    return arrows


def test_every_room_is_known():
    assert room_arrows().keys() == set(ROOMS)


def test_no_room_imports_one_above_it():
    wrong = [
        f"{module} imports {target}"
        for module, targets in imports().items()
        for target in targets
        if room_of(module) != "gradpruner"
        and (room_of(target) == "gradpruner" or ROOMS.index(room_of(target)) > ROOMS.index(room_of(module)))
    ]
    assert wrong == []


def circle(arrows):
    """Modules that import each other in a circle, the first that is found, or nothing."""
    done, way = set(), []

    def walk(module):
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        way.append(module)
        for target in sorted(arrows.get(module, ())):
            if found := walk(target):
                return found
        way.pop()
        done.add(module)
        return []

    for module in sorted(arrows):
        if found := walk(module):
            return found
    return []


def test_no_modules_import_each_other_in_a_circle():
    assert circle(imports()) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def floors(arrows):
    """How many rooms stand on top of each other at most."""
    height = functools.cache(lambda room: 1 + max(map(height, arrows[room]), default=0))
    return max(map(height, arrows))


def test_few_floors():
    assert floors({"a": set(), "b": {"a"}, "c": {"a", "b"}}) == 3
    assert floors(room_arrows()) <= MOST_FLOORS


def test_few_files_in_the_root():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_FILES_IN_THE_ROOT


def test_the_faces_of_rooms_hold_a_docstring_and_nothing_else():
    for face in PACKAGE.rglob("*/__init__.py"):
        body = ast.parse(face.read_text(encoding="utf-8")).body
        assert ast.get_docstring(ast.Module(body=body, type_ignores=[])), face
        if str(face.parent.relative_to(PACKAGE)) not in FACES:
            assert len(body) == 1, face


@pytest.mark.parametrize("folder", ["gradpruner", "kernels", "benchmarks", "tests", "examples", "csrc"])
def test_no_file_is_long(folder):
    files = [path for kind in ("*.py", "*.cpp", "*.h") for path in (ROOT / folder).rglob(kind)]
    long = {str(path.relative_to(ROOT)): lines for path in files if (lines := lines_of(path)) > LONGEST_FILE}
    assert files and long == {}


def lines_of(path):
    return len(path.read_text(encoding="utf-8").splitlines())
