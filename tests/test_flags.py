"""Compiler flags that may change bits are refused by csrc/flags.h and CMakeLists.txt."""

import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[1] / "csrc").glob("*.c"))
EVERYWHERE = ["-ffast-math", "-Ofast", "-ffinite-math-only"]
GCC = [
    "-funsafe-math-optimizations",
    "-fassociative-math -fno-signed-zeros -fno-trapping-math",
    "-freciprocal-math",
    "-fno-signed-zeros",
    "-fsingle-precision-constant",
]

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@lru_cache
def is_gcc():
    done = subprocess.run(["cc", "--version"], capture_output=True, text=True, check=True)
    return "Free Software Foundation" in done.stdout


def compile_with(source, flags):
    """Whether a file of the library compiles with some flags, and the compiler's first error."""
    command = [
        "cc", "-std=c11", "-O3", "-fsyntax-only", "-Wfatal-errors", *flags.split(),
        "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-D_DEFAULT_SOURCE",
        "-DFO_ISA=any", source,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
@pytest.mark.parametrize("flags", EVERYWHERE + GCC)
def test_refused(source, flags):
    if flags in GCC and not is_gcc():
        pytest.skip("GCC defines a macro for it; other compilers only have the flag")
    accepted, messages = compile_with(source, flags)
    assert not accepted
    assert "would change the bits of a step" in messages


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_excess_precision_is_refused(source):
    accepted, messages = compile_with(source, "-U__FLT_EVAL_METHOD__ -D__FLT_EVAL_METHOD__=2")
    assert not accepted
    assert "float must be computed in float" in messages


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_harmless_flags(source):
    """Including flags that undo others, as packagers use them."""
    for flags in ("", "-O2 -g -fno-fast-math -fwrapv", "-ffast-math -fno-fast-math"):
        accepted, messages = compile_with(source, flags)
        assert accepted, messages


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")
@pytest.mark.parametrize("kind", ["C_FLAGS", "C_FLAGS_RELEASE", "MODULE_LINKER_FLAGS"])
@pytest.mark.parametrize("before", ["", "-g ", "-g\t", "-g\n", "-g\r\n", "-g;", '"', "'"])
@pytest.mark.parametrize(
    ("flag", "ok"),
    [
        ("-ffast-math", False),
        ("-Ofast", False),
        ("-mdaz-ftz", False),
        ("-fdenormal-fp-math=preserve-sign,preserve-sign", False),
        ("-fno-fast-math", True),
        ("-ffast-mathematics", True),
    ],
)
def test_cmake_finds_flags_after_any_separator(flag, ok, before, kind, tmp_path):
    """Runs only the lines of CMakeLists.txt that search for such flags."""
    text = (SOURCES[0].parents[1] / "CMakeLists.txt").read_text()
    lines = re.search(r"string\(CONCAT bad_flags.*?endforeach\(\)", text, re.DOTALL)
    after = {'"': '"', "'": "'"}.get(before, before[2:])
    value = f"{before}{flag}{after}{'-g' if after else ''}"
    script = tmp_path / "flags.cmake"
    setting = f"set(CMAKE_BUILD_TYPE Release)\nset(CMAKE_{kind} [==[{value}]==])\n"
    script.write_bytes((setting + lines[0]).encode())
    done = subprocess.run(["cmake", "-P", script], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == ok, done.stderr
    assert ok or "would change the bits of a step" in " ".join(done.stderr.split())


def test_there_are_sources():
    assert {"kernels.c", "step.c", "dispatch.c"} <= {path.name for path in SOURCES}
