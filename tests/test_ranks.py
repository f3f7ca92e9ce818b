"""Sums over ranks between the reads and writes of a step: each rank has a part of every leaf."""

import threading

import numpy as np
import pytest
from cases import CASES, CLASSES, canonical

import fusedopt
from fusedopt import reference

SHAPES = [(6, 70), (9,), (1, 5), (1300,)]  # one rank has nothing of (1, 5)
# one case of each row of the C table and class: its last, with most options
RULES = list({(case.cls, case.is_layerwise): case for case in CASES}.values())
OPTIONS = [
    {"max_grad_norm": 0.5},
    {"max_grad_norm": np.inf, "grad_scale": -0.5},
    {"max_grad_norm": 0.2, "per_tensor": True},
    {"stats": True},
    {"max_grad_norm": 0.3, "stats": True, "zero_grads": True, "clip_value": 0.02},
]


class Ranks:
    """Two threads that sum arrays as MPI's Allreduce does."""

    def __init__(self):
        self.barrier, self.arrays, self.calls = threading.Barrier(2, timeout=20), [None, None], 0

    def reduce(self, rank):
        def add(array):
            assert array.dtype == np.float64 and array.flags.c_contiguous
            self.arrays[rank] = array
            self.barrier.wait()
            total = self.arrays[0] + self.arrays[1]
            self.calls += rank
            self.barrier.wait()
            array[...] = total

        return add

    def run(self, work):
        """Return work(rank, reduce) of both ranks."""
        results = [None, None]

        def target(rank):
            try:
                results[rank] = work(rank, self.reduce(rank))
            except BaseException as exc:
                results[rank] = exc

        threads = [threading.Thread(target=target, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


def arrays(seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]


def part(whole, rank):
    """A rank's part of each leaf, along the first axis."""
    return [a[: len(a) // 3].copy() if rank else a[len(a) // 3 :].copy() for a in whole]


def joined(parts):
    return [np.concatenate([a, b]) for b, a in zip(*parts, strict=True)]


def steps(module, case, options, cut=lambda whole: whole, grads=arrays, **more):
    params = cut(arrays(0))
    opt = getattr(module, case.cls)(params, **case.options, **case.class_options)
    return params, [opt.step(cut(grads(1 + step)), **options, **more) for step in range(3)], opt


def on_ranks(module, case, options, grads=arrays):
    ranks = Ranks()
    runs = ranks.run(
        lambda rank, reduce: steps(
            module, case, options, lambda whole: part(whole, rank), grads, reduce=reduce
        )
    )
    return runs, ranks


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", RULES, ids=str)
def test_parts_step_as_the_whole(case, options):
    params, results, _ = steps(fusedopt, case, options)
    runs, ranks = on_ranks(fusedopt, case, options)
    for a, b in zip(params, joined([run[0] for run in runs]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    for _, ours, _ in runs:
        for result, whole in zip(ours, results, strict=True):
            assert result[:3] == whole[:3]
            assert (result.grad_norm is None) == ("max_grad_norm" not in options)
            if result.grad_norm is not None:
                assert result.grad_norm == pytest.approx(whole.grad_norm, rel=1e-6)
            assert result.clip_factor == pytest.approx(whole.clip_factor, rel=1e-6)
            for column in ("grad_norm", "param_norm", "update_norm", "zero_fraction", "nonfinite"):
                if whole.stats is not None:
                    mine, its = (getattr(r.stats, column) for r in (result, whole))
                    np.testing.assert_allclose(mine, its, rtol=2e-5, err_msg=column)
    assert [r.clip_factor for r in runs[0][1]] == [r.clip_factor for r in runs[1][1]]
    measures = "max_grad_norm" in options
    calls = measures + case.is_layerwise + options.get("stats", False) * (2 - measures)
    assert ranks.calls == 3 * calls


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", RULES, ids=str)
def test_reference(case, options):
    """The reference on ranks gives the bits of the fast step on ranks."""
    ours, theirs = (on_ranks(module, case, options)[0] for module in (fusedopt, reference))
    for a, b in zip(ours, theirs, strict=True):
        assert [canonical(x) for x in a[0]] == [canonical(x) for x in b[0]]
        for mine, its in zip(a[1], b[1], strict=True):
            assert mine[:-1] == its[:-1]
            if mine.stats is not None:
                for column in mine.stats.COLUMNS:
                    np.testing.assert_array_equal(
                        getattr(mine.stats, column), getattr(its.stats, column), column
                    )


def test_every_class_is_in_the_table():
    assert {case.cls for case in RULES} == {cls.__name__ for cls in CLASSES}


@pytest.mark.parametrize("module", [fusedopt, reference], ids=["fast", "reference"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("case", RULES, ids=str)
def test_ranks_agree_on_what_to_skip(case, value, module):
    """A gradient that is not finite on one rank; the last step's is finite again."""

    def grads(seed):
        found = arrays(seed)
        if seed == 2:
            found[2][0, 1] = value  # which only rank 0 has
        return found

    runs, _ = on_ranks(module, case, {"nonfinite": "skip"}, grads)
    for _, results, _ in runs:
        assert [(r.step, r.skipped) for r in results] == [(1, False), (1, True), (2, False)]
    with pytest.raises(FloatingPointError, match=r"^grads\[2\]: 1 of 5 |^a gradient of another"):
        on_ranks(module, case, {"nonfinite": "raise"}, grads)


@pytest.mark.parametrize("module", [fusedopt, reference], ids=["fast", "reference"])
def test_what_is_not_finite_is_of_the_whole_leaf(module):
    def grads(seed):
        found = arrays(seed)
        found[0][...] = np.nan
        return found

    size = arrays(0)[0].size
    with pytest.raises(FloatingPointError, match=rf"^grads\[0\]: {size} of {size} "):
        on_ranks(module, RULES[0], {"nonfinite": "raise"}, grads)


def test_leaves_without_a_gradient_on_one_rank():
    def work(rank, reduce):
        params = part(arrays(0), rank)
        opt = fusedopt.AdamW(params, lr=0.1)
        grads = part(arrays(1), rank)
        if rank == 1:
            grads = [None] * len(grads)
        return opt.step(grads, max_grad_norm=1.0, stats=True, reduce=reduce)

    first, second = Ranks().run(work)
    alone = part(arrays(1), 0)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in alone))
    assert first.grad_norm == second.grad_norm == pytest.approx(norm, rel=1e-12)
    assert (first.updated, second.updated) == (4, 0)
    assert len(second.stats) == 0


def test_accumulated_gradients():
    """An accumulator's sums are of this rank, and are summed over ranks like measured ones."""

    def work(rank, reduce, options):
        params = part(arrays(0), rank)
        opt, total = fusedopt.SGD(params, lr=0.1), fusedopt.GradAccumulator(params)
        for seed in (1, 2):
            total.add(part(arrays(seed), rank), scale=0.5)
        return params, opt.step(total, reduce=reduce, **options)

    for options in ({"max_grad_norm": 0.5}, {}, {"stats": True}):
        runs = Ranks().run(lambda rank, reduce, o=options: work(rank, reduce, o))
        params, whole = arrays(0), [(a + b) / 2 for a, b in zip(arrays(1), arrays(2), strict=True)]
        result = fusedopt.SGD(params, lr=0.1).step(whole, **options)
        for a, b in zip(params, joined([run[0] for run in runs]), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
        for _, mine in runs:
            if "stats" in options:
                np.testing.assert_allclose(mine.stats.grad_norm, result.stats.grad_norm, rtol=1e-6)
                np.testing.assert_allclose(mine.stats.update_norm, result.stats.update_norm, 2e-5)
            if "max_grad_norm" in options:
                assert mine.grad_norm == pytest.approx(result.grad_norm, rel=1e-6)
            else:
                assert mine.grad_norm is None  # the norm of a part would mislead


@pytest.mark.parametrize("module", [fusedopt, reference], ids=["fast", "reference"])
@pytest.mark.parametrize("case", RULES, ids=str)
def test_a_reduction_that_fails_changes_nothing(case, module):
    params = arrays(0)
    opt = getattr(module, case.cls)(params, **case.options, **case.class_options)
    opt.step(arrays(1))
    before = [canonical(a) for a in params]

    def fail(array):
        array[...] = 1e9
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="network"):
        opt.step(arrays(2), max_grad_norm=1.0, zero_grads=True, reduce=fail)
    assert [canonical(a) for a in params] == before
    assert opt.step(arrays(2)).step == 2


@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
@pytest.mark.parametrize("case", RULES, ids=str)
def test_a_reduction_that_fails_at_any_call(case, options):
    """Before the first write nothing has changed; the last call with `stats` is behind it."""
    shapes, after = [], []
    for module in (fusedopt, reference):

        def failing(at, module=module):
            params, calls = arrays(0), []

            def reduce(array):
                calls.append(array.shape)
                if len(calls) == at:
                    raise OSError("the network is gone")

            opt = getattr(module, case.cls)(params, **case.options, **case.class_options)
            try:
                opt.step([*arrays(1)[:-1], None], reduce=reduce, **options)
            except OSError:
                assert len(calls) == at
            return opt.state["params[0]"]["step"], [canonical(a) for a in params], calls

        full = failing(0)
        shapes.append(full[2])
        late = options.get("stats", False) * (1 if "max_grad_norm" in options else 2)
        for at in range(1, 1 + len(full[2])):
            step, params, _ = failing(at)
            if at <= len(full[2]) - late:
                assert (step, params) == (0, [canonical(a) for a in arrays(0)])
            else:
                assert (step, params) == full[:2]
        after.append(full[1])
    assert shapes[0] == shapes[1]
    assert after[0] == after[1]


def test_bad_reductions():
    opt, grads = fusedopt.Adam(arrays(0)), arrays(1)
    with pytest.raises(TypeError, match="^reduce: expected a callable, got str"):
        opt.step(grads, max_grad_norm=1.0, reduce="sum")
    with pytest.raises(ValueError, match="^norm_type: reduce sums over ranks"):
        opt.step(grads, max_grad_norm=1.0, norm_type=np.inf, reduce=lambda array: None)
    called = []
    assert opt.step(grads, reduce=called.append).step == 1
    assert not called  # nothing is measured
