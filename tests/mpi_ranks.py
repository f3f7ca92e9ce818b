"""Run by tests/test_mpi.py: one rank of some, one scenario after another.

    mpiexec -n WORLD python tests/mpi_ranks.py FOLDER SCENARIO...

With RANK and WORLD in the environment, the ranks are a gloo group of torch.distributed. Each
scenario trains the same arrays with `Sharded` and, on each rank alone, with the plain class on the
mean of the gradients, and compares bytes.
"""

import itertools
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
from cases import CASES, FACTOR_CASES, MATRIX_CASES, STEP_OPTIONS, canonical, swapped, takes

import fusedopt
from fusedopt import _disk, _parts
from fusedopt.formats import Stored
from fusedopt.mpi import Sharded

FOLDER = Path(sys.argv[1])
SHAPES = {"w": (70, 60), "b": (9,), "none": (0, 4), "v": (1300,), "u": (3, 700), "s": ()}
MATRICES = {"w": (70, 60), "v": (13, 100), "u": (3, 700)}

if "RANK" in os.environ:
    import torch.distributed

    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD"])
    torch.distributed.init_process_group(
        "gloo", rank=RANK, world_size=WORLD, timeout=timedelta(seconds=60),
        store=torch.distributed.FileStore(str(FOLDER / f"store{WORLD}"), WORLD),
    )  # fmt: skip
    COMM = torch.distributed.group.WORLD
else:
    from mpi4py import MPI

    COMM = MPI.COMM_WORLD
    RANK, WORLD = COMM.Get_rank(), COMM.Get_size()

OWN = FOLDER / f"of-{WORLD}"  # what no other number of ranks loads
OWN.mkdir(exist_ok=True)
PAIR = Sharded(fusedopt.SGD, [np.zeros(1)], COMM)._comm  # to compare what ranks have


def arrays(seed, shapes=None, dtype=np.float32, order="C"):
    rng = np.random.default_rng(seed)
    shapes = SHAPES if shapes is None else shapes
    return {k: np.array(rng.standard_normal(s), dtype, order=order) for k, s in shapes.items()}


def grads_of_ranks(step, make=arrays):
    """The gradients of all ranks, and their mean, added in the order of the ranks."""
    each = [make(100 + 10 * step + rank) for rank in range(WORLD)]
    return each, {name: mean([g[name] for g in each]) for name in each[0]}


def mean(parts):
    if parts[0] is None:
        return None
    wide = np.float64 if parts[0].dtype == np.float64 else np.float32
    total = parts[0].astype(wide if WORLD > 1 else parts[0].dtype, order="K")
    for part in parts[1:]:
        total += part.astype(wide)
    return np.asarray(total / wide(WORLD)) if WORLD > 1 else total


def same(ours, theirs, exact, where):
    for name in ours:
        a, b = ours[name], theirs[name]
        if isinstance(a, Stored):
            assert a.format == b.format, (where, name)
            same(*(dict(enumerate(x.parts())) for x in (a, b)), exact, (where, name))
        elif not isinstance(a, np.ndarray):
            assert a == b, (where, name, a, b)
        elif exact:
            assert (a.shape, a.dtype) == (b.shape, b.dtype), (where, name)
            bits = [x if x.itemsize > 1 else x.astype(np.uint16) for x in (a, b)]
            assert canonical(bits[0]) == canonical(bits[1]), (where, name)
        else:
            np.testing.assert_allclose(
                a.astype(np.float64), b.astype(np.float64), rtol=2e-5, atol=2e-5, err_msg=str(where)
            )


def same_on_all_ranks(params, where):
    told = PAIR.gather([canonical(np.asarray(p)) for p in params.values()])
    assert all(its == told[0] for its in told), where


def same_state(sharded, plain, exact, where):
    ours, theirs = sharded.state_dict(), plain.state_dict()
    assert {k: v for k, v in ours.items() if k not in ("state", "param_groups")} == {
        k: v for k, v in theirs.items() if k not in ("state", "param_groups")
    }
    assert repr(ours["param_groups"]) == repr(theirs["param_groups"]) or not exact, where
    assert ours["state"].keys() == theirs["state"].keys()
    for name in ours["state"]:
        assert ours["state"][name].keys() == theirs["state"][name].keys()
        same(ours["state"][name], theirs["state"][name], exact, (where, name))


def compare(make, exact, where, *, params=arrays, grads=arrays, steps=3, **options):
    """Step both; return them with their parameters."""
    p, q = params(0), params(0)
    sharded, plain = Sharded(make[0], p, COMM, **make[1]), make[0](q, **make[1])
    for step in range(steps):
        each, average = grads_of_ranks(step, grads)
        ours, theirs = sharded.step(each[RANK], **options), plain.step(average, **options)
        same_result(ours, theirs, where)
    same(p, q, exact, where)
    same_on_all_ranks(p, where)
    same_state(sharded, plain, exact, where)
    return sharded, plain, p, q


def same_result(ours, theirs, where):
    assert ours[:3] == theirs[:3], where
    assert (ours.grad_norm is None) == (theirs.grad_norm is None), where
    if ours.grad_norm is not None:
        np.testing.assert_allclose(ours.grad_norm, theirs.grad_norm, rtol=1e-6, err_msg=str(where))
    np.testing.assert_allclose(ours.clip_factor, theirs.clip_factor, rtol=1e-6, err_msg=str(where))
    if theirs.stats is not None:
        assert ours.stats.names == theirs.stats.names
        for column in theirs.stats.COLUMNS:
            mine, its = (getattr(r.stats, column) for r in (ours, theirs))
            np.testing.assert_allclose(mine, its, rtol=2e-5, atol=1e-7, err_msg=f"{where} {column}")


def cls_of(case):
    return getattr(fusedopt, case.cls), {**case.options, **case.class_options}


def rules():
    """Every class, with most options; what depends on no norm over a cut leaf is equal in bits."""
    cases = list({(case.cls, case.is_layerwise): case for case in CASES}.values())
    for case in (*cases, *FACTOR_CASES):
        is_sum = case.is_layerwise and case.cls != "Adafactor"
        compare(cls_of(case), not is_sum or WORLD == 1, case.name)
    for case in MATRIX_CASES:
        compare(
            cls_of(case), False, case.name,
            params=lambda seed: arrays(seed, MATRICES), grads=lambda seed: arrays(seed, MATRICES),
        )  # fmt: skip


def step_options():
    """Three steps on one rank or two; one on four, where each takes long on few CPUs."""
    for cls, options in itertools.product(("AdamW", "SGD", "LAMB"), STEP_OPTIONS):
        more = {"momentum": 0.9} if cls == "SGD" else {}
        is_norm = "max_grad_norm" in options or cls == "LAMB"
        make = (getattr(fusedopt, cls), {"lr": 0.01, **more})
        steps = 3 if WORLD <= 2 else 1
        compare(make, WORLD == 1 or not is_norm, (cls, options), steps=steps, **options)


def storage():
    """Formats of parameters, gradients and state, memory orders, averages."""
    import ml_dtypes

    rows = [
        {"state_dtype": "int8", "min_8bit_size": 4200},
        {"state_dtype": "int8", "min_8bit_size": 1, "seed": 5},
        {"state_dtype": "bfloat16"},
        {"ema": 0.9, "ema_warmup": True},
        {"state_dir": FOLDER, "ema": 0.9},
        {"state_dir": FOLDER, "state_dtype": "int8", "min_8bit_size": 1},
    ]
    _disk.LEAST = 1  # bytes, of arrays on disk
    for name, row in itertools.product(("AdamW", "Yogi", "Prodigy", "Lion"), rows):
        if takes(name, row):
            compare((getattr(fusedopt, name), row), name != "Prodigy" or WORLD == 1, (name, row))
    for bits, grad in itertools.product((None, 24, 16), (np.float32, ml_dtypes.bfloat16)):
        compare(
            (fusedopt.AdamW, {"master_bits": bits, "state_dtype": "int8", "min_8bit_size": 1}),
            True, ("master_bits", bits, grad),
            params=lambda seed: arrays(seed, dtype=ml_dtypes.bfloat16),
            grads=lambda seed, grad=grad: arrays(seed, dtype=grad),
        )  # fmt: skip
    for dtype, order in ((np.float16, "C"), (np.float64, "F"), (np.float32, "F")):
        for order_of_grads in "CF":
            compare(
                (fusedopt.Adam, {"lr": 0.1}), True, (dtype, order),
                params=lambda seed, d=dtype, o=order: arrays(seed, dtype=d, order=o),
                grads=lambda seed, d=dtype, o=order_of_grads: arrays(seed, dtype=d, order=o),
            )  # fmt: skip


def falling(step):
    return 0.1 / step


def mixed():
    """Leaves of several dtypes in groups, a schedule, leaves without a gradient, a new rate."""

    def make(seed):
        a, b = arrays(seed), arrays(seed + 1, dtype=np.float64)
        return [
            {"params": a, "lr": falling},
            {"params": [b["w"], b["v"]], "weight_decay": 0.3, "ema": 0.5},
        ]

    p, q = make(0), make(0)
    sharded, plain = Sharded(fusedopt.AdamW, p, COMM), fusedopt.AdamW(q)
    for step in range(3):
        each = [
            [g[0]["params"], g[1]["params"]] for g in (make(9 + step + r) for r in range(WORLD))
        ]
        for own in each:
            own[0]["w"].flags.writeable = False
            own[0]["b" if step else "v"] = None
            if step == 1:
                own[1] = None
        average = [
            {k: mean([own[0][k] for own in each]) for k in each[0][0]},
            None if each[0][1] is None else [mean(list(x)) for x in zip(*(o[1] for o in each))],  # noqa: B905
        ]
        for opt in (sharded, plain):
            opt.param_groups[1]["lr"] = 0.01 * (step + 1)
        same_result(sharded.step(each[RANK]), plain.step(average), "mixed")
    for a, b in zip(p, q, strict=True):
        ours, theirs = (dict(enumerate(its.values())) if isinstance(its, dict) else
                        dict(enumerate(its)) for its in (a["params"], b["params"]))  # fmt: skip
        same(ours, theirs, True, "mixed")
    same_state(sharded, plain, True, "mixed")


def grown(seed, dtype=np.float32, order="C"):
    """What is added later: more than a tile for each rank, a scalar, and next to nothing."""
    shapes = [{"w": (60, 70), "s": ()}, {"tiny": (3,), "none": (0,)}]
    return [arrays(seed + i, its, dtype, order) for i, its in enumerate(shapes)]


# of a class and its options: options of the groups that are added, and how their arrays are
GROWN = [
    ("AdamW", {"state_dtype": "int8", "min_8bit_size": 1}, {"lr": falling, "seed": 3}, {}),
    ("AdamW", {"ema": 0.9, "state_dir": FOLDER}, {"ema": None, "state_dtype": "bfloat16"}, {}),
    ("Adam", {}, {"amsgrad": True, "ema": 0.5}, {"dtype": np.float64, "order": "F"}),
    ("AdamW", {"master_bits": 24}, {"weight_decay": 0.3}, {"dtype": "bfloat16"}),
    ("SGD", {"momentum": 0.0}, {"momentum": 0.9, "maximize": True}, {"dtype": np.float16}),
    ("Prodigy", {}, {"slice_p": 7}, {}),
    ("LAMB", {}, {"weight_decay": 0.3}, {}),
    ("ASGD", {"lr": falling}, {"alpha": 0.5}, {}),
    ("ScheduleFreeAdamW", {}, {"betas": (0.8, 0.99)}, {}),
]


def groups():
    """Groups that are added between steps, and checkpoints before and behind that."""
    import ml_dtypes  # noqa: F401  (names bfloat16 for NumPy)

    _disk.LEAST = 1  # bytes, of arrays on disk
    for row in GROWN if WORLD < 4 else GROWN[::4]:  # ranks take turns on few CPUs
        grow(*row)
    matrices = {"dtype": np.float32}
    grow("Muon", {}, {"momentum": 0.5}, matrices, [{"a": (30, 40)}, {"b": (50, 20), "c": (8, 9)}])
    grow("Adafactor", {}, {"weight_decay": 0.1}, matrices)


def grow(name, options, more, how, shapes=None):
    cls, where = getattr(fusedopt, name), (name, options, more)
    how = {k: np.dtype(v) if k == "dtype" else v for k, v in how.items()}
    first = MATRICES if shapes else SHAPES

    def added(seed):
        if shapes is None:
            return grown(seed, **how)
        return [arrays(seed + i, its, **how) for i, its in enumerate(shapes)]

    def make(seed):
        return [arrays(seed, first, **how), *added(50 + seed)]

    def both_step(count):
        """Step with gradients for as many groups as there are."""
        n = len(plain.param_groups)
        each = [make(700 + 10 * count + rank)[:n] for rank in range(WORLD)]
        average = [{k: mean([its[i][k] for its in each]) for k in each[0][i]} for i in range(n)]
        same_result(sharded.step(each[RANK]), plain.step(average), where)
        same_all()

    def same_all():
        for a, b in zip(p, q, strict=True):
            same(a, b, exact, where)
            same_on_all_ranks(a, where)
        same_state(sharded, plain, exact, where)

    exact = WORLD <= 2 and (WORLD == 1 or name not in ("Prodigy", "LAMB", "Muon"))
    p, q = make(0), make(0)
    sharded = Sharded(cls, [{"params": p[0]}], COMM, **options)
    plain = cls([{"params": q[0]}], **options)
    both_step(0)
    before = sharded.parts
    saved = sharded.state_dict()
    sharded.save(OWN / "grow.npz", by_rank=True)
    for i in (1, 2):
        for opt, its in ((sharded, p), (plain, q)):
            opt.add_param_group({"params": its[i], **(more if i == 1 else {})})
        assert sharded.parts.items() >= before.items(), where
        both_step(i)
    for opt in (sharded, plain):
        opt.add_param_group({"params": []})  # of no leaves
    sizes = PAIR.gather(sum(map(len, sharded.parts.values())))
    total = sum(a.size for its in p for a in its.values())
    if sharded._spread.is_cut:
        unit = 512 * more.get("slice_p", 1)  # at whose multiples leaves are cut
        assert max(sizes) - min(sizes) <= 2 * unit, (where, sizes)
    assert sum(sizes) == total
    raises(ValueError, "param_groups for this", lambda: sharded.load_state_dict(saved))
    raises(ValueError, "grow", lambda: sharded.load(OWN / "grow.npz", by_rank=True))
    sharded.save(OWN / "grown.npz", by_rank=True)
    sharded.save(OWN / "whole.npz")
    given = [{"params": its, **(more if i == 1 else {})} for i, its in enumerate(p)]
    given.append({"params": []})
    for by_rank, path in ((True, "grown.npz"), (False, "whole.npz")):
        sharded = Sharded(cls, given, COMM, **options)  # cut elsewhere
        sharded.load(OWN / path, by_rank=by_rank)
        same_all()


def around():
    """Copies, accumulators, a loss scale, gradients in bfloat16 on the wire."""
    for options in ({}, {"max_grad_norm": 0.1}, {"nonfinite": "skip"}):
        p, q = arrays(0), arrays(0)
        copies, others = (arrays(1, dtype=np.float16) for _ in range(2))
        sharded, plain = Sharded(fusedopt.AdamW, p, COMM), fusedopt.AdamW(q)
        each, average = grads_of_ranks(0)
        if "nonfinite" in options:
            each[-1]["w"][69, 59] = average["w"][69, 59] = np.nan
        ours = sharded.step(each[RANK], copy_out=copies, zero_grads=True, **options)
        theirs = plain.step(average, copy_out=others, zero_grads=True, **options)
        same_result(ours, theirs, options)
        exact = WORLD == 1 or "max_grad_norm" not in options
        same(p, q, exact, options)
        same(copies, others, exact, options)
        assert not any(g.any() for g in each[RANK].values())

    p, q = arrays(0), arrays(0)
    sharded, plain = Sharded(fusedopt.SGD, p, COMM, lr=0.1), fusedopt.SGD(q, lr=0.1)
    total, average = fusedopt.GradAccumulator(p), fusedopt.GradAccumulator(q)
    for step in range(2):
        each, its = grads_of_ranks(step)
        total.add(each[RANK])
        average.add(its)
    same_result(sharded.step(total, max_grad_norm=1e3), plain.step(average, max_grad_norm=1e3), "a")
    same(p, q, False, "accumulator")
    same_on_all_ranks(p, "accumulator")
    assert total.count == 0
    scaler = fusedopt.GradScaler(2.0**4)
    each, _ = grads_of_ranks(7)
    each[-1]["b"][3] = np.inf
    assert scaler.step(sharded, each[RANK]).skipped
    scaler.update()
    assert scaler.scale == 2.0**3

    import ml_dtypes

    p, q = arrays(0), arrays(0)
    sharded = Sharded(fusedopt.AdamW, p, COMM, wire_dtype="bfloat16")
    plain = fusedopt.AdamW(q)
    for step in range(2):
        each, _ = grads_of_ranks(step)
        rounded = [{k: g.astype(ml_dtypes.bfloat16) for k, g in own.items()} for own in each]
        sharded.step(each[RANK])
        if WORLD > 1:
            plain.step({k: mean([g[k] for g in rounded]) for k in p})
        else:  # nothing travels
            plain.step(each[0])
    same(p, q, True, "wire")
    same_on_all_ranks(p, "wire")


def averages():
    sharded, plain, p, q = compare((fusedopt.AdamW, {"ema": 0.9}), True, "ema")
    same(sharded.ema_params(), plain.ema_params(), True, "ema_params")
    same(sharded.master_params(), plain.master_params(), True, "master_params")
    before = {k: a.copy() for k, a in p.items()}
    with sharded.swap_ema(), plain.swap_ema():
        same(p, q, True, "swap_ema")
        raises(RuntimeError, "averages are in the place", lambda: sharded.step(arrays(1)))
    same(p, before, True, "after swap_ema")
    sharded, plain, p, q = compare((fusedopt.ScheduleFreeAdamW, {}), True, "schedulefree")
    with sharded.swap_ema(), plain.swap_ema():
        same(p, q, True, "schedulefree's average")
    sharded = Sharded(fusedopt.Adam, arrays(0), COMM)
    raises(ValueError, "there is no average", sharded.ema_params)
    raises(ValueError, "there is no average", sharded.swap_ema().__enter__)


# of classes: options, and whether the sums over ranks are of cut leaves
KEPT = {
    "AdamW": {"state_dtype": "int8", "min_8bit_size": 1, "ema": 0.9},
    "Prodigy": {"slice_p": 11},
    "Adafactor": {},
    "SGD": {"momentum": 0.9},
}


def trained(name, steps):
    """A plain optimizer behind some steps, the same for any number of ranks."""
    q = arrays(0)
    plain = getattr(fusedopt, name)(q, **KEPT[name])
    for step in range(steps):
        plain.step(arrays(1 + step))
    return plain, q


def save():
    """Sharded loads what the plain class has, and saves it in all ways."""
    for name, ending in itertools.product(KEPT, ("npz", "safetensors")):
        plain, q = trained(name, 3)
        p = {k: a.copy() for k, a in q.items()}
        sharded = Sharded(getattr(fusedopt, name), p, COMM, **KEPT[name])
        sharded.load_state_dict(plain.state_dict())
        same_state(sharded, plain, True, name)
        sharded.save(FOLDER / f"{name}.{ending}")
        sharded.save(FOLDER / f"both-{name}.{ending}", params=True)
        sharded.save(FOLDER / f"{name}.{ending}", by_rank=True)
        plain = getattr(fusedopt, name)(q, **KEPT[name])
        plain.load(FOLDER / f"{name}.{ending}")
        same_state(sharded, plain, True, name)
        r = arrays(7)
        getattr(fusedopt, name)(r, **KEPT[name]).load(FOLDER / f"both-{name}.{ending}")
        same(p, r, True, name)
    assert (FOLDER / f"AdamW.{RANK}-of-{WORLD}.npz").exists()
    raises(ValueError, "must end in", lambda: sharded.save(FOLDER / "x.txt"))
    raises(ValueError, "not with by_rank", lambda: sharded.save("x.npz", params=True, by_rank=True))
    raises(FileNotFoundError, "missing", lambda: sharded.save(FOLDER / "missing" / "x.npz"), [0])


def load():
    """Another number of ranks continues."""
    for name, ending, by_rank in itertools.product(KEPT, ("npz", "safetensors"), (False, True)):
        plain, q = trained(name, 3)
        p = {k: a.copy() for k, a in q.items()}
        sharded = Sharded(getattr(fusedopt, name), p, COMM, **KEPT[name])
        sharded.load(FOLDER / f"{name}.{ending}", by_rank=by_rank)
        same_state(sharded, plain, True, name)
        if not by_rank:
            r = arrays(7)
            Sharded(getattr(fusedopt, name), r, COMM, **KEPT[name]).load(
                FOLDER / f"both-{name}.{ending}", params=False if ending == "npz" else None
            )
            same(r, arrays(7) if ending == "npz" else p, True, name)
        plain.step(arrays(50))
        sharded.step(arrays(50))
        same(p, q, name != "Prodigy" or WORLD == 1, name)
    other = Sharded(fusedopt.AdamW, arrays(0), COMM)
    before = repr(other.state_dict())
    raises(ValueError, "of SGD, and this", lambda: other.load(FOLDER / "SGD.npz"))
    raises(ValueError, "of SGD, and this", lambda: other.load(FOLDER / "SGD.npz", by_rank=True))
    raises(FileNotFoundError, "no such file of a rank",
           lambda: other.load(FOLDER / "no.npz", by_rank=True))  # fmt: skip
    raises(ValueError, "has no parameters", lambda: other.load(FOLDER / "AdamW.npz", params=True))
    small = Sharded(fusedopt.SGD, {"w": np.zeros(3, np.float32)}, COMM, momentum=0.9)
    raises(ValueError, "not those of", lambda: small.load(FOLDER / "SGD.npz", by_rank=True))
    raises(ValueError, "SGD.npz: state dict", lambda: small.load(FOLDER / "SGD.npz"))
    plain = fusedopt.SGD(arrays(0), momentum=0.9)
    bad = plain.state_dict()
    if RANK == WORLD - 1:  # on one rank alone
        bad["state"] = bad["state"] | {"params['w']": {"step": 1, "momentum_buffer": np.ones(2)}}
    fits = Sharded(fusedopt.SGD, arrays(0), COMM, momentum=0.9)
    raises(ValueError, "params['w']", lambda: fits.load_state_dict(bad), [WORLD - 1])
    assert repr(other.state_dict()) == before


def raises(kind, text, call, ranks=None, outcome="nothing has changed"):
    """The call raises `kind` on some ranks (by default all), and its message on the others."""
    expected = kind if ranks is None or RANK in ranks else RuntimeError
    try:
        call()
    except BaseException as exc:
        assert type(exc) is expected, (kind, repr(exc))
        if expected is kind:
            assert text in str(exc), exc
        elif outcome != "nothing has changed" or not str(exc).startswith("another rank cannot"):
            assert str(exc).startswith("rank ") and outcome in str(exc) and text in str(exc), exc
    else:
        raise AssertionError(f"{kind} was not raised")


def faults_of_groups():
    """A group that one rank cannot add, none adds; all is as before, and the next one is right."""
    last = WORLD - 1
    p, q, extra, other = arrays(0), arrays(0), arrays(1), arrays(1)
    sharded, plain = Sharded(fusedopt.AdamW, p, COMM, ema=0.9), fusedopt.AdamW(q, ema=0.9)
    about = repr(sharded), repr(sharded.param_groups), sharded.parts, sharded.memory()

    class Name(int):
        def __repr__(self):
            return "one name"

    class Bomb(dict):
        def __getitem__(self, key):
            if key == "params":
                self.bomb()
            return super().__getitem__(key)

    def bombed(call):
        group = Bomb(params=extra)
        group.bomb = call if RANK == last else int
        return group

    def fail(*_):
        raise MemoryError("bomb")

    frozen = np.zeros(3, np.float32)
    frozen.flags.writeable = False
    small = {"w": np.zeros(4, np.float32)}
    stored = Stored("bfloat16", np.zeros(4, np.uint16))
    half, twice = arrays(0, dtype=np.float16), {Name(0): extra["w"], Name(1): extra["v"]}
    rows = [
        (TypeError, "params[1]: expected a dict with 'params'", extra["w"]),
        (TypeError, "params[1]: expected a dict with 'params'", {"lr": 1.0}),
        (TypeError, "params[1]: unknown option 'rate'", {"params": extra, "rate": 1}),
        (ValueError, "params[1].lr: must be", {"params": extra, "lr": -1}),
        (ValueError, "params[1]['params']['x']: read-only", {"params": {"x": frozen}}),
        (TypeError, "params[1]['params']['x']", {"params": {"x": "text"}}),
        (TypeError, "params[1]['params']['x']: Sharded takes", {"params": {"x": stored}}),
        (ValueError, "share memory", {"params": p}),
        (ValueError, "two parameters have this name", {"params": twice}),
        (ValueError, "master_bits=24 needs bfloat16", {"params": half, "master_bits": 24}),
        (ValueError, "row_steps: keeps a number", {"params": extra, "row_steps": True}),
        (MemoryError, "bomb", bombed(fail)),
    ]  # fmt: skip
    if WORLD > 1:
        rows.append((KeyboardInterrupt, "", bombed(lambda: signal.raise_signal(signal.SIGINT))))
    for kind, text, group in rows:
        good = {"params": extra}
        raises(kind, text, lambda: sharded.add_param_group(group if RANK == last else good), [last])  # noqa: B023
        assert (repr(sharded), repr(sharded.param_groups), sharded.parts, sharded.memory()) == about
    planned = _parts.Mover  # the last that needs memory
    _parts.Mover = fail if RANK == last else planned
    raises(MemoryError, "bomb", lambda: sharded.add_param_group({"params": extra}), [last])
    _parts.Mover = planned
    assert (repr(sharded), repr(sharded.param_groups), sharded.parts, sharded.memory()) == about
    if WORLD > 1:
        for text, group in (
            ("params: ranks 0 and", {"params": small if RANK == last else extra}),
            ("params: ranks 0 and", {"params": [] if RANK == last else extra}),
            ("params: ranks 0 and", {"params": list(extra.values()) if RANK == last else extra}),
            ("options: ranks 0 and", {"params": extra, "lr": 0.1 + (RANK == last)}),
        ):
            raises(ValueError, text, lambda: sharded.add_param_group(group))  # noqa: B023
            assert (repr(sharded), repr(sharded.param_groups), sharded.parts) == about[:3]
    with sharded.swap_ema():
        raises(RuntimeError, "averages are in the place", lambda: sharded.add_param_group({}))
    for opt, its in ((sharded, extra), (plain, other)):
        opt.add_param_group({"params": its})
    for step in (1, 2):
        each = [[arrays(10 * step + rank), arrays(10 * step + rank + 5)] for rank in range(WORLD)]
        average = [{k: mean([its[i][k] for its in each]) for k in p} for i in range(2)]
        same_result(sharded.step(each[RANK]), plain.step(average), "groups")
    same(p, q, WORLD <= 2, "groups")
    same(extra, other, WORLD <= 2, "groups")
    same_state(sharded, plain, WORLD <= 2, "groups")
    raises(ValueError, "expected a list with one entry for each of the 2", lambda: sharded.step(p))
    comm = Interrupted(last)
    sharded = Sharded(fusedopt.AdamW, arrays(0), comm)

    def gather(value):
        every = PAIR.gather(value)
        if RANK == last:
            signal.raise_signal(signal.SIGINT)
        return every

    comm.gather = gather  # from here on one rank is interrupted when ranks agree
    if RANK == last:
        raises(KeyboardInterrupt, "", lambda: sharded.add_param_group({"params": extra}))
    else:
        sharded.add_param_group({"params": extra})
    comm.gather = PAIR.gather
    assert len(sharded.param_groups) == 2  # on all ranks
    assert len(sharded.parts) == 2 * len(SHAPES)


class Interrupted:
    """Ranks of which one is interrupted whenever data travels: the step ends on all."""

    def __init__(self, rank):
        self.rank, self.size, self.gather = PAIR.rank, PAIR.size, PAIR.gather
        self.victim = rank

    def exchange(self, send, receive):
        PAIR.exchange(send, receive)
        if self.rank == self.victim and self.size > 1:
            signal.raise_signal(signal.SIGINT)


def faults():
    """What one rank raises, all raise; all is as before, and the next step is right."""
    last = WORLD - 1
    bomb = []

    def rate(step):
        if bomb and RANK == last:
            bomb.pop()()
        return 0.1

    def fail(exc):
        def call():
            raise exc

        return call

    p, q = arrays(0), arrays(0)
    sharded, plain = Sharded(fusedopt.AdamW, p, COMM, lr=rate), fusedopt.AdamW(q, lr=0.1)

    def same_as_before():
        same(p, q, True, "faults")
        assert sharded.state["params['w']"]["step"] == plain.state["params['w']"]["step"]
        each, average = grads_of_ranks(3)
        sharded.step(each[RANK])
        plain.step(average)
        same(p, q, True, "faults")

    def wrong(**change):
        grads = grads_of_ranks(0)[0][RANK]
        return grads | change if RANK == last else grads

    raises(ValueError, "grads['w']", lambda: sharded.step(wrong(w=np.ones(3))), [last])
    same_as_before()
    raises(TypeError, "grads['b']", lambda: sharded.step(wrong(b="text")), [last])
    raises(ValueError, "no 'b'", lambda: sharded.step({"w": p["w"]} if RANK == last else wrong()),
           [last])  # fmt: skip
    raises(TypeError, "unknown option 'lr'", lambda: sharded.step(wrong(), lr=1))
    for kind in (MemoryError, KeyboardInterrupt, SystemExit):
        bomb[:] = [fail(kind("bomb"))]
        raises(kind, "bomb", lambda: sharded.step(wrong()), [last])
        same_as_before()
    if WORLD > 1:
        bomb[:] = [lambda: signal.raise_signal(signal.SIGINT)]  # a real one, within the step
        raises(KeyboardInterrupt, "", lambda: sharded.step(wrong()), [last])
        same_as_before()
        raises(ValueError, "grads: ranks 0 and", lambda: sharded.step(wrong(w=None)))
        raises(ValueError, "options of the step: ranks 0 and",
               lambda: sharded.step(wrong(), clip_value=1.0 + RANK))  # fmt: skip
        sharded.param_groups[0]["weight_decay"] = 0.01 * (1 + RANK)
        raises(ValueError, "param_groups: ranks 0 and", lambda: sharded.step(wrong()))
        sharded.param_groups[0]["weight_decay"] = 0.01
        same_as_before()
        shape = {"w": (4, 4 + RANK)}
        raises(ValueError, "params: ranks 0 and",
               lambda: Sharded(fusedopt.Adam, arrays(0, shape), COMM))  # fmt: skip
        raises(ValueError, "options: ranks 0 and",
               lambda: Sharded(fusedopt.Adam, arrays(0), COMM, lr=0.1 + RANK))  # fmt: skip
    p, q = arrays(0), arrays(0)
    sharded, plain = Sharded(fusedopt.AdamW, p, Interrupted(last)), fusedopt.AdamW(q)
    each, average = grads_of_ranks(3)
    plain.step(average)
    if RANK == last and WORLD > 1:
        raises(KeyboardInterrupt, "", lambda: sharded.step(each[RANK]))
    else:
        sharded.step(each[RANK])
    same(p, q, True, "interrupted while data travelled")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    p, q = arrays(0), arrays(0)
    sharded, plain = Sharded(fusedopt.AdamW, p, COMM), fusedopt.AdamW(q, lr=1e-3)
    bad = arrays(0)
    if RANK == last:
        bad["w"].flags.writeable = False
    raises(ValueError, "params['w']: read-only", lambda: Sharded(fusedopt.Adam, bad, COMM), [last])
    grads = wrong()
    if RANK == last:
        grads["w"][0, 0] = np.inf
    raises(FloatingPointError, "grads['w']: 1 of 4200 elements",
           lambda: sharded.step(grads, nonfinite="raise"))  # fmt: skip
    same_as_before()
    raises(TypeError, "cls: expected a class", lambda: Sharded("Adam", arrays(0), COMM))
    raises(ValueError, "wire_dtype: expected",
           lambda: Sharded(fusedopt.Adam, arrays(0), COMM, wire_dtype="int8"))  # fmt: skip
    raises(TypeError, "unknown option", lambda: Sharded(fusedopt.Adam, arrays(0), COMM, x=1))
    path = OWN / "faults.npz"
    other = path.with_suffix(".txt" if RANK == last else ".npz")
    raises(ValueError, "must end in", lambda: sharded.save(other), [last])
    flag = "yes" if RANK == last else True
    raises(TypeError, "params: expected True", lambda: sharded.save(path, params=flag), [last])
    sharded.save(path, params=True)
    raises(TypeError, "params: expected True", lambda: sharded.load(path, params=flag), [last])
    raises(ValueError, "state dict: expected", lambda: sharded.load_state_dict(
        [] if RANK == last else plain.state_dict()), [last])  # fmt: skip
    if WORLD > 1:
        flag = RANK == last
        raises(RuntimeError, "different calls", lambda: sharded.save(path) if flag else
               sharded.step(wrong()))  # fmt: skip
        raises(ValueError, "by_rank: ranks 0 and", lambda: sharded.save(path, by_rank=flag))
        raises(ValueError, "params: ranks 0 and",
               lambda: sharded.load(path, params=None if flag else False))  # fmt: skip
        raises(ValueError, "step of the state: ranks 0 and", lambda: sharded.load_state_dict(
            plain.state_dict() | {"step": RANK}))  # fmt: skip
    same_as_before()
    sharded.save(path, by_rank=True)
    mine = path.with_name(f"faults.{RANK}-of-{WORLD}.npz")
    kept, saved = mine.read_bytes(), repr(sharded.state_dict())
    same_as_before()
    if RANK == last:
        mine.chmod(0o444)
    raises(OSError if RANK < last else PermissionError, "a read-only file",
           lambda: sharded.save(path, by_rank=True), [last])  # fmt: skip
    assert mine.read_bytes() == kept  # on all ranks: the files stay those of one step
    sharded.load(path, by_rank=True)
    assert repr(sharded.state_dict()) == saved
    assert not [its for its in OWN.iterdir() if its.name.endswith(".tmp")]
    a = np.zeros(600, np.float32)
    raises(ValueError, "share memory", lambda: Sharded(fusedopt.Adam, [a, a[300:]], COMM))


def disks():
    """What a disk refuses within a step raises on all, before any rank has stepped or behind."""
    _disk.LEAST = 1  # bytes, of arrays on disk
    path = OWN / "disks.npz"
    broken_disk(fusedopt.Adam, path, max_grad_norm=0.5, stats=True)
    broken_disk(fusedopt.Prodigy, path, reads_first=True)
    if WORLD > 2:  # the same passes, each of which takes long on few CPUs
        return
    broken_disk(fusedopt.Adam, path)
    broken_disk(fusedopt.LAMB, path, reads_first=True)
    broken_disk(fusedopt.Muon, path, lambda seed: arrays(seed, MATRICES), reads_first=True)
    loads_to_disk()


def loads_to_disk():
    """Files are read as they are used."""
    p, q, mapped = arrays(0), arrays(0), []
    options = {"state_dtype": "int8", "min_8bit_size": 1, "ema": 0.9}
    sharded = Sharded(fusedopt.AdamW, p, COMM, state_dir=OWN, **options)
    plain = fusedopt.AdamW(q, **options)
    each, average = grads_of_ranks(0)
    sharded.step(each[RANK])
    plain.step(average)
    map_file = _disk.Disk.map_file
    _disk.Disk.map_file = lambda disk, path: mapped.append(path) or map_file(disk, path)
    try:
        for ending, by_rank in itertools.product(("npz", "safetensors"), (False, True)):
            path = OWN / f"large.{ending}"
            sharded.save(path, by_rank=by_rank)
            sharded.step(each[RANK])
            sharded.load(path, by_rank=by_rank)
            same_state(sharded, plain, WORLD <= 2, (ending, by_rank))
    finally:
        _disk.Disk.map_file = map_file
    assert len(mapped) == 2 * (1 + WORLD)


def broken_disk(cls, path, make=arrays, reads_first=False, **options):
    """`reads_first` says that a rule reads all of its state before it writes."""
    last = WORLD - 1
    p, q = make(0), make(0)
    sharded, plain = Sharded(cls, p, COMM, state_dir=FOLDER), cls(q)
    each, average = grads_of_ranks(0, make)
    sharded.step(each[RANK], **options)
    plain.step(average, **options)
    sharded.save(path, params=True)
    reads_nothing = (lambda _: ("/dev/null", os.O_RDONLY)), reads_first or WORLD == 1
    writes_nothing = (lambda number: (f"/proc/self/fd/{number}", os.O_RDONLY)), False
    for flags, is_before in (reads_nothing, writes_nothing):
        undo = swapped(sharded._inner, flags) if RANK == last else int
        after = "nothing has changed" if is_before else "load a checkpoint of both"
        raises(OSError, str(FOLDER), lambda: sharded.step(each[RANK], **options), [last], after)
        undo()
        if not is_before:
            refused = "a step was cut off by an error"
            raises(RuntimeError, refused, lambda: sharded.step(each[RANK]))
            raises(RuntimeError, refused, lambda: sharded.save(path))
            sharded.load(path)
    for step in (1, 2):
        its, average = grads_of_ranks(step, make)
        sharded.step(its[RANK], **options)
        plain.step(average, **options)
    same(p, q, WORLD <= 2 and cls is fusedopt.Adam and not options, cls.__name__)


def parts():
    """Each has its share of the state, and all of it is somewhere."""
    p = arrays(0, {"w": (300, 512), "b": (77,)})
    sharded = Sharded(fusedopt.AdamW, p, COMM)
    own = {name: len(its) for name, its in sharded.parts.items()}
    sizes = PAIR.gather(own)
    for name, param in p.items():
        assert sum(its[f"params['{name}']"] for its in sizes) == param.size
    total = sum(a.size for a in p.values())
    assert abs(sum(own.values()) - total / WORLD) <= 512
    ours, theirs = sharded.memory(grad_itemsize=2), fusedopt.AdamW(p).memory(grad_itemsize=2)
    assert ours["grad"] == theirs["grad"] == {"resident": 0, "moved": 2}
    assert ours["param"]["resident"] == 4
    if WORLD == 1:
        assert ours == theirs
        assert sharded.memory() == fusedopt.AdamW(p).memory()
        return
    assert list(ours) == ["param", "exp_avg", "exp_avg_sq", "grad", "sums", "buffers", "total"]
    kept = {name: round(total * row["resident"]) for name, row in ours.items()}
    moved = {name: round(total * row["moved"]) for name, row in ours.items()}
    n = sum(own.values())
    assert kept["exp_avg"] == kept["exp_avg_sq"] == kept["sums"] == 4 * n
    assert moved["exp_avg"] == moved["sums"] == 8 * n
    assert moved["param"] == 4 * (n + total)
    sharded.step(arrays(0, {"w": (300, 512), "b": (77,)}))
    assert sum(a.nbytes for a in sharded._spread.sums(list(p.values()))) == kept["sums"]
    assert kept["buffers"] == 2 * WORLD * 8 * _parts.BUCKET
    assert kept["total"] == sum(kept.values()) - kept["total"]


def buckets():
    """Data that travels in many pieces, of which the last ones are shorter."""
    _parts.BUCKET = 700
    compare((fusedopt.AdamW, {"ema": 0.9}), True, "float32")
    sharded, plain, _, _ = compare(
        (fusedopt.AdamW, {"state_dtype": "int8", "min_8bit_size": 1}), True, "8 bits",
        grads=lambda seed: arrays(seed, dtype=np.float16),
    )  # fmt: skip
    sharded.load_state_dict(plain.state_dict())
    same_state(sharded, plain, True, "buckets")


if __name__ == "__main__":
    fusedopt.set_num_threads(1)
    for scenario in sys.argv[2:]:
        globals()[scenario]()
        sys.stdout.write(f"rank {RANK}: {scenario}: passed\n")  # one write: ranks share the pipe
        sys.stdout.flush()
    if "RANK" in os.environ:
        os._exit(0)  # threads of gloo, which is not ours, may abort an interpreter that ends
