"""The benchmark: its cases, its statistics, its reports, and errors for bad input."""

import dataclasses
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import command

import fusedopt
from fusedopt import _core, cli
from fusedopt.bench import cases, machine, measure, stats, worker
from fusedopt.bench.cases import CASES, OPTIMIZERS, Problem, takers
from fusedopt.bench.contenders import AGAIN, LIMIT, OURS, ROWS
from fusedopt.bench.recording import Entry, Recording

COMMAND = [sys.executable, "-m", "fusedopt", "bench"]


# as little as measures each contender: few placements of small arrays, on one thread
LEAST = ("--quick", "--threads", "1", "--seconds", "0.1")


def run(*arguments):
    return command("bench", *arguments)


def run_before(folder, arguments, program=COMMAND):
    """Run a program in a process where modules in a folder hide installed ones."""
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    env = os.environ | {"PYTHONPATH": paths}
    words = [*program, *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=200, env=env)


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
    shapes = CASES[name].shapes
    assert len(shapes) == arrays
    assert sum(int(np.prod(shape)) for shape in shapes) == parameters


def test_interval_covers_the_median():
    """Of 200 samples with median 1.3, about 95% of the intervals hold 1.3, and all are short."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        sample = 1.3 * np.exp(0.1 * rng.standard_normal(41))
        low, high = stats.median_interval([list(sample)])[-2:]
        covered += low <= 1.3 <= high
        assert 0 < high - low < 0.3
    assert 175 <= covered <= 200


def test_disturbed_rounds_do_not_count():
    entry = Entry("x", "x", "size", 1, 1, 1, 1, 1, "warm", placements=[3, 3])
    for busy in (0.0, 1.0, 0.1, 0.0, 1.0, 0.2):
        rare = {"rare": 3.0} if busy == 1.0 else {}
        entry.add_round({OURS: 1.0, LIMIT: 1.0 - busy / 2} | rare, busy)
    assert stats.calm(entry, OURS, LIMIT) == [0, 2, 3, 5]
    assert stats.quotients(entry, LIMIT, OURS) == [[1.0, 0.95], [1.0, 0.9]]
    assert stats.quotients(entry, "rare", OURS) == [[3.0], [3.0]]  # it has no calm ones
    assert stats.disturbance(entry) == pytest.approx(0.075)


@pytest.mark.slow("runs the benchmark")
def test_shapes_of_ones_own():
    """An array of a shape, beside the named cases; 400x250 remains the name of many."""
    bytes_of = {}
    options = ("--optimizer", "adafactor", "--case", "30x40, 9x3x3", "--contender", "numpy")
    done = run(*options, *LEAST)
    assert done.returncode == 0, done.stderr
    for name in ("one array of 30 x 40", "one array of 9 x 3 x 3"):
        assert name in done.stdout
    for shape in [(30, 40), (9, 3, 3)]:
        case = cases.own_case("x".join(map(str, shape)))
        bytes_of[shape] = cases.Problem(case, "adafactor", "float32", 1).moved
    assert bytes_of == {(30, 40): 4 * (3 * 1200 + 2 * 70), (9, 3, 3): 4 * (3 * 81 + 2 * 54)}
    assert cases.own_case("0x3") is cases.own_case("3x") is cases.own_case("mlp") is None


@pytest.mark.parametrize(
    ("option", "known"), [("--case", "resnet50"), ("--contender", "numpy"), ("--optimizer", "lion")]
)
def test_unknown_names_list_the_known_ones(option, known):
    done = run(option, "nonsense")
    assert done.returncode == 2
    assert "nonsense" in done.stderr and known in done.stderr


def recording(path, ours):
    """A recording in which a step of ours takes some seconds, the limit and NumPy 1 and 3."""
    made = Recording(
        {"optimizer": "adam", "dtype": "float32"}, {}, {"numpy": "NumPy"}, date="today"
    )
    made.entries = [
        Entry(name, name, "size", 1, 1, 1, 1, 1, "warm", placements=[9], optimizer="adam")
        for name in ("same", "slower")
    ]
    for i in range(9):
        noise = 1 + 0.001 * i
        for entry, seconds in zip(made.entries, (1.0, ours), strict=True):
            entry.add_round({OURS: seconds * noise, LIMIT: 1.0, "numpy": 3.0 * noise}, 0.0)
    made.save(path)
    return path


def test_comparison_names_what_became_slower(tmp_path):
    then, now = recording(tmp_path / "then.json", 1.0), recording(tmp_path / "now.json", 1.2)
    done = run("--load", now, "--compare", then)
    assert done.returncode == 0, done.stderr
    text = done.stdout.partition("compared with")[2].splitlines()
    assert [line.split()[-4:] for line in text[2:-1]] == [
        ["1.00", "0.83", "0.83", "slower"], ["3.00", "2.50", "0.83", "slower"],
    ]  # fmt: skip
    assert text[-1].startswith("2 of 4 ratios did not change")
    other = json.loads(then.read_text())
    other["entries"] = []
    then.write_text(json.dumps(other))
    done = run("--load", now, "--compare", then)
    assert done.returncode == 0 and f"{then} holds no case" in done.stdout


@pytest.mark.slow("runs the benchmark")
def test_several_optimizers_beside_a_busy_process(tmp_path):
    """A row for each, whose busy process is not what disturbs a round."""
    path = tmp_path / "x.json"
    options = ("--optimizer", "sgd,adam", "--busy", "1", "--case", "1k", "--contender", "numpy")
    done = run(*options, *LEAST, "--json", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("beside 1 busy process; noise") == 2
    rows = done.stdout.partition("optimizers:")[2].splitlines()[2:4]
    assert [row.split()[0] for row in rows] == ["sgd", "adam"]
    kept, moved = rows[1].split("process")[1].split()[:2]
    assert (kept, moved) == ("8", "28")
    entries = json.loads(path.read_text())["entries"]
    assert [entry["busy"] for entry in entries] == [1, 1]


@pytest.mark.slow("runs the benchmark")
def test_run_writes_what_it_measured(tmp_path):
    """Missing libraries are listed, and narrow formats move the right number of bytes."""
    (tmp_path / "numba.py").write_text("raise ModuleNotFoundError('No module named numba')")
    path = tmp_path / "x.json"
    contenders = "numpy,numba,fusedopt-bf16,fusedopt-int8,fusedopt-short"
    options = ("--cache", "both", "--case", "30k", "--contender", contenders, "--json", path)
    done = run_before(tmp_path, [*LEAST, *options])
    assert done.returncode == 0, done.stderr
    assert "Numba, parallel loop: ModuleNotFoundError: No module named numba" in done.stdout
    recorded = json.loads(path.read_text())
    assert recorded["complete"] and list(recorded["absent"]) == ["numba"]
    warm, cold = recorded["entries"]
    assert (warm["cache"], cold["cache"]) == ("warm", "cold")
    moved = {name: size / 30_000 for name, size in warm["own_moved"].items()}
    blocks = 4 / 64  # both moments' common exponents, read and written
    assert moved == pytest.approx(
        {"fusedopt-bf16": 20, "fusedopt-int8": 16 + blocks, "fusedopt-short": 12 + blocks}, abs=1e-3
    )
    assert warm["seconds"].keys() == {LIMIT, OURS, AGAIN, "numpy", *moved}
    again = run("--load", path)
    assert again.returncode == 0 and again.stdout in done.stdout


@pytest.mark.slow("runs the benchmark")
def test_developers_contenders_run_by_the_same_command(tmp_path):
    """A worker finds their classes, and reports here that their libraries are missing."""
    for name in ("torch", "tensorflow"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name}')")
    script = Path(__file__).parents[1] / "bench" / "compare.py"
    options = ("--contender", "deepspeed,tensorflow", "--case", "1k")
    done = run_before(tmp_path, [*LEAST, *options], [sys.executable, script])
    assert done.returncode == 0, done.stderr
    assert "DeepSpeedCPUAdam: ModuleNotFoundError: no torch" in done.stdout
    assert "TensorFlow, raw operation: ModuleNotFoundError: no tensorflow" in done.stdout


@pytest.mark.slow("runs the benchmark")
def test_interrupted_run_keeps_what_it_measured(tmp_path):
    path = tmp_path / "x.json"
    options = ("--case", "1k,1M", "--quick", "--contender", "numpy", "--seconds", "1")
    process = subprocess.Popen(
        [*COMMAND, *options, "--json", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    err = b""
    while b"1M" not in err:  # the first case is done
        err += (byte := process.stderr.read(1))
        assert byte, err
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"interrupted" in err
    assert b"1k in one array" in out and b"NumPy, in place" in out
    recorded = json.loads(path.read_text())
    assert not recorded["complete"]
    assert recorded["entries"][0]["seconds"]["numpy"]


def test_case_that_does_not_fit_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(machine, "available_memory", lambda: 10**9)
    assert cli.main(["bench", "--case", "50M", "--contender", "numpy"]) == 0
    out = capsys.readouterr().out
    assert "50M in one array" in out
    assert "skipped: needs 3.1 GB of memory, 0.9 GB are free" in out


def test_teams_fit_into_memory():
    """Each holds those of every round; contenders that do not fit beside them are left out."""
    problem = Problem(CASES["50M"], "adam", "float32", 1)
    rows = [ROWS[name] for name in (LIMIT, OURS, AGAIN, "numpy", "reference", "functional")]
    budget = 5.4e9  # 3.9 GB for all teams; 1 or 1.6 more for numpy and the reference
    members, too_large = measure.teams(rows, problem, budget)
    assert [[row.name for row in team[3:]] for team in members] == [["numpy"], ["functional"]]
    assert list(too_large) == ["reference"] and "needs 5.5 GB" in too_large["reference"]
    members, too_large = measure.teams(rows, problem, 4.1e9)
    assert [[row.name for row in team[2:]] for team in members] == [["numpy"], ["functional"]]
    assert too_large.keys() == {AGAIN, "reference"}


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}])
def test_streams_change_nothing(options):
    """Each way to stream reads and writes all arrays, and leaves them as they were."""
    rng = np.random.default_rng(0)
    params, grads = rng.standard_normal((2, 3, 5_003)).astype(np.float32)
    opt = fusedopt.Adam(list(params), **options)
    opt.step(list(grads))
    before = pickle.dumps((params, grads, opt.state_dict()))
    for how in range(_core.STREAMS):
        for threads in (1, 2):
            opt._work.stream(list(grads), how, threads)
        assert pickle.dumps((params, grads, opt.state_dict())) == before
    for how in (-1, _core.STREAMS):
        with pytest.raises(SystemError):
            opt._work.stream(list(grads), how, 1)


@pytest.mark.slow("runs the benchmark")
def test_memory_is_measured(tmp_path):
    path = tmp_path / "x.json"
    done = run("--memory", "--case", "1M", "--contender", "numpy,reference", "--json", path)
    assert done.returncode == 0, done.stderr
    found = {m["contender"]: m for m in json.loads(path.read_text())["memory"]}
    assert found.keys() == {OURS, "numpy", "reference"}
    assert all(m["state"] == 8 * m["elements"] for m in found.values())
    assert found[OURS]["temporary"] < 20_000
    assert 4 * 10**6 <= found["reference"]["temporary"] < 40 * 10**6


@pytest.mark.slow("runs the benchmark")
def test_report_is_complete(tmp_path):
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "notes.md").write_text("another file")
    done = run("--case", "mlp", "--contender", "numpy", *LEAST, "--report", folder)
    assert done.returncode == 0, done.stderr
    page = (folder / "README.md").read_text()
    pictures = [path.name for path in folder.glob("*.png")]
    assert pictures == ["models.png"] and "![Models](models.png)" in page
    for title in ("MLP 784-128-128-10", "Memory, mlp", "NumPy, in place", "does not win"):
        assert title in page, title
    assert (folder / "notes.md").exists()
    (folder / "README.md").unlink()
    again = run("--load", folder / "results.json", "--report", folder)
    assert again.returncode == 0, again.stderr
    assert (folder / "README.md").read_text() == page


@pytest.mark.parametrize("name", ["numpy", "fusedopt-short"])
def test_another_update_is_refused(name):
    """Only contenders that computed the reference's update, within a tolerance, are timed."""
    problem = Problem(CASES["mlp"], "adam", "float32", fusedopt.get_num_threads())  # gets set
    other = dataclasses.replace(problem, optimizer="adamw")
    worker.build(ROWS[name], problem)
    cls = type("Other", (ROWS[name].cls,), {})
    cls.__init__ = lambda self, _, params, **options: ROWS[name].cls.__init__(
        self, other, params, **options
    )
    wrong = dataclasses.replace(ROWS[name], cls=cls, tolerance=1e-3)
    with pytest.raises(worker.Disagreement, match="off by"):
        worker.build(wrong, problem)


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("name", [OURS, "functional", "fusedopt-torch", "fusedopt-int8"])
def test_ours_compute_every_rule_that_they_have(name, rule):
    if name == "fusedopt-torch":
        pytest.importorskip("torch", reason="extra `torch`")
    known = rule in ROWS[name].optimizers
    assert known or (name == "fusedopt-int8" and rule not in takers("int8"))
    if known:
        worker.build(ROWS[name], Problem(CASES["1k"], rule, "float32", fusedopt.get_num_threads()))


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_rule_that_a_contender_lacks_is_refused(name):
    unknown = [rule for rule in OPTIMIZERS if rule not in ROWS[name].optimizers] or ["other"]
    for rule in unknown:
        with pytest.raises(ValueError, match=f"{name}: has no {rule} of this form"):
            worker.build(ROWS[name], Problem(CASES["1k"], rule, "float32", 1))


class Slow:
    """A session whose steps take given times and are not run."""

    def __init__(self, seconds):
        self.rows = self.step_seconds = seconds
        self.workers = self

    def cpu_seconds(self):
        return math.nan  # as on systems that do not report it: no round counts as disturbed

    def turn(self, name, warm):
        return self.step_seconds[name]


@pytest.mark.parametrize("late", [False, True])
def test_slow_contenders_are_never_dropped(late, monkeypatch):
    """All are in the first round, so that a run that ends early has measured each."""
    if late:
        monkeypatch.setattr(measure, "_PATIENCE", 0)
    entry = Entry("x", "x", "size", 1, 1, 1, 1, 1, "warm")
    session = Slow({LIMIT: 1e-6, OURS: 1e-6, "slow": 10.0, "slower": 100.0})
    settings = measure.Settings()
    measure.run_rounds(session, entry, settings, None, lambda share: None)
    taken = {name: sum(s is not None for s in column) for name, column in entry.seconds.items()}
    assert taken.keys() == session.rows.keys()
    assert taken[OURS] == entry.rounds
    if not late:
        assert taken["slow"] == taken["slower"] == settings.least < entry.rounds
