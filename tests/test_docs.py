"""Examples, commands and links of the documentation work."""

import ast
import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fusedopt
from fusedopt import _core, formats

ROOT = Path(__file__).parent.parent
MODULES = [
    m.name for m in pkgutil.walk_packages(fusedopt.__path__, "fusedopt.")
    if not m.name.endswith(("__main__", "._arrays", "._core", "._tensors"))
]  # fmt: skip
EXTRAS = ("torch", "keras", "thinc")  # in the names of modules that need them
PUBLIC = ["fusedopt"] + [
    f"fusedopt.{name}" for name in (
        "formats", "functional", "keras", "monitor", "mpi", "reference", "schedules", "thinc",
        "torch", "tune",
    )
]  # fmt: skip
BLOCK = re.compile(r"```python\n(.*?)```", re.S)
OWN_TESTS = ("keras.md", "programs.md")  # test_keras.py, test_programs.py
PAGES = [
    page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
    if page.name not in OWN_TESTS and BLOCK.search(page.read_text())
]  # fmt: skip
EXAMPLES = sorted(ROOT.glob("docs/examples/*.py"))
NUMBER = re.compile(r"\d[\d.]*")


@pytest.mark.parametrize("name", ["fusedopt", *MODULES])
def test_examples_in_docstrings(name):
    for extra in EXTRAS:
        if extra in name:
            pytest.importorskip(extra, reason=f"needs it: pip install {extra}")
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs={"fusedopt": fusedopt, "np": np})
    assert failed == 0


def test_there_are_examples():
    found = [
        test for name in ["fusedopt", *MODULES]
        if not any(extra in name for extra in EXTRAS)
        for test in doctest.DocTestFinder().find(importlib.import_module(name)) if test.examples
    ]  # fmt: skip
    assert len(found) >= 4


def absent(code):
    """The name of a module that some code imports and that is not installed, or None."""
    for node in ast.walk(ast.parse(code)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            for needed in (name.partition(".")[0], *(e for e in EXTRAS if f"fusedopt.{e}" in name)):
                if importlib.util.find_spec(needed) is None:
                    return needed
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_pages_runs(page, tmp_path, monkeypatch):
    """All Python blocks, one after the other, as a reader would; up to what needs more."""
    monkeypatch.chdir(tmp_path)
    names, ran = {"__name__": "page"}, 0
    for block in BLOCK.findall(page.read_text()):
        missing = absent(block)
        if missing is not None:
            if not ran:
                pytest.skip(f"needs {missing}")
            return
        exec(compile(block, str(page), "exec"), names)
        ran += 1
    assert ran


def test_most_pages_have_code():
    assert len(PAGES) >= 9 and ROOT / "README.md" in PAGES


@pytest.mark.slow("runs whole programs")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_prints_what_the_site_shows(path, tmp_path):
    """All but the numbers, which differ a little from machine to machine."""
    missing = absent(path.read_text())
    if missing is not None:
        pytest.skip(f"needs {missing}")
    one = dict.fromkeys(("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    can_draw = importlib.util.find_spec("matplotlib") is not None
    pictures = ["drawn.svg"] if path.with_suffix(".svg").exists() and can_draw else []
    run = subprocess.run(  # on one thread: on a busy machine others would only wait
        [sys.executable, str(path), *pictures], cwd=tmp_path, capture_output=True, text=True,
        timeout=280, env=os.environ | one,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert all("<svg" in (tmp_path / picture).read_text() for picture in pictures)
    shown = path.with_suffix(".txt").read_text()
    assert NUMBER.sub("#", run.stdout) == NUMBER.sub("#", shown)


def test_examples_are_on_the_site():
    page = (ROOT / "docs/examples/index.md").read_text()
    for path in EXAMPLES:
        assert f"}} {path.name}\n" in page and f"}} {path.stem}.txt\n" in page, path.name
    pictures = [path.name for path in ROOT.glob("docs/examples/*.svg")]
    assert len(pictures) >= 2 and all(f"]({name})" in page for name in pictures)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_readme_commands_are_cis():
    """CI runs the README's commands exactly."""
    commands = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    ci = (ROOT / ".ci/run").read_text()
    for command in (line for block in commands for line in block.splitlines()):
        assert command in ci


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_documented(module):
    for extra in EXTRAS:
        if extra in module:
            pytest.importorskip(extra)
    module = importlib.import_module(module)
    for name in module.__all__:
        thing = getattr(module, name)
        if callable(thing) and not isinstance(thing, dict):
            assert thing.__doc__ and len(thing.__doc__) > 20, name
            for method in vars(thing) if isinstance(thing, type) else ():
                member = getattr(thing, method)
                documented = not callable(member) or member.__doc__
                assert method.startswith("_") or documented, f"{name}.{method}"


def test_links_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", text):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_changelog_has_its_form():
    """A heading for each version, newest first, and under it known sections that are not empty."""
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\]", text, re.M)
    assert versions[0] == "Unreleased"
    numbers = [tuple(map(int, version.split("."))) for version in versions[1:]]
    assert numbers == sorted(set(numbers), reverse=True)
    sections = re.findall(r"^### (.+)\n\n(.?)", text, re.M)
    known = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Numerics"}
    assert {name for name, _ in sections} <= known
    assert len(sections) == text.count("\n### ") and all(first == "-" for _, first in sections)


def test_hooks_have_the_versions_of_the_lint_stage():
    hooks = set(re.findall(r"[\w-]+==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text()))
    extra = re.search(r"\nlint = \[(.*?)\n\]", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    assert len(hooks) >= 5 and hooks <= set(re.findall(r"[\w-]+==[\d.]+", extra))


def test_bench_results_are_on_the_site():
    recorded = {path.name for path in ROOT.glob("bench/results/*.md")}
    pages = [page.read_text() for page in ROOT.glob("docs/benchmarks/*.md")]
    shown = {re.search(r"bench/results/(\S+)", page)[1] for page in pages}
    assert shown == recorded


def test_pictures_show_the_constants():
    """Numbers in the diagrams are those of the code."""
    texts = {
        name: re.findall(r"<text[^>]*>([^<]*)<", (ROOT / f"docs/pictures/{name}.svg").read_text())
        for name in ("step", "tile", "block")
    }
    tile, block = _core.TILE, formats.BLOCK
    assert any(f"a tile of {tile} elements" in text for text in texts["step"])
    parts = [int(t.split()[0]) for t in texts["tile"] if re.fullmatch(r"\d+( elements)?", t)]
    whole = int(texts["tile"][0].split()[3].replace(",", ""))
    assert parts[:6] == [tile] * 5 + [whole - 5 * tile]
    assert parts[6:] == [block] * (tile // block - 1) and f"block of {block}" in texts["tile"]
    codes = [t for t in texts["block"] if t.startswith("code ")]
    assert codes[-1] == f"code {block - 1}" and f"1 + 1 / {block} bytes" in texts["block"]
    wide = np.float32(2) ** np.arange(-40, 1, dtype="f4").repeat(2)[:block]
    for name, exponents in (("int8", 4), ("uint8", 5)):
        assert f"{exponents} exponent bits" in texts["block"]
        stored = formats.Stored(name, np.zeros(block, "u1"), np.zeros(1, "u1"))
        stored.encode(wide)
        kept = np.unique(stored.decode()[stored.decode() > 0])
        # a window of 2**exponents binades, of which the topmost and the base's evenness take some
        binades = np.log2(kept.max() / kept.min())
        assert 2**exponents - 4 <= binades < 2**exponents, (name, binades)
