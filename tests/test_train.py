"""`python -m fusedopt train` and `info`, as a user runs them."""

import re

import numpy as np
import pytest
from cases import isa, threads

import fusedopt
from fusedopt import _core, cli
from fusedopt.cli import train

pytest.importorskip("sklearn", reason="trains on scikit-learn's digits: extra `demo`")
pytest.importorskip("tqdm", reason="shows progress by tqdm: extra `demo`")
pytestmark = pytest.mark.usefixtures("one_blas_thread")


def run(capsys, *options):
    status = cli.main(["train", *map(str, options)])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def accuracy(out):
    return float(re.search(r"accuracy ([\d.]+)%", out)[1])


def weights(out):
    return re.search(r"weights sha256 (\w{64})", out)[1]


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_defaults_reach_96_percent(capsys, seed):
    out = run(capsys, "--seed", seed)
    assert accuracy(out) >= 96
    assert "the same bits" in out
    assert re.search(r"forward\+backward .* s .*%\n .*optimizer .* s .*%", out)
    assert len(re.findall(r"^ +\d  +\d+ / \d+", out, re.M)) == 10


SHORT = 4  # epochs: less than the default 10, and enough to see that a rate is right
EPOCHS = {"rprop": 30, "gd": 60}  # of one step; SHORT for others
LEAST = {  # per cent; 94 for others
    "adafactor": 96, "gd": 92, "lamb": 96, "lars": 96, "lion": 88, "muon": 88, "radam": 92,
    "signsgd": 92, "yogi": 96,
}  # fmt: skip


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize(
    ("options", "least"),
    [
        *[
            (["--optimizer", name, "--epochs", str(EPOCHS.get(name, SHORT))], LEAST.get(name, 94))
            for name in train.OPTIMIZERS
        ],
        *[
            (words + ["--epochs", str(SHORT)], 90)
            for words in (
                ["--optimizer", "lars", "--momentum", "0", "--lr", "10", "--l2", "1e-3"],
                ["--optimizer", "sgd", "--momentum", "0.5", "--l1", "1e-5", "--l2", "1e-4"],
                ["--warmup", "50", "--batch-size", "64"],
                ["--optimizer", "sgd", "--momentum", "0.9", "--lr", "0.1"],
            )
        ],
        *[(["--schedule", name, "--epochs", "3"], 90) for name in train.SCHEDULES],
        (["--data", "iris", "--epochs", "30"], 90),
        (["--data", "wine"], 95),
        (["--data", "breast_cancer"], 93),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_choices_learn(capsys, options, least):
    out = run(capsys, *options, "--monitor")
    assert accuracy(out) >= least
    assert "the same bits" in out and "\nnothing looks wrong\n" in out


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "muon", "schedulefreeadamw", "gd"])
def test_automatic_rate_learns(capsys, tmp_path, optimizer):
    options = ["--optimizer", optimizer, "--lr", "auto", "--no-reference"]
    epochs = EPOCHS.get(optimizer, SHORT)
    options += ["--schedule", "constant", "--epochs", epochs, "--save", tmp_path / "run.npz"]
    out = run(capsys, *options)
    assert accuracy(out) >= 90
    found = re.match(
        r"rate: ([\d.e-]+), by a range test up to .*: the loss falls fastest there\n", out
    )
    assert found, out
    usual = train.OPTIMIZERS[optimizer].lr
    assert usual / 30 < float(found[1]) < 30 * usual
    given = run(capsys, *options[:2], "--lr", found[1], *options[4:])
    assert weights(given) == weights(out)  # nothing of the test is left
    more = run(capsys, *options, "--resume", options[-1], "--epochs", epochs + 1)
    assert "rate: that of the checkpoint\n" in more


def test_automatic_rate_without_a_suggestion(capsys, tmp_path):
    x, y = np.zeros((40, 3)), np.arange(40) % 2  # nothing to learn from
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    options = ["--batch-size", 40, "--lr", "auto", "--epochs", 1]
    out = run(capsys, "--data", tmp_path / "d.npz", *options)
    assert out.startswith("rate: 0.002, the default: the loss")


@pytest.mark.slow("trains networks")
def test_same_weights_for_any_threads_and_isa(capsys):
    """Bit for bit."""
    found = set()
    for number, name in enumerate(_core.available_isas()):
        with isa(name), threads(1 + number):
            found.add(weights(run(capsys, "--epochs", 1, "--no-reference")))
    assert len(found) == 1


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("optimizer", ["adam", "muon"])  # muon: two optimizers in one file
def test_interrupted_and_resumed_is_uninterrupted(capsys, tmp_path, monkeypatch, suffix, optimizer):
    path = tmp_path / f"run.{suffix}"
    options = ["--epochs", 4, "--schedule", "one-cycle", "--warmup", 10, "--optimizer", optimizer]
    whole = run(capsys, *options, "--no-reference")
    seen = []
    train_epoch = train.train_epoch

    def interrupted(state, *args):
        seen.append(state.epoch)
        if len(seen) == 3:
            raise KeyboardInterrupt
        train_epoch(state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", interrupted)
        words = [*options, "--no-reference", "--save", path]
        assert cli.main(["train", *map(str, words)]) == 130
    resumed = run(capsys, *options, "--resume", path)
    assert "resumed after epoch 2" in resumed
    assert weights(resumed) == weights(whole)
    assert "the same bits" in resumed


@pytest.mark.slow("trains networks")
def test_longer_run_from_a_checkpoint(capsys, tmp_path):
    path = tmp_path / "run.npz"
    options = ["--schedule", "step", "--optimizer", "sgd", "--no-reference"]
    whole = run(capsys, *options, "--epochs", 5)
    run(capsys, *options, "--epochs", 2, "--save", path)
    assert weights(run(capsys, *options, "--epochs", 5, "--resume", path)) == weights(whole)
    finished = run(capsys, *options, "--epochs", 2, "--resume", path)  # nothing left to do
    assert "accuracy" in finished


def own(path, **changes):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 200)
    x = np.eye(3)[y] + 0.1 * rng.standard_normal((200, 3))
    arrays = {"x_train": x[:150], "y_train": y[:150], "x_test": x[150:], "y_test": y[150:]}
    arrays = {k: v for k, v in (arrays | changes).items() if v is not None}
    np.savez(path, **arrays)
    return path


def test_own_data(capsys, tmp_path):
    out = run(capsys, "--data", own(tmp_path / "mine.npz"), "--epochs", 20)
    assert accuracy(out) >= 98


ROWS = [["sunny", *point] for point in np.eye(3)] + [["rain; snow", *point] for point in -np.eye(3)]


def table(path, text=None, delimiter=",", head="a,b,c,kind\n"):
    lines = [delimiter.join([*map(str, point), f'"{kind}"']) for kind, *point in ROWS * 20]
    path.write_text(head.replace(",", delimiter) + "\n".join(lines) if text is None else text)
    return path


@pytest.mark.parametrize("head", ["a,b,c,kind\n", "", "\ufeffa,b,c,kind\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_own_table(capsys, tmp_path, head, delimiter):
    """With classes of any name, in the order of their names."""
    path = table(tmp_path / "mine.CSV", None, delimiter, head)
    out = run(capsys, "--data", path, "--epochs", 20)
    assert accuracy(out) == 100
    assert re.findall(r"^ *(.*?)  +0 / 15$", out, re.M) == ["rain; snow", "sunny"]


def test_classes_that_are_numbers(tmp_path):
    rows = "".join(f"{i % 3},{(10, 9, 2)[i % 3]}\n\n" for i in range(30))
    data = cli.train.data_module.load(str(table(tmp_path / "x.csv", rows)))
    assert data.labels == ("2", "9", "10") and data.classes == 3
    assert np.unique(data.x_train[data.y_train == 0]).size == 1


@pytest.mark.slow("trains networks")
def test_plot(capsys, tmp_path):
    """Of a resumed run too, which may have nothing left to do."""
    pytest.importorskip("matplotlib", reason="draws by matplotlib: extra `demo`")
    for extra in (["--save", tmp_path / "run.npz"], ["--resume", tmp_path / "run.npz"]):
        path = tmp_path / "run.png"
        run(capsys, "--epochs", 2, "--plot", path, *extra)
        assert path.read_bytes().startswith(b"\x89PNG")
        path.unlink()


FAULTS = {
    "missing array": (lambda d: ["--data", own(d / "a.npz", y_test=None)], "no y_test in it"),
    "lengths": (lambda d: ["--data", own(d / "a.npz", y_test=np.ones(3, int))], "one row and one"),
    "labels": (lambda d: ["--data", own(d / "a.npz", y_test=np.ones(50))], "labels must be whole"),
    "nan": (lambda d: ["--data", own(d / "a.npz", x_test=np.full((50, 3), np.nan))], "finite"),
    "widths": (lambda d: ["--data", own(d / "a.npz", x_test=np.ones((50, 4)))], "has rows"),
    "no file": (lambda d: ["--data", d / "none.npz"], "No such file"),
    "no npz": (lambda d: ["--data", __file__], "not a .npz file"),
    "no name": (lambda d: ["--data", "irsi"], "no such file, and none of digits, iris, wine"),
    "cell": (lambda d: ["--data", table(d / "a.csv", "1,2,a\n1,x,b")], "a.csv: row 2: .*'x'"),
    "cells": (lambda d: ["--data", table(d / "a.csv", "1,2,a\n1,b")], "2 values, expected 3"),
    "one column": (lambda d: ["--data", table(d / "a.csv", "a\nb")], "values, expected 2 or"),
    "one class": (lambda d: ["--data", table(d / "a.csv", "1,a\n2,a")], "1 classes in the last"),
    "real": (
        lambda d: ["--data", table(d / "a.csv", "".join(f"1,{i}.5\n" for i in range(1001)))],
        "1001 classes in the last column, expected 2 to 1000",
    ),
    "empty": (lambda d: ["--data", table(d / "a.csv", "")], "a.csv: 0 classes in the last column"),
    "single": (lambda d: ["--data", table(d / "a.csv", "1,a\n2,b\n3,b")], "a.csv: cannot hold out"),
    "no number": (lambda d: ["--data", table(d / "a.csv", "nan,a\n2,b\n" * 9)], "must be finite"),
    "lr": (lambda d: ["--lr", "-1"], "lr: must be >= 0"),
    "auto lr": (lambda d: ["--optimizer", "rprop", "--lr", "auto"], "lr: Rprop's is what its"),
    "epochs": (lambda d: ["--epochs", "0"], "--epochs: must be >= 1"),
    "batch": (lambda d: ["--batch-size", "0"], "--batch-size: must be >= 1"),
    "momentum": (lambda d: ["--momentum", "0.9"], "--momentum: goes with --optimizer lars, .*sgd"),
    "l1": (
        lambda d: ["--optimizer", "adamw", "--l1", "0.1"],
        "--l1: goes with --optimizer adam, sgd, gd",
    ),
    "save folder": (lambda d: ["--save", d / "no" / "x.npz"], "there is no folder"),
    "save ending": (lambda d: ["--epochs", "1", "--save", d / "x.pt"], "must end in .npz"),
    "resume nothing": (lambda d: ["--resume", d / "x.npz"], "No such file"),
    "resume foreign": (lambda d: ["--resume", own(d / "a.npz")], "not a checkpoint of fusedopt"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_bad_input_is_one_line(capsys, tmp_path, kind):
    options, message = FAULTS[kind]
    assert cli.main(["train", *map(str, options(tmp_path))]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("fusedopt train: ")
    assert re.search(message, err)


def test_resume_with_other_settings(capsys, tmp_path):
    path = tmp_path / "run.npz"
    run(capsys, "--epochs", 1, "--save", path)
    for options, message in [
        (["--epochs", "1", "--seed", "5"], "was made with --seed 0; resume with the same"),
        (["--epochs", "2"], "was made with --epochs 1, which cosine depends on"),
        (["--epochs", "1", "--data", str(own(tmp_path / "mine.npz"))], "was made on other data"),
    ]:
        assert cli.main(["train", *options, "--resume", str(path)]) == 2
        assert message in capsys.readouterr().err
    state = fusedopt.SGD([np.ones(2)])
    state.save(path)
    assert cli.main(["train", "--resume", str(path)]) == 2
    assert "not a checkpoint that this run can continue" in capsys.readouterr().err


def test_unknown_choice_lists_the_known(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "--optimizer", "best"])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert all(name in err for name in train.OPTIMIZERS)


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for label, text in fusedopt.info().items():
        assert re.search(rf"^{label} +{re.escape(text)}$", out, re.M)


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_monitor(capsys, tmp_path, optimizer):
    """Monitoring changes no bit, prints its findings of every layer, and draws them if asked."""
    options = ["--optimizer", optimizer, "--epochs", 2, "--no-reference"]
    without = run(capsys, *options)
    draws = optimizer == "adam"
    pictures = [tmp_path / "m.png", "--plot", tmp_path / "p.png"] if draws else []
    out = run(capsys, *options, "--monitor", *pictures)
    assert weights(out) == weights(without)
    rows = re.findall(r"params\['dense\d'\]\['[Wb]'\] +\d\.\d\de[-+]\d\d", out)
    assert len(rows) == 6 and "\nlayer, medians of 20 " in out
    assert not draws or (tmp_path / "m.png").stat().st_size > 10_000
    dead = run(capsys, "--epochs", 2, "--no-reference", "--monitor", "--lr", 1e-9)
    assert "too small; raise the learning rate" in dead
