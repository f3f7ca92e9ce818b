"""fusedopt.torch: every trap on the way from a tensor to its memory."""

import copy
import gc
import threading
import weakref

import pytest
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


def strided(x):
    """A parameter with gaps."""
    return torch.empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)


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
    """Any mix of memory orders; where they differ, copies stand in, and state stays in place."""
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
    """A parameter is asked for its sign again when its data is another's."""
    p, q = leaf(6), leaf(6)
    opt, peer = fo.Adam([p]), torch.optim.Adam([q])
    for _ in range(2):
        opt.step()
        peer.step()
        p.data = neg_view(p.detach())
        q.data = neg_view(q.detach())
        assert p.is_neg()
    torch.testing.assert_close(p.detach().resolve_neg(), q.detach().resolve_neg())


@pytest.mark.parametrize("size", [6, 100_000])  # of which the small are shared from step to step
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
    refused(layer.weight, r"\['params'\]\[1\]\.grad: is a sparse_coo tensor.*sparse=False")


@since("2.6")
def test_named_in_errors():
    layer = torch.nn.Embedding(5, 3, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    opt = fo.SGD(layer.named_parameters(), lr=0.1)
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


def test_expanded_parameter():
    p = torch.zeros(1).expand(5).requires_grad_()
    p.grad = torch.zeros(5)
    refused(p, "elements share memory", ValueError)


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

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("another thread" in text for text in errors)
    assert int(opt.state[p]["step"]) == 41 - len(errors)


def test_devices_other_than_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    p = leaf(3)
    q = torch.nn.Parameter(p.detach().cuda())
    q.grad = p.grad.cuda()
    refused(q, "is on device cuda")
