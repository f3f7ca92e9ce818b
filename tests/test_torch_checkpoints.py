"""fusedopt.torch: state through files, other formats, other memory orders, and into torch.optim."""

import copy
import itertools
from functools import partial

import pytest
from test_interrupts import interrupted_at
from torch_cases import fo, leaf, model, numbers, torch, train

import fusedopt
from fusedopt.formats import Stored

RULES = [("AdamW", {"lr": 0.1, "amsgrad": True}), ("SGD", {"lr": 0.1, "momentum": 0.9})]
STATES = [{}, {"state_dtype": "bfloat16"}, {"state_dtype": "int8", "min_8bit_size": 100}]
ORDERS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


def made(order, name, options, start=None):
    """Two parameters, one of them small, and their optimizer."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(8, 6, 3, bias=False), torch.nn.Linear(5, 3, False))
    net[0].weight.data = ORDERS[order](net[0].weight.data)
    for p, q in zip(net.parameters(), start or [], strict=False):
        p.data.copy_(q)
    return net, getattr(fo, name)(net.parameters(), **options)


def steps(net, opt, seeds):
    """Steps with gradients whose channels differ in size."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in net.parameters():
            sizes = torch.logspace(-3, 0, len(p)).reshape(-1, *[1] * (p.dim() - 1))
            p.grad = torch.randn(p.shape, generator=generator) * sizes
        opt.step()


def by_file(net, opt, other, other_opt, folder):
    torch.save(opt.state_dict(), folder / "run.pt")
    other_opt.load_state_dict(torch.load(folder / "run.pt", weights_only=True))


def by_contiguous_tensors(net, opt, other, other_opt, folder):
    """As safetensors requires."""
    saved = copy.deepcopy(opt.state_dict())
    saved["state"] = {
        number: {key: value.contiguous() for key, value in own.items()}
        for number, own in saved["state"].items()
    }
    other_opt.load_state_dict(saved)


def by_dcp(net, opt, other, other_opt, folder, **how):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, own = get_state_dict(net, opt)
    dcp.save({"model": model, "optimizer": own}, checkpoint_id=folder / "dcp")
    model, own = get_state_dict(other, other_opt)
    both = {"model": model, "optimizer": own}
    dcp.load(both, checkpoint_id=folder / "dcp", **how)
    set_state_dict(other, other_opt, model_state_dict=model, optim_state_dict=both["optimizer"])


WAYS = [by_file, by_contiguous_tensors]
if torch.distributed.is_available():
    WAYS.append(by_dcp)
ignore_torchs_own = pytest.mark.filterwarnings("ignore")  # deprecations in torch's checkpoints


@ignore_torchs_own
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize(("name", "options"), RULES, ids=str)
def test_resumed_equals_straight(name, options, state, way, order, tmp_path):
    """Six steps, or three, a checkpoint and three; bit for bit."""
    straight, opt = made(order, name, options | state)
    steps(straight, opt, range(6))
    first, opt = made(order, name, options | state)
    steps(first, opt, range(3))
    for now in ORDERS:
        if now != order and state.get("state_dtype") == "bfloat16":
            continue  # its noise follows the memory
        other, other_opt = made(now, name, options | state, first.parameters())
        way(first, opt, other, other_opt, tmp_path)
        steps(other, other_opt, range(3, 6))
        for p, q in zip(other.parameters(), straight.parameters(), strict=True):
            assert torch.equal(p, q), now


@pytest.mark.parametrize("state", STATES[::2], ids=str)
@pytest.mark.parametrize(("name", "options"), RULES, ids=str)
@pytest.mark.parametrize(("before", "after"), [*itertools.permutations(ORDERS, 2)])
def test_memory_order_changed_within_a_run(before, after, name, options, state):
    straight, opt = made(before, name, options | state)
    steps(straight, opt, range(4))
    net, opt = made(before, name, options | state)
    steps(net, opt, range(2))
    net[0].weight.data = ORDERS[after](net[0].weight.data)
    steps(net, opt, range(2, 3))
    for own in opt.state.values():  # and if the memory order of state changes
        for key, value in own.items():
            own[key] = ORDERS[before](value) if value.dim() == 4 else value
    steps(net, opt, range(3, 4))
    for p, q in zip(net.parameters(), straight.parameters(), strict=True):
        assert torch.equal(p, q)


# ------------------------------------------------------------------ between formats

FORMATS = [None, "bfloat16", "int8"]


def stepped(name="AdamW", state_dtype=None, shape=(500,), steps=3, **options):
    p = leaf(*shape)
    options = {"momentum": 0.9} | options if name == "SGD" else options
    opt = getattr(fo, name)([p], lr=0.01, state_dtype=state_dtype, min_8bit_size=1, **options)
    for seed in range(steps):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        opt.step()
    return p, opt


@pytest.mark.parametrize("shape", [(500,), (20, 30), ()], ids=str)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize(("before", "after"), [*itertools.product(FORMATS, FORMATS)])
def test_converted(before, after, name, shape):
    """Exactly if the new format holds the numbers of the old, else within its precision."""
    p, opt = stepped(name, before, shape)
    q, other = stepped(name, after, shape, steps=1)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for state in ("momentum_buffer",) if name == "SGD" else ("exp_avg", "exp_avg_sq"):
        old, new = numbers(opt, p, state), numbers(other, q, state)
        if after == before or after is None or (before, after) == ("int8", "bfloat16"):
            assert torch.equal(old, new), state
        else:
            size = float(old.abs().max())
            precision = {"bfloat16": 2**-7, "int8": 2**-2}[after]
            torch.testing.assert_close(old, new, rtol=precision, atol=2**-6 * size)
        narrow = after == "int8"
        assert (state + "_codes" in other.state[q]) == narrow == (state not in other.state[q])
        assert (state + "_blocks" in other.state[q]) == narrow
    q.grad = torch.ones(shape)
    other.step()
    assert name == "SGD" or other.state[q]["step"] == 4


@pytest.mark.parametrize("shape", [(500,), (20, 30), (3, 2, 128), ()], ids=str)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("state_dtype", FORMATS)
def test_state_dicts_of_numbers(state_dtype, name, shape):
    """They have the keys of torch.optim's, which goes on from them; the state stays as it was."""
    p, opt = stepped(name, state_dtype, shape)
    kept = copy.deepcopy(opt.state_dict())
    opt._state_dict_dtype = "float32"
    saved = opt.state_dict()
    q = torch.nn.Parameter(p.detach().clone())
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    peer = getattr(torch.optim, name)([q], lr=0.01, **momentum)
    q.grad = torch.ones(shape)
    peer.step()
    theirs = peer.state_dict()
    assert saved["param_groups"][0].keys() == theirs["param_groups"][0].keys()
    assert saved["state"][0].keys() - {"step"} == theirs["state"][0].keys() - {"step"}
    assert all(value.dtype == torch.float32 for value in saved["state"][0].values())
    peer.load_state_dict(copy.deepcopy(saved))  # torch shares tensors
    states = ("momentum_buffer",) if name == "SGD" else ("exp_avg", "exp_avg_sq")
    for state in states:
        assert torch.equal(peer.state[q][state], numbers(opt, p, state))
    peer.step()
    opt._state_dict_dtype = None
    now = opt.state_dict()
    assert (
        now["param_groups"] == kept["param_groups"]
        and now["state"][0].keys() == opt.state[p].keys()
    )
    assert all(torch.equal(now["state"][0][k], v) for k, v in kept["state"][0].items())
    with pytest.raises(
        ValueError, match="^state_dict_dtype: expected None or 'float32', got 'int8'"
    ):
        getattr(fo, name)([p], lr=0.01, state_dict_dtype="int8")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((500,), (8,)), ((128,), (2,)), ((), (1,)), ((20, 30), (10,)), ((20, 128), (20, 2)),
        ((3, 2, 32), (3, 1)), ((3, 64, 3, 3), (3, 9)), ((0, 64), (0, 1)), ((5, 0), (5, 0)),
    ],
    ids=str,
)  # fmt: skip
def test_shape_of_blocks(shape, expected):
    """That of the parameter, but for the axes in a block; another one with as many loads too."""
    opt = fo.AdamW([leaf(*shape)], state_dtype="int8", min_8bit_size=0)
    opt.step()
    assert opt.state_dict()["state"][0]["exp_avg_blocks"].shape == expected
    saved = copy.deepcopy(opt.state_dict())
    for key in ("exp_avg_blocks", "exp_avg_sq_blocks"):
        saved["state"][0][key] = saved["state"][0][key].reshape(-1)
    opt.load_state_dict(saved)
    assert opt.state_dict()["state"][0]["exp_avg_blocks"].shape == expected
    opt.step()


def test_codes_under_the_names_of_torch_still_load():
    """As an older version wrote them, with blocks in memory order."""
    for order in (lambda x: x, lambda x: x.t().contiguous().t()):
        p, opt = stepped("AdamW", "int8", (20, 30))
        numbers_before = {name: numbers(opt, p, name) for name in ("exp_avg", "exp_avg_sq")}
        saved = copy.deepcopy(opt.state_dict())
        own = saved["state"][0]
        for name, values in numbers_before.items():
            codes, blocks = (torch.zeros(n, dtype=torch.uint8) for n in (p.shape, 10))
            codes, laid = order(codes), order(values)
            form = "uint8" if name.endswith("_sq") else "int8"
            Stored(form, codes.numpy(), blocks.numpy()).encode(laid.numpy())
            numbers_before[name] = torch.from_numpy(Stored(form, codes.numpy(), blocks.numpy())
                                                    .decode())  # fmt: skip
            del own[name + "_codes"]
            own[name], own[name + "_blocks"] = codes, blocks
        q, other = stepped("AdamW", None, (20, 30), steps=0)
        other.load_state_dict(saved)
        for name, values in numbers_before.items():
            assert torch.equal(other.state[q][name], values)
        r, other = stepped("AdamW", "int8", (20, 30), steps=0)
        other.load_state_dict(saved)
        assert "exp_avg_codes" in other.state[r] and "exp_avg" not in other.state[r]


CODES = torch.zeros(500, dtype=torch.uint8)
SPARSE = torch.zeros(500).to_sparse()


@pytest.mark.parametrize("state_dtype", FORMATS)
@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        ({"step": None}, "its state has no step"),
        ({"step": "a"}, "step: expected a tensor of one"),
        ({"step": torch.tensor(float("nan"))}, "step: is nan"),
        ({"step": torch.tensor(1.0, device="meta")}, "step: is on device meta"),
        ({"exp_avg": None}, "its state has no exp_avg,"),
        ({"exp_avg_sq": None}, "its state has no exp_avg_sq,"),
        ({"exp_avg": None, "exp_avg_sq": None}, "its state has no exp_avg, exp_avg_sq,"),
        ({"exp_avg_codes": CODES, "exp_avg_blocks": CODES[:8]}, "has exp_avg and exp_avg_codes"),
        ({"exp_avg": SPARSE}, "exp_avg: is a sparse_coo tensor"),
        ({"exp_avg_sq": torch.zeros(500, device="meta")}, "exp_avg_sq: is on device meta"),
        (
            {"exp_avg": torch.zeros(500, dtype=torch.complex64)},
            "exp_avg: is of dtype.*complex",
        ),
        ({"exp_avg": torch.zeros(500, dtype=torch.int64)}, "exp_avg: is of dtype torch.int64"),
        ({"ema": SPARSE}, "ema: is a sparse_coo tensor"),
        ({"ema": torch.zeros(500, dtype=torch.complex64)}, "ema: is of dtype torch.complex64"),
        ({"residual": SPARSE}, "residual: is a sparse_coo tensor"),
        ({"exp_avg": torch.zeros(7)}, r"exp_avg: shape \(7,\) does not fit"),
        ({"exp_avg": None, "exp_avg_codes": torch.zeros(500, dtype=torch.uint8)}, "exp_avg_blocks"),
        ({"exp_avg": None, "exp_avg_codes": torch.zeros(500)}, "exp_avg_codes: torch.float32, but"),
        (
            {
                "exp_avg": None,
                "exp_avg_codes": torch.zeros(500, dtype=torch.uint8),
                "exp_avg_blocks": torch.zeros(8),
            },
            "exp_avg_blocks",
        ),
        ({"exp_avg": 0.5}, "exp_avg: is a float; expected a tensor"),
        ({"ema": torch.zeros(500, 2)}, r"ema: shape \(500, 2\) does not fit"),
        ({"residual": torch.zeros(5, dtype=torch.int16)}, r"residual: shape \(5,\) does not fit"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_does_not_fit_changes_nothing(spoil, match, state_dtype):
    p, opt = stepped("AdamW", state_dtype)
    _, source = stepped("AdamW", None)
    saved = copy.deepcopy(source.state_dict())
    saved["param_groups"][0]["lr"] = 7.0
    saved["state"][0].update(spoil)
    before = {key: value.clone() for key, value in opt.state[p].items()}
    objects, groups = [opt.state, opt.param_groups], copy.copy(opt.param_groups[0])
    with pytest.raises(
        (TypeError, ValueError), match=r"^param_groups\[0\]\['params'\]\[0\].*" + match
    ):
        opt.load_state_dict(saved)
    assert opt.state[p].keys() == before.keys()
    assert all(torch.equal(opt.state[p][key], value) for key, value in before.items())
    assert objects[0] is opt.state and objects[1] is opt.param_groups
    assert groups == opt.param_groups[0]


@pytest.mark.parametrize("keep", ["without", "without a key"])
@pytest.mark.parametrize("name", ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
@pytest.mark.parametrize("module", [fo, torch.optim], ids=lambda m: m.__name__)
def test_a_part_of_the_state_is_missing(module, name, keep):
    """Of the second parameter; also of a state dict of torch.optim."""
    params = [leaf(5), leaf(6)]
    source = module.AdamW(params, amsgrad=True)
    source.step()
    saved = copy.deepcopy(source.state_dict())
    saved["state"][1].pop(name)
    if keep == "without":
        saved["state"][1][name] = None
    opt = fo.AdamW(params)
    with pytest.raises(ValueError, match=rf"\['params'\]\[1\]: its state has no {name},"):
        opt.load_state_dict(saved)
    assert not opt.state and not opt.param_groups[0]["amsgrad"]


@pytest.mark.parametrize("entries", [{}, {"momentum_buffer": None}])
def test_momentum_may_be_missing(entries):
    """As in torch, which starts a new buffer."""
    p, opt = stepped("SGD")
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0] = entries
    opt.load_state_dict(saved)
    opt.step()
    assert torch.equal(opt.state[p]["momentum_buffer"], p.grad)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_steps_that_were_counted_in_a_number(name):
    """As torch did before 1.12."""
    p, opt = stepped(name, ema=0.5)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["step"] = 3
    opt.load_state_dict(saved)
    opt.step()
    assert opt.state[p]["step"] == 4


def test_entries_of_others_stay_as_they_are():
    p, opt = stepped("SGD")
    opt.state[p]["mine"] = {"a": torch.ones(2, dtype=torch.float64)}
    opt.state["of no parameter"] = 5
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)
    assert opt.state[p]["mine"]["a"].dtype == torch.float64
    assert opt.state["of no parameter"] == 5 and "momentum_buffer" in opt.state[p]


def test_torchs_own_errors_change_nothing():
    p, opt = stepped("SGD")
    saved = copy.deepcopy(opt.state_dict())
    before = opt.state, opt.param_groups
    for groups in ([], [{**saved["param_groups"][0], "params": [0, 1]}]):
        with pytest.raises(ValueError, match="parameter group"):
            opt.load_state_dict({**saved, "param_groups": groups})
    assert (opt.state, opt.param_groups) == before and p in opt.state


@pytest.mark.parametrize("state_dtype", FORMATS)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_load_is_interrupted_at_any_moment(name, state_dtype):
    """At each line of Python code in it: all is loaded or nothing, and no hook stays."""
    p, opt = stepped(name, state_dtype)
    _, other = stepped(name, None, steps=5, ema=0.9)
    saved = [copy.deepcopy(opt.state_dict()), copy.deepcopy(other.state_dict())]
    saved[1]["param_groups"][0]["lr"] = 0.5

    def look():
        own = {key: value.clone() for key, value in opt.state[p].items()}
        return opt.param_groups[0]["lr"], own

    def alike(a, b):
        return a[0] == b[0] and a[1].keys() == b[1].keys() and all(
            torch.equal(a[1][key], b[1][key]) for key in a[1]
        )  # fmt: skip

    states = []
    for one in saved[::-1]:
        opt.load_state_dict(copy.deepcopy(one))
        states.append(look())
    outcomes, when, interrupted = set(), 0, True
    while interrupted:
        when += 1 if when <= 40 else 7  # the later lines are similar
        opt.load_state_dict(copy.deepcopy(saved[0]))
        loading = copy.deepcopy(saved[1])
        interrupted = interrupted_at(when, partial(opt.load_state_dict, loading))
        now = look()
        outcomes.add(next(i for i, state in enumerate(states) if alike(now, state)))
        assert torch.is_grad_enabled(), when
        assert not opt._optimizer_load_state_dict_pre_hooks
        assert not opt._optimizer_load_state_dict_post_hooks
    assert outcomes >= {1} and when > 100
    opt.load_state_dict(copy.deepcopy(saved[1]))
    assert alike(look(), states[0])


# ------------------------------------------------------------------ into torch.optim


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_torch_does_not_read_codes_as_numbers(name):
    """It finds no state of its names. (SGD without a buffer steps as in the first step.)"""
    p, opt = stepped(name, "int8")
    options = {"momentum": 0.9} if name == "SGD" else {}
    peer = getattr(torch.optim, name)([p], lr=0.01, **options)
    peer.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert not {"exp_avg", "exp_avg_sq", "momentum_buffer"} & set(peer.state[p])
    if name == "SGD":
        peer.step()
        assert torch.equal(peer.state[p]["momentum_buffer"], p.grad)
    else:
        with pytest.raises(KeyError, match="exp_avg"):
            peer.step()


@ignore_torchs_own
@pytest.mark.skipif(by_dcp not in WAYS, reason="this torch has no torch.distributed")
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize(
    ("before", "after", "missing"),
    [
        ((fo, "int8"), (fo, None), True),
        ((fo, "int8"), (torch.optim, None), True),
        ((fo, None), (fo, "int8"), True),
        ((torch.optim, None), (fo, "int8"), True),
        ((torch.optim, None), (fo, None), False),
        ((fo, None), (torch.optim, None), False),
        ((fo, "int8"), (fo, "int8"), False),
    ],
    ids=lambda x: f"{x[0].__name__.split('.')[0]}-{x[1]}" if isinstance(x, tuple) else "",
)
def test_dcp_between_formats(name, before, after, missing, tmp_path):
    """The numbers, or an error that names the missing key; never codes as numbers."""

    def build(module, state_dtype):
        torch.manual_seed(0)
        net = torch.nn.Linear(30, 20)
        options = {"momentum": 0.9} if name == "SGD" else {}
        if state_dtype is not None:
            options |= {"state_dtype": state_dtype, "min_8bit_size": 1}
        return net, getattr(module, name)(net.parameters(), lr=0.1, **options)

    a, opt = build(*before)
    a(torch.ones(1, 30)).square().mean().backward()
    opt.step()
    b, other = build(*after)
    state = "momentum_buffer" if name == "SGD" else "exp_avg"
    if missing:
        end = "_codes" if after[1] == "int8" else ""
        with pytest.raises(BaseException, match=rf"Missing key.*\.{state}({end}|_blocks)\b"):
            by_dcp(a, opt, b, other, tmp_path)
        return
    by_dcp(a, opt, b, other, tmp_path)
    assert torch.equal(numbers(opt, a.weight, state), numbers(other, b.weight, state))


@ignore_torchs_own
@pytest.mark.skipif(by_dcp not in WAYS, reason="this torch has no torch.distributed")
def test_dcp_of_torchs_bfloat16(tmp_path):
    """torch has no residual bits: only a partial load works, so that none of ours is lost."""
    from torch.distributed.checkpoint import DefaultLoadPlanner

    def build(module, **options):
        torch.manual_seed(0)
        net = torch.nn.Linear(30, 20).bfloat16()
        return net, module.AdamW(net.parameters(), lr=0.1, **options)

    a, opt = build(torch.optim)
    a(torch.ones(1, 30).bfloat16()).square().mean().backward()
    opt.step()
    b, other = build(fo)
    with pytest.raises(BaseException, match=r"Missing key.*\.residual"):
        by_dcp(a, opt, b, other, tmp_path)
    b, other = build(fo)
    by_dcp(a, opt, b, other, tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        own = other.state[q]
        assert torch.equal(p, q) and own["step"] == 1 and not own["residual"].any()
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(own[key], opt.state[p][key].float()), key


def test_numpy_and_torch_keep_the_same_codes():
    """Also for a transposed parameter; blocks follow the index here."""
    p, opt = stepped("AdamW", "int8", (20, 30))
    q = p.detach().t().contiguous().t()
    array = leaf(20, 30).detach().numpy()
    peer = fusedopt.AdamW([array], lr=0.01, state_dtype="int8", min_8bit_size=1)
    for seed in range(3):
        grad = torch.randn((20, 30), generator=torch.Generator().manual_seed(seed))
        peer.step([grad.numpy()])
    own = next(iter(peer.state.values()))
    assert torch.equal(q, torch.from_numpy(array))
    for name in ("exp_avg", "exp_avg_sq"):
        assert (own[name].data == opt.state[p][name + "_codes"].numpy()).all()
        assert (own[name].extra == opt.state[p][name + "_blocks"].numpy()).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ASGD", {"lr": 0.1, "lambd": 0.1, "t0": 2.0}),
        ("ASGD", {"lr": 0.3, "lambd": 1.0, "alpha": 2.0, "weight_decay": 0.1}),
        ("Rprop", {"lr": 0.1, "etas": (0.3, 1.5)}),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_a_run_changes_between_torch_and_ours(name, options, late):
    """At a rate that a scheduler has changed after the last step; with torch's state, all of it."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(50))
    q = torch.nn.Parameter(p.detach().clone())
    modules = itertools.cycle([fo, torch.optim] if late else [torch.optim, fo])
    opt, peer = (
        getattr(next(modules), name)([p], **options),
        getattr(torch.optim, name)([q], **options, foreach=False),
    )
    for step in range(12):
        if step % 3 == 2:
            saved = copy.deepcopy(opt.state_dict())
            opt = getattr(next(modules), name)([p], **options)
            opt.load_state_dict(saved)
            mine, its = saved["state"][0], peer.state_dict()["state"][0]
            assert mine.keys() == its.keys()
            for key, value in its.items():
                torch.testing.assert_close(mine[key], value, rtol=3e-6, atol=1e-6)
        grad = torch.randn(50)
        p.grad, q.grad = grad.clone(), grad
        opt.step()
        peer.step()
        torch.testing.assert_close(p, q, rtol=3e-6, atol=1e-6)
        for group in (*opt.param_groups, *peer.param_groups):
            group["lr"] = options["lr"] * 0.7 ** (step + 1)


def test_a_checkpoint_of_torchs_asgd_that_has_no_step():
    """And one whose numbers no rate explains: the group's is taken."""
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    fresh = torch.optim.ASGD([p], lr=0.1)
    opt = fo.ASGD([q])
    opt.load_state_dict(fresh.state_dict())
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    fresh.step()
    opt.step()
    torch.testing.assert_close(p, q)
    saved = copy.deepcopy(fresh.state_dict())
    saved["param_groups"][0].update(lambd=1.0, alpha=3.0)
    saved["state"][0]["eta"].fill_(1e10)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["last_lr"] == 0.1
    opt.step()
    assert torch.isfinite(q).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_that_a_loader_has_cast(dtype):
    """As torch's own load_state_dict does, where an optimizer around ours calls it."""
    nets = [model(), model()]
    opts = [fo.AdamW(net.parameters(), state_dtype="int8", min_8bit_size=0) for net in nets]
    for net, opt in zip(nets, opts, strict=True):
        train(net, opt, range(2))
    for own in opts[0].state.values():
        for key in [key for key in own if key.endswith(("_codes", "_blocks"))]:
            own[key] = own[key].to(dtype)
    for net, opt in zip(nets, opts, strict=True):
        train(net, opt, range(2, 4))
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)
    own = next(iter(opts[0].state.values()))
    assert own["exp_avg_codes"].dtype == own["exp_avg_blocks"].dtype == torch.uint8
    for wrong in (0.5, 256.0, -1.0, float("nan")):  # no codes
        own["exp_avg_codes"] = torch.full(own["exp_avg_codes"].shape, wrong, dtype=dtype)
        with pytest.raises(TypeError, match="exp_avg_codes: is of dtype"):
            train(nets[0], opts[0], [4])
