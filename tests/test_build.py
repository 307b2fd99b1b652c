"""The extension's build: what goes into it, when it is left out, and which instruction set it picks."""

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gradpruner import ops

ROOT = Path(__file__).resolve().parent.parent
needs_source = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source tree")
needs_extension = pytest.mark.skipif(
    ops.available_backends()["cpp"] != "available", reason="the extension is not built"
)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def setup_names(monkeypatch):
    """Runs setup.py without building and returns its names, `arguments` what it would tell setuptools."""

    def run() -> dict:
        import setuptools

        arguments: dict = {}
        monkeypatch.setattr(setuptools, "setup", arguments.update)
        return {**runpy.run_path(str(ROOT / "setup.py")), "arguments": arguments}

    return run


@pytest.fixture
def setup_arguments(setup_names):
    """As `setup_names`; returns the arguments alone."""
    return lambda: setup_names()["arguments"]


@needs_source
def test_every_source_is_part_of_the_extension(setup_arguments, monkeypatch):
    monkeypatch.delenv("GRADPRUNER_NO_EXT", raising=False)
    monkeypatch.setenv("CXX", sys.executable)  # any program that exists; nothing is compiled here
    (extension,) = setup_arguments()["ext_modules"]
    assert {ROOT / source for source in extension.sources} == set((ROOT / "csrc").rglob("*.cpp"))


@needs_source
def test_the_extension_can_be_declined(setup_arguments, monkeypatch, capsys):
    monkeypatch.setenv("GRADPRUNER_NO_EXT", "1")
    assert setup_arguments()["ext_modules"] == []
    assert "without its C++ extension: GRADPRUNER_NO_EXT=1" in capsys.readouterr().err


@needs_source
def test_no_compiler_is_a_warning_not_an_error(setup_arguments, monkeypatch, capsys):
    monkeypatch.delenv("GRADPRUNER_NO_EXT", raising=False)
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    assert setup_arguments()["ext_modules"] == []
    assert "no C++ compiler found" in capsys.readouterr().err


@needs_source
@pytest.mark.parametrize("knows", [True, False])
def test_amx_is_left_out_where_the_compiler_does_not_know_it(setup_names, monkeypatch, tmp_path, capsys, knows):
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-mamx-bf16*) exit {0 if knows else 1};; esac\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    names = setup_names()
    if not names["X86"]:
        pytest.skip("no x86 processor")
    pytest.importorskip("pybind11")
    text = names["build_file"](tmp_path / "_cpu.so")
    assert ("amx/weight_gradient.o" in text) == ("-DGRADPRUNER_AMX" in text) == ("-mamx-bf16" in text) == knows
    assert "avx512bf16/weight_gradient.o" in text and "-DGRADPRUNER_X86" in text
    assert ("no variant for AMX" in capsys.readouterr().err) != knows


def test_a_missing_extension_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradpruner._cpu", None)
    monkeypatch.delitem(sys.modules, "gradpruner.ops.cpp", raising=False)
    with pytest.raises(ImportError, match="installing builds it"):
        importlib.import_module("gradpruner.ops.cpp")


@needs_extension
def test_an_instruction_set_can_be_forced():
    result = run_python("from gradpruner.ops import cpp; print(cpp.ISA)", GRADPRUNER_CPU_ISA="portable")
    assert result.stdout.strip() == "portable", result.stderr


@needs_extension
def test_an_unknown_instruction_set_is_refused():
    result = run_python("import gradpruner.ops.cpp", GRADPRUNER_CPU_ISA="sse9")
    assert re.search(r"InvalidArgument: GRADPRUNER_CPU_ISA: instruction set 'sse9'.*portable", result.stderr)


@needs_extension
def test_the_extension_does_not_need_torch():
    import gradpruner._cpu as _cpu

    result = run_python(
        "import importlib.machinery as m, importlib.util as u, sys\n"
        f"loader = m.ExtensionFileLoader('_cpu', {_cpu.__file__!r})\n"
        "module = u.module_from_spec(u.spec_from_loader('_cpu', loader))\n"
        "loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(module.select_variant(''))"
    )
    assert result.returncode == 0, result.stderr
