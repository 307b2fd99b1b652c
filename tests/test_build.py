"""The extension's build: what goes into it, when it is left out, and which instruction set it picks."""

import importlib
import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
        timeout=300,
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
def test_every_room_is_packaged_and_the_kernels_without_their_link(setup_arguments, tmp_path, monkeypatch):
    rooms = {path.parent for path in (ROOT / "gradpruner").rglob("__init__.py")}
    packages = setup_arguments()["packages"]
    assert len(packages) == len(set(packages))
    assert {".".join(room.relative_to(ROOT).parts) for room in rooms} | {"gradpruner.kernels"} <= set(packages)

    import setuptools

    unpacked: dict = {}  # a source distribution has no link gradpruner/kernels
    (tmp_path / "gradpruner" / "storage").mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", tmp_path)
    monkeypatch.setattr(setuptools, "setup", unpacked.update)
    runpy.run_path(str(tmp_path / "setup.py"))
    assert unpacked["packages"] == ["gradpruner", "gradpruner.kernels", "gradpruner.storage"]


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
@pytest.mark.parametrize("quoting", ["'", " "])
def test_a_compiler_that_cannot_be_read_is_passed_over(setup_names, monkeypatch, quoting):
    monkeypatch.setenv("CXX", quoting)
    assert setup_names()["compiler"]() in ("c++", "g++", "clang++", None)


def fake_compiler(folder: Path, fails: str) -> str:
    """A compiler that compiles nothing, and complains where the shell pattern `fails` matches its arguments."""
    compiler = folder / "compiler"
    compiler.write_text(
        f"""#!/bin/sh
case "$*" in {fails}) echo "fake: error: cannot compile this"; exit 1;; esac
while [ $# -gt 0 ]; do
  case "$1" in -o) echo object > "$2";; -MF) echo "${{2%.d}}:" > "$2";; esac
  shift
done
"""
    )
    compiler.chmod(0o755)
    return str(compiler)


@needs_source
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="no x86 processor")
@pytest.mark.parametrize(
    ("flag", "lost"),
    [
        ("-no-such-flag", set()),
        ("-mamx-bf16", {"amx"}),
        ("-mavx512bf16", {"avx512bf16", "amx"}),
        ("-mavx2", {"avx2"}),
        ("-mavx512f", {"avx512", "avx512bf16", "amx"}),
    ],
)
def test_a_variant_is_left_out_where_the_compiler_does_not_know_its_flags(
    setup_names, monkeypatch, tmp_path, flag, lost
):
    monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(get_include=lambda: "include"))
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, f"*{flag}*"))
    names = setup_names()
    text = names["build_file"](tmp_path / "_cpu.so", names["variants"]())
    assert "build portable/merge.o" in text
    for variant in ("avx2", "avx512", "avx512bf16", "amx"):
        there = variant not in lost
        assert (f"build {variant}/merge.o" in text) == there
        assert (f"-DGRADPRUNER_{variant.upper()}" in text.split()) == there


@pytest.fixture
def install(tmp_path):
    """Runs setup.py's build in a copy of the source; returns what it did and the folder with the package."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_cpu_build.txt")
    for name in ("gradpruner", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source" / name)

    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "pybind11.py").write_text("get_include = lambda: 'include'\n")

    def run(*options: str, stubbed: bool = True, **environment: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        environment = {**os.environ, "GRADPRUNER_NO_EXT": "0", **environment}
        if stubbed:
            environment["PYTHONPATH"] = str(stub)
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), *options]
        result = subprocess.run(
            command, cwd=tmp_path / "source", env=environment, capture_output=True, text=True, timeout=300
        )
        return result, (tmp_path / "source" if "--inplace" in options else tmp_path / "lib") / "gradpruner"

    return run


def note_of(package: Path) -> str | None:
    note = package / "_cpu_build.txt"
    return note.read_text() if note.is_file() else None


needs_ninja = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file() or shutil.which("ninja") is None, reason="needs a source tree and ninja"
)


@pytest.mark.slow
@pytest.mark.in_ci
@needs_ninja
def test_a_source_that_does_not_compile_costs_its_variant_alone(install, tmp_path):
    result, package = install(CXX=fake_compiler(tmp_path, "*avx512/merge.o*"))
    assert result.returncode == 0, result.stderr
    (built,) = package.glob("_cpu*.so")
    assert "has no kernels for avx512:" in note_of(package) and "has no kernels for avx512:" in result.stderr
    linked = (tmp_path / "source").glob("build/*/build.ninja")
    assert "avx512bf16/merge.o" in (text := next(linked).read_text()) and "build avx512/merge.o" not in text
    # the note goes with what it is about
    result, package = install(CXX=fake_compiler(tmp_path, "nothing"))
    assert result.returncode == 0 and note_of(package) is None and built.is_file()


@needs_ninja
@pytest.mark.parametrize(
    ("fails", "options"),
    [("*", ()), ("*portable/merge.o*", ("--inplace",)), ("*-shared*", ())],
    ids=["everything", "portable, in place", "linking"],
)
def test_a_compiler_that_fails_is_a_warning_not_an_error(install, tmp_path, fails, options):
    package = install(*options, CXX=fake_compiler(tmp_path, "nothing"))[1]
    assert list(package.glob("_cpu*.so"))
    shutil.rmtree(tmp_path / "source" / "build")
    result, package = install(*options, CXX=fake_compiler(tmp_path, fails))
    assert result.returncode == 0, result.stderr
    assert not list(package.glob("_cpu*.so"))  # not even one of an earlier installation
    assert "without its C++ extension: the compiler" in note_of(package)
    assert "fake: error: cannot compile this" in note_of(package)
    assert "without its C++ extension" in result.stderr


@needs_ninja
def test_no_ninja_is_a_warning_not_an_error(install, tmp_path):
    (tmp_path / "stub" / "ninja.py").write_text(f"BIN_DIR = {str(tmp_path)!r}\n")
    result, package = install(CXX=fake_compiler(tmp_path, "nothing"), PATH="/nowhere")
    assert result.returncode == 0, result.stderr
    assert "without its C++ extension: ninja not found" in note_of(package)


@pytest.mark.slow
@needs_ninja
def test_the_rest_runs_where_one_variant_does_not_compile(install, tmp_path, setup_names):
    real = setup_names()["compiler"]()
    if real is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("needs a C++ compiler and pybind11")
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *avx2/merge.o*) echo "error: no"; exit 1;; esac\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    result, package = install(CXX=str(compiler), stubbed=False)
    assert result.returncode == 0, result.stderr
    code = (
        "import importlib.machinery as m, importlib.util as u\n"
        f"loader = m.ExtensionFileLoader('_cpu', {str(next(package.glob('_cpu*.so')))!r})\n"
        "module = u.module_from_spec(u.spec_from_loader('_cpu', loader))\n"
        "loader.exec_module(module)\n"
        "print(module.select_variant('portable'), module.select_variant(''))\n"
        "module.select_variant('avx2')\n"
    )
    ran = run_python(code)
    assert ran.stdout.startswith("portable ") and "'avx2' cannot run here" in ran.stderr


def test_backends_says_what_installing_left_out(tmp_path, monkeypatch, capsys):
    from gradpruner.cli.main import main

    monkeypatch.setattr("gradpruner.ops.backends.BUILD_NOTE", str(tmp_path / "note.txt"))
    assert main(["backends"]) == 0 and "cpp build" not in capsys.readouterr().out
    (tmp_path / "note.txt").write_text("the C++ extension has no kernels for amx: the compiler 'c++' cannot\n")
    assert main(["backends"]) == 0
    assert "cpp build: the C++ extension has no kernels for amx" in capsys.readouterr().out


def test_a_missing_extension_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradpruner._cpu", None)
    monkeypatch.delitem(sys.modules, "gradpruner.ops.cpp", raising=False)
    with pytest.raises(ImportError, match="installing builds it"):
        importlib.import_module("gradpruner.ops.cpp")


@pytest.mark.slow
@pytest.mark.in_ci
@needs_extension
def test_an_instruction_set_can_be_forced():
    result = run_python("from gradpruner.ops import cpp; print(cpp.ISA)", GRADPRUNER_CPU_ISA="portable")
    assert result.stdout.strip() == "portable", result.stderr


@pytest.mark.slow
@pytest.mark.in_ci
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
