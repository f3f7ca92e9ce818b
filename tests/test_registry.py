"""Every rule of the C table has its class, function, reference, cases, files and README row."""

import inspect
import re
from pathlib import Path

import pytest
from cases import CASES, EVERY_CLASS, FACTOR_CASES, MATRIX_CASES, ROW_CASES

from fusedopt import _core, _options, functional, reference
from fusedopt.cli.train import OPTIMIZERS

ROOT = Path(__file__).parent.parent
EVERY_CASE = [*CASES, *FACTOR_CASES, *MATRIX_CASES, *ROW_CASES]
VARIANTS = {c.rule.variant[1]: c.rule for c in EVERY_CLASS if c.rule.variant is not None}
TABLE = {row[0]: row for row in _core.rules()}
RULES = {name: row for name, row in TABLE.items() if name not in VARIANTS}


@pytest.mark.parametrize("rule", RULES)
def test_three_files_of_one_name(rule):
    assert all((ROOT / name).exists() for name in files(rule))


@pytest.mark.parametrize("rule", RULES)
def test_class_cases_and_documents(rule):
    assert any(c.rule.name == rule for c in EVERY_CLASS)
    assert any(case.rule == rule for case in EVERY_CASE)
    readme = (ROOT / "README.md").read_text()
    page = (ROOT / "docs" / "optimizers.md").read_text()
    for cls in (c for c in EVERY_CLASS if c.rule.name == rule):
        assert f"`{cls.__name__}`" in readme
        assert page.count(f"\n| `{cls.__name__}` |") == 2
        assert any(case.cls == cls.__name__ for case in EVERY_CASE)


def files(rule):
    """The three files of a rule, from the root."""
    package = "src/fusedopt"
    return [f"csrc/rules/{rule}.h", f"{package}/optim/{rule}.py", f"{package}/reference/{rule}.py"]


def test_guide_gives_the_length_of_rules():
    """Within a tenth, or 3 lines."""
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| \d+ \|$", guide, re.M)
    assert {"lion", "rmsprop", "adagrad"} == {rule for rule, *_ in rows}
    for rule, *counts in rows:
        for name, count in zip(files(rule), map(int, counts), strict=True):
            lines = len((ROOT / name).read_text().splitlines())
            assert lines == pytest.approx(count, rel=0.1, abs=3), name


LISTS = {  # the lists of rules; Keras's classes and the benchmark's peers, which have some of them
    "csrc/rules/index.h",
    "src/fusedopt/__init__.py",
    "src/fusedopt/bench/contenders/__init__.py",
    "src/fusedopt/cli/train.py",
    "src/fusedopt/functional.py",
    "src/fusedopt/keras.py",
    "src/fusedopt/reference/__init__.py",
    "src/fusedopt/tune.py",  # whose probe is a run of one
}


@pytest.mark.parametrize(
    "rule", sorted(RULES.keys() - {"adam", "sgd"})
)  # which are examples everywhere
def test_no_other_file_names_a_rule(rule):
    names = {rule, *(c.__name__ for c in EVERY_CLASS if c.rule.name == rule)}
    word = re.compile(rf"\b({'|'.join(names)})\b")
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("csrc", "src")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".c", ".h", ".py", ".pyi", ".pyx", ".pxd")
        and word.search(path.read_text("utf-8"))
    }
    variants = {f"csrc/rules/{name}.h" for name, its in VARIANTS.items() if its.name == rule}
    assert set(files(rule)) <= found <= {*files(rule), *LISTS, *variants}


@pytest.mark.parametrize("cls", EVERY_CLASS, ids=lambda c: c.__name__)
def test_class_fits_the_table(cls):
    """State and scalars of the class are those of the C rule, in number and by name.

    A class may have less than all of the optional state.
    """
    rule = cls.rule
    _, scalars, states, required = RULES[rule.name]
    kind = _core.RULES[rule.name][3]
    is_matrix = kind == "matrix"  # then one state is there during a step alone
    assert is_matrix == (rule.outside is not None)
    assert (kind == "factored") == rule.has_parts
    assert (kind == "summing") == (rule.settle is not None)
    assert required - is_matrix <= len(rule.for_tensors.states) <= states - is_matrix
    assert sum(rule.uses(rule.defaults)) >= required - is_matrix
    if rule.variant is not None:
        option, variant = rule.variant
        assert TABLE[variant][2:] == (states, required)
        scalars = {*scalars, *TABLE[variant][1]}
        assert (ROOT / f"csrc/rules/{variant}.h").exists()
        cases = [*CASES, *ROW_CASES]
        assert any(case.cls == cls.__name__ and case.options.get(option) for case in cases)
    options = rule.advanced(rule.begun(rule.defaults))
    hyper = rule.at(options if rule.share is None else rule.share([options])[0])(1)
    assert set(hyper) == {*scalars, "grad_scale", "l2", "l1", "ema_weight"}
    assert all(isinstance(value, float) for value in hyper.values())


@pytest.mark.parametrize("cls", EVERY_CLASS, ids=lambda c: c.__name__)
def test_reference_class_has_the_same_signature(cls):
    plain = getattr(reference, cls.__name__)
    assert issubclass(plain, cls)
    assert inspect.signature(plain) == inspect.signature(cls)
    steps = [name for name in _options.DEFAULTS if name != "grad_scale"]
    others = [*cls.rule.defaults, *steps, "threads", "state_dir"]
    assert list(inspect.signature(cls).parameters)[1:] == others


@pytest.mark.parametrize("name", functional.__all__)
def test_reference_function_has_the_same_signature(name):
    fast, plain = getattr(functional, name), getattr(reference, name)
    assert inspect.signature(fast) == inspect.signature(plain)


def test_classes_and_functions_are_all_listed():
    names = {cls.__name__ for cls in EVERY_CLASS}
    assert set(functional.__all__) == {case.function for case in EVERY_CASE}
    assert {choice.cls for choice in OPTIMIZERS.values()} == names
    assert set(reference.__all__) == {*functional.__all__, *names}
