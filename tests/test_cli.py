"""The command line: bad input gives one line and status 2, before any work."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import zipfile

import numpy as np
import pytest
from cases import command as run

import fusedopt
from fusedopt import cli

pytest.importorskip("sklearn", reason="trains on scikit-learn's digits: extra `demo`")
pytest.importorskip("tqdm", reason="shows progress by tqdm: extra `demo`")
pytest.importorskip("matplotlib", reason="draws by matplotlib: extra `demo`")

COMMAND = [sys.executable, "-m", "fusedopt"]
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX shells, pipes or signals")


def data(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {"x_train": rng.random((8, 3)), "x_test": rng.random((4, 3))}
    arrays |= {"y_train": np.arange(8) % 2, "y_test": np.arange(4) % 2} | changes
    np.savez(path, **arrays)


def members(path, content):
    with zipfile.ZipFile(path, "w") as file:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            file.writestr(name, content)


def claims(path, shape):
    """A file whose x_train claims a larger size than it has."""
    data(path)
    with zipfile.ZipFile(path) as file:
        kept = {name: file.read(name) for name in file.namelist()}
    head = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    kept["x_train.npy"] = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode()
    with zipfile.ZipFile(path, "w") as file:
        for name, content in kept.items():
            file.writestr(name, content)


def damaged(path):
    data(path, x_train=np.ones((800, 3)))
    path.write_bytes(path.read_bytes().replace(np.ones(3).tobytes(), bytes(24)))


x = np.ones((8, 3))
NPY = b"\x93NUMPY\x01\x00" + bytes(200)
DATA = {
    "no columns": (lambda p: data(p, x_train=x[:, :0], x_test=x[:4, :0]), r"shapes \(8, 0\)"),
    "no rows": (lambda p: data(p, x_train=x[:0], y_train=np.ones(0, int)), r"shapes \(0, 3\)"),
    "0-d inputs": (lambda p: data(p, x_train=np.float64(1)), r"shapes \(\) and \(8,\)"),
    "1-d inputs": (lambda p: data(p, x_train=np.ones(8)), r"shapes \(8,\) and \(8,\)"),
    "0-d labels": (lambda p: data(p, y_test=np.int64(1)), r"shapes \(4, 3\) and \(\)"),
    "2-d labels": (lambda p: data(p, y_test=np.ones((4, 1), int)), r"and \(4, 1\)"),
    "more rows": (lambda p: data(p, y_test=np.ones(5, int)), "one row and one label each"),
    "label 1e9": (lambda p: data(p, y_train=np.arange(8) * 10**9), "0 to 999, got 0 to 7000"),
    "label 1000": (lambda p: data(p, y_test=np.array([1000, 0, 0, 0])), "0 to 999, got 0 to 1000"),
    "label 2^64": (lambda p: data(p, y_test=np.full(4, -1).astype("u8")), " to 184467440737"),
    "label -1": (lambda p: data(p, y_test=np.array([-1, 0, 0, 0])), "got -1 to 0"),
    "label 0.5": (lambda p: data(p, y_test=np.full(4, 0.5)), "whole numbers, got float64"),
    "label text": (lambda p: data(p, y_test=np.array(["a"] * 4)), "whole numbers, got <U1"),
    "label time": (lambda p: data(p, y_test=np.ones(4, "m8[s]")), "whole numbers, got timedelta"),
    "NaN": (lambda p: data(p, x_test=x[:4] * np.nan), "x_test, y_test: inputs must be finite"),
    "infinite": (lambda p: data(p, x_train=x * np.inf), "x_train, y_train: inputs must be finite"),
    "complex": (lambda p: data(p, x_train=x * 1j), "real numbers, got complex128"),
    "text": (lambda p: data(p, x_train=x.astype(str)), "real numbers, got <U32"),
    "structured": (lambda p: data(p, x_train=np.ones((8, 3), "f4,f4")), "real numbers, got"),
    "too large": (lambda p: data(p, x_train=x * 1e300 * np.arange(3)), "too far apart"),
    "too far out": (lambda p: data(p, x_test=x[:4] * 1e300), "too far apart"),
    "widths": (lambda p: data(p, x_test=x[:4, :2]), r"x_train has rows \(3,\), x_test \(2,\)"),
    "objects": (lambda p: data(p, x_train=np.array([[None] * 3] * 8)), "allow_pickle"),
    "members that are no arrays": (lambda p: members(p, "hello"), "x_train is not an array"),
    "empty members": (lambda p: members(p, ""), "x_train is not an array"),
    "missing members": (lambda p: np.savez(p, x_train=x), "no y_train, x_test, y_test in it"),
    "claims 1e15 rows": (lambda p: claims(p, "(1000000000000000, 3)"), "bad.npz: "),
    "claims 1e30 rows": (lambda p: claims(p, f"({10**30}, 3)"), "bad.npz: "),
    "cut": (lambda p: (data(p), p.write_bytes(p.read_bytes()[:-30])), "not a zip file"),
    "damaged": (damaged, "CRC"),
    "an .npy file": (lambda p: p.write_bytes(NPY), "not a .npz file"),
    "a pickle": (lambda p: p.write_bytes(pickle.dumps(x)), "not a .npz file"),
    "text file": (lambda p: p.write_text("a,b\n1,2\n"), "not a .npz file"),
    "empty file": (lambda p: p.write_bytes(b""), "not a .npz file"),
    "missing": (lambda p: None, "No such file"),
    "folder": (lambda p: p.mkdir(), "--data .*bad.npz: a folder, not a file"),
}  # fmt: skip


def assert_refused(done, command, message):
    """The output is one line that says what is wrong."""
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fusedopt {command}: "), line
    assert re.search(message, line), line
    assert done.stdout == ""


@pytest.mark.parametrize("kind", DATA)
def test_bad_data(tmp_path, kind):
    make, message = DATA[kind]
    make(tmp_path / "bad.npz")
    assert_refused(run("train", "--epochs", 1, "--data", tmp_path / "bad.npz"), "train", message)


def recording(**changes):
    tree = {"schema": 1, "settings": {}, "machine": {}, "titles": {}, "entries": [], "memory": []}
    return json.dumps(tree | changes)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of every kind in the working directory of the command."""
    monkeypatch.chdir(tmp_path)
    data(tmp_path / "data.npz")
    for name in ("folder.npz", "folder.png", "folder.json"):
        (tmp_path / name).mkdir()
    if hasattr(os, "mkfifo"):
        for name in ("pipe.npz", "pipe.json"):
            os.mkfifo(tmp_path / name)
    fusedopt.SGD([np.ones(2)]).save(tmp_path / "other.npz")
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "text.json").write_text("text")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "schema.json").write_text(recording(schema=2))
    (tmp_path / "parts.json").write_text(recording(entries=[5]))
    (tmp_path / "types.json").write_text(recording(titles=5, absent=3, settings=[]))
    return tmp_path


OPTIONS = [
    *[
        (f"train {option} {name}", message)
        for option in ("--plot", "--monitor")
        for name, message in [
            ("x.foo", f"{option} x.foo: must end in one of ."),
            ("x", f"{option} x: must end in one of"),
            ("x.pgf", "must end in one of"),
            ("no/x.png", "there is no folder no"),
            ("folder.png", f"{option} folder.png: a folder, not a file"),
        ]
    ],
    ("train --save x.foo", "x.foo: the name must end in .npz or .safetensors"),
    ("train --save no/x.npz", "--save no/x.npz: there is no folder no"),
    ("train --save folder.npz", "--save folder.npz: a folder, not a file"),
    ("train --data data.npz --save ./data.npz", "--save data.npz: would overwrite --data"),
    ("train --data pipe.npz", "--data pipe.npz: a pipe or a device, not a file"),
    ("train --data /dev/zero", "--data /dev/zero: a pipe or a device, not a file"),
    ("train --resume pipe.npz", "--resume pipe.npz: a pipe or a device, not a file"),
    ("train --resume folder.npz", "--resume folder.npz: a folder, not a file"),
    ("train --resume no.npz", "No such file"),
    ("train --data data.npz --resume text.npz", "text.npz: not a checkpoint of fusedopt"),
    (
        "train --data data.npz --resume other.npz",
        "other.npz: not a checkpoint that this run can continue",
    ),
    ("train --data data.npz --lr nan", "lr: must be finite"),
    ("train --data data.npz --lr -1", "lr: must be >= 0"),
    ("train --data data.npz --l2 nan", "weight_decay: must be finite"),
    ("train --data data.npz --optimizer sgd --momentum -1", "momentum: must be"),
    ("train --optimizer lamb --l1 0.1", "--l1: goes with --optimizer adam, sgd, gd"),
    *[
        (f"train --{name} {value}", f"--{name}: must be >= ")
        for name in ("epochs", "batch-size", "warmup", "seed")
        for value in (-1, 10**30)
    ],
    ("bench --threads -1", "--threads -1: must be >= 1"),
    ("bench --threads 0", "--threads 0: must be >= 1"),
    ("bench --threads 99999", "--threads 99999: this process may run on"),
    *[(f"bench --seconds {x}", "--seconds: must be > 0") for x in ("nan", "inf", "0", "-1")],
    ("bench --plot x.foo", "--plot x.foo: must end in one of"),
    ("bench --plot no/x.png", "there is no folder no"),
    ("bench --json folder.json", "--json folder.json: a folder, not a file"),
    ("bench --report text.npz", "--report text.npz/results.json: there is no folder text.npz"),
    ("bench --report no/x", "--report no/x: there is no folder no"),
    ("bench --load pipe.json", "--load pipe.json: a pipe or a device, not a file"),
    ("bench --load folder.json", "--load folder.json: a folder, not a file"),
    ("bench --load no.json", "No such file"),
    *[
        (f"bench --load {name}.json", f"{name}.json: not a recording of fusedopt bench")
        for name in ("text", "deep", "schema", "parts", "types")
    ],
]


@pytest.mark.parametrize(("words", "message"), OPTIONS, ids=[words for words, _ in OPTIONS])
def test_bad_options(folder, words, message):
    if os.name != "posix" and ("pipe" in words or "/dev" in words):
        pytest.skip("needs POSIX files")
    assert_refused(run(*words.split()), words.split()[0], re.escape(message))


@posix
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --data shut.npz", r"Permission denied: '?shut.npz"),
        ("train --resume shut.npz", r"Permission denied: '?shut.npz"),
        ("train --save shut/x.npz", "--save shut/x.npz: no permission to write"),
        ("train --plot shut/x.png", "--plot shut/x.png: no permission to write"),
        ("train --plot shut.png", "--plot shut.png: no permission to write"),
        ("bench --json shut/x.json", "--json shut/x.json: no permission to write"),
        ("bench --load shut.json", r"Permission denied: '?shut.json"),
    ],
)
def test_files_without_permission(capsys, monkeypatch, words, message):
    """In this process, as another user if this one is root."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)
        os.chmod(folder, 0o755)
        for name in ("shut.npz", "shut.png", "shut.json"):
            open(name, "w").close()
            os.chmod(name, 0)
        os.mkdir("shut", 0o555)
        if root:
            os.seteuid(65534)
        try:
            status = cli.main(words.split())
        finally:
            if root:
                os.seteuid(0)
            monkeypatch.undo()
    out, err = capsys.readouterr()
    assert status == 2 and not out
    assert re.fullmatch(rf"fusedopt {words.split()[0]}: .*{message}.*\n", err), err


def resumable(folder):
    """The arrays and the metadata of a checkpoint of two epochs on data.npz."""
    from fusedopt import _checkpoint

    words = ["--data", "data.npz", "--schedule", "constant", "--no-reference"]
    assert cli.main(["train", *words, "--epochs", "2", "--save", "run.npz"]) == 0
    return words, *_checkpoint.read(folder / "run.npz")


def test_damaged_checkpoints(folder, capsys):
    """The program's own entries are checked too, not only the optimizer's."""
    from fusedopt import _checkpoint

    words, arrays, meta = resumable(folder)
    name = "params['dense1']['b']"
    for changes, altered in [
        ({"epoch": "2"}, {}),
        ({"epoch": 1.0}, {}),
        ({"epoch": -1}, {}),
        ({"epoch": 3}, {}),
        ({"epochs": None}, {}),
        ({"history": []}, {}),
        ({"history": {}}, {}),
        ({"history": meta["history"] | {"loss": ["x"]}}, {}),
        ({"history": meta["history"] | {"loss": 1}}, {}),
        ({"train": []}, {}),
        ({"data": 5}, {}),
        ({"optimizer": None}, {}),
        ({}, {name: arrays[name].astype(np.float64)}),
        ({}, {name: arrays[name].astype(str)}),
        ({}, {name: arrays[name][:-1]}),
    ]:
        _checkpoint.write(folder / "bad.npz", arrays | altered, meta | changes)
        capsys.readouterr()
        assert cli.main(["train", *words, "--epochs", "4", "--resume", "bad.npz"]) == 2, changes
        out, err = capsys.readouterr()
        assert err.startswith("fusedopt train: bad.npz: not a checkpoint") and not out
    assert cli.main(["train", *words, "--epochs", "4", "--resume", "run.npz"]) == 0


def test_a_finished_run_has_nothing_to_monitor(folder, capsys):
    words, *_ = resumable(folder)
    for path in ([], ["m.png"]):
        again = ["--epochs", "2", "--resume", "run.npz", "--monitor", *path]
        assert cli.main(["train", *words, *again]) == 0
    assert not (folder / "m.png").exists()


# ---------------------------------------------------------------- exit status and streams


def test_failures_half_way(folder, capsys, monkeypatch):
    """A full disk gives one line and status 1; a bug gives a traceback."""
    words = ["train", "--data", "data.npz", "--save", "x.npz"]

    def full(*_):
        raise OSError(28, "No space left on device", "x.npz")

    with monkeypatch.context() as patch:
        patch.setattr(cli.train, "save", full)
        assert cli.main(words) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "fusedopt train: [Errno 28] No space left on device: 'x.npz'"
    for error in (ValueError, TypeError, ZeroDivisionError):
        with monkeypatch.context() as patch:
            patch.setattr(cli.train, "save", lambda *_, error=error: 1 / 0 or error)
            with pytest.raises(ZeroDivisionError):
                cli.main(words)


@pytest.mark.parametrize("words", [["train"], ["info"], ["bench"], []])
def test_wrong_usage(words):
    done = run(*words, "--nonsense")
    assert done.returncode == 2 and "usage: fusedopt" in done.stderr


@pytest.mark.parametrize("script", [False, True])
def test_version(script):
    found = os.path.join(sysconfig.get_path("scripts"), "fusedopt")
    command = [found] if script else COMMAND
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout == f"fusedopt {fusedopt.__version__}\n"


TRAIN = "train --epochs 1 --no-reference --data data.npz"
# words; redirections -> status, and a pattern of all that is on the open streams
STREAMS = {
    "stderr closed": (TRAIN, "2>&-", 0, r"\nheld out: (?s:.*)weights sha256 \w+\n"),
    "stdout closed": ("info", ">&-", 0, ""),
    "all closed": (TRAIN, "<&- >&- 2>&-", 0, ""),
    "stdin closed": (TRAIN, "<&- 2>/dev/null", 0, r"\nheld out: (?s:.*)"),
    "refused, stderr closed": ("train --data data.npz --lr -1", "2>&-", 2, ""),
    "wrong usage, stderr closed": ("train --nonsense", "2>&-", 2, ""),
    "refused, stderr full": ("train --data data.npz --lr -1", "2>/dev/full", 2, ""),
    "stdout full": ("info", ">/dev/full", 1, "fusedopt.*: .*No space left on device\n"),
}


@pytest.mark.slow("starts interpreters")
@posix
@pytest.mark.parametrize("kind", STREAMS)
def test_closed_and_full_streams(folder, kind):
    words, redirection, status, pattern = STREAMS[kind]
    if "/dev/full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", *COMMAND, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert re.fullmatch(pattern, done.stdout + done.stderr), (done.stdout, done.stderr)


@pytest.mark.slow("starts interpreters")
@posix
@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("words", ["info", "--version", "train --help", TRAIN])
def test_reader_is_gone(folder, words, unbuffered):
    """A closed pipe, as of `| head`: no message, and the status of SIGPIPE."""
    reading, writing = os.pipe()
    os.close(reading)
    env = os.environ | {"PYTHONUNBUFFERED": "1" if unbuffered else ""}
    done = subprocess.run(
        [*COMMAND, *words.split()],
        stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, env=env,
    )  # fmt: skip
    os.close(writing)
    silent = unbuffered and words in (
        "--version",
        "train --help",
    )  # argparse ignores its own failures to write
    assert done.returncode == (0 if silent else 141)
    assert "rror" not in done.stderr and "Exception" not in done.stderr, done.stderr


@posix
def test_interrupted(folder):
    """After some epochs: status 130, and the checkpoint is there."""
    words = ["train", "--data", "data.npz", "--epochs", "1000000", "--save", "run.npz"]
    process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    err = b""
    while b"epoch 3/" not in err:
        err += (byte := process.stderr.read(1))
        assert byte, err
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith(b"fusedopt train: interrupted\n")
    assert (folder / "run.npz").exists()
