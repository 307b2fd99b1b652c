"""The C++ kernels under the compiler's sanitizers: no access out of bounds, no undefined behaviour, no data race."""

from __future__ import annotations

import os
import platform
import runpy
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
EXERCISE = ROOT / "tests" / "native" / "exercise.cpp"
EMULATED_TILES = ROOT / "tests" / "native" / "emulated_tiles.h"
OPS = (
    "square_accumulate",
    "all_finite",
    "weight_gradient",
    "gram_norm",
    "threshold",
    "factor_threshold",
    "outer_square_accumulate",
    "sign_merge",
    "factor_sign_merge",
    "weight_importance",
    "prune_groups",
    "apply_mask",
)


@dataclass(frozen=True)
class Sanitizer:
    """What to compile with, and a faulty program together with the words of the report that it must get."""

    flags: str
    faulty: str
    report: str


# A report ends the program: nothing after it can be trusted.
UNDEFINED = "-fsanitize=undefined,float-cast-overflow,float-divide-by-zero -fno-sanitize-recover=all"
SANITIZERS = {
    "address": Sanitizer(
        "-fsanitize=address",
        "int main(int count, char**) { int* p = new int[count]; return p[count]; }",
        "heap-buffer-overflow",
    ),
    "undefined": Sanitizer(UNDEFINED, "int main(int count, char**) { return 1 << (count + 31); }", "shift exponent"),
    "thread": Sanitizer(
        "-fsanitize=thread",
        "#include <thread>\nint n; int main() { std::thread t([] { ++n; }); ++n; t.join(); return 0; }",
        "data race",
    ),
}
# Fresh memory is full of NaN, so that a result made from memory that nobody wrote is wrong.
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1:max_malloc_fill_size=1073741824:malloc_fill_byte=255",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source tree"),
]


@pytest.fixture
def build(monkeypatch) -> dict[str, Any]:
    """What setup.py builds the extension with."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    names = runpy.run_path(str(ROOT / "setup.py"))
    if names["compiler"]() is None or names["ninja"]() is None:
        pytest.skip("needs a C++ compiler and ninja")
    return names


def same_addresses() -> list[str]:
    """The prefix that runs a program without address randomisation, more bits of which than a runtime expects stop
    it before main: "unexpected memory mapping"."""
    prefix = ["setarch", platform.machine(), "-R"]
    if shutil.which("setarch") and subprocess.run([*prefix, "true"], capture_output=True, timeout=60).returncode == 0:
        return prefix
    return []


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*same_addresses(), str(program), *arguments],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=900,
    )


def need_runtime(build: dict[str, Any], sanitizer: Sanitizer, folder: Path) -> None:
    """Skips where the compiler has no such sanitizer; fails where it has one that sees no fault."""
    source, program = folder / "faulty.cpp", folder / "faulty"
    source.write_text(sanitizer.faulty + "\n")
    command = f"{build['compiler']()} -O1 -g {sanitizer.flags} -pthread {source} -o {program}"
    compiled = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=900)
    if compiled.returncode != 0:
        pytest.skip(f"no runtime for {sanitizer.flags}: {compiled.stderr.strip()[-300:]}")
    result = run(program)
    assert result.returncode != 0 and sanitizer.report in result.stderr, result.stderr


def build_file(build: dict[str, Any], flags: str) -> str:
    """build.ninja for the exercise: csrc/ as setup.py compiles it, without the Python module, and less optimised.

    Three times: `exercise` starts its threads, `exercise_team` finds an OpenMP runtime that has them, and in
    `exercise_tiles` the weight gradient of `avx512` is that of `amx` on emulated tile registers.
    """
    escaped = build["escaped"]
    extra = "-O2 -g -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS -pthread"
    lines = [
        "rule compile",
        f"  command = {build['compiler']()} {build['COMMON_FLAGS']} {extra} {flags} $extra -c $in -o $out",
        "rule link",
        f"  command = {build['compiler']()} {flags} -pthread -rdynamic $in -o $out -ldl",
    ]
    objects = []

    def compiled(source: Path, name: str, extra: str = "") -> str:
        lines.extend([f"build {name}: compile {escaped(source)}", f"  extra = {extra}"])
        return name

    for source in sorted(CSRC.glob("*.cpp")):
        if source.name != "module.cpp":
            objects.append(compiled(source, f"{source.stem}.o", build["choice_flags"](build["variants"]())))
    for variant, variant_flags in build["variants"]().items():
        for source in sorted((CSRC / "variant").glob("*.cpp")):
            contract = "-ffp-contract=fast" if source.name in build["CONTRACTED"] else ""
            extra = f"-DGRADPRUNER_VARIANT={variant} {variant_flags} {contract}"
            objects.append(compiled(source, f"{variant}/{source.stem}.o", extra))
    for program, extra in (("exercise", ""), ("exercise_team", "-DEXERCISE_TEAM")):
        own = compiled(EXERCISE, f"{program}.o", extra)
        lines.append(f"build {program}: link {' '.join(objects)} {own}")
    if "avx512" in build["VARIANTS"]:
        extra = f"-DGRADPRUNER_VARIANT=avx512 {build['VARIANTS']['avx512']} -include {shlex.quote(str(EMULATED_TILES))}"
        emulated = compiled(CSRC / "variant" / "weight_gradient.cpp", "emulated_tiles.o", extra)
        others = [name for name in objects if name != "avx512/weight_gradient.o"]
        lines.append(f"build exercise_tiles: link {' '.join(others)} {emulated} exercise.o")
    return "\n".join(lines) + "\n"


def check_clean(result: subprocess.CompletedProcess[str], variants: Iterable[str]) -> None:
    """Nothing reported, every op run, by callers at once too, in every instruction set that there is."""
    assert result.stderr == "" and result.returncode == 0, result.stderr[-20_000:]
    for variant in variants:
        assert f"ran {variant}\n" in result.stdout or f"'{variant}' cannot run here" in result.stdout
    assert "ran portable\n" in result.stdout
    assert [line.split()[1] for line in result.stdout.splitlines() if line.startswith("shared ")] == list(OPS)


@pytest.mark.parametrize("names", [("address", "undefined"), ("thread",)], ids="+".join)
def test_the_kernels_are_clean(build, tmp_path, names):
    flags = []
    for name in names:
        need_runtime(build, SANITIZERS[name], tmp_path)
        flags.append(SANITIZERS[name].flags)
    (tmp_path / "build.ninja").write_text(build_file(build, " ".join(flags)))
    compiled = subprocess.run([build["ninja"](), "-C", str(tmp_path)], capture_output=True, text=True, timeout=900)
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr
    scope = "threads" if names == ("thread",) else "all"
    variants = build["variants"]()
    check_clean(run(tmp_path / "exercise", scope, *variants), variants)
    check_clean(run(tmp_path / "exercise_team", "threads", "portable"), ["portable"])
    if "avx512" in variants:
        check_clean(run(tmp_path / "exercise_tiles", scope, "portable", "avx512"), ["portable", "avx512"])
