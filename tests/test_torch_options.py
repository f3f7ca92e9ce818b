"""fusedopt.torch: options that torch's own optimizers do not have."""

import copy
import inspect
import io
import pickle
import signal

import numpy as np
import pytest
from cases import takes
from torch_cases import ANY_SHAPE, fo, leaf, numbers, since, torch

import fusedopt

# ------------------------------------------------------------------ storage formats

FORMATS = [
    (torch.bfloat16, {}),
    (torch.bfloat16, {"master_bits": 24}),
    (torch.bfloat16, {"master_bits": 16, "seed": 3}),
    (torch.float16, {}),
    (torch.float32, {"state_dtype": "bfloat16"}),
    (torch.float32, {"state_dtype": "int8", "min_8bit_size": 64, "seed": 5}),
    (torch.bfloat16, {"state_dtype": "int8", "min_8bit_size": 64}),
]


def as_numpy(tensor):
    """A bfloat16 tensor as fusedopt.formats.Stored has it: its bits, uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize(("dtype", "options"), FORMATS, ids=str)
@pytest.mark.parametrize("rule", [("AdamW", {}), ("SGD", {"momentum": 0.9}), ("SGD", {})], ids=str)
def test_formats_have_the_bits_of_the_numpy_interface(rule, dtype, options):
    """The same codes, residual bits and blocks after five steps, with the same noise.

    SGD without momentum counts steps for the noise alone.
    """
    ml_dtypes = pytest.importorskip("ml_dtypes") if dtype == torch.bfloat16 else None
    name, own = rule
    options = {"lr": 0.1, **own, **options}
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (700, 30)]
    arrays = [as_numpy(p.detach().clone()) for p in params]
    if ml_dtypes is not None:
        arrays = [a.view(ml_dtypes.bfloat16) for a in arrays]
    opt, peer = getattr(fo, name)(params, **options), getattr(fusedopt, name)(arrays, **options)
    for _ in range(5):
        for p in params:
            p.grad = torch.randn(p.shape).to(dtype)
        grads = [as_numpy(p.grad) for p in params]
        peer.step([g.view(arrays[0].dtype) for g in grads])
        opt.step()
    for p, a, state in zip(params, arrays, peer.state.values(), strict=True):
        assert as_numpy(p.detach()).tobytes() == a.tobytes()
        for key, value in opt.state[p].items():
            if key == "step":
                assert value == 5
            elif key == "residual":
                assert as_numpy(value).tobytes() == state[key].tobytes()
            elif key.endswith("_blocks"):
                assert value.numpy().tobytes() == state[key.removesuffix("_blocks")].extra.tobytes()
            else:
                theirs = state[key.removesuffix("_codes")]
                theirs = theirs if isinstance(theirs, np.ndarray) else theirs.data
                assert as_numpy(value).tobytes() == theirs.tobytes(), key


@pytest.mark.parametrize(("dtype", "options"), FORMATS, ids=str)
@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_formats_resume_exactly(name, dtype, options, tmp_path):
    """Through a file: state keeps its dtype, which torch's rule would cast to the parameter's."""
    options = {"lr": 0.1, **({"momentum": 0.9} if name == "SGD" else {}), **options}

    def steps(p, opt, seeds):
        for seed in seeds:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            opt.step()

    def start():
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(20, 10).to(dtype))
        return p, getattr(fo, name)([p], **options)

    straight, opt = start()
    steps(straight, opt, range(6))
    p, opt = start()
    steps(p, opt, range(3))
    torch.save({"p": p, "opt": opt.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    q, opt = start()
    with torch.no_grad():
        q.copy_(saved["p"])
    opt.load_state_dict(saved["opt"])
    for key, value in saved["opt"]["state"][0].items():
        assert opt.state[q][key].dtype == value.dtype, key
    steps(q, opt, range(3, 6))
    assert torch.equal(q, straight)


@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "int8"])
def test_state_of_torch_is_converted(state_dtype):
    """torch keeps bfloat16 state of a bfloat16 parameter; ours has the format asked for."""
    p = torch.nn.Parameter(torch.randn(5000).bfloat16())
    p.grad = torch.randn(5000).bfloat16()
    peer = torch.optim.Adam([p])
    peer.step()
    ours = fo.Adam([p], state_dtype=state_dtype)
    ours.load_state_dict(peer.state_dict())
    state, end = ours.state[p], "_codes" if state_dtype == "int8" else ""
    wanted = {None: torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}[state_dtype]
    assert state["exp_avg" + end].dtype == state["exp_avg_sq" + end].dtype == wanted
    assert ("exp_avg_blocks" in state) == ("exp_avg" not in state) == (state_dtype == "int8")
    ours.step()
    back = fo.Adam([p])  # and 8-bit codes become numbers again
    back.load_state_dict(ours.state_dict())
    assert back.state[p]["exp_avg"].dtype == torch.float32
    assert not {"exp_avg_codes", "exp_avg_blocks"} & set(back.state[p])
    expected = peer.state[p]["exp_avg"].float() * 0.9 + 0.1 * p.grad.float()
    torch.testing.assert_close(back.state[p]["exp_avg"], expected, rtol=0.4, atol=1e-3)


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        ({"exp_avg_blocks": None}, ValueError, "exp_avg_codes: 8-bit codes need .*exp_avg_blocks"),
        ({"exp_avg_blocks": torch.zeros(4, dtype=torch.uint8)}, ValueError, "exp_avg_blocks"),
        ({"exp_avg_blocks": torch.full((5,), 0.5)}, TypeError, "exp_avg_blocks: is of dtype"),
        (
            {"exp_avg_codes": None, "exp_avg": torch.zeros(300, dtype=torch.float64)},
            TypeError,
            "float64 does not fit",
        ),
        (
            {"exp_avg_codes": None, "exp_avg": torch.zeros(300, dtype=torch.uint8)},
            TypeError,
            "exp_avg: is of dtype",
        ),
        ({"exp_avg": torch.zeros(300)}, ValueError, "has exp_avg and exp_avg_codes, of which one"),
        ({"exp_avg_sq": torch.zeros(300)}, ValueError, "has exp_avg_sq and exp_avg_sq_codes"),
        ({"step": None}, TypeError, "step: expected a tensor"),
        ({"exp_avg_codes": torch.full((300,), 0.5)}, TypeError, "exp_avg_codes: is of dtype"),
        ({"exp_avg_codes": torch.zeros(299, dtype=torch.uint8)}, ValueError, "does not fit"),
        ({"exp_avg_codes": None}, ValueError, "its state has no exp_avg"),
        ({"exp_avg_codes": None, "exp_avg": None}, ValueError, "its state has no exp_avg,"),
        ({"exp_avg_codes": None, "exp_avg_sq_codes": None}, ValueError, "no exp_avg, exp_avg_sq,"),
    ],
)
def test_state_that_no_longer_fits(spoil, error, match):
    p = leaf(300)
    opt = fo.Adam([p], state_dtype="int8", min_8bit_size=1)
    opt.step()
    opt.state[p].update(spoil)
    before, own = p.detach().clone(), copy.deepcopy(opt.state[p])
    with pytest.raises(error, match=match):
        opt.step()
    assert torch.equal(p, before) and opt.state[p].keys() == own.keys()
    for key, value in own.items():
        assert opt.state[p][key] is value or torch.equal(opt.state[p][key], value), key


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "ema", "mine"])
def test_none_counts_as_missing(name):
    """With codes present; an average that is None starts again."""
    params = [leaf(300), leaf(300)]
    opts = [fo.Adam([p], state_dtype="int8", min_8bit_size=1, ema=0.5) for p in params]
    for p, opt in zip(params, opts, strict=True):
        opt.step()
        opt.state[p][name] = None
        if opt is opts[1]:
            del opt.state[p][name]
    if name == "ema":
        for opt in opts:
            with pytest.raises(ValueError, match="there is no average yet"), opt.swap_ema():
                pass
    for opt in opts:
        opt.step()
    assert torch.equal(*params)
    assert torch.equal(*[opt.ema_params()[p] for p, opt in zip(params, opts, strict=True)])


def test_wrong_storage_options():
    p = leaf(300)
    opt = fo.Adam([p])
    with pytest.raises(ValueError, match="state_dtype"):
        fo.SGD([p], state_dtype="int4")
    with pytest.raises(ValueError, match=r"param_groups\[1\]: master_bits"):
        opt.add_param_group({"params": [leaf(2)], "master_bits": 17})


# ------------------------------------------------------------------ step options


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_clip_is_that_of_torch(name):
    """Like clip_grad_norm_ before the step, except for rounding; gradients are not changed."""
    torch.manual_seed(0)
    ours, theirs = ([leaf(30, 20), leaf(7)] for _ in range(2))
    opt = getattr(fo, name)(ours, lr=0.1, max_grad_norm=0.5)
    peer = getattr(torch.optim, name)(theirs, lr=0.1)
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    for step in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        before = [p.grad.clone() for p in ours]
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        opt.step()
        peer.step()
        assert opt.last_step.grad_norm == pytest.approx(float(norm), rel=1e-6)
        assert opt.last_step.step == step + 1
        for p, g in zip(ours, before, strict=True):
            assert torch.equal(p.grad, g)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_an_infinite_limit_clips_nothing(wrong):
    """Not even if the norm is NaN or infinite; torch's clip makes all gradients NaN."""
    params = [leaf(3), leaf(2)]
    params[1].grad[0] = wrong
    opt = fo.SGD(params, lr=1.0, max_grad_norm=float("inf"))
    expected = [p.detach() - p.grad for p in params]
    opt.step()
    np.testing.assert_equal(opt.last_step.grad_norm, wrong)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, equal_nan=True)


@pytest.mark.parametrize("fused", [True, False, None])
def test_clip_and_scaled_gradients(fused):
    """Whichever side divides by the scale, the norm is that of the unscaled gradients."""
    torch.manual_seed(0)
    params = [leaf(30), leaf(7)]
    norm = sum(float(p.grad.square().sum()) for p in params) ** 0.5
    opt = fo.AdamW(params, max_grad_norm=0.5, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.zeros(()))
    for p in params:
        p.grad = p.grad * 2.0**10
    scaler.step(opt)
    assert opt.last_step.grad_norm == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("name", ["Adam", "SGD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_averages(name, dtype):
    """The bits of the NumPy interface; swapped in and out; exact through a checkpoint."""
    start = torch.randn(600).to(dtype)
    p = torch.nn.Parameter(start.clone())
    opt = getattr(fo, name)([p], lr=0.1, ema=0.9, ema_warmup=True)
    wide = np.float64 if dtype == torch.float64 else np.float32
    average = start.to(torch.float64).numpy().astype(wide)
    for step in range(1, 4):
        p.grad = torch.full_like(p, 0.5)
        opt.step()
        if dtype != torch.bfloat16:
            weight = wide(1 - min(0.9, (1 + step) / (10 + step)))
            average = average + weight * (p.detach().numpy() - average)
            assert (opt.ema_params()[p].numpy() == average).all()
    before = p.detach().clone()
    with opt.swap_ema():
        assert torch.equal(p, opt.ema_params()[p].to(dtype))
    assert torch.equal(p, before)
    twin = torch.nn.Parameter(before.clone())
    other = getattr(fo, name)([twin], lr=0.1, ema=0.9, ema_warmup=True)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for q, o in [(p, opt), (twin, other)]:
        q.grad = torch.full_like(q, 0.25)
        o.step()
    assert torch.equal(p, twin) and torch.equal(opt.ema_params()[p], other.ema_params()[twin])


def test_average_begins_with_a_checkpoint_of_torch():
    """Momentum of torch continues, and the average begins as the parameter."""
    p, q = leaf(5), leaf(5)
    q.data.copy_(p.data)
    theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9)
    for _ in range(2):
        q.grad = torch.ones(5)
        theirs.step()
    p.data.copy_(q.data)
    ours = fo.SGD([p], lr=0.1, momentum=0.9, ema=0.5)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for x, opt in [(p, ours), (q, theirs)]:
        x.grad = torch.ones(5)
        opt.step()
    torch.testing.assert_close(p, q)
    with pytest.raises(ValueError, match="there is no average: make the optimizer with ema="):
        fo.SGD([leaf(2)]).ema_params()
    with pytest.raises(ValueError, match="no average yet: it begins with the first step"):
        fo.SGD([leaf(2)], ema=0.5).ema_params()


@pytest.mark.parametrize("ema", [{}, {"ema": 0.9}, {"ema": 0.9, "ema_warmup": True}], ids=str)
@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["later", "lost"])
def test_a_new_momentum_buffer_begins_as_the_gradient(how, dtype, state_dtype, ema):
    """As in torch, whatever the step count; in one of two parameters, or in both."""
    late = {"momentum": 0.9, "dampening": 0.5, "nesterov": False}
    params = [leaf(100, dtype=dtype), leaf(100, seed=1, dtype=dtype)]
    first = {} if how == "later" else late
    opt = fo.SGD(params, lr=0.1, **first, **ema, state_dtype=state_dtype, min_8bit_size=1)
    opt.step()
    opt.step()
    opt.param_groups[0].update(late)
    if how == "lost":
        for key in [key for key in opt.state[params[1]] if key.startswith("momentum")]:
            del opt.state[params[1]][key]
    before = numbers(opt, params[0], "momentum_buffer").clone() if how == "lost" else None
    opt.step()
    for p in params if how == "later" else params[1:]:
        found = numbers(opt, p, "momentum_buffer")
        torch.testing.assert_close(found, p.grad.float(), rtol=0.13, atol=0.02)
        if state_dtype is None:
            assert torch.equal(found, p.grad.float())
    if before is not None and state_dtype is None:
        expected = 0.9 * before + 0.5 * params[0].grad.float()
        torch.testing.assert_close(numbers(opt, params[0], "momentum_buffer"), expected)


@since("2.6")  # named parameters
def test_stats_and_history():
    opt = fo.AdamW([("w", leaf(40, 3)), ("b", leaf(3))], stats=True, max_grad_norm=1.0)
    history = fusedopt.monitor.History()
    for _ in range(3):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        opt.step()
        history.record(opt.last_step)
    stats = opt.last_step.stats
    assert [name.split()[-1] for name in stats.names] == ["(w)", "(b)"]
    np.testing.assert_allclose(stats.grad_norm, [120**0.5, 3**0.5])
    assert history.steps == [1, 2, 3]
    again = pickle.loads(pickle.dumps(opt))
    assert again.defaults["max_grad_norm"] == 1.0 and again.defaults["stats"] is True


@pytest.mark.parametrize(
    "options",
    [
        *({"max_grad_norm": wrong} for wrong in (0, -1.0, float("nan"), float("-inf"), "inf")),
        {"ema": 1.0},
        {"stats": 1},
        {"ema_warmup": "yes"},
    ],
)
def test_wrong_options_of_our_own(options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        fo.Adam([leaf(3)], **options)


@pytest.mark.parametrize(("name", "value"), [("max_grad_norm", 1.0), ("stats", True)])
def test_options_of_no_group(name, value):
    group = {"params": [leaf(3)], name: value}
    with pytest.raises(ValueError, match=rf"^param_groups\[0\]\.{name}: is of the optimizer"):
        fo.SGD([group], lr=0.1)
    opt = fo.SGD([leaf(2)], lr=0.1, **{name: value})
    with pytest.raises(ValueError, match=rf"^param_groups\[1\]\.{name}: is of the optimizer"):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [leaf(4)]})
    opt.step()
    opt.param_groups[1][name] = value
    with pytest.raises(ValueError, match=rf"^param_groups\[1\]\.{name}: is of the optimizer"):
        opt.step()


TEXT, TWO = "0.1", torch.ones(2)
EDITS = [
    *(
        (cls, name, wrong, TypeError, "expected a number, got")
        for cls, names in (
            ("Adam", ["lr", "eps", "weight_decay"]),
            ("AdamW", ["lr", "eps", "weight_decay"]),
            ("SGD", ["lr", "momentum", "dampening", "weight_decay"]),
        )
        for name in names
        for wrong in (TEXT, None, 1j, TWO, torch.ones((), device="meta"), [0.1])
    ),
    *(("AdamW", "betas", wrong, TypeError, "") for wrong in (0.9, "ab", (0.9,), (0.9, None), TWO)),
    *((cls, "ema", 2.0, ValueError, r"must be in \[0, 1\), got 2.0") for cls in ("Adam", "SGD")),
    ("AdamW", "ema", "0.9", TypeError, "expected a number"),
    ("AdamW", "state_dtype", "int4", ValueError, "expected None or"),
    ("AdamW", "master_bits", 17, ValueError, "expected None or"),
    ("AdamW", "min_8bit_size", -1, ValueError, "must be >= 0"),
    ("AdamW", "seed", 0.5, TypeError, "expected a whole number"),
    ("AdamW", "ema_warmup", "yes", TypeError, "expected True or False"),
]


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize(("cls", "name", "value", "error", "match"), EDITS, ids=str)
def test_options_edited_in_a_group(cls, name, value, error, match, when):
    """The error names the option at any time; once it is corrected, the run continues."""
    params, twins = ([leaf(3), leaf(4, seed=1)] for _ in range(2))
    groups = [[{"params": [p]} for p in both] for both in (params, twins)]
    opt, peer = (getattr(fo, cls)(both, lr=0.1) for both in groups)
    for _ in range(when):
        opt.step()
        peer.step()
    before = opt.param_groups[1].get(name)
    opt.param_groups[1][name] = value
    for _ in range(2):
        with pytest.raises(error, match=rf"^param_groups\[1\]\.{name}(\[\d\])?: .*{match}"):
            opt.step()
        assert same(params, twins)
    opt.param_groups[1][name] = before
    if name not in peer.param_groups[1]:
        del opt.param_groups[1][name]
    opt.step()
    peer.step()
    assert same(params, twins)


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        *(("AdamW", name) for name in ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")),
        *(("SGD", name) for name in ("lr", "momentum", "dampening", "nesterov", "maximize")),
    ],
)
def test_options_taken_out_of_a_group(cls, name):
    p = leaf(3)
    opt = getattr(fo, cls)([p], lr=0.1)
    opt.step()
    del opt.param_groups[0][name]
    with pytest.raises(ValueError, match=rf"^param_groups\[0\]: has no {name}$"):
        opt.step()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lr", [0.1, 0.2, 1, torch.tensor(0.3), np.float32(0.25), torch.tensor([0.5])]),
        ("betas", [(0.5, 0.6), [0.7, 0.8], (torch.tensor(0.9), 0.95)]),
        ("weight_decay", [0, 0.5, torch.tensor(0.25)]),
        ("eps", [1e-3, 1e-2]),
        ("maximize", [True, False]),
        ("ema", [0.5, 0.75, 0.75]),
    ],
)
def test_options_edited_take_effect(name, values):
    """Also those that change in place, in the same object."""
    p, q = leaf(5), leaf(5)
    opt = fo.AdamW([p], lr=0.1)
    opt.step()
    fo.AdamW([q], lr=0.1).step()
    state = copy.deepcopy(opt.state_dict()["state"][0])
    for value in [*values, "in place"]:
        if value == "in place":
            value = opt.param_groups[0][name]  # noqa: PLW2901
            if isinstance(value, torch.Tensor):
                value.mul_(0.5)
            elif isinstance(value, list):
                value[0] = 0.125
        opt.param_groups[0][name] = value
        opt.step()
        fresh = fo.AdamW([q], lr=0.1, **({"ema": 0.5} if name == "ema" else {}))
        saved = fresh.state_dict()
        saved["state"] = {0: state}
        fresh.load_state_dict(saved)
        fresh.param_groups[0][name] = copy.deepcopy(value)
        fresh.step()
        assert torch.equal(p, q), value
        state = copy.deepcopy(fresh.state_dict()["state"][0])
    assert name != "ema" or torch.equal(opt.ema_params()[p], fresh.ema_params()[q])


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"stats": True}, {}], ids=str)
@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_last_step_after_one_that_grad_scaler_skipped(name, options):
    """With fused=True the step is told of it; otherwise GradScaler does not call it."""
    p = leaf(3)
    opt = getattr(fo, name)([p], lr=0.1, fused=True, **options)
    scaler, history = torch.amp.GradScaler("cpu", init_scale=4.0), fusedopt.monitor.History()
    for value, expected in ((1.0, (1, 1, False)), (np.inf, (1, 0, True)), (2.0, (2, 1, False))):
        scaler.scale(torch.zeros(()))
        p.grad = torch.full((3,), value)
        scaler.step(opt)
        scaler.update()
        assert opt.last_step[:3] == expected
        if "stats" in options:
            history.record(opt.last_step)
    assert (history.steps, history.skipped) == (([1, 2], [1]) if "stats" in options else ([], []))


@pytest.mark.parametrize("name", ["Adam", "SGD", "Adagrad"])
def test_a_step_that_grad_scaler_skipped_copies_and_zeroes(name):
    """Else gradients that are accumulated in place stay infinite, and no step follows."""
    p = leaf(3)
    opt = getattr(fo, name)([p], lr=0.125, fused=True, zero_grads=True, max_grad_norm=1e9)
    scaler, copy_out = torch.amp.GradScaler("cpu", init_scale=4.0), torch.zeros(3)
    p.grad.zero_()
    for value, expected in ((np.inf, (0, 0, True)), (1.0, (1, 1, False))):
        before = p.detach().clone()
        scaler.scale(torch.zeros(()))
        p.grad += value
        scaler.step(opt, copy_out=[copy_out])
        scaler.update()
        assert opt.last_step[:3] == expected and not p.grad.any()
        assert torch.equal(copy_out, p) and torch.equal(p, before) == opt.last_step.skipped


@pytest.mark.parametrize(
    ("copy_out", "error", "match"),
    [
        (torch.zeros(2), ValueError, r"shape \(2,\) does not fit the parameter's \(3,\)"),
        (torch.zeros(1).expand(3), ValueError, "elements share memory"),
        (torch.zeros(3, dtype=torch.float64), TypeError, "not as torch.float64"),
        (torch.zeros(3, device="meta"), TypeError, "is on device meta"),
        ([0.0, 0.0, 0.0], TypeError, "is a list; expected a tensor"),
    ],
    ids=str,
)
def test_copies_without_gradient_that_do_not_fit(copy_out, error, match):
    frozen, p = leaf(3), leaf(3)
    frozen.grad = None
    opt, before = fo.AdamW([frozen, p]), p.detach().clone()
    with pytest.raises(error, match=rf"^copy_out of param_groups\[0\]\['params'\]\[0\]: .*{match}"):
        opt.step(copy_out=[copy_out, None])
    assert torch.equal(p, before) and not opt.state


def test_copies_without_gradient_that_are_not_plain():
    frozen, target = leaf(3), torch._neg_view(torch.zeros(3))
    frozen.grad = None
    fo.AdamW([frozen]).step(copy_out=[target])
    assert torch.equal(target, frozen)


@pytest.mark.parametrize("name", [name for name in ANY_SHAPE if takes(name, {"ema": 0.5})])
def test_the_average_begins_with_the_first_step(name):
    """With the parameter of then, also where torch makes state in the constructor."""
    p = leaf(3)
    opt = getattr(fo, name)([p], lr=0.0, ema=0.5)
    with torch.no_grad():
        p.fill_(8.0)
    with pytest.raises(ValueError, match="no average yet: it begins with the first step"):
        opt.ema_params()
    opt.step()
    torch.testing.assert_close(opt.ema_params()[p], torch.full((3,), 8.0))  # least step of Rprop


def test_a_signal_under_a_mode_while_a_step_ends():
    """A mode's Python code is asked of no autograd switch: the list is let go, autograd is on."""

    class Interrupted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch._C._set_grad_enabled and args[0]:
                signal.raise_signal(signal.SIGINT)
            return function(*args, **(kwargs or {}))

    p = leaf(3)
    opt = fo.SGD([p], lr=0.5)
    with Interrupted():
        opt.step()
    assert torch.is_grad_enabled()
    opt.step()
    assert opt.last_step.step == 2


def test_threads_of_its_own():
    """The option is checked, used by the steps, and not in checkpoints."""
    p = torch.nn.Parameter(torch.ones(3))
    opt = fo.SGD([p], lr=0.5, threads=1)
    p.grad = torch.ones(3)
    opt.step()
    assert p.tolist() == [0.5] * 3
    assert "threads" not in opt.state_dict()["param_groups"][0]
    with pytest.raises(ValueError, match="^threads: must be >= 1"):
        fo.SGD([p], lr=0.5, threads=0)


def saved_and_loaded(opt):
    buffer = io.BytesIO()
    torch.save(opt, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt)), saved_and_loaded]
)
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_copies_keep_every_option_of_our_own(name, clone):
    options = {
        "state_dtype": "bfloat16", "master_bits": 24, "min_8bit_size": 7, "seed": 3, "ema": 0.9,
        "ema_warmup": True, "max_grad_norm": 0.5, "norm_type": np.inf, "per_tensor": True,
        "clip_value": 0.3, "nonfinite": "skip", "stats": True, "zero_grads": True,
        "state_dict_dtype": "float32", "threads": 1,
    }  # fmt: skip
    own = list(inspect.signature(getattr(fo, name)).parameters)
    assert {*options, "process_group", "state_dir"} == set(own[own.index("state_dtype") :])
    given = getattr(fo, name)([leaf(3, dtype=torch.bfloat16)], lr=0.1, **options)
    given.step()
    opt = clone(given)
    assert opt.last_step.step == 1 and opt.last_step.stats.names == given.last_step.stats.names
    found = {**opt.defaults, **opt.param_groups[0], "threads": opt._threads}
    found["state_dict_dtype"] = opt._state_dict_dtype
    assert {key: found[key] for key in options} == options
    opt.add_param_group({"params": [leaf(2)]})
    assert set(opt.param_groups[0]) == set(opt.param_groups[1])
    opt.load_state_dict(opt.state_dict())
    assert opt._threads == 1


# ------------------------------------------------------------------ averages in a block


def averaged(*shapes, **options):
    """Parameters after two steps, the optimizer, and copies of them."""
    params = [leaf(*shape, seed=i) for i, shape in enumerate(shapes)]
    opt = fo.SGD(params, lr=1.0, ema=0.5, **options)
    opt.step()
    opt.step()
    return params, opt, [p.detach().clone() for p in params]


def same(params, kept):
    return all(torch.equal(p, q) for p, q in zip(params, kept, strict=True))


@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_autograd_within_is_as_without(outside):
    params, opt, kept = averaged((3,), (2, 2))
    with outside(), opt.swap_ema():
        assert torch.is_grad_enabled() == (outside is torch.enable_grad)
        assert same(params, list(opt.ema_params().values()))
        if outside is torch.enable_grad:
            params[0].grad = None
            params[0].square().sum().backward()
            torch.testing.assert_close(params[0].grad, 2 * opt.ema_params()[params[0]])
    assert same(params, kept) and torch.is_grad_enabled()


def test_averages_are_seen_by_the_version_counters():
    params, opt, _ = averaged((3,))
    loss = params[0].square().sum()
    with opt.swap_ema():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, GeneratorExit])
def test_parameters_are_back_whatever_happens_within(error):
    params, opt, kept = averaged((3,), (2, 2))
    with pytest.raises(error), opt.swap_ema():
        params[0].data = torch.zeros(3)
        raise error
    assert same(params, kept)


@pytest.mark.parametrize("when", [[1], [2], [2, 3], [1, 2]], ids=str)
def test_a_signal_while_averages_come_or_go(when, monkeypatch):
    """In Python code of the swap, with autograd off: raised after all is restored."""
    params, opt, kept = averaged((3,), (2, 2))
    calls = []

    def interrupted():
        calls.append(None)
        if len(calls) in when:
            torch.set_grad_enabled(False)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(opt, "_forget_weights", interrupted)
    with pytest.raises(KeyboardInterrupt), opt.swap_ema():
        assert 1 not in when
    assert same(params, kept) and torch.is_grad_enabled()
    assert len(calls) > max(when)  # weights that engines hold were dropped, too


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer")
def test_a_signal_at_any_time():
    """A timer whose handler raises goes off at any time of entry, block and exit."""
    params, opt, kept = averaged(*[(20_000,)] * 40)

    def handler(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, handler)
    interrupted = 0
    try:
        for i in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, 2e-5 * (i + 1))
                with opt.swap_ema():
                    assert params[0].data_ptr() > 0
                signal.setitimer(signal.ITIMER_REAL, 0)
            except TimeoutError:
                interrupted += 1
                assert same(params, kept) and torch.is_grad_enabled(), i
            signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeoutError:  # between two tries
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted and same(params, kept)


def test_no_memory_for_the_copies(monkeypatch):
    params, opt, kept = averaged((3,), (2, 2))
    clone, calls = torch.Tensor.clone, []

    def failing(tensor):
        calls.append(tensor)
        if len(calls) == 2:
            raise MemoryError
        return clone(tensor)

    monkeypatch.setattr(torch.Tensor, "clone", failing)
    versions = [p._version for p in params]
    with pytest.raises(MemoryError), opt.swap_ema():
        pass
    monkeypatch.undo()
    assert same(params, kept) and [p._version for p in params] == versions


@pytest.mark.parametrize("kind", [torch.nn.Parameter, lambda x: x.requires_grad_()])
def test_memory_exchanged_within(kind):
    p = kind(torch.ones(5))
    opt = fo.SGD([p], lr=1.0, ema=0.5)
    p.grad = torch.ones(5)
    opt.step()
    opt.step()
    kept = p.detach().clone()
    with opt.swap_ema():
        p.data = torch.zeros(5)
    assert torch.equal(p, kept)


def test_averages_that_do_not_fit():
    params, opt, kept = averaged((3,), (2, 2))
    opt.state[params[1]]["ema"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"\['params'\]\[1\]\.ema: shape \(3,\) does not fit"):
        with opt.swap_ema():
            pass
    assert same(params, kept)


WITHIN = {
    "step": lambda opt: opt.step(),
    "a step with a closure": lambda opt: opt.step(lambda: pytest.fail("called")),
    "load_state_dict": lambda opt: opt.load_state_dict(opt.state_dict()),
    "add_param_group": lambda opt: opt.add_param_group({"params": [leaf(2)]}),
    "swap_ema": lambda opt: opt.swap_ema().__enter__(),
}


@pytest.mark.parametrize("act", WITHIN.values(), ids=WITHIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_needs_the_parameters_is_refused_within(dtype, act):
    """For example, a step from averages would make the residual bits of parameters wrong."""
    p, peer = leaf(1000, dtype=dtype), leaf(1000, dtype=dtype)
    opts = [fo.AdamW([x], lr=0.01, ema=0.9) for x in (p, peer)]
    for opt in opts:
        opt.step()
        opt.step()
    with opts[0].swap_ema():
        with pytest.raises(RuntimeError, match="leave the block of swap_ema first"):
            act(opts[0])
        assert len(opts[0].param_groups) == 1
    for opt in opts:
        opt.step()
    assert torch.equal(p, peer)
    for key, value in opts[1].state[peer].items():
        assert torch.equal(opts[0].state[p][key], value), key


CHANGES = {
    "fewer": lambda p: torch.zeros(1),
    "more": lambda p: torch.zeros(5, *p.shape),  # to which copy_ would broadcast
    "as many": lambda p: torch.zeros(1, p.numel()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_shape_changed_within(which, change):
    """The others are restored, and the exception names the one that is not."""
    params, opt, kept = averaged((3,), (4,), (6,))
    with pytest.raises(RuntimeError, match=rf"\['params'\]\[{which}\]: cannot take back"):
        with opt.swap_ema():
            params[which].data = change(params[which])
    for i in {0, 1, 2} - {which}:
        assert torch.equal(params[i], kept[i])
    assert torch.is_grad_enabled()
    params[which].data = kept[which].clone()
    with opt.swap_ema():
        assert same(params, list(opt.ema_params().values()))
    assert same(params, kept)


def test_one_context_is_entered_once_at_a_time():
    params, opt, kept = averaged((3,))
    context = opt.swap_ema()
    with context:
        with pytest.raises(RuntimeError, match="entered already"), context:
            pass
        assert same(params, list(opt.ema_params().values()))
    assert same(params, kept)
    with context:
        assert not same(params, kept)
    assert same(params, kept)


def test_casts_that_autocast_keeps_are_dropped():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(30, 30), torch.ones(2, 30)
    opt = fo.SGD(model.parameters(), lr=1.0, ema=0.5)
    model(x).sum().backward()
    opt.step()
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        with opt.swap_ema():
            average = model(x)
        after = model(x)
    assert torch.equal(before, after) and not torch.equal(before, average)
