"""The face of the package and of the command line: what they name, and what they do not import."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import gradpruner
from gradpruner.plan import Plan

ROOT = Path(__file__).parents[1]
HEAVY = ("transformers.trainer", "peft", "datasets", "accelerate")  # many seconds to import
TORCH = ("torch", "transformers", "numpy")


def imported(code, names, cwd=None):
    """Run code in a new interpreter. Return which of the modules it has imported."""
    end = "\n".join(
        ["finally:", "    import json, sys", f"    print(json.dumps([n for n in {names!r} if n in sys.modules]))"]
    )
    lines = "\n".join(f"    {line}" for line in code.splitlines())
    made = subprocess.run(
        [sys.executable, "-c", f"try:\n{lines}\n{end}"],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    return json.loads(made.stdout.splitlines()[-1])


def command(*arguments):
    return f"from gradpruner.cli import main\nmain({list(arguments)!r})"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["plan", "--help"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments):
    assert imported(command(*arguments), [*HEAVY, *TORCH]) == []


def test_importing_the_package_loads_nothing_heavy():
    assert imported("import gradpruner\ndir(gradpruner)\ngradpruner.__version__", [*HEAVY, *TORCH]) == []
    assert imported("import gradpruner\ngradpruner.Plan, gradpruner.InvalidArgument", [*HEAVY, *TORCH]) == []
    assert imported("import gradpruner\ngradpruner.Igia, gradpruner.apply", HEAVY) == []


def test_planning_loads_no_trainer(home, tmp_path):
    code = command("plan", str(home / "igia.safetensors"), "--count", "2", "--out", str(tmp_path / "plan.json"))
    assert imported(code, HEAVY) == []
    assert len(Plan.load(tmp_path / "plan.json").removed) == 2


def test_a_report_loads_no_trainer(tmp_path):
    plan = Plan(4, [2])
    row = dict.fromkeys(("exact_match", "perplexity", "step_seconds", "tokens_per_second", "peak_bytes"), 0.5)
    row |= {"name": "pruned", "layers": 3, "parameters": 10, "checkpoint_bytes": 10, "failed": None}
    probe = {"steps": 2, "skipped": 0, "layer_scores": [1.0, 2.0, 0.5, 3.0], "stability": [1.0], "margin": 0.5}
    content = {"rows": [row], "plan": plan.to_dict(), "probe": probe}
    (tmp_path / "results.json").write_text(json.dumps(content))
    (tmp_path / "run.json").write_text(json.dumps({"source": "m", "steps": 4, "probe_steps": 2}))
    assert imported(command("report", str(tmp_path)), HEAVY) == []
    assert (tmp_path / "report.html").is_file()


def test_every_public_name_is_there():
    assert len(set(gradpruner.__all__)) == len(gradpruner.__all__)
    for name in gradpruner.__all__:
        assert getattr(gradpruner, name) is not None
    assert set(gradpruner.__all__) <= set(dir(gradpruner))
    assert imported("import gradpruner\nassert set(gradpruner.__all__) <= set(dir(gradpruner))", ()) == []


def test_the_other_public_modules_need_no_import_of_their_own():
    code = "import gradpruner\ngradpruner.errors.InvalidArgument, gradpruner.ops.threshold, gradpruner.methods.Laco"
    assert imported(f"{code}\ngradpruner.sparsity.Masks", HEAVY[1:3]) == []


def test_an_unknown_name_is_refused_as_python_does():
    with pytest.raises(AttributeError, match=r"^module 'gradpruner' has no attribute 'nothing'$"):
        _ = gradpruner.nothing
    with pytest.raises(ImportError):
        importlib.import_module("gradpruner.nothing")


def test_no_public_name_is_that_of_a_submodule():
    """Importing `gradpruner.report`, say, sets an attribute on the package: it would hide a function of that name."""
    folder = Path(gradpruner.__file__).parent
    submodules = {path.stem for path in folder.glob("*.py")} | {
        path.parent.name for path in folder.glob("*/__init__.py")
    }
    assert not submodules & set(gradpruner.__all__)
    assert not any(isinstance(getattr(gradpruner, name), types.ModuleType) for name in gradpruner.__all__)


def test_the_lazy_names_are_those_that_type_checkers_see():
    import ast

    tree = ast.parse(Path(gradpruner.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == gradpruner._MODULES
    assert {*seen, "__version__"} == set(gradpruner.__all__)
