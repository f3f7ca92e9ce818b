"""The comparison measures what it says: its data, its statistics, its answers to bad input."""

import json
import subprocess
import sys

import numpy as np
import pytest

from fusedopt.bench import measure, stats
from fusedopt.bench.cases import CASES
from fusedopt.bench.contenders import LIMIT, OURS
from fusedopt.bench.recording import Entry


def run(*arguments):
    command = [sys.executable, "-m", "fusedopt", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    ("name", "arrays", "parameters"),
    [
        ("1k", 1, 1000),
        ("400x250", 400, 100_000),
        ("mlp", 6, 784 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10),
        ("resnet50", 161, 25_557_032),
        ("gpt2", 148, 124_439_808),
        ("vit", 152, 86_567_656),
    ],
)
def test_shapes_are_those_of_the_models(name, arrays, parameters):
    shapes = {case.name: case for case in CASES}[name].shapes if isinstance(CASES, list) else (
        CASES[name].shapes
    )  # fmt: skip
    assert len(shapes) == arrays
    assert sum(int(np.prod(shape)) for shape in shapes) == parameters


def test_interval_covers_the_median():
    """Of 200 samples around 1.3, about 95% of the intervals hold 1.3, and all are short."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        sample = 1.3 * np.exp(0.1 * rng.standard_normal(41))
        low, high = stats.median_interval([list(sample)])[-2:]
        covered += low <= 1.3 <= high
        assert 0 < high - low < 0.3
    assert 175 <= covered <= 200


@pytest.mark.parametrize("option", ["--case", "--contender"])
def test_unknown_names_list_the_known_ones(option):
    done = run(option, "nonsense")
    assert done.returncode == 2
    assert (
        "nonsense" in done.stderr and ("resnet50" if option == "--case" else "numpy") in done.stderr
    )


def test_run_writes_what_it_measured(tmp_path):
    path = tmp_path / "x.json"
    done = run("--quick", "--case", "1k", "--contender", "numpy,optax", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "NumPy, in place" in done.stdout and "1.00" in done.stdout
    assert json.loads(path.read_text())
    again = run("--load", str(path))
    assert again.returncode == 0 and "NumPy, in place" in again.stdout


class Slow:
    """A session in which every step takes as long as it says, and nothing is really run."""

    def __init__(self, seconds):
        self.rows = self.step_seconds = seconds
        self.workers = self

    def cpu_seconds(self):
        return 0.0

    def turn(self, name, warm):
        return self.step_seconds[name]


@pytest.mark.parametrize("late", [False, True])
def test_slow_contenders_are_never_dropped(late, monkeypatch):
    """All are in the first round, so that a run that ends early has a figure of each."""
    if late:
        monkeypatch.setattr(measure, "_PATIENCE", 0)
    entry = Entry("x", "x", "size", 1, 1, 1, 1, 1, "warm")
    session = Slow({LIMIT: 1e-6, OURS: 1e-6, "slow": 10.0, "slower": 100.0})
    settings = measure.Settings()
    measure.run_rounds(session, entry, settings, 1.0, None, lambda text, share: None)
    taken = {name: sum(s is not None for s in column) for name, column in entry.seconds.items()}
    assert taken.keys() == session.rows.keys()
    assert taken[OURS] == entry.rounds
    if not late:
        assert taken["slow"] == taken["slower"] == settings.least < entry.rounds
