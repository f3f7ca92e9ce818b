"""Agreement with the library that a rule is from: every option crossed, with a rate that changes.

Within 1e-12 of the largest parameter in float64 and 3e-6 in float32, over 25 steps.
"""

import itertools

import numpy as np
import pytest

import fusedopt

torch = pytest.importorskip("torch", reason="compares with torch.optim: extra `peers`")

STEPS = 25
BOUND = {np.float32: 3e-6, np.float64: 1e-12}
FLAG = (False, True)
BETAS = ((0.9, 0.999), (0.6, 0.5))
# options of each rule, with the values that are crossed
OPTIONS = {
    "NAdam": {
        "betas": BETAS,
        "eps": (1e-8, 1e-3),
        "weight_decay": (0.0, 0.1),
        "momentum_decay": (4e-3, 1.0),
        "decoupled_weight_decay": FLAG,
        "maximize": FLAG,
    },
}


def rate(step):
    return 0.02 / (1 + 0.1 * (step % 7))


def trained(make, start, peer):
    """The parameters after some steps; torch's groups take the rate of each."""
    rng = np.random.default_rng(1)
    params = [torch.tensor(p, requires_grad=True) if peer else p.copy() for p in start]
    opt = make(params)
    for step in range(1, STEPS + 1):
        grads = [rng.standard_normal(p.shape).astype(p.dtype) for p in start]
        if peer:
            opt.param_groups[0]["lr"] = rate(step)
            for p, g in zip(params, grads, strict=True):
                p.grad = torch.tensor(g)
            opt.step()
        else:
            opt.step(grads)
    return [p.detach().numpy() if peer else p for p in params]


@pytest.mark.parametrize("dtype", BOUND, ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", OPTIONS)
def test_agrees_with_its_source(name, dtype):
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(shape).astype(dtype) for shape in [(3, 17), ()]]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.from_numpy(start[0]).dtype)  # of numbers that torch keeps
    try:
        for values in itertools.product(*OPTIONS[name].values()):
            options = dict(zip(OPTIONS[name], values, strict=True))
            ours = trained(
                lambda params: getattr(fusedopt, name)(params, lr=rate, **options),  # noqa: B023
                start,
                False,
            )
            theirs = trained(
                lambda params: getattr(torch.optim, name)(params, foreach=False, **options),  # noqa: B023
                start,
                True,
            )
            largest = max(np.abs(p).max() for p in theirs)
            worst = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
            assert worst <= BOUND[dtype] * largest, (options, worst / largest)
    finally:
        torch.set_default_dtype(before)
