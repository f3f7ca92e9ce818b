"""The rows of the bit tests: every rule with every option that changes its arithmetic."""

from __future__ import annotations

import io
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np

import fusedopt
from fusedopt import _core, reference

TILE = _core.TILE
EVERY_CLASS = [cls for cls in vars(fusedopt).values() if getattr(cls, "rule", None) is not None]
# those whose state has the shape of the parameter, which may be any: the tables are of arrays of
# many; test_muon.py and test_factors.py have the others
CLASSES = [cls for cls in EVERY_CLASS if cls.rule.demand_shape is None and not cls.rule.has_parts]
RULES = {cls.__name__: cls.rule for cls in EVERY_CLASS}
# rules that need sums over each leaf, or over all, before a step
LAYERWISE = {name for name, row in _core.RULES.items() if row[3] not in ("elementwise", "internal")}
DTYPES = (np.float32, np.float64)


@dataclass(frozen=True)
class Case:
    rule: str
    name: str
    function: str  # in functional and in reference
    cls: str
    states: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    class_options: dict[str, Any] = field(default_factory=dict)  # more options, of the class
    first_step: int = 1  # of functions
    remembered: dict[str, Any] = field(default_factory=dict)  # what the function takes beside them

    @property
    def plurals(self) -> list[str]:
        """The names of the lists of state in functions."""
        by_name = {state.name: state.plural or f"{state.name}s" for state in RULES[self.cls].states}
        return [by_name[name] for name in self.states]

    @property
    def fast(self) -> Callable[..., None]:
        return partial(getattr(fusedopt.functional, self.function), **self.remembered)

    @property
    def reference(self) -> Callable[..., None]:
        return partial(getattr(reference, self.function), **self.remembered)

    def make(self, params: Any, module: Any = fusedopt) -> Any:
        return getattr(module, self.cls)(params, **self.options, **self.class_options)

    def __str__(self) -> str:
        return self.name

    @property
    def is_layerwise(self) -> bool:
        """Whether a step needs sums over each leaf before it writes."""
        rule = getattr(fusedopt, self.cls).rule
        return rule.row([self.options]) in LAYERWISE


def _adam(name: str, function: str = "adam", amsgrad: bool = False, **options: Any) -> Case:
    states = ("exp_avg", "exp_avg_sq") + ("max_exp_avg_sq",) * amsgrad
    cls = {"adam": "Adam", "adamw": "AdamW"}[function]
    return Case("adam", name, function, cls, states, options, {"amsgrad": amsgrad})


def _sgd(name: str, **options: Any) -> Case:
    states = ("momentum_buffer",) if options.get("momentum") else ()
    return Case("sgd", name, "sgd", "SGD", states, options)


def _lamb(name: str, **options: Any) -> Case:
    return Case("lamb", name, "lamb", "LAMB", ("exp_avg", "exp_avg_sq"), options)


def _lion(name: str, **options: Any) -> Case:
    return Case("lion", name, "lion", "Lion", ("exp_avg",), options)


def _rmsprop(name: str, centered: bool = False, **options: Any) -> Case:
    states = ("square_avg",) + ("momentum_buffer",) * ("momentum" in options)
    states += ("grad_avg",) * centered
    return Case("rmsprop", name, "rmsprop", "RMSprop", states, options, {"centered": centered})


def _adagrad(name: str, first: float = 0.0, **options: Any) -> Case:
    begins = {"initial_accumulator_value": first}
    return Case("adagrad", name, "adagrad", "Adagrad", ("sum",), options, begins)


def _adopt(name: str, **options: Any) -> Case:
    return Case("adopt", name, "adopt", "ADOPT", ("exp_avg", "exp_avg_sq"), options)


def _asgd(name: str, last_lr: float = 0.01, **options: Any) -> Case:
    return Case("asgd", name, "asgd", "ASGD", ("ax",), options, remembered={"last_lr": last_lr})


def _signsgd(name: str, **options: Any) -> Case:
    states = ("momentum_buffer",) if options.get("momentum", 0.9) else ()
    return Case("signsgd", name, "signsgd", "SignSGD", states, options)


def _yogi(name: str, first: float = 1e-6, **options: Any) -> Case:
    states, begins = ("exp_avg", "exp_avg_sq"), {"initial_accumulator": first}
    return Case("yogi", name, "yogi", "Yogi", states, options, begins)


def _rprop(name: str, lr: float = 0.01, **options: Any) -> Case:
    return Case("rprop", name, "rprop", "Rprop", ("prev", "step_size"), options, {"lr": lr})


def _lars(name: str, **options: Any) -> Case:
    return Case("lars", name, "lars", "LARS", ("momentum_buffer",), options)


def _nadam(name: str, **options: Any) -> Case:
    return Case("nadam", name, "nadam", "NAdam", ("exp_avg", "exp_avg_sq"), options)


def _radam(name: str, first_step: int = 1, **options: Any) -> Case:
    states = ("exp_avg", "exp_avg_sq")
    return Case("radam", name, "radam", "RAdam", states, options, first_step=first_step)


def _adamax(name: str, **options: Any) -> Case:
    return Case("adamax", name, "adamax", "Adamax", ("exp_avg", "exp_inf"), options)


def _adadelta(name: str, **options: Any) -> Case:
    return Case("adadelta", name, "adadelta", "Adadelta", ("square_avg", "acc_delta"), options)


def _ademamix(name: str, **options: Any) -> Case:
    states = ("exp_avg", "exp_avg_sq", "exp_avg_slow")
    return Case("ademamix", name, "ademamix", "AdEMAMix", states, options)


def takes(cls: str, storage: Any) -> bool:
    """Whether a class refuses none of some options that all have, or this `state_dtype`."""
    rule = RULES[cls]
    options = storage if isinstance(storage, dict) else {"state_dtype": storage}
    if rule.average is not None and options.get("ema") is not None:
        return False
    return not any(options.get("state_dtype") in state.refuses for state in rule.states)


def _schedulefree(name: str, **options: Any) -> Case:
    kind = "sgd" if "sgd" in name else "adamw"
    states = ("z", "exp_avg_sq") if kind == "adamw" else ("z",)
    remembered = {"k": 3, "weight_sum": 0.7, "lr_max": 0.4}
    cls = {"adamw": "ScheduleFreeAdamW", "sgd": "ScheduleFreeSGD"}[kind]
    return Case(
        "schedulefree", name, f"schedulefree{kind}", cls, states, options, remembered=remembered
    )


CASES = [
    _adam("adam"),
    _adam("adam-lr-betas-eps", lr=0.3, betas=(0.5, 0.75), eps=1e-3),
    _adam("adam-beta-0", betas=(0.0, 0.0), eps=0.0),
    _adam("adam-l2", weight_decay=0.01),
    _adam("adam-l1", l1=0.03),
    _adam("adam-amsgrad", amsgrad=True),
    _adam("adam-maximize", maximize=True),
    _adam("adam-all", amsgrad=True, weight_decay=0.1, l1=0.02, maximize=True),
    _adam("adam-eps-hat", eps=1e-3, eps_hat=True, amsgrad=True),
    _adam("adam-uncorrected", bias_correction=False, weight_decay=0.01),
    _adam("adamw", "adamw"),
    _adam("adamw-eps-hat", "adamw", eps=1e-3, eps_hat=True),
    _adam("adamw-all", "adamw", amsgrad=True, lr=0.1, weight_decay=0.3, maximize=True),
    _adam("adamw-cautious", "adamw", cautious=True),
    _adam("adamw-cautious-all", "adamw", amsgrad=True, lr=0.1, maximize=True, cautious=True),
    _sgd("gd", lr=0.1),
    _sgd("gd-l1-l2", lr=0.1, l1=0.01, weight_decay=0.1, maximize=True),
    _sgd("momentum", lr=0.1, momentum=0.9),
    _sgd("momentum-damped", lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    _sgd("nesterov", lr=0.1, momentum=0.8, nesterov=True, l1=0.01, maximize=True),
    _lion("lion"),
    _lion("lion-all", lr=0.1, betas=(0.5, 0.0), weight_decay=0.3, maximize=True),
    _lion("lion-cautious", lr=0.1, weight_decay=0.3, cautious=True),
    _rmsprop("rmsprop"),
    _rmsprop("rmsprop-momentum", lr=0.3, alpha=0.5, eps=1e-3, momentum=0.8, weight_decay=0.1),
    _rmsprop("rmsprop-centered", centered=True, maximize=True),
    _rmsprop("rmsprop-all", centered=True, momentum=0.5, alpha=0.9, weight_decay=0.01),
    _rmsprop("rmsprop-eps-in-sqrt", eps=1e-3, eps_in_sqrt=True),
    _rmsprop("rmsprop-eps-in-sqrt-all", True, lr=0.3, momentum=0.5, eps=1e-3, eps_in_sqrt=True),
    _adopt("adopt"),
    _adopt("adopt-l2", lr=0.1, betas=(0.5, 0.75), clip_exp=None, weight_decay=0.1, eps=0.0),
    _adopt(
        "adopt-decoupled",
        clip_exp=0.0,
        weight_decay=0.3,
        weight_decouple=True,
        fixed_decay=True,
        maximize=True,
    ),
    _asgd("asgd"),
    _asgd("asgd-mean", lr=0.3, lambd=0.1, alpha=0.5, t0=0.0, last_lr=0.2),
    _asgd("asgd-l2", lr=0.1, lambd=0.0, t0=1.0, weight_decay=0.1, maximize=True),
    _signsgd("signsgd", lr=0.1, momentum=0.0, weight_decay=0.3, maximize=True),
    _signsgd("signum", momentum=0.5),
    _signsgd("signum-l2", lr=0.1, weight_decay=0.1, weight_decouple=False),
    _yogi("yogi"),
    _yogi("yogi-l2", first=0.3, lr=0.3, weight_decay=0.1, weight_decouple=False, maximize=True),
    _yogi("yogi-decoupled", betas=(0.5, 0.0), weight_decay=0.3, fixed_decay=True, eps=0.0),
    _rprop("rprop"),
    _rprop("rprop-all", lr=0.3, etas=(0.3, 1.5), step_sizes=(1e-2, 0.7), maximize=True),
    _adagrad("adagrad"),
    _adagrad("adagrad-decay", lr=0.5, lr_decay=0.25, weight_decay=0.1, maximize=True),
    _adagrad("adagrad-first", first=0.3, eps=0.0),
    _adagrad("adagrad-eps-in-sqrt", eps=1e-3, eps_in_sqrt=True),
    _nadam("nadam"),
    _nadam("nadam-l2", lr=0.3, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.1, maximize=True),
    _nadam("nadam-decoupled", weight_decay=0.3, momentum_decay=2.0, decoupled_weight_decay=True),
    _nadam("nadam-beta-0", betas=(0.0, 0.0), momentum_decay=0.0, eps=0.0),
    _radam("radam"),
    _radam("radam-rectified", first_step=6),
    _radam(
        "radam-l2", 6, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.1, maximize=True
    ),  # from 8 on
    _radam("radam-decoupled", 6, betas=(0.9, 0.95), weight_decay=0.3, decoupled_weight_decay=True),
    _adamax("adamax"),
    _adamax("adamax-all", lr=0.3, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.1, maximize=True),
    _adamax("adamax-beta-0", betas=(0.0, 0.0), eps=0.0),
    _adadelta("adadelta"),
    _adadelta("adadelta-all", lr=0.3, rho=0.5, eps=1e-3, weight_decay=0.1, maximize=True),
    _adadelta("adadelta-rho-1", rho=1.0, eps=1e-2),
    _ademamix("ademamix"),
    _ademamix("ademamix-warmup", alpha=8.0, t_alpha_beta3=3.0, weight_decay=0.3, maximize=True),
    _ademamix("ademamix-all", lr=0.3, betas=(0.5, 0.75, 0.25), eps=1e-3, alpha=0.5),
    _schedulefree("schedulefree-adamw"),
    _schedulefree(
        "schedulefree-adamw-all",
        lr=0.3,
        betas=(0.6, 0.75),
        eps=1e-3,
        weight_decay=0.1,
        warmup_steps=3,
        r=1.0,
        weight_lr_power=1.0,
    ),
    _schedulefree("schedulefree-sgd"),
    _schedulefree(
        "schedulefree-sgd-all", lr=0.1, momentum=0.4, weight_decay=0.1, warmup_steps=3, r=0.5
    ),
    _schedulefree("schedulefree-sgd-still", lr=0.0),  # without a weight in the average
    _lamb("lamb", lr=0.01),
    _lamb("lamb-all", lr=0.3, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.0, maximize=True),
    _lars("lars"),
    _lars(
        "lars-all",
        lr=0.5,
        momentum=0.7,
        weight_decay=0.1,
        trust_coefficient=0.1,
        eps=1e-6,
        maximize=True,
    ),
]


def _prodigy(name: str, **options: Any) -> Case:
    states = ("exp_avg", "exp_avg_sq", "s", "p0")
    remembered = {"k": 3, "d": 2e-3, "d_max": 3e-3, "d_numerator": 1e-4}
    return Case("prodigy", name, "prodigy", "Prodigy", states, options, remembered=remembered)


CASES += [
    _prodigy("prodigy"),
    _prodigy("prodigy-l2", weight_decay=0.1, decouple=False, growth_rate=1.02, d_coef=2.0),
    _prodigy(
        "prodigy-all",
        lr=0.7,
        betas=(0.5, 0.75),
        beta3=0.5,
        eps=1e-3,
        weight_decay=0.3,
        use_bias_correction=True,
        safeguard_warmup=True,
        d0=1e-3,
    ),
]

FACTOR_CASES = [  # of rules whose state has other shapes: the rows of test_factors.py
    *(
        Case("adafactor", name, "adafactor", "Adafactor", (), options)
        for name, options in {
            "adafactor": {},
            "adafactor-all": {
                "lr": 0.3, "beta2_decay": -0.5, "eps": (1e-5, 0.1), "d": 2.0, "weight_decay": 0.1,
                "maximize": True,
            },
            "adafactor-small": {"eps": (0.0, 0.0), "beta2_decay": 0.0},
        }.items()
    ),
    _prodigy("prodigy-sample", slice_p=11),
    _prodigy("prodigy-sample-all", slice_p=3, d0=1e-3, use_bias_correction=True, lr=0.5),
]  # fmt: skip

ROW_CASES = [  # of rules that may keep a number for each row: rows of test_rows.py
    _adagrad("rowwise", first=0.1, rowwise=True),
    _adagrad("rowwise-decay", rowwise=True, weight_decay=0.1, eps_in_sqrt=True),
]

MATRIX_CASES = [  # of rules that step matrices alone: the rows of test_muon.py
    Case("muon", name, "muon", "Muon", ("momentum_buffer",), options)
    for name, options in {
        "muon": {},
        "muon-plain": {"nesterov": False, "momentum": 0.6, "weight_decay": 0.3, "lr": 0.02},
        "muon-rms": {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.2, "ns_steps": 3},
        "muon-cubic": {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 9, "eps": 1e-3},
    }.items()
]


# step options: the rows of the tests of every adapter
ALL_STEP_OPTIONS = {
    "grad_scale": 0.25,
    "max_grad_norm": 0.5,
    "clip_value": 0.01,
    "stats": True,
    "zero_grads": True,
}
STEP_OPTIONS = [
    {"grad_scale": 0.37},
    {"grad_scale": -3.0, "clip_value": 0.2},
    {"clip_value": 0.01},
    {"max_grad_norm": 0.7},
    {"max_grad_norm": 1e9, "grad_scale": 2.0},
    {"max_grad_norm": 0.3, "per_tensor": True},
    {"max_grad_norm": 0.3, "norm_type": np.inf},
    {"max_grad_norm": 0.1, "norm_type": np.inf, "per_tensor": True, "nonfinite": "skip"},
    {"nonfinite": "skip"},
    {"max_grad_norm": np.inf},
    {"max_grad_norm": np.inf, "norm_type": np.inf, "per_tensor": True},
    {"stats": True},
    {"stats": True, "nonfinite": "skip"},
    {"zero_grads": True},
    ALL_STEP_OPTIONS,
]


def values(n: int, dtype: Any, seed: int, hostile: bool = True) -> np.ndarray:
    """n numbers of mixed sizes; if hostile, with infinities, NaN, zeros and subnormals."""
    return _values(n, dtype, seed, hostile).copy()


@lru_cache(maxsize=64)
def _values(n: int, dtype: Any, seed: int, hostile: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(n) * 10.0 ** rng.integers(-12, 5, n)).astype(dtype)
    if hostile:
        info = np.finfo(dtype)
        edge = [np.inf, -np.inf, np.nan, 0.0, -0.0, info.smallest_subnormal, -info.tiny / 3]
        edge += [info.max, -info.max, info.tiny, 1.0]
        where = rng.permutation(n)[: min(n // 3, 4 * len(edge))]
        x[where] = np.resize(np.array(edge, dtype), where.size)
    return x


def canonical(x: np.ndarray) -> bytes:
    """The bytes of x with all NaNs made the same: their payloads are not promised."""
    if x.dtype.kind not in "f":
        return x.tobytes()
    return np.where(np.isnan(x), x.dtype.type(np.nan), x).tobytes()


def assert_same(ours: list[np.ndarray], theirs: list[np.ndarray], names: list[str]) -> None:
    for name, a, b in zip(names, ours, theirs, strict=True):
        if canonical(a) != canonical(b):
            i = np.flatnonzero((a != b) & ~(np.isnan(a) & np.isnan(b)))[:3]
            raise AssertionError(f"{name} differs at {i}: {a.ravel()[i]} is not {b.ravel()[i]}")


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = fusedopt.get_num_threads()
    fusedopt.set_num_threads(n)
    try:
        yield
    finally:
        fusedopt.set_num_threads(before)


def in_two_threads(work: Callable[[], object]) -> None:
    """Call a function in two threads at once, and wait for both."""
    pair = [threading.Thread(target=work) for _ in range(2)]
    for thread in pair:
        thread.start()
    for thread in pair:
        thread.join()


@contextmanager
def isa(name: str) -> Iterator[None]:
    before = _core.isa()
    _core.select_isa(name)
    try:
        yield
    finally:
        _core.select_isa(before)


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run a command of fusedopt in this process: its imports take longer than most commands."""
    from fusedopt import cli

    words = list(map(str, arguments))
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = cli.main(words)
        except SystemExit as exc:
            status = exc.code
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def swapped(opt: Any, flags: Callable[[int], tuple[str, int]]) -> Callable[[], None]:
    """Exchange the file of the state for another view of it; return what undoes that."""
    number = opt._disk._file.fileno()
    kept, other = os.dup(number), os.open(*flags(number))
    os.dup2(other, number)
    os.close(other)

    def undo() -> None:
        os.dup2(kept, number)
        os.close(kept)

    return undo


SPLIT = 400_000  # elements: enough to be split over threads


def work(seed: int = 0, steps: int = 5, module: Any = fusedopt) -> bytes:
    """The bytes of a parameter, large enough to be split, after some steps."""
    rng = np.random.default_rng(seed)
    p, g = (rng.standard_normal(SPLIT).astype(np.float32) for _ in range(2))
    opt = module.Adam([p])
    for _ in range(steps):
        opt.step([g])
    return p.tobytes()
