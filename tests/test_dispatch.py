"""Instruction sets: what is chosen, what can be forced, what is refused."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusedopt
from fusedopt import _core

X86 = platform.machine() in ("x86_64", "AMD64")


def built_by_gcc():
    """Whether GCC built the extension: clang cannot compile one function for wider registers."""
    return b"clang version" not in Path(_core.__file__).read_bytes()


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True
    )


@pytest.mark.skipif(not X86 or not Path("/proc/cpuinfo").exists(), reason="reads Linux's cpuinfo")
def test_available_is_what_the_cpu_has():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(re.split(r"\s*: ?", line, maxsplit=1) for line in lines if ":" in line)
    flags = set(facts["flags"].split())
    expected = ["sse2"]
    if "avx2" in flags:
        expected.insert(0, "avx2")
    if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags:
        expected.insert(0, "avx512")
        if built_by_gcc():
            amd, family, model = (facts[name] for name in ("vendor_id", "cpu family", "model"))
            is_zen5 = (amd, int(family)) == ("AuthenticAMD", 0x1A)
            has_512_bits = is_zen5 and int(model) >> 4 not in (2, 3, 6)
            expected.insert(0 if has_512_bits else 1, "avx512_wide")
    assert _core.available_isas() == expected


@pytest.mark.parametrize("name", _core.available_isas())
def test_forced(name):
    done = run("import fusedopt; print(fusedopt.info()['isa'])", FUSEDOPT_ISA=name)
    assert done.stdout == f"{name} (FUSEDOPT_ISA)\n", done.stderr


@pytest.mark.parametrize("name", ["avx1024", "", "AVX2", "neon" if X86 else "avx2"])
def test_unknown_or_unsupported_is_an_import_error(name):
    done = run("import fusedopt", FUSEDOPT_ISA=name)
    assert done.returncode == 1
    known = ", ".join(_core.available_isas())
    assert f"ImportError: FUSEDOPT_ISA={name!r}: this machine and build can run {known}" in (
        done.stderr
    )


def test_info_is_complete():
    info = fusedopt.info()
    assert info["available"].split(", ") == _core.available_isas()
    assert info["threads"].split()[0] == str(fusedopt.get_num_threads())
    assert info["formats"].split(", ") == [row[0] for row in _core.formats()]
    assert all(isinstance(value, str) and value for value in info.values())
