"""fusedopt.torch.GradAccumulator: sums of micro-batches, with the bits of the NumPy interface."""

import contextlib
import copy
import math
import pickle
import re
import sys
import threading
from functools import partial

import numpy as np
import pytest
from cases import in_two_threads, takes
from test_interrupts import interrupted_at
from test_torch_table import MODELS, OPTION_ROWS, ROWS, as_numpy, check_state, raw
from torch_cases import fo, leaf, model, since, torch, training

import fusedopt
from fusedopt import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # of gradients


def add(total, arrays, grads, scale):
    """What `add` does, in NumPy: to buffers by number, in float32 or float64."""
    for k, (a, g) in enumerate(zip(arrays, grads, strict=True)):
        if g is not None:
            wide = np.dtype(np.float64 if a.dtype == np.float64 else np.float32).type
            total.setdefault(k, np.zeros(a.shape, wide))
            total[k] += wide(scale) * as_numpy(g).astype(wide)


@pytest.mark.parametrize("shapes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("row", "case"), list(enumerate(ROWS)), ids=str)
def test_bits(row, case, shapes):
    """A step on sums is the reference's on the same numbers: its options, copies, and norm."""
    name, options, dtype, storage = case
    averages, step_options = OPTION_ROWS[(row + 4 * len(shapes)) % len(OPTION_ROWS)]
    averages = averages if takes(name, averages) else {}
    own = {k: v for k, v in step_options.items() if k != "zero_grads"}
    generator = torch.Generator().manual_seed(row)
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    params = [torch.nn.Parameter(p.clone()) for p in start]
    arrays = [as_numpy(p.clone()) for p in start]
    copies = [torch.zeros(p.shape, dtype=torch.float16) for p in start] if row % 2 else None
    theirs = copies and [as_numpy(copy.clone()) for copy in copies]
    opt = training(getattr(fo, name)(params, **options, **storage, **averages))
    peer = getattr(reference, name)(arrays, **options, **storage, **averages)
    sums = fo.GradAccumulator(params)
    for step in range(3):
        total = {}
        for micro_batch in range(2):
            narrow = dtype if dtype == torch.float64 else DTYPES[(row + micro_batch) % 3]
            grads = [torch.randn(p.shape, generator=generator).to(narrow) for p in params]
            if step == 1:
                grads[-1] = None
            sums.add(grads, scale=0.25)
            add(total, arrays, grads, 0.25)
        assert sums.count == 2
        opt.step(grads=sums, copy_out=copies, **step_options)
        result = peer.step([total.get(k) for k in range(len(params))], copy_out=theirs, **own)
        for p, a in zip(params, arrays, strict=True):
            assert raw(as_numpy(p.detach())) == raw(a)
        for a, b in zip(copies or [], theirs or [], strict=True):
            assert raw(as_numpy(a)) == raw(b)
        last, known = opt.last_step, "max_grad_norm" in own or "nonfinite" in own
        assert (last.step, last.updated, last.skipped, last.clip_factor) == (
            result.step, result.updated, result.skipped, result.clip_factor
        )  # fmt: skip
        norm = result.grad_norm
        if not known:
            norm = peer_norm(total, own)
        assert repr(last.grad_norm) == repr(norm)
        if result.stats is not None:
            for column in result.stats.COLUMNS:
                a, b = getattr(last.stats, column), getattr(result.stats, column)
                np.testing.assert_array_equal(a, b, column)
        assert sums.count == 0 and not any(b.any() for b in sums._buffers)
    for p, state in zip(params, peer.state.values(), strict=True):
        check_state(opt.state[p] if p in opt.state else {}, state)


def peer_norm(total, options):
    """The norm of sums, as a step measures it that must know it."""
    arrays = list(total.values()) or [np.zeros(1)]
    twin = fusedopt.SGD([np.zeros_like(a) for a in arrays], lr=0.0)
    scale = options.get("grad_scale", 1.0)
    return twin.step(arrays, max_grad_norm=math.inf, grad_scale=scale).grad_norm


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_backward_passes(dtype, set_to_none):
    """They are consumed: their sum is that of the float32 gradients, for any number of passes."""
    net = model(dtype=dtype)
    params = list(net.parameters())
    sums, twin = fo.GradAccumulator(net.parameters()), {}
    places = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        net(torch.randn(5, 7, generator=generator).to(dtype)).square().mean().backward()
        add(twin, [np.zeros(p.shape, np.float32) for p in params], [p.grad for p in params], 1.0)
        sums.add(set_to_none=set_to_none)
        if set_to_none:
            assert all(p.grad is None for p in params)
        else:
            assert not any(p.grad.any() for p in params)
            places.append([p.grad.data_ptr() for p in params])
        assert sums.count == seed + 1
    assert places == places[:1] * 3 * (not set_to_none)
    for k, total in enumerate(sums.grads):
        assert total.dtype == torch.float32
        assert raw(total.numpy()) == raw(twin[k])


def test_one_parameter_at_a_time():
    """As from hooks: gradients by parameter; the same sums, counted as whole micro-batches."""
    params = [leaf(3, 4), leaf(5), leaf(6, 2)]
    whole, parts = fo.GradAccumulator(params), fo.GradAccumulator([{"params": params}])
    for seed in range(3):
        grads = [leaf(*p.shape, seed=seed).detach() for p in params]
        whole.add(grads)
        for p, g in reversed(list(zip(params, grads, strict=True))):
            parts.add({p: g})
            assert parts.count == seed + 1
    assert parts.count == whole.count == 3
    assert all(p.grad is not None for p in params)  # gradients that are given stay
    for a, b in zip(whole.grads, parts.grads, strict=True):
        assert torch.equal(a, b)
    parts.zero()
    assert parts.count == 0 and parts.grads == [None] * 3
    parts.add({params[1]: params[1].grad})
    opt = fo.SGD(params, lr=1.0)
    before = [p.detach().clone() for p in params]
    opt.step(grads=parts)
    assert opt.last_step.updated == 1
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [True, False, True]


def test_groups_in_another_order():
    """Sums belong to parameters, not to places."""
    for order in ([0, 1, 2], [2, 0, 1]):
        params = [leaf(3, 4, seed=1), leaf(5, seed=2), leaf(6, 2, seed=3)]
        twins = copy.deepcopy(params)
        sums = fo.GradAccumulator(
            [{"params": [params[i]], "lr": 0.5} for i in order]
        )  # as an optimizer's param_groups
        grads = [leaf(*p.shape, seed=7).detach() for p in params]
        sums.add({p: g for p, g in zip(params, grads, strict=True) if p is not params[1]})
        opt, peer = fo.AdamW(params), fo.AdamW(twins)
        for k in (0, 2):
            twins[k].grad = grads[k]
        twins[1].grad = None
        opt.step(grads=sums, max_grad_norm=0.5)
        peer.step(max_grad_norm=0.5)
        assert opt.last_step == peer.last_step
        assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
        assert sums.count == 0 and sums.grads == [None] * 3


@pytest.mark.parametrize(
    ("change", "options", "wanted"),
    [
        (0.01, {"max_grad_norm": 10.0}, (3**0.5, False)),
        (math.nan, {"nonfinite": "skip"}, (math.nan, True)),
    ],
    ids=str,
)
def test_buffers_that_were_written(change, options, wanted):
    """A step uses what others add or scale, not what was measured before."""
    p = torch.nn.Parameter(torch.zeros(3))
    opt, sums = fo.SGD([p], lr=1.0), fo.GradAccumulator([p])
    sums.add([torch.full((3,), 100.0)])
    kept = sums.grads[0]
    for _ in range(2):
        kept *= change
        opt.step(grads=sums, **options)
        assert repr((opt.last_step.grad_norm, opt.last_step.skipped)) == repr(wanted)
        assert not kept.any()
        sums.add([torch.full((3,), 100.0)])  # and through the view that was read before


def test_gradients_that_are_not_finite():
    p, q = leaf(3), leaf(4)
    sums, opt = fo.GradAccumulator([p, q]), fo.AdamW([p, q])
    q.grad[2] = math.inf
    sums.add()
    name = re.escape("param_groups[0]['params'][1].grad: 1 of 4 elements")
    with pytest.raises(FloatingPointError, match=f"^{name}"):
        opt.step(grads=sums, nonfinite="raise")
    assert sums.count == 1 and not opt.state  # nothing was consumed
    opt.step(grads=sums, nonfinite="skip")
    assert opt.last_step.skipped and sums.count == 0
    sums.add([leaf(3).grad, leaf(4).grad])
    opt.step(grads=sums, nonfinite="skip")
    assert opt.last_step[:3] == (1, 2, False)


def test_a_loss_scale():
    """As GradScaler leaves it, and a closure."""
    p, q = leaf(30), leaf(30)
    sums = fo.GradAccumulator([p])
    sums.add([p.grad * 1024])
    opt, peer = (fo.AdamW([x], max_grad_norm=0.1) for x in (p, q))
    assert opt.step(lambda: 5.0, grads=sums, grad_scale=1 / 1024) == 5.0
    peer.step()
    assert torch.equal(p, q) and opt.last_step == peer.last_step


@pytest.mark.parametrize("layout", ["transposed", "gap", "expanded", "negative"])
def test_gradients_in_another_layout(layout):
    made = {
        "transposed": lambda g: g.t().contiguous().t(),
        "gap": lambda g: torch.stack([g, g], 2)[..., 0],
        "expanded": lambda g: g[:1].expand(4, 6),
        "negative": lambda g: torch._neg_view(g),
    }[layout]
    p = leaf(4, 6)
    g = made(torch.randn(4, 6))
    before = g.clone()
    sums = fo.GradAccumulator([p])
    for _ in range(2):
        sums.add({p: g})
    assert torch.equal(sums.grads[0], 2 * before) and torch.equal(g, before)


def refused(call, error, match, sums, params):
    before = [b.clone() for b in sums._buffers], sums.count
    grads = [p.grad for p in params]
    with pytest.raises(error, match=match):
        call()
    assert all(torch.equal(a, b) for a, b in zip(before[0], sums._buffers, strict=True))
    assert sums.count == before[1]
    assert all(a is p.grad for a, p in zip(grads, params, strict=True))


def test_bad_input():
    """A clear error, and nothing has been added, consumed or stepped."""
    p, q = params = [leaf(3), leaf(4)]
    sums = fo.GradAccumulator([("first", p), ("second", q)] if has_names() else [p, q])
    sums.add([p.grad, q.grad])
    name = re.escape("param_groups[0]['params'][1]") + (r" \(second\)" if has_names() else "")
    good = torch.ones(3)
    rows = [
        ([good], ValueError, "^grads: expected a dict, or a list with a tensor or None for each"),
        (good, ValueError, "^grads: expected a dict"),
        ({good: good}, ValueError, "^grads: has a key that is none of the parameters"),
        ([good, np.ones(4)], TypeError, rf"^{name}\.grad: is a ndarray; expected a tensor"),
        ([good, torch.ones(3)], ValueError, rf"^{name}\.grad: shape \(3,\) does not fit"),
        ([good, torch.ones(4).int()], TypeError, rf"^{name}\.grad: is of dtype torch.int32"),
        ([good, torch.ones(4).to_sparse()], ValueError, rf"^{name}\.grad: is sparse, and a Grad"),
        ([good, sums._buffers[1]], ValueError, rf"^{name}\.grad.* share"),
        ([good, torch.ones(4, device="meta")], TypeError, rf"^{name}\.grad: is on device meta"),
    ]
    for given, error, match in rows:
        refused(partial(sums.add, given), error, match, sums, params)
    refused(partial(sums.add, scale="1"), TypeError, "^scale: ", sums, params)
    refused(partial(sums.add, scale=math.nan), ValueError, "^scale: ", sums, params)
    refused(partial(sums.add, set_to_none=1), TypeError, "^set_to_none: ", sums, params)
    q.grad = torch.ones(4).to_sparse()
    for set_to_none in (True, False):
        call = partial(sums.add, set_to_none=set_to_none)
        refused(call, ValueError, "is sparse", sums, params)
    for opt, match in [
        (fo.SGD([p]), "^grads: the accumulator has buffers for 2 parameters, of which .* has 1"),
        (fo.SGD([p, q, leaf(2)]), r"^param_groups\[0\]\['params'\]\[2\]: the accumulator has no"),
    ]:
        refused(partial(opt.step, grads=sums), ValueError, match, sums, params)
    opt = fo.SGD(params)
    for wrong in ([p.grad, q.grad], fusedopt.GradAccumulator([np.ones(3)])):
        match = "^grads: expected a GradAccumulator of fusedopt.torch, got "
        refused(partial(opt.step, grads=wrong), TypeError, match, sums, params)
    refused(partial(opt.step_params, params, grads=sums), TypeError, "grads", sums, params)
    refused(partial(opt.step, grads=sums, copy_out=[]), ValueError, "copy_out", sums, params)
    refused(partial(opt.step, grads=sums, zero_grads=5), TypeError, "^zero_grads", sums, params)
    refused(partial(opt.step, sums), TypeError, "^step: closure: .* given as grads=", sums, params)
    for made in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            made(sums)


def has_names():
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_bad_parameters():
    p = leaf(3)
    for wrong in (p, 3, [3]):
        with pytest.raises(TypeError):  # torch's own, or of a list
            fo.GradAccumulator(wrong)
    with pytest.raises(ValueError, match="empty parameter list"):
        fo.GradAccumulator([])
    with pytest.raises(ValueError, match=r"^params: has a parameter twice"):
        fo.GradAccumulator([p, p])
    first = re.escape("param_groups[0]['params'][0]")
    with pytest.raises(TypeError, match=rf"^{first}: is of dtype torch.int32"):
        fo.GradAccumulator([torch.ones(3, dtype=torch.int32)])
    with pytest.raises(TypeError, match=rf"^{first}: is on device meta"):
        fo.GradAccumulator([torch.nn.Parameter(torch.ones(3, device="meta"))])


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}], ids=str)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_interrupted_at_any_moment(set_to_none, options):
    """All of a micro-batch has been added and consumed, or none; sums are stepped, or kept."""
    params = [leaf(5), leaf(3, 2)]
    grads = [p.grad for p in params]

    def once(when):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        sums, opt = fo.GradAccumulator(params), fo.AdamW(params, lr=0.0, **options)
        interrupted = interrupted_at(when, partial(sums.add, set_to_none=set_to_none))
        added = [b.any() for b in sums._buffers]
        consumed = [p.grad is None or not p.grad.any() for p in params]
        assert added == consumed == [sums.count == 1] * 2
        if not interrupted:
            step = opt.step.__wrapped__  # within torch's profiler, which an interrupt leaves behind
            interrupted = interrupted_at(when, partial(step, opt, grads=sums))
            left = [b.any() for b in sums._buffers]
            assert left == [opt.last_step.step == 0] * 2 == [sums.count == 1] * 2
            assert len(opt.state) == 2 * opt.last_step.step
            sums.add(grads)
            interrupted |= interrupted_at(when, sums.zero)
            assert [b.any() for b in sums._buffers] == [sums.count > 0] * 2
        return interrupted

    when = 1
    while once(when):
        when += 1
    assert when > 20


def test_two_threads():
    """One is refused while another adds; nothing is counted twice."""
    p = torch.nn.Parameter(torch.zeros(200_000))
    sums, opt, faults = fo.GradAccumulator([p]), fo.SGD([p], lr=1.0), []
    done = []

    def work():
        for _ in range(50):
            try:
                sums.add([torch.ones(200_000)])
                done.append(1)
            except RuntimeError as exc:
                faults.append(str(exc))

    in_two_threads(work)
    assert len(done) + len(faults) == 100 and sums.count == len(done)
    assert all("another thread" in text for text in faults)
    opt.step(grads=sums)
    assert (p == -float(len(done))).all()


def test_two_threads_take_gradients():
    """One of them consumes what is in `.grad`, once."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(60):
            params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(50)]
            sums = fo.GradAccumulator(params)
            for p in params:
                p.grad = torch.ones(4)
            barrier = threading.Barrier(2)

            def work(barrier=barrier, sums=sums):
                barrier.wait()
                with contextlib.suppress(RuntimeError):
                    sums.add()

            in_two_threads(work)
            assert all((b == 1).all() for b in sums._buffers)
    finally:
        sys.setswitchinterval(interval)


class Mode(torch.overrides.TorchFunctionMode):
    """Runs Python code wherever torch allows it, with a signal at one moment."""

    def __init__(self, when):
        super().__init__()
        self.when, self.calls = when, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        if self.calls == self.when:
            raise KeyboardInterrupt
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_interrupted_in_a_mode(set_to_none):
    """As of `with torch.device(...)`, which sees what is set to `.grad`."""
    when, interrupted = 0, True
    while interrupted:
        when += 1
        params = [leaf(3, seed=k) for k in range(3)]
        sums, interrupted = fo.GradAccumulator(params), False
        try:
            with Mode(when):
                sums.add(set_to_none=set_to_none)
        except KeyboardInterrupt:
            interrupted = True
        added = [b.any() for b in sums._buffers]
        consumed = [p.grad is None or not p.grad.any() for p in params]
        assert added == consumed == [sums.count == 1] * 3
    assert when > 1


def test_counts_of_partial_micro_batches():
    """After a step, or zeros, any gradient begins a new count."""
    p, q = leaf(3), leaf(4)
    sums, opt = fo.GradAccumulator([p, q]), fo.SGD([p, q])
    for empty in (lambda: opt.step(grads=sums), sums.zero):
        for one in (p, q, p):
            sums.add({one: one.grad})
            assert sums.count == 1
            empty()
            assert sums.count == 0


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda p: fo.AdamW(p, state_dtype="int8", min_8bit_size=1), (64, 70)),
        (fo.Adafactor, (100, 70)),
        (fo.AdamW, (100, 70)),
        (partial(fo.Adagrad, rowwise=True), (100, 70)),
    ],
    ids=["int8", "Adafactor", "AdamW", "rowwise"],
)
def test_steps_in_another_memory_order(make, shape):
    """The norm has the bits of a step on the sums, whatever order they were added in."""
    for seed in range(40):
        torch.manual_seed(seed)
        t = torch.randn(shape, dtype=torch.float64).t()
        p, q = torch.nn.Parameter(t.clone()), torch.nn.Parameter(t.clone())
        g = torch.randn(t.shape, dtype=torch.float64)
        ours, theirs, sums = make([p]), make([q]), fo.GradAccumulator([p])
        sums.add([g])
        q.grad = g.clone()
        ours.step(grads=sums, max_grad_norm=0.5, stats=True)
        theirs.step(max_grad_norm=0.5, stats=True)
        assert torch.equal(p, q)
        assert ours.last_step[:-1] == theirs.last_step[:-1]
        for column in ("grad_norm", "param_norm"):
            stats = (getattr(opt.last_step.stats, column) for opt in (ours, theirs))
            np.testing.assert_array_equal(*stats, column)


def test_grad_scaler():
    """torch's looks at `.grad`: an error says what to do, and leaves the optimizer usable."""
    p, q = leaf(30), leaf(30)
    opt, peer, sums = fo.AdamW([p], fused=True), fo.AdamW([q]), fo.GradAccumulator([p])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(1))
    sums.add([p.grad * 4])
    p.grad = None
    with pytest.raises(ValueError, match="^grads: torch's GradScaler looks for overflow in .grad"):
        scaler.step(opt, grads=sums)
    assert sums.count == 1 and opt.last_step.step == 0
    opt.step(grads=sums, grad_scale=1 / 4, nonfinite="skip")
    peer.step()
    assert torch.equal(p, q) and opt.last_step[:2] == (1, 1)
    fo.AdamW([torch.nn.Parameter(torch.ones(3))], fused=True)  # without gradients, as torch's
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(1))
    opt.zero_grad()
    scaler.step(opt)
    assert opt.last_step[:2] == (2, 0)


def test_inference_mode():
    """Buffers outlive the block in which they were made."""
    with torch.inference_mode():
        p = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        sums = fo.GradAccumulator([p])
        sums.add([torch.ones(3)])
    sums.add([torch.ones(3)])
    assert sums.grads[0].tolist() == [2.0] * 3
    sums.zero()
    assert sums.grads == [None]


def test_version_counters():
    """autograd notices that buffers, and gradients set to zero, were written."""
    p = leaf(3)
    sums = fo.GradAccumulator([p])
    grad = p.grad
    before = grad._version, sums._buffers[0]._version
    sums.add(set_to_none=False)
    assert (grad._version, sums._buffers[0]._version) == (before[0] + 1, before[1] + 1)
    fo.SGD([p]).step(grads=sums)
    assert sums._buffers[0]._version == before[1] + 2


def test_another_default_device():
    p = leaf(3)
    sums = fo.GradAccumulator([p])
    torch.set_default_device("meta")
    try:
        sums.add()
        sums.zero()
        fo.SGD([p]).step(grads=sums)
    finally:
        torch.set_default_device(None)
    assert sums.count == 0


@since("2.6")
def test_schedulers_and_hooks():
    """A scheduler wraps `step`, hooks get its arguments."""
    p = leaf(3)
    sums, opt = fo.GradAccumulator([p]), fo.SGD([p], lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    seen = []
    opt.register_step_pre_hook(lambda opt, args, kwargs: seen.append(kwargs))
    start = p.detach().clone()
    total = torch.zeros(3)
    for rate in (0.5, 0.25):
        sums.add([torch.ones(3)])
        opt.step(grads=sums)
        schedule.step()
        total += rate
    assert torch.equal(p, start - total) and [*map(list, seen)] == [["grads"]] * 2
