"""Rules that step matrices alone, whose direction goes through matrix products of NumPy.

Bits are compared with the reference, which uses the same products on the same machine; across
machines they are not promised. test_torch_muon.py tests the same for torch.
"""

import math

import ml_dtypes
import numpy as np
import pytest
from cases import ALL_STEP_OPTIONS, MATRIX_CASES, STEP_OPTIONS, canonical, isa, threads
from test_step_options import STORAGE, contents, run, same, tree_bytes

import fusedopt
from fusedopt import _core, functional, reference
from fusedopt.optim import muon as module

pytestmark = pytest.mark.usefixtures("one_blas_thread")

BF16 = ml_dtypes.bfloat16
ONE = [(30, 50)]
SEVERAL = [(7, 90), (90, 7), (1, 600), (600, 1), (0, 5), (5, 0), (1, 1), (33, 33), (12, 20)]
SHAPES = pytest.mark.parametrize("shapes", [ONE, SEVERAL], ids=["one", "several"])
EACH = pytest.mark.parametrize("case", MATRIX_CASES, ids=str)


def matrices(seed=0, dtype=np.float64, shapes=SEVERAL):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


# ---------------------------------------------------------------- the step


@SHAPES
@pytest.mark.parametrize("options", [{}, *STEP_OPTIONS], ids=str)
@EACH
def test_step_options(case, options, shapes):
    same(case, options, {}, shapes)


@SHAPES
@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("copies", [None, np.float16, BF16])
@pytest.mark.parametrize("dtypes", [(np.float32, BF16), (BF16, BF16), (np.float16, np.float32)])
@EACH
def test_formats(case, dtypes, copies, storage, shapes):
    same(case, ALL_STEP_OPTIONS, storage, shapes, *dtypes, copies)


@SHAPES
@pytest.mark.parametrize("grad_dtype", [np.float32, np.float64, BF16])
@EACH
def test_double(case, grad_dtype, shapes):
    same(case, ALL_STEP_OPTIONS, {"ema": 0.9}, shapes, np.float64, grad_dtype, BF16)


@pytest.mark.parametrize("options", STEP_OPTIONS, ids=str)
def test_hostile_values(options):
    same(MATRIX_CASES[0], options, {}, SEVERAL, hostile=True)


def test_isas_and_threads():
    """They change nothing of what is ours, and the products do not depend on them."""
    args = MATRIX_CASES[0], {"stats": True}, {}, [(50, 1000), (1000, 50)]
    wanted = run(reference, *args)
    for name in _core.available_isas():
        for count in (1, 2, 5):
            with isa(name), threads(count):
                assert run(fusedopt, *args) == wanted


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("grad_order", ["C", "F"])
@EACH
def test_orders(case, order, grad_order):
    """Memory orders change roundings at the most."""
    found = []
    for kind in (order, "C"):
        params = [np.asarray(p, order=kind) for p in matrices()]
        opt = case.make(params)
        for seed in range(3):
            opt.step([np.asarray(g, order=grad_order) for g in matrices(1 + seed)])
        found.append(params)
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@EACH
def test_functions(case, dtype):
    """The class's bits, on arrays at odd addresses too."""
    ours = {"class": matrices(0, dtype), "function": matrices(0, dtype)}
    ours["odd"] = [odd(p) for p in matrices(0, dtype)]
    opt = case.make(ours["class"])
    buffers = {name: [odd(0 * p) for p in ours[name]] for name in ("function", "odd")}
    plain = [0 * p for p in ours["class"]], matrices(0, dtype)
    for step in range(1, 4):
        grads = matrices(step, dtype)
        grads[1] = None if step == 2 else grads[1]
        opt.step(grads)
        for name, its in buffers.items():
            functional.muon(ours[name], grads, its, step=step, **case.options)
        reference.muon(plain[1], grads, plain[0], step=step, **case.options)
    for name in ("function", "odd"):
        assert [canonical(p) for p in ours[name]] == [canonical(p) for p in ours["class"]], name
    assert [canonical(p) for p in plain[1]] == [canonical(p) for p in ours["class"]]


def odd(array):
    """A copy whose memory begins 2 bytes off."""
    memory = np.empty(array.nbytes + 2, np.uint8)
    copy = memory[2:].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def transcription(p, m, g, lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True,
                  ns_coefficients=(3.4445, -4.775, 2.0315), eps=1e-7, ns_steps=5,
                  adjust_lr_fn=None):  # fmt: skip
    """torch.optim.Muon 2.13, with products in float64 for its bfloat16."""
    a, b, c = ns_coefficients
    m[...] = momentum * m + (1 - momentum) * g
    u = (1 - momentum) * g + momentum * m if nesterov else m.copy()
    rows, columns = u.shape
    u = u.T if rows > columns else u
    u = u / max(np.linalg.norm(u), eps)
    for _ in range(ns_steps):
        gram = u @ u.T
        u = a * u + (b * gram + c * gram @ gram) @ u
    u = u.T if rows > columns else u
    ratio = max(1, rows / columns) ** 0.5
    if adjust_lr_fn == "match_rms_adamw":
        ratio = 0.2 * max(rows, columns) ** 0.5
    p *= 1 - lr * weight_decay
    p -= lr * ratio * u


@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-13), (np.float32, 1e-5)])
@EACH
def test_is_torchs_formula(case, dtype, bound):
    ours, theirs = matrices(0, dtype, SEVERAL[:4]), matrices(shapes=SEVERAL[:4])
    opt, buffers = case.make(ours), [0 * p for p in theirs]
    for seed in range(25):
        grads = matrices(1 + seed, shapes=SEVERAL[:4])
        opt.step(grads)
        for p, m, g in zip(theirs, buffers, grads, strict=True):
            transcription(p, m, g, **case.options)
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a - b).max() <= bound * np.abs(b).max()


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (20, 20), (1, 9), (9, 1)])
def test_the_direction_is_orthogonal(shape):
    """With enough steps of a cubic that converges to 1, it is the orthogonal polar factor."""
    (g,) = matrices(0, shapes=[shape])
    p = np.zeros(shape)
    cubic = {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 60}
    fusedopt.Muon(p, lr=1.0, momentum=0.0, **cubic).step(g)
    left, _, right = np.linalg.svd(g, full_matrices=False)
    np.testing.assert_allclose(p, -left @ right * math.sqrt(max(1, shape[0] / shape[1])), atol=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e30])
def test_the_scale_of_gradients_does_not_matter(scale):
    """In float32: neither over- nor underflows, as long as the norm is above eps."""
    found = []
    for factor in (1.0, scale):
        (p,) = matrices(0, np.float32, ONE)
        fusedopt.Muon(p, lr=1.0, eps=0.0).step(matrices(1, np.float32, ONE)[0] * np.float32(factor))
        found.append(p)
    np.testing.assert_allclose(*found, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, BF16])
@EACH
def test_gradients_of_zero(case, dtype):
    """From state of zero: parameters decay, and nothing is divided by 0."""
    params = matrices(0, dtype)
    before = [p.astype(np.float64) for p in params]
    opt = case.make(params)
    opt.step([0 * p for p in params])
    keep = 1 - opt.param_groups[0]["lr"] * opt.param_groups[0]["weight_decay"]
    for p, old in zip(params, before, strict=True):
        np.testing.assert_allclose(p.astype(np.float64), keep * old, rtol=1e-2 if p.itemsize == 2
                                   else 1e-6)  # fmt: skip


def test_what_is_not_finite():
    """It stays in its own leaf, is skipped, or raises."""
    for value in (np.nan, np.inf):
        params, grads = matrices(), matrices(1)
        grads[0][3, 4] = value
        opt = fusedopt.Muon(params)
        before = contents(opt)
        assert opt.step(grads, nonfinite="skip").skipped
        with pytest.raises(FloatingPointError, match=r"^grads\[0\]: 1 of 630"):
            opt.step(grads, nonfinite="raise")
        assert contents(opt) == before
        opt.step(grads)
        assert np.isnan(params[0]).all()
        assert all(np.isfinite(p).all() for p in params[1:])


def test_accumulated_gradients():
    found = []
    for cls in (fusedopt.Muon, reference.Muon):
        params = matrices(0, np.float32)
        opt, total = cls(params), fusedopt.GradAccumulator(params)
        for seed in range(4):
            total.add(matrices(seed, np.float32), scale=0.5)
            if seed % 2:
                opt.step(total, max_grad_norm=1.0)
        found.append(contents(opt))
    assert found[0] == found[1]


# ---------------------------------------------------------------- options and groups


def test_groups_and_schedules():
    """Each group goes along directions of its own options, as they are in each step."""
    found = []
    for cls in (fusedopt.Muon, reference.Muon):
        params, other = matrices(0, np.float32), matrices(9, np.float32)
        cubic = {"ns_coefficients": [1.5, -0.5, 0.0], "ns_steps": 2, "momentum": 0.3}
        second = {"params": other, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"} | cubic
        opt = cls([{"params": params}, second], lr=lambda step: 0.1 / step)
        for seed in range(6):
            grads = [matrices(10 + seed, np.float32), matrices(30 + seed, np.float32)]
            grads[seed % 2][3] = None
            opt.step(grads)
            if seed == 3:
                opt.param_groups[0].update(ns_steps=np.int64(1), adjust_lr_fn="match_rms_adamw")
                opt.param_groups[1].update(lr=np.float32(0.5), ns_coefficients=(2.0, -1.5, 0.5))
        found.append(tree_bytes([params, other, opt.state]))
    assert found[0] == found[1]


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize(
    ("option", "value", "error", "match"),
    [
        ("lr", -1.0, ValueError, "lr: must be >= 0"),
        ("weight_decay", -0.1, ValueError, "weight_decay: must be >= 0"),
        ("momentum", -0.1, ValueError, "momentum: must be >= 0"),
        ("nesterov", 1, TypeError, "nesterov: expected True or False"),
        ("ns_coefficients", (1.0, 2.0), TypeError, "ns_coefficients: expected 3 numbers"),
        ("ns_coefficients", 3.0, TypeError, "ns_coefficients: expected 3 numbers"),
        ("ns_coefficients", (1.0, "2", 3.0), TypeError, r"ns_coefficients\[1\]: expected a num"),
        ("eps", -1e-9, ValueError, "eps: must be >= 0"),
        ("ns_steps", 100, ValueError, "ns_steps: must be below 100"),
        ("ns_steps", -1, ValueError, "ns_steps: must be >= 0"),
        ("ns_steps", 5.0, TypeError, "ns_steps: expected a whole number"),
        ("adjust_lr_fn", "none", ValueError, "adjust_lr_fn: expected None or 'original' or"),
        ("maximize", True, TypeError, "unknown option 'maximize'"),
    ],
)
def test_bad_options(option, value, error, match, edited):
    p = np.ones((2, 3))
    with pytest.raises(error, match=match):
        if not edited:
            fusedopt.Muon([p], **{option: value})
        opt = fusedopt.Muon([p])
        opt.param_groups[0][option] = value
        opt.step([p.copy()])
    assert (p == 1).all()


@pytest.mark.parametrize("cls", [fusedopt.Muon, reference.Muon])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_what_is_no_matrix_is_refused(cls, shape):
    good, bad = np.ones((2, 3)), np.ones(shape)
    words = r"\['b'\]: has shape .*, and Muon only supports 2D parameters, .*; give it to AdamW"
    with pytest.raises(ValueError, match=f"^params{words}"):
        cls({"W": good, "b": bad})
    opt = cls([{"params": {"W": good}}])
    with pytest.raises(ValueError, match=rf"^params\[1\]\['params'\]{words}"):
        opt.add_param_group({"params": {"V": good.copy(), "b": bad}})
    assert len(opt.param_groups) == len(opt.state) == 1
    function = functional.muon if cls is fusedopt.Muon else reference.muon
    with pytest.raises(ValueError, match=r"^params\[1\]: has shape .*give it to AdamW"):
        function([good, bad], [good, bad], [good.copy(), bad.copy()], step=1)
    assert (good == 1).all()


@pytest.mark.parametrize("cls", [fusedopt.Muon, reference.Muon])
def test_parts_of_matrices_are_refused(cls):
    params = matrices()
    opt = cls(params)
    before = contents(opt)
    with pytest.raises(ValueError, match="^reduce: Muon computes with whole matrices"):
        opt.step(matrices(1), reduce=lambda array: None)
    assert contents(opt) == before


# ---------------------------------------------------------------- all or nothing


FAULTS = [KeyboardInterrupt, MemoryError, FloatingPointError]


@pytest.mark.parametrize("options", [{}, ALL_STEP_OPTIONS], ids=["plain", "all"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_product_that_fails(at, fault, options, monkeypatch):
    """At any of the leaves: all is as it was, and the next step as if it had not been tried."""
    params, twins = matrices(0, np.float32), matrices(0, np.float32)
    storage = {"state_dtype": "int8", "min_8bit_size": 0, "ema": 0.9}
    opt, twin = fusedopt.Muon(params, **storage), fusedopt.Muon(twins, **storage)
    opt.step(matrices(1, np.float32))
    twin.step(matrices(1, np.float32))
    before, calls, product = contents(opt), [], module._in_place

    def failing(*args):
        calls.append(args)
        if len(calls) == at + 1:
            raise fault("meanwhile")
        return product(*args)

    grads = matrices(2, np.float32)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_in_place", failing)
        with pytest.raises(fault, match="meanwhile"):
            opt.step(grads, **options)
    assert len(calls) == at + 1
    assert contents(opt) == before
    assert tree_bytes(grads) == tree_bytes(matrices(2, np.float32))
    assert opt.step(grads, **options)[:3] == twin.step(matrices(2, np.float32), **options)[:3]
    assert contents(opt) == contents(twin)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_no_memory_for_directions(options, monkeypatch):
    opt, made = fusedopt.Muon(matrices()), []
    before, empty_like = contents(opt), np.empty_like

    def failing(*args, **kwargs):
        made.append(args)
        if len(made) == 4:
            raise MemoryError("no more")
        return empty_like(*args, **kwargs)

    grads = matrices(1)
    with monkeypatch.context() as patch:
        patch.setattr(np, "empty_like", failing)
        with pytest.raises(MemoryError, match="no more"):
            opt.step(grads, **options)
    assert contents(opt) == before
    assert opt.step(grads, **options).step == 1


def test_a_bad_gradient_behind_good_ones(monkeypatch):
    """The checks of all leaves come first: no product is computed."""
    monkeypatch.delattr(module, "_in_place")
    opt = fusedopt.Muon(matrices())
    before, grads = contents(opt), matrices(1)
    grads[-1] = np.ones((2, 2))
    with pytest.raises(ValueError, match=r"^grads\[8\]: shape \(2, 2\) does not fit"):
        opt.step(grads)
    assert contents(opt) == before


def test_a_call_from_within():
    """The list is claimed while Python code runs in the middle of a step."""
    opt = fusedopt.Muon(matrices())
    errors = []

    class Nosy(dict):
        def __getitem__(self, key):
            if key == "ns_steps" and not errors:
                try:
                    opt.step(matrices(1))
                except RuntimeError as exc:
                    errors.append(str(exc))
            return super().__getitem__(key)

    opt._groups[0].options = Nosy(opt._groups[0].options)
    opt._groups[0].plan = fusedopt.Muon.rule.plan(opt._groups[0].options)
    opt._plans = None
    assert opt.step(matrices(1)).step == 1
    assert "another thread is in a step" in errors[0]


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_files(tmp_path, storage, suffix):
    """A run continues from a file with the same bits, all options among them."""
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
    params, path = matrices(0, np.float32), tmp_path / f"run.{suffix}"
    options = {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3, "adjust_lr_fn": "original"}
    opt = fusedopt.Muon(params, **options, **storage)
    for seed in range(3):
        opt.step(matrices(1 + seed, np.float32))
    opt.save(path)
    twin = fusedopt.Muon([p.copy() for p in params], **storage)
    twin.load(path)
    assert contents(twin) == contents(opt)
    for each in (opt, twin):
        each.step(matrices(9, np.float32))
    assert contents(twin) == contents(opt)
    names = {"step", "momentum_buffer"} | ({"ema"} if "ema" in storage else set())
    assert opt.state["params[0]"].keys() == names
    with pytest.raises(ValueError, match="of Muon, and this optimizer is SGD"):
        fusedopt.SGD(params, momentum=0.9).load(path)


def test_memory_is_that_of_momentum():
    table = fusedopt.Muon(matrices(0, np.float32)).memory()
    assert table["total"] == {"resident": 8.0, "moved": 20.0}
