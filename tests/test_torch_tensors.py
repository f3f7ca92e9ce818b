"""fusedopt.torch: tensors of all kinds, layouts and overlaps, and their memory."""

import copy
import gc
import threading
import weakref
from collections import UserDict

import pytest
from cases import in_two_threads
from test_interrupts import interrupted_at
from torch_cases import fo, leaf, since, torch, twins

from fusedopt import _torch_plain

# ------------------------------------------------------------------ memory


def neg_view(x):
    return torch._neg_view(-x)


def neg_strided(x):
    return torch.complex(torch.zeros_like(x), -x).conj().imag


@pytest.mark.parametrize("make", [neg_view, neg_strided])
@pytest.mark.parametrize("shape", [(6,), (1,), ()])
@pytest.mark.parametrize("role", ["grad", "param"])
def test_negative_bit(make, shape, role):
    def build():
        p = leaf(*shape)
        if role == "grad":
            p.grad = make(p.grad)
            assert p.grad.is_neg()
            return p
        view = make(p.detach())
        assert view.is_neg()
        view.requires_grad_()
        view.grad = p.grad
        return view

    p, opt, q, peer = twins(build)
    opt.step()
    peer.step()
    torch.testing.assert_close(p.detach().resolve_neg(), q.detach().resolve_neg())


NEGATIVES = {
    "view": lambda x: torch._neg_view(-x),
    "in place": lambda x: torch._neg_view(x.neg_()),  # of the same memory
    "strided": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
    "gaps": lambda x: torch._neg_view(strided(-x)),
}
ROLES = [
    "param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ema", "step", "residual",
    "exp_avg_codes", "exp_avg_blocks", "exp_avg_sq_codes", "exp_avg_sq_blocks",
]  # fmt: skip


@pytest.mark.parametrize("storage", [{}, {"state_dtype": "int8", "min_8bit_size": 1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", NEGATIVES)
@pytest.mark.parametrize("role", ROLES)
def test_the_sign_of_what_is_exchanged(role, make, dtype, storage):
    """Tensors of a run become negative views of the same values, once and again."""
    if make == "strided" and (dtype == torch.bfloat16 or role.endswith(("_codes", "_blocks"))):
        pytest.skip("torch has no complex numbers of these")
    if make == "gaps" and role == "step":
        pytest.skip("of one element")
    options = {"amsgrad": True, "ema": 0.9, "lr": 0.1} | storage
    params = [[leaf(130, seed=i, dtype=dtype) for i in range(2)] for _ in range(2)]
    opt, peer = (fo.AdamW(both, **options) for both in params)
    found = 0
    for step in range(6):
        for both in params:
            for i, p in enumerate(both):
                p.grad = torch.randn(130, generator=torch.Generator().manual_seed(step)).to(dtype)
                p.grad = p.grad * (i + 1)
        for p in params[0] if step % 2 else params[0][1:]:
            if role == "param":
                p.data = NEGATIVES[make](p.detach().resolve_neg())
            elif role == "grad":
                p.grad = NEGATIVES[make](p.grad)
            elif role in (own := opt.state.get(p, {})):
                own[role] = NEGATIVES[make](own[role].resolve_neg())
                assert own[role].is_neg()
            found += role in own if role not in ("param", "grad") else p.is_neg() or p.grad.is_neg()
        opt.step()
        peer.step()
        for p, q in zip(*params, strict=True):
            assert torch.equal(p.detach().resolve_neg(), q.detach())
            for key, value in peer.state[q].items():
                assert torch.equal(opt.state[p][key].resolve_neg(), value), key
    exists = {
        "residual": dtype == torch.bfloat16, "codes": bool(storage), "blocks": bool(storage),
        "avg": not storage, "sq": not storage,
    }  # fmt: skip
    assert found or not exists.get(role.split("_")[-1], True)


def strided(x):
    """A parameter with gaps."""
    return x.new_empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "gaps": strided,
}


@pytest.mark.parametrize("p_layout", LAYOUTS)
@pytest.mark.parametrize("g_layout", LAYOUTS)
@pytest.mark.parametrize("state_layout", LAYOUTS)
def test_layouts(p_layout, g_layout, state_layout):
    """Any mix of memory orders; if they differ, copies are stepped, and state stays in place."""
    torch.manual_seed(0)
    start, grad = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)

    def build():
        p = LAYOUTS[p_layout](start).requires_grad_()
        p.grad = LAYOUTS[g_layout](grad)
        return p

    p, opt, q, peer = twins(build)
    for _ in range(2):
        opt.step()
        peer.step()
        for key in ("exp_avg", "exp_avg_sq"):
            opt.state[p][key] = LAYOUTS[state_layout](opt.state[p][key])
        held = opt.state[p]["exp_avg"]
    opt.step()
    peer.step()
    assert opt.state[p]["exp_avg"] is held
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(held, peer.state[q]["exp_avg"])


def test_pointers_are_not_kept():
    p, opt, q, peer = twins(lambda: leaf(50))
    opt.step()
    peer.step()
    for o, x in ((opt, p), (peer, q)):
        x.data = x.data.clone()
        x.grad = x.grad.clone()
        o.state[x]["exp_avg"] = o.state[x]["exp_avg"].clone()
        o.step()
    torch.testing.assert_close(p, q)


def test_data_exchanged_for_a_negative():
    """The sign of a parameter is read again when its data is exchanged."""
    p, q = leaf(6), leaf(6)
    opt, peer = fo.Adam([p]), torch.optim.Adam([q])
    for _ in range(2):
        opt.step()
        peer.step()
        p.data = neg_view(p.detach())
        q.data = neg_view(q.detach())
        assert p.is_neg()
    torch.testing.assert_close(p.detach().resolve_neg(), q.detach().resolve_neg())


@pytest.mark.parametrize("size", [6, 100_000])
def test_state_lives_no_longer_than_in_the_optimizer(size):
    opt = fo.Adam([leaf(size)])
    opt.step()
    opt.step()
    own = next(iter(opt.state.values()))
    old = [weakref.ref(tensor) for tensor in own.values()]
    del own
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.step()
    assert [ref() for ref in old] == [None] * 3
    old = [weakref.ref(tensor) for tensor in next(iter(opt.state.values())).values()]
    del opt
    assert [ref() for ref in old] == [None] * 3


def test_a_cycle_through_a_hook_is_collected():
    p = leaf(6)
    opt = fo.SGD([p], momentum=0.9)
    p.register_hook(lambda _, opt=opt: None)
    for _ in range(2):
        p.exp().sum().backward()
        opt.step()
    gone = weakref.ref(p)
    del p, opt
    gc.collect()
    assert gone() is None


def test_subclass_with_memory_is_stepped():
    class Named(torch.Tensor):
        pass

    p, q = leaf(5), leaf(5)
    named = p.detach().as_subclass(Named).requires_grad_()
    named.grad = p.grad
    version = named._version
    fo.SGD([named], lr=0.1).step()
    assert named._version > version
    fo.SGD([q], lr=0.1).step()
    assert torch.equal(named.detach().as_subclass(torch.Tensor), q)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (1, 1), (3, 1, 2)])
def test_odd_shapes(shape):
    p, opt, q, peer = twins(lambda: leaf(*shape))
    for _ in range(2):
        opt.step()
        peer.step()
    torch.testing.assert_close(p, q)


def test_steps_counted_in_other_tensors():
    """float64 (default dtype), an integer, one element in an array."""
    for count in (torch.tensor(3.0, dtype=torch.float64), torch.tensor(3), torch.tensor([3.0])):
        p, opt, q, peer = twins(lambda: leaf(5))
        for o, x in ((opt, p), (peer, q)):
            o.step()
            o.state[x]["step"] = count.clone()
            o.step()
        assert opt.state[p]["step"].item() == 4
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("count", ["nan", "-5", "-0.5", "inf", "-inf", "2.5", "1e19"])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"ema": 0.9}])
def test_counts_that_no_run_could_have(count, kind, options):
    p, q = leaf(5), leaf(5, seed=1)
    opt = fo.AdamW([p, q], **options)
    opt.step()
    before = [t.detach().clone() for t in (p, q, *opt.state[p].values())]
    opt.state[q]["step"] = torch.tensor(float(count), dtype=kind)
    with pytest.raises(ValueError, match=r"\['params'\]\[1\]\.step: is .*, which is no number of"):
        opt.step()
    after = [p, q, *opt.state[p].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (UserDict, ": its state is a UserDict; expected a dict"),
        (list, ": its state is a list; expected a dict"),
        (lambda own: None, ": its state is a NoneType; expected a dict"),
        (lambda own: own | {"exp_avg": "m"}, r"\.exp_avg: is a str; expected a tensor"),
        (lambda own: own | {"step": 3}, r"\.step: expected a tensor of one element"),
    ],
)
def test_state_that_no_step_makes(spoil, match):
    p, q = leaf(5), leaf(5, seed=1)
    opt = fo.AdamW([p, q])
    opt.step()
    before = [t.detach().clone() for t in (p, q, *opt.state[p].values())]
    opt.state[q] = spoil(opt.state[q])
    with pytest.raises(TypeError, match=r"^param_groups\[0\]\['params'\]\[1\]" + match):
        opt.step()
    after = [p, q, *opt.state[p].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_long_runs_go_on():
    """torch counts in float32, which stops at 2**24; steps do not."""
    for count in (2.0**24, 2.0**61):
        p, opt, q, peer = twins(lambda: leaf(5))
        for o, x in ((opt, p), (peer, q)):
            o.step()
            o.state[x]["step"] = torch.tensor(count)
            o.step()
        torch.testing.assert_close(p, q)


# ------------------------------------------------------------------ kinds that C handles alone


class Mine(torch.nn.Parameter):
    pass


class Named(torch.Tensor):
    pass


KINDS = {
    "parameter": torch.nn.Parameter,
    "subclass of Parameter": Mine,
    "subclass of Tensor": lambda x: x.as_subclass(Named).requires_grad_(),
}


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"state_dtype": "int8", "min_8bit_size": 1}])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("api", [True, False], ids=["api", "capsules"])
def test_kinds_and_layouts_are_handled_in_c(api, kind, layout, options, monkeypatch):
    """With the bits of an ordinary, contiguous parameter, and no check in Python."""
    if not api:
        monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    torch.manual_seed(0)
    start, grads = torch.randn(2, 3, 4, 5), torch.randn(3, 2, 3, 4, 5)
    monkeypatch.setattr(fo.AdamW, "_stand_in", None)
    params = [kind(LAYOUTS[layout](start)), torch.nn.Parameter(start.clone())]
    opts = [fo.AdamW([p], lr=0.1, **options) for p in params]
    for grad in grads:
        for p, opt in zip(params, opts, strict=True):
            p.grad = grad.clone()
            opt.step()
    assert type(params[0]) is type(kind(start))
    assert torch.equal(params[0].detach().as_subclass(torch.Tensor), params[1])
    a, b = (opt.state[p] for p, opt in zip(params, opts, strict=True))
    assert all(torch.equal(torch.as_tensor(a[key]), b[key]) for key in b)


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch exports in Python"
)
def test_subclass_is_asked_for_its_gradient_alone():
    """Where its memory lies, and of which sign, needs no Python and is not its own to say."""
    asked = []

    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            asked.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    p = torch.zeros(3).as_subclass(Asked).requires_grad_()
    p.grad = torch.ones(3).as_subclass(Asked)
    opt = fo.SGD([p], lr=0.5, momentum=0.9)
    opt.step()
    asked.clear()
    opt.step()
    assert asked == [torch.Tensor.grad.__get__]
    del p.grad
    p.grad = torch._neg_view(torch.ones(3)).as_subclass(Asked)
    opt.step()
    goal = torch.zeros(3, requires_grad=True)
    peer = torch.optim.SGD([goal], lr=0.5, momentum=0.9)
    for sign in (1, 1, -1):
        goal.grad = torch.full((3,), float(sign))
        peer.step()
    assert torch.equal(p.detach().as_subclass(torch.Tensor), goal)


def test_subclass_with_a_dispatch_of_its_own():
    """Its memory may have another meaning, so it is refused."""

    class Strange(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise AssertionError("not to be called")

    p = torch.Tensor._make_subclass(Strange, torch.zeros(3), True)
    q = leaf(3)
    q.grad = torch.ones(3)
    opt = fo.SGD([q], lr=0.1, momentum=0.9)
    opt.step()
    opt.state[q]["momentum_buffer"] = p
    with pytest.raises(TypeError, match="momentum_buffer: is a Strange without memory of its own"):
        opt.step()


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True, "ema": 0.9}, {"state_dtype": "int8", "min_8bit_size": 1}]
)
def test_state_can_be_swapped(options):
    """torch.utils.swap_tensors needs tensors without other references."""
    p = leaf(70)
    opt = fo.AdamW([p], **options)
    opt.step()
    opt.step()
    for key, tensor in opt.state[p].items():
        other = tensor.clone()
        torch.utils.swap_tensors(tensor, other)
        assert opt.state[p][key] is tensor
    opt.step()
    q = leaf(70)
    peer = fo.AdamW([q], **options)
    for _ in range(3):
        peer.step()
    assert torch.equal(p, q)


# ------------------------------------------------------------------ refused


def refused(p, match, error=TypeError):
    good = leaf(4, seed=9)
    before = good.detach().clone()
    opt = fo.AdamW([good, p])
    with pytest.raises(error, match=match):
        opt.step()
    assert torch.equal(good, before) and len(opt.state) == 0


def test_sparse_gradient():
    layer = torch.nn.Embedding(5, 3, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    refused(layer.weight, r"\['params'\]\[1\]\.grad: is a sparse tensor.*sparse=False")


@since("2.6")
def test_named_in_errors():
    layer = torch.nn.Embedding(5, 3, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    opt = fo.Lion(layer.named_parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"\['params'\]\[0\] \(weight\)\.grad"):
        opt.step()


def test_meta():
    p = torch.nn.Parameter(torch.zeros(3, device="meta"))
    p.grad = torch.zeros(3, device="meta")
    refused(p, "is on device meta")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_dtypes(dtype):
    p = torch.zeros(3).to(dtype).requires_grad_()
    p.grad = torch.zeros(3).to(dtype)
    refused(p, "of dtype torch.*supported: float32")


@pytest.mark.filterwarnings("ignore")  # torch: quantization is deprecated
def test_quantized():
    p = torch.nn.Parameter(torch.zeros(3))
    opt = fo.Adam([p])
    p.grad = torch.zeros(3)
    opt.step()
    opt.state[p]["exp_avg"] = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8)
    with pytest.raises(TypeError, match="exp_avg: is of dtype torch.quint8"):
        opt.step()
    assert int(opt.state[p]["step"]) == 1


def test_fake_tensor():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        p = torch.nn.Parameter(torch.zeros(3))
        p.grad = torch.zeros(3)
    refused(p, "is a .* without memory of its own")


def test_inside_a_transform():
    seen = []

    def inner(x):
        p = x.detach()
        seen.append(p)
        with pytest.raises(TypeError, match="without memory of its own"):
            _torch_plain.local("p", p)
        return x.sum()

    torch.func.grad(inner)(torch.zeros(3))
    assert seen


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:1].expand(5),
        lambda x: x.as_strided((3, 4), (2, 1)),
        lambda x: x.as_strided((2, 2), (3, 3)),
        lambda x: x.as_strided((2, 3, 2), (8, 2, 3)),
    ],
)
@pytest.mark.parametrize("role", ["param", "state"])
def test_elements_that_share_memory(view, role):
    p = view(torch.zeros(40))
    if role == "param":
        p = p.requires_grad_()
        p.grad = torch.zeros(p.shape)
        refused(p, "elements share memory", ValueError)
        return
    q = leaf(*p.shape)
    opt = fo.SGD([q], lr=0.1, momentum=0.9)
    opt.step()
    opt.state[q]["momentum_buffer"] = p
    with pytest.raises(ValueError, match="momentum_buffer: elements share memory"):
        opt.step()


def test_many_axes():
    """torch copies up to 64 axes; without a copy there is no limit."""
    shape = (1,) * 69 + (5,)
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.ones(shape)
    fo.SGD([p], lr=0.5).step()
    assert p.flatten().tolist() == [-0.5] * 5
    p = torch.nn.Parameter(torch.zeros(10).as_strided(shape, (1,) * 69 + (2,)))
    p.grad = torch.ones(shape)
    refused(p, "has 70 axes, of at most 64", ValueError)


@pytest.mark.parametrize("view", [lambda x: x[:1].expand(5), lambda x: x.as_strided((5,), (7,))])
def test_gradients_may_repeat_or_have_gaps(view):
    def build():
        p = leaf(5)
        p.grad = view(torch.arange(40.0))
        return p

    p, opt, q, peer = twins(build)
    opt.step()
    peer.step()
    torch.testing.assert_close(p, q)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_the_same_parameter_twice():
    p = leaf(5)
    opt = fo.AdamW([p, p])
    with pytest.raises(ValueError, match=r"\['params'\]\[0\].*\['params'\]\[1\].*share memory"):
        opt.step()


def test_overlapping_parameters():
    base = torch.zeros(10)
    views = [base[:6].requires_grad_(), base[5:].detach().requires_grad_()]
    for view in views:
        view.grad = torch.ones_like(view)
    opt = fo.SGD(views, lr=0.1)
    with pytest.raises(ValueError, match="share memory"):
        opt.step()
    assert not base.any()


def test_columns_of_one_buffer():
    """Their ranges of memory overlap, but they share no element."""
    for dtype in (torch.float32, torch.bfloat16):
        base = torch.zeros(5, 12, dtype=dtype)
        views = [base[:, :4], base[:, 4:7], base[:, 8:]]
        views = [view.detach().requires_grad_() for view in views]
        for view in views:
            view.grad = torch.ones_like(view)
        opt = fo.SGD(views, lr=0.5, momentum=0.5)
        buffers = torch.zeros(5, 12)
        for step in range(3):
            opt.step()
            for view, columns in zip(views, (slice(4), slice(4, 7), slice(8, 12)), strict=True):
                if step == 0:
                    buffers[:, columns] = opt.state[view]["momentum_buffer"]
                opt.state[view]["momentum_buffer"] = buffers[:, columns]
        assert (base == -0.5 * (1 + 1.5 + 1.75)).sum() == 55 and (base[:, 7] == 0).all()
        assert (buffers == 1.75).sum() == 55


OVERLAPS = {
    "columns": lambda b: (b[:, :4], b[:, 3:]),
    "column and row": lambda b: (b[:, 2], b[3]),
    "row and column": lambda b: (b[3], b[:, 2]),
    "odd and even rows, and a column": lambda b: (b[::2, 1:], b[1::2, 1:], b[:, 5:6]),
    "a column within": lambda b: (b[:, :3], b[:, 4:], b[1:3, 2]),
    "one byte": lambda b: (b.view(torch.int32)[:, :4].view(b.dtype), b.flatten()[3:4]),
    "transposed": lambda b: (b[:, :4], b.t()[:4]),
    "the same": lambda b: (b[:, :4], b[:, :4]),
    "the whole": lambda b: (b[:, :4], b),
}


@pytest.mark.parametrize("role", ["param", "momentum_buffer", "ema", "both", "residual"])
@pytest.mark.parametrize("views", OVERLAPS.values(), ids=OVERLAPS)
@pytest.mark.parametrize("when", [0, 1])
def test_overlaps_with_gaps(when, views, role):
    """Of tensors that are stepped on copies, and of others; in the first step or a later one."""
    dtypes = {"param": torch.float32, "residual": torch.int16}
    base = torch.zeros(6, 8, dtype=dtypes.get(role, torch.float32))
    shared = [view.detach() for view in views(base)]
    params = [
        torch.nn.Parameter(
            torch.zeros(x.shape, dtype=torch.bfloat16 if role == "residual" else torch.float32)
        )
        for x in shared
    ]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = fo.SGD(params, lr=0.5, momentum=0.5, ema=0.5)
    for _ in range(when + (role != "param")):
        opt.step()
    for i, (p, x) in enumerate(zip(params, shared, strict=True)):
        if role == "param" or (role == "both" and i == 0):
            p.data = x
        else:
            opt.state[p]["momentum_buffer" if role == "both" else role] = x
    before = [t.clone() for t in (*params, base, *(t for s in opt.state.values() for t in
              s.values()))]  # fmt: skip
    with pytest.raises(ValueError, match=r"param_groups.* share memory"):
        opt.step()
    after = [*params, base, *(t for s in opt.state.values() for t in s.values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_random_views_of_one_buffer(dtype):
    """Refused exactly where two of them share an element."""
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        return int(torch.randint(n, (), generator=generator))

    outcomes = set()
    for _ in range(150):
        base = torch.zeros(60, dtype=dtype)
        marks, views, apart = torch.zeros(60, dtype=torch.int64), [], True
        for _ in range(3):
            shape, steps, at = (1 + draw(3), 1 + draw(4)), (5 + draw(8), 1 + draw(2)), draw(28)
            view = base.as_strided(shape, steps, at)
            marks.as_strided(shape, steps, at).add_(1)
            views.append(view.detach().requires_grad_())
            views[-1].grad = torch.ones_like(view)
            if _torch_plain.repeats(view):
                break
        else:
            apart = int(marks.max()) == 1
            opt = fo.SGD(views, lr=1.0, master_bits=16 if dtype.itemsize == 2 else None)
            if apart:
                opt.step()
                assert torch.equal(base, -marks.to(dtype))
            else:
                with pytest.raises(ValueError, match="share memory"):
                    opt.step()
                assert not base.any()
            outcomes.add(apart)
    assert outcomes == {True, False}


@pytest.mark.parametrize("layout", [lambda b: b[:, :4], lambda b: b.t()[:4]])
def test_a_gradient_in_a_parameter_with_gaps(layout):
    """Refused if they share an element; it may lie in the gaps."""
    for at, ok in ((0, False), (5, True)):
        base = torch.zeros(8, 8)
        base[:, 5] = 1
        p = layout(base).detach().requires_grad_()
        p.grad = torch.ones(p.shape)
        q = torch.nn.Parameter(torch.zeros(1))
        q.grad = base[3, at : at + 1]
        opt = fo.SGD([p, q], lr=0.5)
        if ok:
            opt.step()
            assert (p == -0.5).all()
        else:
            with pytest.raises(ValueError, match=r"\[1\]\.grad: shares memory with .*\[0\]"):
                opt.step()
            assert not p.any() and not q.any()


EXTRAS = {
    "residual": (torch.bfloat16, {}, "residual"),
    "residual of 24 bits": (torch.bfloat16, {"master_bits": 24}, "residual"),
    "blocks": (torch.float32, {"state_dtype": "int8", "min_8bit_size": 1}, "exp_avg_blocks"),
    "blocks of squares": (
        torch.float32, {"state_dtype": "int8", "min_8bit_size": 1}, "exp_avg_sq_blocks"
    ),
}  # fmt: skip


@pytest.mark.parametrize("other", ["extra", "param", "state"])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize(("dtype", "options", "key"), EXTRAS.values(), ids=EXTRAS)
def test_extras_overlap(dtype, options, key, gaps, other):
    """Residual bits and block exponents are written, too."""
    p, q = leaf(256, dtype=dtype), leaf(256, seed=1, dtype=dtype)
    opt = fo.AdamW([p, q], **options)
    opt.step()
    opt.step()
    if other == "extra":
        memory = opt.state[q][key]
    elif other == "param":
        memory = q.detach().view(opt.state[p][key].dtype)
    else:
        memory = opt.state[q][next(k for k in opt.state[q] if k.startswith("exp_avg_sq"))]
        memory = memory.view(opt.state[p][key].dtype)
    n = opt.state[p][key].numel()
    if gaps:  # every other element, the first one shared
        wide = torch.zeros(2 * memory.numel(), dtype=memory.dtype)
        if other == "extra":
            opt.state[q][key] = memory = wide[: memory.numel()]
        opt.state[p][key] = wide[::2][:n] if other == "extra" else memory[::2][:n]
        if opt.state[p][key].numel() < n:
            pytest.skip("does not fit")
    else:
        opt.state[p][key] = memory[:n]
    before = [t.detach().clone() for t in (p, q)]
    with pytest.raises(ValueError, match=rf"\['params'\]\[0\]\.{key}\b.*share memory"):
        opt.step()
    assert torch.equal(p, before[0]) and torch.equal(q, before[1])


def test_neighbours_in_one_buffer():
    base = torch.zeros(10)
    views = [base[:5].requires_grad_(), base[5:].detach().requires_grad_()]
    for view in views:
        view.grad = torch.ones_like(view)
    opt = fo.SGD(views, lr=0.5)
    for _ in range(2):
        opt.step()
    assert (base == -1).all()


def test_gradient_that_is_the_parameter():
    p = leaf(5)
    p.grad = p.detach()
    refused(p, r"\.grad: shares memory with", ValueError)


def test_overlap_is_found_when_addresses_change():
    p, q = leaf(5), leaf(5, seed=1)
    opt = fo.SGD([p, q], lr=0.1)
    opt.step()
    q.data = p.data
    with pytest.raises(ValueError, match="share memory"):
        opt.step()


def test_two_threads():
    p = leaf(4_000_000)
    opt = fo.Adam([p])
    opt.step()
    errors = []

    def work():
        for _ in range(20):
            try:
                opt.step()
            except RuntimeError as exc:
                errors.append(str(exc))

    in_two_threads(work)
    assert all("another thread" in text for text in errors)
    assert int(opt.state[p]["step"]) == 41 - len(errors)


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"state_dtype": "int8", "min_8bit_size": 1}])
def test_a_signal_in_the_first_step(options, monkeypatch):
    """At any moment at which Python code runs, which is before the first write."""
    original = torch.Tensor.__hash__
    outcomes = set()
    for when in range(1, 20):
        p, q = leaf(5), leaf(70, seed=1)
        before = [p.detach().clone(), q.detach().clone()]
        opt = fo.AdamW([p, q], **options)
        calls = []

        def interrupted(tensor, calls=calls, when=when):
            calls.append(None)
            if len(calls) == when:
                raise KeyboardInterrupt
            return original(tensor)

        monkeypatch.setattr(torch.Tensor, "__hash__", interrupted)
        try:
            opt.step()
        except KeyboardInterrupt:
            pass
        monkeypatch.undo()
        written = [not torch.equal(a, b) for a, b in zip(before, [p, q], strict=True)]
        assert written in ([True] * 2, [False] * 2)
        assert len(opt.state) == sum(written) and all(opt.state.values())
        assert [p._version, q._version] == [opt.last_step.step] * 2 == [int(written[0])] * 2
        assert torch.is_grad_enabled()
        outcomes.add((written[0], len(calls) >= when))
    assert outcomes == {(False, True), (True, False)}


def test_options_change_while_another_thread_steps():
    """A call that is refused leaves the constants of the step that is running."""
    p, q = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    groups = [{"params": [p], "lr": 1.0}, {"params": [q], "lr": 0.125}]
    opt = fo.SGD(groups, momentum=0.5)
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    make, faults = opt._make_state, []

    def other():
        opt.param_groups[0]["weight_decay"] = float("0")  # equal, another object
        try:
            opt.step()
        except RuntimeError as exc:
            faults.append(str(exc))

    def slow(group, i, param, own):
        if param is q:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        return make(group, i, param, own)

    opt._make_state = slow
    opt.step()
    assert p.tolist() == [-1.0] * 2 and q.tolist() == [-0.125] * 2
    assert len(faults) == 1 and "another thread" in faults[0]


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"state_dtype": "int8", "min_8bit_size": 1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad])
@pytest.mark.slow("interrupts a call again and again")
def test_autograd_after_a_first_step_that_was_interrupted(outside, dtype, options):
    """At each line of the Python code that makes the state."""
    when, interrupted = 0, True
    with outside():
        mode = torch.is_grad_enabled()
        while interrupted:
            when += 1
            opt = fo.AdamW([leaf(70, dtype=dtype)], **options)
            interrupted = interrupted_at(when, opt.step)
            now = torch.is_grad_enabled()
            torch.set_grad_enabled(mode)
            assert now == mode, when
    assert when > 50


def test_devices_other_than_the_cpu():
    """torch's own step is theirs; tests/torch_device.py has more, on a device made there."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    results = []
    for module in (fo, torch.optim):
        p, q = leaf(3), leaf(4)
        device_q = torch.nn.Parameter(q.detach().cuda())
        device_q.grad = q.grad.cuda()
        opt = module.AdamW([p, device_q], lr=0.1)
        for _ in range(3):
            opt.step()
        results.append([p.detach(), device_q.detach().cpu()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
