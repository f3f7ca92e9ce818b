"""Examples, commands and links of the documentation work."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

import fusedopt

ROOT = Path(__file__).parent.parent
MODULES = [
    m.name for m in pkgutil.walk_packages(fusedopt.__path__, "fusedopt.")
    if not m.name.endswith(("__main__", "._arrays", "._core", "._tensors"))
]  # fmt: skip
EXTRAS = ("torch", "keras", "thinc")  # in the names of modules that need them


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


def test_readme_code_runs():
    """All Python blocks of the README, one after the other, as a reader would."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 4
    if importlib.util.find_spec("torch") is None:
        blocks = [block for block in blocks if "import torch" not in block]
    exec(compile("\n".join(blocks), "README.md", "exec"), {})


def test_readme_commands_are_cis():
    """CI runs the README's commands exactly."""
    commands = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    ci = (ROOT / ".ci/run").read_text()
    for command in (line for block in commands for line in block.splitlines()):
        assert command in ci


@pytest.mark.parametrize("name", fusedopt.__all__)
def test_public_names_are_documented(name):
    thing = getattr(fusedopt, name)
    if callable(thing):
        assert thing.__doc__ and len(thing.__doc__) > 40
        for method in vars(thing) if isinstance(thing, type) else ():
            member = getattr(thing, method)
            assert method.startswith("_") or not callable(member) or member.__doc__, method


def test_links_lead_somewhere():
    for page in ROOT.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (ROOT / target).exists(), f"{page.name}: {target}"
