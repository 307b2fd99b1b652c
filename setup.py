"""Builds the C++ extension `gradpruner._cpu` with ninja. Everything else is in pyproject.toml.

The extension is optional: without a compiler, or with GRADPRUNER_NO_EXT=1, the package installs without it.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
NAME = "gradpruner._cpu"
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
AMX_FLAGS = VARIANTS.get("avx512bf16", "") + " -mamx-tile -mamx-bf16"
# What the variant `amx` needs beyond its flags: the intrinsics, an assembler that knows them, Linux's permission.
AMX_PROBE = """
#include <immintrin.h>
#include <sys/syscall.h>
int main() {
  _tile_zero(0);
  _tile_dpbf16ps(0, 1, 2);
  return __builtin_cpu_supports("amx-bf16") + static_cast<int>(SYS_arch_prctl);
}
"""


def compiler() -> str | None:
    """The C++ compiler's command line: $CXX, else the first of the usual names that exists."""
    for command in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if command and shutil.which(shlex.split(command)[0]):
            return command
    return None


@cache
def variants() -> dict[str, str]:
    """The instruction sets that this compiler can build for, by name, with their flags."""
    if not X86:
        return VARIANTS
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(AMX_PROBE)
        built = shlex.quote(str(source.with_suffix(".o")))
        command = f"{compiler()} -std=c++17 {AMX_FLAGS} -c {shlex.quote(str(source))} -o {built}"
        if subprocess.run(command, shell=True, capture_output=True).returncode != 0:
            print("warning: no variant for AMX: the compiler or this system does not know it", file=sys.stderr)
            return VARIANTS
    return {**VARIANTS, "amx": AMX_FLAGS}


def choice_flags() -> str:
    """What tells variant.cpp which variants there are to choose from."""
    return ("-DGRADPRUNER_X86" if X86 else "") + (" -DGRADPRUNER_AMX" if "amx" in variants() else "")


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


def build_file(output: Path) -> str:
    """The text of build.ninja, which makes `output` out of csrc/."""
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
        flags = {"module.cpp": module_flags, "variant.cpp": choice_flags()}
        add(source, f"{source.stem}.o", flags.get(source.name, "-pthread"))
    for variant, variant_flags in variants().items():
        for source in sorted((CSRC / "variant").glob("*.cpp")):
            contract = "-ffp-contract=fast" if source.name in CONTRACTED else ""
            extra = f"-DGRADPRUNER_VARIANT={variant} {variant_flags} {contract}"
            add(source, f"{variant}/{source.stem}.o", extra)
    lines += [f"build {escaped(output)}: link {' '.join(objects)}", f"default {escaped(output)}"]
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Compiles in build/, in parallel, and only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        program = ninja()
        if program is None:
            raise RuntimeError("ninja not found: install the `ninja` package, or set GRADPRUNER_NO_EXT=1")
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        built = folder / output.name
        text = build_file(built)
        script = folder / "build.ninja"
        if not script.is_file() or script.read_text() != text:
            script.write_text(text)
        subprocess.run([program, "-C", str(folder)], check=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a process that has the old one loaded keeps it.
        temporary = output.with_name(output.name + ".new")
        shutil.copyfile(built, temporary)
        temporary.replace(output)


reason = why_not()
if reason:
    print(f"warning: gradpruner is installed without its C++ extension: {reason}", file=sys.stderr)
sources = [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*.cpp"))]
setup(
    ext_modules=[] if reason else [Extension(NAME, sources)],
    cmdclass={"build_ext": NinjaBuild},
)
