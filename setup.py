"""Builds the C++ extension `gradpruner._cpu` with ninja, and lists the packages. The rest is in pyproject.toml.

The extension is optional: without a compiler, with one that fails, or with GRADPRUNER_NO_EXT=1, the package installs
without it. Kernels of an instruction set that the compiler cannot build are left out. What is missing is printed, and
kept in a file beside the extension for `gradpruner backends`.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
NAME = "gradpruner._cpu"
NOTE = "_cpu_build.txt"  # in the package: what was left out of the extension, and why
COMMON_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra"
    # Results must not depend on the instruction set: a product is rounded before it is added.
    " -ffp-contract=off -fno-math-errno -fno-trapping-math"
)
# Sums whose last bits are free, and which twice as many operations a cycle make faster.
CONTRACTED = ("gram.cpp", "importance_tile.cpp", "weight_gradient.cpp")
X86 = platform.machine().lower() in ("x86_64", "amd64")
VARIANTS = {"portable": ""}
if X86:
    VARIANTS["avx2"] = "-mavx2 -mfma"
    VARIANTS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512"
    VARIANTS["avx512bf16"] = VARIANTS["avx512"] + " -mavx512bf16"
    VARIANTS["amx"] = VARIANTS["avx512bf16"] + " -mamx-tile -mamx-bf16"
# What a variant needs beyond its flags: intrinsics, an assembler that knows them, the question whether the machine has
# the instructions, and for the tiles of AMX Linux's permission.
PROBES = {
    "avx2": """
#include <immintrin.h>
int main() {
  _mm256_fmadd_ps(_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps());
  return __builtin_cpu_supports("avx2") + __builtin_cpu_supports("fma");
}
""",
    "avx512": """
#include <immintrin.h>
int main() {
  _mm512_add_ps(_mm512_setzero_ps(), _mm512_setzero_ps());
  return __builtin_cpu_supports("avx512f") + __builtin_cpu_supports("avx512bw") +
         __builtin_cpu_supports("avx512dq") + __builtin_cpu_supports("avx512vl");
}
""",
    "avx512bf16": """
#include <immintrin.h>
int main() {
  _mm512_cvtneps_pbh(_mm512_setzero_ps());
  return __builtin_cpu_supports("avx512bf16");
}
""",
    "amx": """
#include <immintrin.h>
#include <sys/syscall.h>
int main() {
  _tile_zero(0);
  _tile_dpbf16ps(0, 1, 2);
  return __builtin_cpu_supports("amx-bf16") + static_cast<int>(SYS_arch_prctl);
}
""",
}


def compiler() -> str | None:
    """The C++ compiler's command line: $CXX, else the first of the usual names that exists."""
    for command in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        try:
            words = shlex.split(command or "")
        except ValueError:  # a quotation mark without its partner
            continue
        if words and shutil.which(words[0]):
            return command
    return None


@cache
def variants() -> dict[str, str]:
    """The instruction sets that this compiler knows, by name, with their flags."""
    return {name: flags for name, flags in VARIANTS.items() if name not in PROBES or _knows(name, flags)}


def _knows(variant: str, flags: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(PROBES[variant])
        built = shlex.quote(str(source.with_suffix(".o")))
        command = f"{compiler()} -std=c++17 {flags} -c {shlex.quote(str(source))} -o {built}"
        return subprocess.run(command, shell=True, capture_output=True).returncode == 0


def choice_flags(chosen: Iterable[str]) -> str:
    """What tells variant.cpp which variants there are to choose from."""
    return " ".join(f"-DGRADPRUNER_{variant.upper()}" for variant in chosen if variant in PROBES)


def ninja() -> str | None:
    """The ninja executable: the one that the `ninja` package brings, else the one on the path."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")


def why_not() -> str | None:
    """The reason why the extension cannot or shall not be built, or None."""
    if os.environ.get("GRADPRUNER_NO_EXT") == "1":
        return "GRADPRUNER_NO_EXT=1"
    if compiler() is None:
        return "no C++ compiler found (looked for $CXX, c++, g++, clang++)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return f"Python.h is not in {sysconfig.get_path('include')}"
    return None


def escaped(path: Path | str) -> str:
    """A path as ninja wants to read it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def build_file(output: Path, chosen: dict[str, str]) -> str:
    """The text of build.ninja, which makes `output` out of csrc/. chosen: see `variants`."""
    import pybind11

    includes = (pybind11.get_include(), sysconfig.get_path("include"))
    module_flags = " ".join(f"-isystem {shlex.quote(folder)}" for folder in includes)
    link = "-shared -pthread" + (" -undefined dynamic_lookup" if sys.platform == "darwin" else " -ldl")
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {compiler()}",
        f"flags = {COMMON_FLAGS} {os.environ.get('CXXFLAGS', '')}",
        f"ldflags = {link} {os.environ.get('LDFLAGS', '')}",
        "rule compile",
        "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in $ldflags -o $out",
    ]
    objects = []

    def add(source: Path, name: str, extra: str) -> None:
        objects.append(name)
        lines.extend([f"build {name}: compile {escaped(source)}", f"  extra = {extra}"])

    for source in sorted(CSRC.glob("*.cpp")):
        flags = {"module.cpp": module_flags, "variant.cpp": choice_flags(chosen)}
        add(source, f"{source.stem}.o", flags.get(source.name, "-pthread"))
    for variant, variant_flags in chosen.items():
        for source in sorted((CSRC / "variant").glob("*.cpp")):
            contract = "-ffp-contract=fast" if source.name in CONTRACTED else ""
            extra = f"-DGRADPRUNER_VARIANT={variant} {variant_flags} {contract}"
            add(source, f"{variant}/{source.stem}.o", extra)
    lines += [f"build {escaped(output)}: link {' '.join(objects)}", f"default {escaped(output)}"]
    return "\n".join(lines) + "\n"


def failed_targets(said: str) -> list[str]:
    """The targets that ninja says it could not make."""
    return re.findall(r"^FAILED: (?:\[code=\d+\] )?(\S+)", said, re.MULTILINE)


def can_do_without(failed: Iterable[str]) -> set[str]:
    """The variants to leave out so that nothing of `failed` is needed; none if that would not help."""
    found = {target.partition("/")[0] for target in failed}
    return found if found <= PROBES.keys() else set()


def complaint(said: str) -> str:
    """The line of a compiler's output that tells best why it failed, cut to what fits on a screen."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("ninja: ")]
    telling = [line for line in lines if re.search(r"\berror\b|not found|cannot", line, re.IGNORECASE)]
    return (telling or lines or ["no reason given"])[0][:200]


def compile_with_ninja(built: Path) -> set[str]:
    """Make `built` in its folder, in parallel, and only what has changed; the variants that had to be left out.

    Raises CompileError.
    """
    program = ninja()
    if program is None:
        raise CompileError("ninja not found: install the `ninja` package")
    built.parent.mkdir(parents=True, exist_ok=True)
    chosen = dict(variants())
    while True:
        try:
            text = build_file(built, chosen)
        except ImportError as error:
            raise CompileError(f"{error}: install the `pybind11` package") from error
        script = built.with_name("build.ninja")
        if not script.is_file() or script.read_text() != text:
            script.write_text(text)
        command = [program, "-C", str(built.parent), "-k", "0"]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        print(result.stdout, flush=True)
        if result.returncode == 0:
            return VARIANTS.keys() - chosen.keys()
        failed = failed_targets(result.stdout)
        useless = can_do_without(failed)
        if not useless:
            after = result.stdout.partition("FAILED: ")[2].partition("\n")[2].partition("\n")[2]
            what = f" at {failed[0]}" if failed else ""
            raise CompileError(f"the compiler {compiler()!r} failed{what}: {complaint(after or result.stdout)}")
        for variant in useless:
            del chosen[variant]


class NinjaBuild(build_ext):
    """Compiles in build/, and leaves a note of what could not be compiled."""

    note: str | None = None

    def run(self) -> None:
        super().run()
        build_py = self.get_finalized_command("build_py")
        package = Path(build_py.get_package_dir("gradpruner") if self.inplace else self.build_lib + "/gradpruner")
        if self.note is None:
            (package / NOTE).unlink(missing_ok=True)
        else:
            package.mkdir(parents=True, exist_ok=True)
            (package / NOTE).write_text(self.note + "\n", encoding="utf-8")
        built = Path(self.get_ext_fullpath(NAME))
        if not (Path(self.build_lib) / self.get_ext_filename(NAME)).is_file():
            built.unlink(missing_ok=True)  # an older one, of other sources

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        try:
            left_out = compile_with_ninja(folder / output.name)
        except (CompileError, OSError) as error:
            output.unlink(missing_ok=True)
            self.note = f"gradpruner is installed without its C++ extension: {error}"
            raise CompileError(self.note) from error  # the extension is optional: setuptools makes a warning of it
        if left_out:
            names = ", ".join(name for name in VARIANTS if name in left_out)
            self.note = f"the C++ extension has no kernels for {names}: the compiler {compiler()!r} cannot build them"
            print(f"warning: {self.note}", file=sys.stderr)
        output.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a process that has the old one loaded keeps it.
        temporary = output.with_name(output.name + ".new")
        shutil.copyfile(folder / output.name, temporary)
        temporary.replace(output)


reason = why_not()
if reason:
    print(f"warning: gradpruner is installed without its C++ extension: {reason}", file=sys.stderr)
sources = [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*.cpp"))]
# Every folder of gradpruner/, and the folder kernels/ beside it as gradpruner.kernels: the link gradpruner/kernels
# serves a checkout only, and a source distribution does not have it.
packages = find_namespace_packages(str(ROOT), include=["gradpruner", "gradpruner.*"], exclude=["*.__pycache__"])
setup(
    packages=sorted({*packages, "gradpruner.kernels"}),
    ext_modules=[] if reason else [Extension(NAME, sources, optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
