"""The compiled code: wide instructions in kernels only, none that change bits."""

import importlib
import platform
import re
import shutil
import subprocess
import sysconfig
from itertools import product
from pathlib import Path

import pytest

from fusedopt import _core

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("objdump") is None,
    reason="disassembles x86-64 with objdump (binutils)",
)

MODULES = [
    importlib.import_module(f"fusedopt.{path.stem}")
    for path in sorted(Path(__file__).parents[1].glob("src/fusedopt/*.pyx"))
]
WIDEST = {"sse2": "xmm", "avx2": "ymm", "avx512": "ymm"}  # over whole tiles; blocks may be wider
WHOLE = [(isa, "whole", register) for isa, register in WIDEST.items()]
WHOLE += [("avx512", "wide", "zmm")] if "avx512_wide" in _core.available_isas() else []


@pytest.fixture(scope="module")
def functions():
    """Name -> instructions of each function of the extension."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", _core.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = {}
    for block in re.split(r"\n\n", listing):
        head = re.match(r"\s*[0-9a-f]+ <(.+)>:\n", block)
        if head:
            lines = block[head.end() :].splitlines()
            found[head[1]] = [line.split("\t", 1)[1] for line in lines if "\t" in line]
    return found


def isa_of(name):
    loop = r"_whole|_wide|_directions|_blocks|_\w+_(blocks|sums)"
    found = re.search(rf"_(sse2|avx2|avx512)({loop})?(\.|$)", name)
    return found[1] if found else None


def code_of(functions, name):
    return [i for f, code in functions.items() if f.startswith(name) for i in code]


def is_avx(instruction):
    # VEX and EVEX forms begin with v; verr and verw are system instructions, which are not used
    return re.match(r"v[a-z]", instruction) or re.search(r"%[yz]mm|%k[0-7]", instruction)


def test_names_are_there(functions):
    """The wheel keeps its symbols, so that this file can distinguish kernels."""
    for isa in WIDEST:
        for rule, kind, loop in product(_core.RULES, ("f32", "f64"), ("whole", "native_sums")):
            name = f"{rule}_{kind}_{isa}_{loop}"
            assert any(f.startswith(name) for f in functions), name


def test_only_kernels_hold_wide_instructions(functions):
    outside = {
        name: [i for i in code if is_avx(i)]
        for name, code in functions.items()
        if isa_of(name) in (None, "sse2")
    }
    assert {name: code for name, code in outside.items() if code} == {}
    assert len(outside) > 50


def test_each_isa_keeps_to_its_registers(functions):
    for name, code in functions.items():
        text = "\n".join(code)
        if isa_of(name) == "avx2":
            assert "zmm" not in text, name
            assert not re.search(r"%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])", text), name


def test_fused_multiply_add_only_where_bits_allow(functions):
    """It rounds once where the reference rounds twice: divide.inc uses it, in pairs.

    Else only sums of squares of floats in double do, whose products are exact.
    """
    fused = set()
    for name, code in functions.items():
        found = [i for i in code if re.match("vfn?m(add|sub)", i)]
        if "_f32_" in name:
            found = [i for i in found if not re.match(r"vfmadd\d+[ps]d", i)]
        rests = sum(i.startswith("vfnmadd") for i in found)
        assert len(found) == 2 * rests, name
        fused |= {re.split("_f(?:32|64)_", name)[0]} if rests else set()
    # those whose constants have a root to divide by
    assert fused == {rule for rule, (_, scalars, *_) in _core.RULES.items() if "root" in scalars}


@pytest.mark.parametrize(("isa", "loop", "register"), WHOLE)
@pytest.mark.parametrize("rule", _core.RULES)
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_rules_are_vectorised(functions, rule, kind, isa, loop, register):
    suffix = ("ps", "pd")[kind == "f64"]
    code = code_of(functions, f"{rule}_{kind}_{isa}_{loop}")
    packed = [i for i in code if re.match(rf"v?(mul|sub){suffix}\s", i) and f"%{register}" in i]
    assert len(packed) >= 2, f"{rule}_{kind}_{isa} has no packed arithmetic in {register}"


@pytest.mark.parametrize("isa", WIDEST)
def test_formats_are_vectorised(functions, isa):
    """Decoding and encoding use packed integers, but for SSE2 within the loop of a rule."""
    known = [[f"adam_f32_{isa}_bf16_state"], [f"adam_f32_{isa}_int8_state"]]
    parts = [[f"{name}_f32_{isa}" for name in ("load_tile", "store_tile", "step_apart")]]
    for names in parts if isa == "sse2" else known:
        code = [i for name in names for i in code_of(functions, name)]
        widening = [i for i in code if re.match(r"v?(pmov[sz]x(bd|wd)|punpck[lh](bw|wd))", i)]
        narrowing = [i for i in code if re.match(r"v?(pmov(db|dw|wb)|packus|punpck|perm[it]2w)", i)]
        hashing = [i for i in code if re.match(r"v?(pmulld|pmuludq)", i)]
        assert len(widening) >= 8 and len(narrowing) >= 4 and len(hashing) >= 8


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_exports_the_module_and_one_name(module):
    if shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    run = ["nm", "-D", "--defined-only", module.__file__]
    listing = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in listing.splitlines()}
    more = {"fo_backend"} if module is _core else set()  # for threadpoolctl
    assert names == {f"PyInit_{module.__name__.rpartition('.')[2]}"} | more


@pytest.mark.parametrize("module", [m for m in MODULES if m is not _core], ids=lambda m: m.__name__)
def test_the_library_is_linked_once(module):
    """The borders call the C library through _core: one pool, one choice of ISA."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    run = ["nm", module.__file__]
    listing = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert not [line for line in listing.splitlines() if re.search(r" \w fo_", line)]


def test_stable_abi():
    """File names that every CPython from 3.11 on finds, whichever built them."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("no stable ABI")
    assert len(MODULES) == 5
    for module in MODULES:
        assert Path(module.__file__).name == module.__name__.partition(".")[2] + ".abi3.so"
