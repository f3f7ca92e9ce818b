"""Run by tests/test_torch_devices.py: parameters on the CPU and on a device made here.

The device's tensors are CPU tensors in disguise: its one kernel takes the disguise off, runs any
operation, and puts it on again. (Strides are not told, so views of views are wrong.) Raises
AssertionError if something is wrong.
"""

import copy
import pickle
import warnings

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import fusedopt.torch as fo

KNOWN = {}  # what is under the disguise, by storage


class Disguised(torch.Tensor):
    pass


def disguise(raw):
    made = torch._C._acc.create_empty_tensor(raw.shape, raw.dtype)
    made.__class__ = Disguised
    KNOWN[made.untyped_storage()._cdata] = raw
    return made


def bare(x):
    """The CPU tensor of one on the device; anything else as it is."""
    is_ours = isinstance(x, torch.Tensor) and x.device.type == "npy"
    return KNOWN[x.untyped_storage()._cdata] if is_ours else x


def kernel(op, *args, **kwargs):
    inputs = {}

    def inner(x):
        raw = bare(x)
        inputs[id(raw)] = x
        return torch.device("cpu") if isinstance(x, torch.device) else raw

    def outer(x):
        if not isinstance(x, torch.Tensor):
            return x
        return inputs[id(x)] if id(x) in inputs else disguise(x)

    args, kwargs = tree_map(inner, (args, kwargs))
    return tree_map(outer, op(*args, **kwargs))


def copy_from(source, target, non_blocking=False):
    bare(target).copy_(bare(source))
    return target


_setup_privateuseone_for_python_backend("npy")
LIBRARIES = [torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")]
LIBRARIES[0].fallback(kernel, "PrivateUse1")
LIBRARIES[1].impl("_copy_from", copy_from, "PrivateUse1")


def make(module, name, options, disguised):
    """Four parameters in two groups, each second one on the device, with their optimizer."""
    torch.manual_seed(0)
    params = []
    for k, shape in enumerate([(6, 9), (5, 7), (3, 4), (2, 8)]):
        start = torch.randn(shape)
        params.append(torch.nn.Parameter(disguise(start) if disguised and k % 2 else start))
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.03}]
    return params, getattr(module, name)(groups, **{"lr": 0.1, **options})


def give(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        grad = torch.randn(p.shape, generator=generator)
        p.grad = disguise(grad) if p.device.type == "npy" else grad


def values(tensors):
    return [bare(x.detach()).clone() for x in tensors]


def contents(opt):
    params = [p for group in opt.param_groups for p in group["params"]]
    return values([*params, *(
        opt.state[p][key] for p in params if p in opt.state for key in sorted(opt.state[p])
    )])  # fmt: skip


def close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def agrees(name, options):
    """Steps, a state dict from and to torch, and step_params, are torch's on each device."""
    params, opt = make(fo, name, options, True)
    peers, peer = make(torch.optim, name, options, False)
    hooks = []
    opt.register_step_post_hook(lambda *args: hooks.append(args))
    for step in range(1, 9):
        give(params, step)
        give(peers, step)
        peer.step()
        if step < 5 or opt._rule.remembers:
            opt.step()
        else:
            for p in reversed(params):
                opt.step_params([p])
        assert opt.last_step[:2] == (step, 4 if step < 5 or opt._rule.remembers else 1)
        close(values(params), values(peers))
        if step == 3:
            saved = pickle.loads(pickle.dumps(tree_map(bare, opt.state_dict())))
            peer.load_state_dict(saved)
            assert all("step" not in own or own["step"] == 3 for own in saved["state"].values())
        if step == 4:
            theirs = [dict(opt.state[p]) for p in params[1::2]]
            opt.state_dict()  # which notes the numbers of a rule, but where torch keeps them
            for own, p in zip(theirs, params[1::2], strict=True):
                assert all(opt.state[p][key] is value for key, value in own.items())
            before = contents(opt)
            opt.load_state_dict(copy.deepcopy(tree_map(bare, opt.state_dict())))
            devices = {p.device.type for own in opt.state.values() for key, p in own.items()
                       if isinstance(p, torch.Tensor) and p.dim()}  # fmt: skip
            assert devices <= {"cpu", "npy"}
            for a, b in zip(contents(opt), before, strict=True):
                assert torch.equal(a, b)
    assert len(hooks) == (8 if opt._rule.remembers else 4)


def refused(opt, params, error, match, **options):
    give(params, 99)
    before = contents(opt)
    try:
        opt.step(**options)
    except error as exc:
        assert match in str(exc), exc
    else:
        raise AssertionError(f"no {error.__name__}: {match}")
    for a, b in zip(contents(opt), before, strict=True):
        assert torch.equal(a, b)


def main():
    whole = {name for name in fo.__all__ if getattr(fo, name)._rule.demand_shape is not None}
    torchs = [name for name in fo.__all__ if hasattr(torch.optim, name)]
    for name in torchs:
        for options in ({}, {"weight_decay": 0.1}):
            if name == "Rprop" and options:
                continue
            agrees(name, options)
    agrees("SGD", {"momentum": 0.9})
    agrees("Adam", {"amsgrad": True})
    assert whole <= set(torchs)

    where = "param_groups[0]['params'][1]: is on device npy:0"
    for name in sorted(set(fo.__all__) - set(torchs)):
        params, opt = make(fo, name, {}, True)
        if opt._rule.average is not None:
            opt.train()
        for group in opt.param_groups if opt._rule.share is not None else ():
            group["lr"] = 0.1  # the same in all
        refused(opt, params, TypeError, where + "; fusedopt steps on the CPU")
    for options in ({"max_grad_norm": 1.0}, {"zero_grads": True}, {"stats": True}):
        params, opt = make(fo, "AdamW", {}, True)
        refused(opt, params, ValueError, where + ", where torch's own step is taken, which has no"
                " options of a step", **options)  # fmt: skip
    for name, value in {"ema": 0.9, "cautious": True}.items():
        params, opt = make(fo, "AdamW", {name: value}, True)
        refused(opt, params, ValueError, f"own step is taken, which has no {name}")
    params, opt = make(fo, "AdamW", {}, True)
    give(params, 1)
    params[2].grad = params[2].grad.to_sparse()  # a fault on the CPU: no device is stepped
    before = contents(opt)
    try:
        opt.step()
        raise AssertionError("no error")
    except TypeError as exc:
        assert "sparse" in str(exc)
    for a, b in zip(contents(opt), before, strict=True):
        assert torch.equal(a, b)

    params, opt = make(fo, "AdamW", {"state_dtype": "int8", "min_8bit_size": 0}, False)
    give(params, 1)
    opt.step()
    params, other = make(fo, "AdamW", {}, True)
    try:
        other.load_state_dict(opt.state_dict())
        raise AssertionError("no error")
    except ValueError as exc:
        assert where + ", and its state in 8-bit codes" in str(exc)
    assert not other.state

    params, opt = make(fo, "AdamW", {"max_grad_norm": 1.0}, False)
    peers, peer = make(fo, "AdamW", {"max_grad_norm": 1.0}, False)
    sums = fo.GradAccumulator(params)
    for p, q in zip(params, peers, strict=True):  # gradients that come from the device
        parts = torch.randn(2, *p.shape)
        q.grad = parts.sum(0)
        for part in parts:
            sums.add({p: disguise(part)})
    opt.step(grads=sums)
    peer.step()
    for a, b in zip(contents(opt), contents(peer), strict=True):
        assert torch.equal(a, b)
    assert opt.last_step == peer.last_step and sums.count == 0
    try:
        fo.GradAccumulator(make(fo, "AdamW", {}, True)[1].param_groups)
        raise AssertionError("no error")
    except TypeError as exc:
        assert where in str(exc)


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
    print("passed")
