"""Any sequence of calls: ours and the reference take it in parallel and never differ.

Hypothesis chooses the calls, including invalid ones. After each one all parameters, states and step
counts are compared. FUSEDOPT_EXAMPLES sets how many sequences are tried.
"""

import contextlib
import copy
import os
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cases import CASES, RULES, canonical, takes
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_processes import in_child

import fusedopt
from fusedopt import _core, reference
from fusedopt.formats import Stored

EXAMPLES = int(os.environ.get("FUSEDOPT_EXAMPLES", "30"))

SIZES = st.sampled_from([0, 1, 2, 63, 64, 65, 511, 512, 513, 1025, 66_000])
NARROW = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
DTYPES = (*NARROW, np.dtype(np.float64))
RATES = st.sampled_from([0.0, 1e-3, 0.1, 0.5, 3.0])
MAKES = st.sampled_from([(case.cls, case.options | case.class_options) for case in CASES])
STORAGE = st.sampled_from(
    [
        {},
        {"state_dtype": "bfloat16"},
        {"state_dtype": "int8", "min_8bit_size": 0, "seed": 3},
        {"state_dtype": "int8", "min_8bit_size": 600},
    ]
)
GOOD = {  # options that may change between steps, and values for them
    "lr": RATES,
    "eps": st.sampled_from([1e-8, 1e-3]),
    "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.5, 0.0)]),
    "weight_decay": RATES,
    "dampening": st.just(0.0),
    "maximize": st.booleans(),
}
BAD = {
    "lr": [-1.0, float("nan"), "fast", None],
    "eps": [-1e-8, float("inf")],
    "betas": [(0.9, 1.0), (0.9,), 0.9, (-0.1, 0.9)],
    "weight_decay": [-1.0, True],
    "maximize": [1, None],
    "state_dtype": ["int8", "bfloat16", "float64", 8],
}


def numbers(size, dtype, seed, hostile=False):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size) * 10.0 ** rng.integers(-6, 3, size)
    if hostile and size:
        x[rng.integers(0, size, 3)] = [np.inf, np.nan, -0.0]
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def parts(value):
    return value.parts() if isinstance(value, Stored) else [np.asarray(value)]


def contents(opt):
    """All that a step may change, as text and bytes."""
    found = [opt.state_dict()["step"]]
    for group in opt.param_groups:
        found += [repr({k: v for k, v in group.items() if k != "params"})]
        found += [canonical(p) for p in group["params"]]
    for state in opt.state.values():
        found += [(key, canonical(a)) for key, value in state.items() for a in parts(value)]
    return found


class Lockstep(RuleBasedStateMachine):
    """`self.opts` are ours and the reference's; invalid calls go to both."""

    @initialize(make=MAKES, storage=STORAGE, sizes=st.lists(SIZES, min_size=1, max_size=4),
                data=st.data())  # fmt: skip
    def begin(self, make, storage, sizes, data):
        self.cls, options = make
        storage = storage if takes(self.cls, storage) else {}
        self.options = options | storage
        self.folder = tempfile.TemporaryDirectory(prefix="fusedopt-machine-")
        self.snapshot = None
        self.groups = ([], [])
        self.opts = ()
        self.extend(sizes, data, 0.1)
        self.opts = self.fresh()

    def teardown(self):
        fusedopt.set_num_threads(self.threads)
        _core.select_isa(_core.available_isas()[0])
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def __init__(self):
        super().__init__()
        self.threads = fusedopt.get_num_threads()

    def fresh(self, **options):
        """New optimizers on the same parameters."""
        options = self.options | options
        return tuple(
            getattr(module, self.cls)([dict(group) for group in groups], **options)
            for module, groups in zip((fusedopt, reference), self.groups, strict=True)
        )

    def extend(self, sizes, data, lr):
        state_dtype = self.options.get("state_dtype")
        dtypes = [data.draw(st.sampled_from(NARROW if state_dtype else DTYPES)) for _ in sizes]
        seed = data.draw(st.integers(0, 999))
        for groups in self.groups:
            arrays = [numbers(*each, seed) for each in zip(sizes, dtypes, strict=True)]
            groups.append({"params": arrays, "lr": lr})

    def grads(self, seed, skip, hostile=False):
        """Gradients of any float dtype; `skip` has a bit for each leaf without one."""
        found, bit = [], 0
        for group in self.groups[0]:
            found.append([])
            for p in group["params"]:
                dtype = p.dtype if p.dtype == np.float64 else NARROW[(seed + bit) % len(NARROW)]
                grad = numbers(p.size, dtype, seed + bit, hostile)
                found[-1].append(None if skip >> bit & 1 else grad)
                bit += 1
        return found

    def refuse(self, call, error=(ValueError, TypeError)):
        """Both raise the same error, and have not changed."""
        texts = []
        for opt in self.opts:
            before = contents(opt)
            with pytest.raises(error) as caught:
                call(opt)
            assert contents(opt) == before
            texts.append(str(caught.value))
        assert texts[0] == texts[1]

    # ------------------------------------------------------------ valid calls

    @rule(seed=st.integers(0, 10**6), skip=st.integers(0, 63), count=st.integers(1, 4),
          hostile=st.sampled_from([False, False, False, True]))  # fmt: skip
    def step(self, seed, skip, count, hostile):
        fusedopt.set_num_threads(count)
        for k in range(1 + seed % 3):
            grads = self.grads(seed + 7 * k, skip, hostile)
            try:
                ours, theirs = (opt.step(grads) for opt in self.opts)
            except ValueError:
                if RULES[self.cls].share is None:
                    raise
                # groups that differ in what they must share
                return self.refuse(lambda opt, grads=grads: opt.step(grads), ValueError)
            assert ours == theirs
        return None

    @rule(group=st.integers(0, 9), name=st.sampled_from(sorted(GOOD)), data=st.data())
    def change(self, group, name, data):
        value = data.draw(GOOD[name])
        for opt in self.opts:
            options = opt.param_groups[group % len(opt.param_groups)]
            if name in options and np.shape(value) == np.shape(options[name]):
                with contextlib.suppress(ValueError):  # a rule may not take it beside the others
                    self.opts[0].rule.check(dict(options) | {name: value})
                    options[name] = value

    @precondition(lambda self: len(self.groups[0]) < 4)
    @rule(sizes=st.lists(SIZES, max_size=2), lr=RATES, data=st.data())
    def add_group(self, sizes, lr, data):
        self.extend(sizes, data, lr)
        for opt, groups in zip(self.opts, self.groups, strict=True):
            opt.add_param_group(dict(groups[-1]))

    @rule(suffix=st.sampled_from([".npz", ".safetensors"]))
    def resume(self, suffix):
        """Both continue in new optimizers from the file that ours has written."""
        path = Path(self.folder.name, f"state{suffix}")
        self.opts[0].save(path)
        self.opts = self.fresh()
        for opt in self.opts:
            opt.load(path)

    @rule(storage=STORAGE)
    def convert(self, storage):
        """Both continue in new optimizers that keep their state in another format."""
        is_double = any(p.dtype == np.float64 for group in self.groups[0] for p in group["params"])
        if is_double or not takes(self.cls, storage):
            return
        dicts = [opt.state_dict() for opt in self.opts]
        self.options = {k: v for k, v in self.options.items() if "8bit" not in k and k != "seed"}
        self.options |= {"state_dtype": None} | storage
        self.opts = self.fresh()
        for opt, state in zip(self.opts, dicts, strict=True):
            opt.load_state_dict(state, convert=True)

    @rule()
    def remember(self):
        params = [p.copy() for group in self.groups[0] for p in group["params"]]
        self.snapshot = copy.deepcopy(self.opts[0].state_dict()), params

    @precondition(lambda self: self.snapshot is not None)
    @rule()
    def go_back(self):
        """To the snapshot; refused by optimizers that have other arrays since."""
        state, params = self.snapshot
        try:
            for opt in self.fresh():
                opt.load_state_dict(state)
        except ValueError:
            return self.refuse(lambda opt: opt.load_state_dict(state))
        for opt, groups in zip(self.opts, self.groups, strict=True):
            opt.load_state_dict(state)
            for p, old in zip((p for g in groups for p in g["params"]), params, strict=True):
                p[...] = old
        return None

    @rule(name=st.sampled_from(_core.available_isas()))
    def change_isa(self, name):
        _core.select_isa(name)

    @precondition(lambda self: hasattr(os, "fork"))
    @rule(seed=st.integers(0, 10**6))
    def fork(self, seed):
        """The child takes the next step; the parent's arrays stay its own."""

        def check():
            self.step(seed=seed, skip=0, count=3, hostile=False)
            self.same()
            return True

        before = contents(self.opts[0])
        assert in_child(check)
        assert contents(self.opts[0]) == before

    # ------------------------------------------------------------ invalid calls

    @rule(group=st.integers(0, 9), name=st.sampled_from(sorted(BAD)), data=st.data())
    def change_badly(self, group, name, data):
        value = data.draw(st.sampled_from(BAD[name]))
        options = [opt.param_groups[group % len(opt.param_groups)] for opt in self.opts]
        if name not in options[0] or value == options[0][name]:  # 1 is True: no change
            return
        right = options[0][name]
        for each in options:
            each[name] = value
        self.refuse(lambda opt: opt.step(self.grads(0, 0)))
        for each in options:
            each[name] = right

    @rule(kind=st.sampled_from(["shape", "dtype", "alias", "list", "groups"]),
          at=st.integers(0, 99))  # fmt: skip
    def step_badly(self, kind, at):
        """Any one of the gradients is invalid."""
        leaves = [(i, k) for i, g in enumerate(self.groups[0]) for k in range(len(g["params"]))]
        i, k = leaves[at % len(leaves)]

        def call(opt):
            grads = self.grads(at, 0)
            param = opt.param_groups[i]["params"][k]
            if kind == "shape":
                grads[i][k] = np.ones(param.size + 1, np.float32)
            elif kind == "dtype":
                grads[i][k] = np.ones(param.size, np.int32)
            elif kind == "alias" and param.size:
                grads[i][k] = param
            elif kind == "list":
                grads[i].append(None)
            else:
                grads.append([])
            opt.step(grads)

        self.refuse(call)

    @rule(kind=st.sampled_from(["twice", "unknown", "read-only", "nothing new", "integers"]))
    def add_badly(self, kind):
        def call(opt):
            good = np.ones(70, np.float32)
            bad = np.ones(70, np.int64 if kind == "integers" else np.float32)
            bad.flags.writeable = kind != "read-only"
            group = {"params": [good, bad]}
            if kind == "twice":
                group["params"][1] = good[3:]
            elif kind == "unknown":
                group["speed"] = 1
            elif kind == "nothing new":
                group["params"][1] = opt.param_groups[0]["params"][0]
                if not group["params"][1].size:
                    group["params"][1] = good
            opt.add_param_group(group)

        self.refuse(call)

    @rule(kind=st.sampled_from(["file", "cut", "step", "leaf", "shape", "group", "option"]))
    def load_badly(self, kind):
        path = Path(self.folder.name, "damaged.npz")
        state = copy.deepcopy(self.opts[0].state_dict())
        name, last = list(state["state"].items())[-1]
        if kind == "cut":
            self.opts[0].save(path)
            path.write_bytes(path.read_bytes()[:-1])
        elif kind == "file":
            path.write_bytes(b"PK\x03\x04" + bytes(100))
        elif kind == "step":
            last["step"] = -1
        elif kind == "leaf":
            state["state"][name + "?"] = state["state"].pop(name)
        elif kind == "shape":
            last["exp_avg" if "exp_avg" in last else "other"] = np.ones((7, 7, 7), np.float32)
        elif kind == "group":
            state["param_groups"].append(state["param_groups"][0])
        else:
            state["param_groups"][-1]["lr"] = -1.0
        if kind in ("cut", "file"):
            self.refuse(lambda opt: opt.load(path))
        else:
            self.refuse(lambda opt: opt.load_state_dict(state))

    @invariant()
    def same(self):
        if getattr(self, "opts", ()):
            ours, theirs = map(contents, self.opts)
            assert ours == theirs


Lockstep.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# from 3.12 on CPython warns of any fork with threads alive, which is tested here
TestLockstep = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)(Lockstep.TestCase)
