"""Train a small classifier, on handwritten digits or other data, and report where the time went."""

from __future__ import annotations

import argparse
import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from operator import methodcaller
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fusedopt
from fusedopt import StepResult, _checkpoint, _tree, reference, schedules
from fusedopt.cli import data as data_module
from fusedopt.cli import files, model, report
from fusedopt.cli.data import Data
from fusedopt.cli.pair import Pair
from fusedopt.monitor import History
from fusedopt.tune import range_test


@dataclass(frozen=True)
class Choice:
    """A class of fusedopt, and defaults here; `options` are those that differ from the class's.

    `rest` is the class for all other parameters, if the first steps only matrices.
    """

    cls: str
    lr: float
    schedule: str = "cosine"
    epochs: int = 10
    options: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False  # one batch of all data
    rest: str = ""

    def default(self, name: str) -> float | None:
        """Return the default of an option of the class, None if it has no such option."""
        known = inspect.signature(getattr(fusedopt, self.cls)).parameters
        value = known[name].default if name in known else None
        found: float | None = self.options.get(name, value)
        return found


OPTIMIZERS = {
    "adadelta": Choice("Adadelta", 1.0),
    "adafactor": Choice("Adafactor", 5e-2),
    "adagrad": Choice("Adagrad", 2e-2),
    "adam": Choice("Adam", 2e-3),
    "adamax": Choice("Adamax", 5e-3),
    "adamw": Choice("AdamW", 2e-3),
    "ademamix": Choice("AdEMAMix", 2e-3),
    "adopt": Choice("ADOPT", 5e-3),
    "asgd": Choice("ASGD", 3e-1),
    "lamb": Choice("LAMB", 5e-3),
    "lars": Choice("LARS", 3.0),
    "lion": Choice("Lion", 5e-4),
    "nadam": Choice("NAdam", 2e-3),
    "prodigy": Choice("Prodigy", 1.0),
    "radam": Choice("RAdam", 1e-2),
    "muon": Choice("Muon", 2e-3, options={"adjust_lr_fn": "match_rms_adamw"}, rest="AdamW"),
    "rmsprop": Choice("RMSprop", 1e-3),
    "rprop": Choice("Rprop", 1e-3, "constant", 30, whole=True),
    "schedulefreeadamw": Choice("ScheduleFreeAdamW", 2.5e-3, "constant"),
    "schedulefreesgd": Choice("ScheduleFreeSGD", 0.5, "constant"),
    "sgd": Choice("SGD", 5e-2, options={"momentum": 0.9}),
    "signsgd": Choice("SignSGD", 5e-4),
    "yogi": Choice("Yogi", 1e-2),
    "gd": Choice("SGD", 1e-1, "constant", 200, whole=True),
}
# option here -> option of the class, description
PENALTIES = {
    "momentum": ("momentum", "momentum"),
    "l1": ("l1", "L1 penalty"),
    "l2": ("weight_decay", "L2 penalty, or decoupled decay where the optimizer has that"),
}
# name -> (rate, steps of the whole run, steps of an epoch) -> schedule
SCHEDULES: dict[str, Callable[[float, int, int], schedules.Schedule]] = {
    "constant": lambda lr, steps, epoch: schedules.constant(lr),
    "linear": lambda lr, steps, epoch: schedules.linear(lr, 0.0, steps),
    "cosine": lambda lr, steps, epoch: schedules.cosine(lr, steps),
    "exponential": lambda lr, steps, epoch: schedules.exponential(lr, 0.8, every=epoch),
    "polynomial": lambda lr, steps, epoch: schedules.polynomial(lr, 0.0, steps, power=2.0),
    "step": lambda lr, steps, epoch: schedules.staircase(lr, 0.3, every=4 * epoch),
    "one-cycle": lambda lr, steps, epoch: schedules.one_cycle(lr, steps),
}
OPEN_ENDED = ("constant", "exponential", "step")  # these do not depend on the run's length
MOST = 2**63 - 1  # more than any run can take
# options that determine a run, and must be the same when it is resumed
FIXED = ("optimizer", "lr", "schedule", "warmup", "batch_size", "momentum", "l1", "l2", "seed")
AUTO = "auto"


def rate(text: str) -> float | str:
    """Return the value of --lr."""
    return text if text == AUTO else float(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument

    def each(value: Callable[[Choice], Any]) -> str:
        return ", ".join(f"{k} {x:g}" for k, v in OPTIMIZERS.items() if (x := value(v)) is not None)

    def most(name: str) -> str:
        usual = getattr(Choice, name)
        values = {k: getattr(v, name) for k, v in OPTIMIZERS.items()}
        others = [f"{k} {value}" for k, value in values.items() if value != usual]
        return f"default: {usual}; {', '.join(others)}"

    add("--optimizer", choices=OPTIMIZERS, default="adam",
        help="gd: full batch; muon: matrices, and AdamW the rest")  # fmt: skip
    add("--lr", type=rate, help="learning rate, or auto: find one by a range test first "
        f"(default: {each(lambda c: c.lr)})")  # fmt: skip
    add("--schedule", choices=SCHEDULES, help=f"of the learning rate ({most('schedule')})")
    add("--warmup", type=int, default=0, metavar="STEPS", help="linear rise before the schedule")
    add("--epochs", type=int, help=f"passes over the data ({most('epochs')})")
    whole = ", ".join(name for name, choice in OPTIMIZERS.items() if choice.whole)
    add("--batch-size", type=int, default=32,
        help=f"rows of a step (default: %(default)s; {whole}: all)")  # fmt: skip
    for option, (name, what) in PENALTIES.items():
        values = each(methodcaller("default", name))
        add(f"--{option}", type=float, help=f"{what} (default: {values})")
    add("--seed", type=int, default=0, help="of the parameters and of the order of the data")
    add("--data", default="digits", help=f"one of {', '.join(data_module.SETS)}; or "
        "FILE.csv: rows of numbers and a class, of which a quarter is held out; or FILE.npz: "
        + ", ".join(data_module.NAMES))  # fmt: skip
    add("--save", type=Path, metavar="CHECKPOINT", help="write parameters and optimizer each epoch")
    add("--resume", type=Path, metavar="CHECKPOINT", help="continue a --save, with equal results; "
        f"--epochs may grow with --schedule {', '.join(OPEN_ENDED)}")  # fmt: skip
    add("--plot", type=Path, metavar="FILE.png", help="draw loss, accuracy, learning rate and "
        "statistics of every layer")  # fmt: skip
    add(
        "--monitor",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FILE.png",
        help="report statistics of every layer and what looks wrong; draw them as --plot does",
    )
    add("--no-reference", action="store_true", help="do not run and time the NumPy reference too")


@dataclass
class Run:
    """The progress of a run: what a checkpoint holds beside the optimizer."""

    params: model.Params
    epoch: int = 0
    history: dict[str, list[float]] = field(
        default_factory=lambda: {
            k: [] for k in ("loss", "lr", "held_out_loss", "accuracy", "epoch_step")
        }
    )
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("forward+backward", "optimizer", "reference"), 0.0)
    )


def settle(options: argparse.Namespace) -> argparse.Namespace:
    """Return the options with the defaults that depend on others, checked."""
    settled = copy.copy(options)
    choice = OPTIMIZERS[options.optimizer]
    for name in ("lr", "schedule", "epochs"):
        if getattr(options, name) is None:
            setattr(settled, name, getattr(choice, name))
    for option, (name, _) in PENALTIES.items():
        default = choice.default(name)
        if getattr(options, option) is None:
            setattr(settled, option, default or 0.0)
        elif default is None:
            able = [k for k, c in OPTIMIZERS.items() if c.default(name) is not None]
            raise ValueError(f"--{option}: goes with --optimizer {', '.join(able)}")
    for name, least in (("epochs", 1), ("batch_size", 1), ("warmup", 0), ("seed", 0)):
        if not least <= getattr(settled, name) <= MOST:
            raise ValueError(f"--{name.replace('_', '-')}: must be >= {least} and <= {MOST}")
    own = None if settled.data in data_module.SETS else Path(settled.data)
    if own is not None:
        if not own.suffix and not own.exists():
            known = ", ".join(data_module.SETS)
            raise ValueError(f"--data {own}: no such file, and none of {known}")
        files.to_read("--data", own)
    if settled.resume is not None:
        files.to_read("--resume", settled.resume)
    if settled.save is not None:
        if _checkpoint.known(settled.save).suffix == ".safetensors":
            _checkpoint._safetensors()  # raises if it is not installed
        files.to_write("--save", settled.save)
        if own is not None and settled.save.resolve() == own.resolve():
            raise ValueError(f"--save {settled.save}: would overwrite --data")
    for option, path in (("--plot", settled.plot), ("--monitor", settled.monitor)):
        if path not in (None, Path()):
            files.to_draw(option, path, "demo")
    return settled


def make_optimizer(module: Any, params: model.Params, o: argparse.Namespace, data: Data) -> Any:
    """Return the optimizer asked for, of fusedopt or of fusedopt.reference."""
    epoch_steps = -(-len(data.x_train) // o.batch_size)
    steps = max(1, o.epochs * epoch_steps - o.warmup)
    lr = SCHEDULES[o.schedule](o.lr, steps, epoch_steps)
    if o.warmup:
        lr = schedules.warmup(o.warmup, lr)
    choice = OPTIMIZERS[o.optimizer]
    kind = {
        name: getattr(o, option)
        for option, (name, _) in PENALTIES.items()
        if choice.default(name) is not None
    }
    make = partial(getattr(module, choice.cls), lr=lr, **(dict(choice.options) | kind))
    if not choice.rest:
        return make(params)
    rest = partial(getattr(module, choice.rest), lr=lr, weight_decay=o.l2)
    return Pair(params, make, rest)


def find_rate(o: argparse.Namespace, data: Data) -> tuple[float, str]:
    """Return a rate for --lr auto, and what to say of it."""
    usual = OPTIMIZERS[o.optimizer].lr
    if o.resume is not None:  # the same rate; if there is none, `resume` says so
        known = _checkpoint.read(o.resume)[1].get("train")
        saved = known.get("lr") if isinstance(known, dict) else None
        return (saved if type(saved) is float else usual), "rate: that of the checkpoint"
    params = model.init(data.x_train.shape[1], data.classes, o.seed)
    fixed = argparse.Namespace(**vars(o) | {"lr": usual, "schedule": "constant", "warmup": 0})
    rows = (rows for epoch in itertools.count() for rows in batches(data, o, epoch))

    def loss_and_grads() -> tuple[float, model.Params]:
        batch = next(rows)
        return model.loss_and_gradients(params, data.x_train[batch], data.y_train[batch])

    with np.errstate(all="ignore"):  # until the loss diverges
        opt = make_optimizer(fusedopt, params, fixed, data)
        found = range_test(opt, loss_and_grads, start=1e-4 * usual, stop=1e3 * usual)
    if found.suggestion is None:
        return usual, f"rate: {usual:g}, the default: {found.reason}"
    lr = float(f"{found.suggestion:.2g}")
    return lr, f"rate: {lr:g}, by a range test up to {found.rates[-1]:.2g}: {found.reason}"


def batches(data: Data, o: argparse.Namespace, epoch: int) -> Iterator[NDArray[np.intp]]:
    """Yield the rows of each mini-batch. The order depends on seed and epoch alone."""
    order = np.random.default_rng([o.seed, epoch]).permutation(len(data.x_train))
    for start in range(0, len(order), o.batch_size):
        yield order[start : start + o.batch_size]


def train_epoch(
    state: Run,
    opt: Any,
    twin: Any,
    data: Data,
    o: argparse.Namespace,
    bar: Any,
    monitor: History | None,
) -> None:
    """Take the steps of one epoch: the loop that this program demonstrates."""
    seconds, history = state.seconds, state.history
    for rows in batches(data, o, state.epoch):
        start = perf_counter()
        loss, grads = model.loss_and_gradients(state.params, data.x_train[rows], data.y_train[rows])
        computed = perf_counter()
        taken = opt.step(grads, stats=monitor is not None and monitor.due)
        stepped = perf_counter()
        if twin is not None:
            twin.step(grads)
        seconds["forward+backward"] += computed - start
        seconds["optimizer"] += stepped - computed
        seconds["reference"] += perf_counter() - stepped
        lr = opt.param_groups[0]["lr"](taken.step)
        if monitor is not None:
            monitor.record(taken, loss=loss, lr=lr)
        history["loss"].append(loss)
        history["lr"].append(lr)
        bar.update()
        bar.set_postfix(loss=f"{np.mean(history['loss'][-20:]):.4f}", refresh=False)


def shown(opt: Any) -> AbstractContextManager[None]:
    """Return a context in which the parameters are those to evaluate, see `rule.Average`."""
    return nullcontext() if opt is None or opt.rule.average is None else opt.swap_ema()


def save(path: Path, state: Run, opt: Any, data: Data, o: argparse.Namespace) -> None:
    """Write one file with the parameters, the optimizer and the history."""
    leaves = dict(_tree.leaves("params", state.params))
    arrays, meta = _checkpoint.pack(opt.state_dict(), leaves)
    fixed = {name: getattr(o, name) for name in FIXED}
    _checkpoint.write(path, arrays, {
        "train": fixed, "data": data.digest, "epoch": state.epoch, "epochs": o.epochs,
        "history": state.history, "optimizer": meta,
    })  # fmt: skip


def resume(path: Path, state: Run, opt: Any, data: Data, o: argparse.Namespace) -> None:
    """Load a file of `save`; ValueError naming it if it belongs to another run."""
    arrays, meta = _checkpoint.read(path)
    try:
        fixed, history = meta["train"], meta["history"]
        epoch, epochs, digest = meta["epoch"], meta["epochs"], meta["data"]
        inner = _checkpoint.unpack(arrays, meta["optimizer"])
        saved = inner.pop("params")
        differing = [
            f"--{n.replace('_', '-')} {fixed[n]}" for n in FIXED if fixed[n] != getattr(o, n)
        ]
        if differing:
            raise ValueError(f"was made with {', '.join(differing)}; resume with the same")
        if digest != data.digest:
            raise ValueError("was made on other data")
        if epochs != o.epochs and o.schedule not in OPEN_ENDED:
            raise ValueError(f"was made with --epochs {epochs}, which {o.schedule} depends on")
        leaves = dict(_tree.leaves("params", state.params))
        if {n: (a.shape, a.dtype) for n, a in saved.items()} != {
            n: (a.shape, a.dtype) for n, a in leaves.items()
        }:
            raise ValueError("holds another model")
        kinds = {type(x) for column in history.values() for x in column}
        if history.keys() != state.history.keys() or not kinds <= {int, float}:
            raise ValueError("its history is damaged")
        if type(epoch) is not int or not 0 <= epoch <= epochs:
            raise ValueError(f"its epoch is {epoch!r} of {epochs!r}")
        opt.load_state_dict(inner)
    except (KeyError, TypeError, AttributeError, ValueError) as exc:
        raise ValueError(f"{path}: not a checkpoint that this run can continue: {exc}") from exc
    for name, array in saved.items():
        leaves[name][...] = array
    state.epoch, state.history = epoch, history


def prepare(options: argparse.Namespace) -> Callable[[], None]:
    """Read the data and a checkpoint, check all options, and return the run."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError(f"train {data_module.DEMO}") from exc
    o = settle(options)
    data = data_module.load(o.data)
    if OPTIMIZERS[o.optimizer].whole:
        o.batch_size = len(data.x_train)
    state, said = Run(model.init(data.x_train.shape[1], data.classes, o.seed)), ""
    if o.lr == AUTO:
        o.lr, said = find_rate(o, data)
    opt = make_optimizer(fusedopt, state.params, o, data)
    if o.resume is not None:
        resume(o.resume, state, opt, data, o)
    return lambda: run(state, opt, data, o, tqdm, said)


def run(state: Run, opt: Any, data: Data, o: argparse.Namespace, tqdm: Any, said: str = "") -> None:
    """Train, evaluate and report, after what is `said`."""
    if said:
        print(said)
    if o.resume is not None:
        print(f"resumed after epoch {state.epoch}")
    shadow = copy.deepcopy(state.params)
    twin = None if o.no_reference else make_optimizer(reference, shadow, o, data)
    if twin is not None:
        twin.load_state_dict(opt.state_dict())

    total = o.epochs * -(-len(data.x_train) // o.batch_size)
    monitor = None
    if o.monitor is not None or o.plot is not None:
        monitor = History(every=min(max(total // 400, 1), 10))
        known = zip(state.history["loss"], state.history["lr"], strict=True)
        for step, (loss, lr) in enumerate(known, start=1):  # those before --resume
            monitor.record(StepResult(step, updated=0), loss=loss, lr=lr)
    with tqdm(total=total, initial=len(state.history["loss"]), unit="step") as bar:
        while state.epoch < o.epochs:
            bar.set_description(f"epoch {state.epoch + 1}/{o.epochs}")
            train_epoch(state, opt, twin, data, o, bar, monitor)
            state.epoch += 1
            with shown(opt):
                held_out, predicted = model.evaluate(state.params, data.x_test, data.y_test)
            state.history["held_out_loss"].append(float(held_out))
            state.history["accuracy"].append(float(np.mean(predicted == data.y_test)))
            state.history["epoch_step"].append(len(state.history["loss"]))
            if o.save is not None:
                save(o.save, state, opt, data, o)
    choice = OPTIMIZERS[o.optimizer]
    with shown(opt), shown(twin):
        report.result(state.params, None if twin is None else shadow, data, state.seconds)
    if monitor is None:
        return
    title = " and ".join(name for name in (choice.cls, choice.rest) if name)
    title += f", {o.schedule} schedule, batches of {o.batch_size}"
    if last := len(data.x_train) % o.batch_size:
        title += f", the last of an epoch of {last}"
    ends = state.history["epoch_step"]
    curves = {
        "held-out loss": (ends, state.history["held_out_loss"]),
        "held-out accuracy": (ends, state.history["accuracy"]),
    }
    if o.monitor is not None and monitor.names:  # resuming a finished run takes no step
        report.layers(monitor)
    for path in {o.plot, o.monitor if monitor.names else None} - {None, Path()}:
        monitor.plot(path, title=title, curves=curves)
        print(f"plot: {path}")
