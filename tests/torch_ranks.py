"""Run by tests/test_torch_distributed.py: the ranks of gloo groups, one group after another.

    python tests/torch_ranks.py FOLDER WORLD:SCENARIO,SCENARIO...

Each group has WORLD ranks, which are forks of this process: torch takes seconds to import. Each
scenario trains the same net with fusedopt.torch and with torch.optim, in the same engine, and
asserts that the parameters agree within 1e-6. FOLDER has the rendezvous and the checkpoints.
"""

import copy
import functools
import inspect
import itertools
import math
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import STEP_OPTIONS
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import fusedopt
import fusedopt.torch as fo

FOLDER = Path(sys.argv[1])
RANK = WORLD = 0  # each rank sets its own
OPTIONS = {"lr": 0.01, "weight_decay": 0.1}
MODULES = {"fusedopt": fo, "torch": torch.optim}


def net():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(10, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5)]
    return torch.nn.Sequential(*layers)  # 33 rows: the shards of two ranks differ in size


def batch(seed, world=None):
    """This rank's part of a batch; the whole batch is the same for any number of ranks."""
    x = torch.randn(8, 10, generator=torch.Generator().manual_seed(seed))
    return x if world == 1 else x.chunk(WORLD)[RANK]


def train(model, opt, seeds):
    for seed in seeds:
        opt.zero_grad()
        model(batch(seed)).square().mean().backward()
        opt.step()


def full(model):
    """The whole parameters, on every rank."""
    return [
        (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for p in model.parameters()
    ]


def agree(run: Callable):
    """Compare the models that run(module) returns for both modules."""
    ours, theirs = (full(run(MODULES[name])) for name in ("fusedopt", "torch"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def ddp(**options):
    def run(module):
        model = DistributedDataParallel(net(), **options)
        train(model, module.AdamW(model.parameters(), **OPTIONS), range(5))
        return model

    agree(run)


def ddp_buckets():
    ddp(gradient_as_bucket_view=True)


def zero():
    """Each rank steps its part of the parameters; rank 0 gathers the state."""

    def run(module, **options):
        model = DistributedDataParallel(net())
        cls = functools.partial(module.AdamW, **options)
        opt = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, **OPTIONS)
        train(model, opt, range(5))
        opt.consolidate_state_dict(to=0)
        if RANK == 0:
            states = opt.state_dict()["state"]
            assert len(states) == 4 and all(float(s["step"]) == 5 for s in states.values())
        return model

    agree(run)
    run(fo, state_dtype="int8", min_8bit_size=1)


def sharded(module, name="AdamW", base=OPTIONS, **more):
    from torch.distributed.fsdp import fully_shard  # since torch 2.6, and only here

    model = net()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    options = base | ({"momentum": 0.9} if name == "SGD" else {}) | more
    cls = getattr(module, name)
    known = inspect.signature(cls).parameters
    return model, cls(model.parameters(), **{k: v for k, v in options.items() if k in known})


def fsdp():
    whole = {name for name in fo.__all__ if getattr(fo, name)._rule.needs_whole}
    names = {name for name in fo.__all__ if hasattr(torch.optim, name)}
    for name in sorted(names - whole - {"Rprop"}):  # torch's Rprop takes no shards

        def run(module, name=name):
            model, opt = sharded(module, name)
            train(model, opt, range(5))
            assert all(hasattr(s, "to_local") for p in opt.state for s in opt.state[p].values()
                       if s.dim() > 0)  # fmt: skip
            return model

        agree(run)


def matrices():
    """Shards of a matrix are refused, a replica is stepped; ranks may have other matrices."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    wide, grad = torch.randn(6, 9), torch.randn(6, 9)
    for name, options in (("Muon", {}), ("Adafactor", {}), ("Prodigy", {"slice_p": 2})):
        cls, made = functools.partial(getattr(fo, name), lr=0.1, **options), {}
        for placement in (Shard(0), Replicate()):
            p = torch.nn.Parameter(distribute_tensor(wide.clone(), mesh, [placement]))
            p.grad = distribute_tensor(grad.clone(), mesh, [placement])
            opt = cls([p])
            try:
                opt.step()
            except ValueError as exc:
                assert "['params'][0]: is a shard, " in str(exc), exc
                assert not opt.state and torch.equal(p.full_tensor(), wide)
            else:
                made[placement] = p.to_local()
        alone = torch.nn.Parameter(wide.clone())
        alone.grad = grad
        cls([alone]).step()
        assert list(made) == [Replicate()] and torch.equal(made[Replicate()], alone)

    for name, options in (
        ("Muon", {"lr": 0.1}),
        ("Adafactor", {"lr": 0.1}),
        ("Prodigy", {"d0": 0.1}),
    ):
        cls = functools.partial(getattr(fo, name), max_grad_norm=0.5, stats=True, **options)
        both = [torch.nn.Parameter(wide.clone()), torch.nn.Parameter(2 * wide)]
        one = cls(both)
        mine = torch.nn.Parameter(both[RANK].detach().clone())
        part = cls([mine], process_group=dist.group.WORLD)
        both[0].grad, both[1].grad = grad, -grad
        mine.grad = both[RANK].grad
        for _ in range(2):
            one.step()
            part.step()
        torch.testing.assert_close(part.last_step.grad_norm, one.last_step.grad_norm)
        torch.testing.assert_close(mine, both[RANK], rtol=0, atol=1e-3 if name == "Muon" else 1e-6)
        if name == "Prodigy":
            assert part.param_groups[0]["d"] == one.param_groups[0]["d"] != 0.1


def whole_norm(run):
    """Compare (model, norms) of run(**options), on shards, with torch on whole tensors."""
    for options in ({"max_grad_norm": 0.05}, {"max_grad_norm": 0.02, "norm_type": math.inf}):
        model, norms = run(**options)
        peer = net()
        opt = torch.optim.AdamW(peer.parameters(), **OPTIONS)
        expected = []
        for seed in range(4):
            opt.zero_grad()
            peer(batch(seed, world=1)).square().mean().backward()
            expected.append(torch.nn.utils.clip_grad_norm_(
                peer.parameters(), options["max_grad_norm"], options.get("norm_type", 2.0)
            ).item())  # fmt: skip
            opt.step()
        torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected), rtol=1e-5, atol=0)
        for a, b in zip(full(model), peer.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=0, atol=2e-5)


def norms_of_shards():
    """FSDP2: the clip's norm, statistics and decisions are of whole tensors by default."""

    def run(accumulates, **options):
        model, opt = sharded(fo, stats=True, **options)
        sums = fo.GradAccumulator(model.parameters())
        norms = []
        for seed in range(4):
            if accumulates:
                for part in batch(seed).tensor_split(2):  # of 4 rows, or of 8
                    model(part).square().mean().backward()
                    sums.add(scale=0.5)
                opt.step(grads=sums)
                assert sums.count == 0 and sums.grads == [None] * 4
            else:
                train(model, opt, [seed])
            norms.append(opt.last_step.grad_norm)
            stats = opt.last_step.stats
            for p, norm in zip(full(model), stats.param_norm, strict=True):
                torch.testing.assert_close(p.norm().item(), norm, rtol=1e-6, atol=0)
            largest = math.inf in options.values()
            if not largest:
                total = math.sqrt((stats.grad_norm**2).sum())
                torch.testing.assert_close(total, norms[-1], rtol=1e-9, atol=0)
        return model, norms

    for accumulates in (False, True):
        whole_norm(functools.partial(run, accumulates))
    model, opt = sharded(fo, nonfinite="skip", zero_grads=True)
    train(model, opt, [0])
    before = full(model)
    model(batch(1)).square().mean().backward()
    if RANK == 1:  # NaN on one rank
        next(model.parameters()).grad.to_local().view(-1)[0] = math.nan
    opt.step()
    assert opt.last_step.skipped and opt.last_step.step == 1
    assert all(torch.equal(a, b) for a, b in zip(full(model), before, strict=True))
    assert all(not p.grad.full_tensor().any() for p in model.parameters())
    model(batch(1)).square().mean().backward()
    if RANK == 1:  # this rank has no gradient, but takes part in the sums
        for p in model.parameters():
            p.grad = None
    opt.step(max_grad_norm=1.0)
    assert not opt.last_step.skipped and opt.last_step.grad_norm > 0


def hybrid():
    """FSDP2 on a mesh of replicas and shards, with a clip: as whole tensors; through DCP too."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, WORLD // 2), mesh_dim_names=("replicas", "shards"))

    def made(**options):
        model = net()
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        return model, fo.AdamW(model.parameters(), **OPTIONS, **options)

    def run(**options):
        model, opt = made(**options)
        norms = []
        for seed in range(4):
            train(model, opt, [seed])
            norms.append(opt.last_step.grad_norm)
        return model, norms

    whole_norm(run)
    narrow = {"state_dtype": "int8", "min_8bit_size": 1, "state_dict_dtype": "float32"}
    model, opt = made(**narrow)
    train(model, opt, range(3))
    save(model, opt, "hybrid")
    resumed, other = made(**narrow)
    load(resumed, other, "hybrid")
    before, _ = whole_state(opt)
    for a, b in zip(before, whole_state(other)[0], strict=True):
        for key in a:
            torch.testing.assert_close(b[key], a[key], rtol=2**-3, atol=2**-13)
    train(resumed, other, [3])
    assert all(float(own["step"]) == 4 for own in other.state.values())


def norms_of_parts():
    """ZeRO: each rank steps other parameters; with process_group the norm is over all."""

    def run(**options):
        model = DistributedDataParallel(net())
        cls = functools.partial(fo.AdamW, process_group=dist.group.WORLD, **options)
        opt = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, **OPTIONS)
        norms = []
        for seed in range(4):
            train(model, opt, [seed])
            norms.append(opt.optim.last_step.grad_norm)
        return model, norms

    whole_norm(run)


def memory():
    """Where one rank alone has no memory for a step, or for a product, no rank takes it."""

    def fails(*args):
        raise MemoryError("none here")

    def no_room():  # real, but for what torch.distributed needs
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), resource.RLIM_INFINITY))

    small = torch.nn.Parameter(torch.ones(9))
    small.grad = torch.ones(9)
    fo.AdamW([small], process_group=dist.group.WORLD, stats=True).step()  # starts all threads
    for name, broken, shape in (
        ("AdamW", None, (1 << 22,)),
        ("Muon", "_new_direction", (5, 4)),
        ("Muon", "_replace", (5, 4)),
    ):
        p = torch.nn.Parameter(torch.ones(shape))
        p.grad = torch.full(shape, 0.5)
        cls = getattr(fo, name)
        opt = cls([p], lr=0.1, process_group=dist.group.WORLD, stats=True)
        if RANK == 1:
            if broken is None:
                no_room()
            else:
                setattr(opt, broken, fails)
        try:
            opt.step()
            raise AssertionError("no error")
        except (MemoryError, RuntimeError) as exc:
            others = "another rank cannot take this step"
            assert (others in str(exc)) == (RANK != 1), exc
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        assert torch.equal(p, torch.ones(shape)) and not opt.state
        if broken is not None and RANK == 1:
            delattr(opt, broken)
        opt.step()
        assert opt.last_step.step == 1 and not torch.equal(p, torch.ones(shape))


def decisions():
    """With every option of a step, ranks with other parts of the parameters do the same.

    They are shards, or whole parameters of a process group; and one rank may have no gradient, one
    that is not finite, one that a GradScaler found so, or one that no step can take.
    """
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (WORLD,))

    def shard(x):
        local = x.chunk(WORLD)[RANK].clone()
        return DTensor.from_local(local, mesh, [Shard(0)], shape=x.shape, stride=x.stride())

    def here(tensors, sharded):  # this rank's part
        return [x.chunk(WORLD)[RANK] for x in tensors] if sharded else [tensors[RANK]]

    plain = ("AdamW", {})

    def run(rule, options, sharded, event, accumulates):
        torch.manual_seed(0)
        start, grads = ([torch.randn(5, 4), torch.randn(7)] for _ in range(2))
        theirs = grads[0].chunk(WORLD)[1] if sharded else grads[1]  # of rank 1
        if event == "no gradient":
            for part in [g.chunk(WORLD)[1] for g in grads] if sharded else grads[1:]:
                part.zero_()
        elif event == "nan":
            theirs[0] = math.nan
        name, own = rule
        cls = functools.partial(getattr(fo, name), lr=0.01, **own)
        peers = [torch.nn.Parameter(x.clone()) for x in start]
        peer = cls(peers)
        if sharded:
            params = [torch.nn.Parameter(shard(x)) for x in start]
            opt = cls(params)
        else:
            params = [torch.nn.Parameter(start[RANK].clone())]
            opt = cls(params, process_group=dist.group.WORLD)

        def local(tensors):
            return [x.to_local() if sharded else x.detach() for x in tensors]

        def give():
            for p, g in zip(peers, grads, strict=True):
                p.grad = g.clone()
            for p, g in zip(params, grads if sharded else [grads[RANK]], strict=True):
                p.grad = shard(g) if sharded else g.clone()
                if event == "no gradient" and RANK == 1:
                    p.grad = None

        give()
        given = {}
        if accumulates:
            sums = fo.GradAccumulator(params)
            sums.add()
            given["grads"] = sums
            if event == "fault" and RANK == 1:
                other = [torch.nn.Parameter(torch.ones(3))]
                given["grads"] = fo.GradAccumulator(other) if sharded else other
        elif event == "fault" and RANK == 1:
            if sharded:
                params[1].grad._local_tensor = torch.zeros(3, dtype=torch.int32)
            else:
                params[0].grad = grads[1].to_sparse()
        if event == "found_inf":  # as GradScaler
            opt.grad_scale, opt.found_inf = None, torch.tensor(float(RANK == 1))
        measures = {"max_grad_norm", "nonfinite", "stats"} & options.keys()
        concerns = bool(measures) or rule != plain or accumulates
        raises = fault = None
        if event == "nan" and options.get("nonfinite") == "raise":
            raises = FloatingPointError
        elif event == "fault" and (RANK == 1 or concerns):
            raises = TypeError if RANK == 1 else RuntimeError
            if raises is TypeError and accumulates and sharded:
                raises = ValueError
        try:
            opt.step(**given, **options)
        except Exception as exc:
            fault = exc
        assert type(fault) is (raises or type(None)), fault
        assert raises is not RuntimeError or str(fault).startswith("another rank cannot take")
        if raises is not None or event == "found_inf":
            assert not opt.state and opt.last_step[:2] == (0, 0)
            for a, b in zip(local(params), here(start, sharded), strict=True):
                assert torch.equal(a, b)
            assert not accumulates or sums.count == 1
        if event == "found_inf":
            assert opt.last_step.skipped
        if raises is FloatingPointError or event == "found_inf":
            return
        if event == "fault":
            if not concerns:
                return  # then each rank is on its own
            give()
            opt.step(**({"grads": sums} if accumulates else {}), **options)
        peer.step(**options)
        mine, its = opt.last_step, peer.last_step
        known = slice(
            2, 4 if "per_tensor" in options else 5
        )  # a rank's own least factor is then told
        every = [None] * WORLD
        dist.all_gather_object(every, repr(mine[known]))
        assert len(set(every)) == 1, every
        norms = [[math.nan if x is None else x for x in step[known]] for step in (mine, its)]
        torch.testing.assert_close(*norms, rtol=1e-6, atol=0, equal_nan=True)
        if event == "no gradient" and sharded and rule != plain:
            return  # the ratio is then of the elements that have a gradient
        after = here([p.detach() for p in peers], sharded)
        if event == "no gradient" and RANK == 1:
            after = here(start, sharded)
        torch.testing.assert_close(local(params), after, rtol=0, atol=1e-6, equal_nan=True)

    rules = [plain, ("AdamW", {"cautious": True}), ("LAMB", {}), ("Prodigy", {"d0": 0.1})]
    rows = [*STEP_OPTIONS, {"nonfinite": "raise"}, {"nonfinite": "raise", "stats": True}]
    events = ["none", "no gradient", "nan", "fault", "found_inf"]
    cases = itertools.product(rules, [{}, *rows], [True, False], events)
    for number, case in enumerate(cases):
        try:
            run(*case, accumulates=number % 3 == 1 and case[3] != "found_inf")
        except Exception as exc:
            raise AssertionError(case) from exc


def faults():
    """What one rank alone finds wrong before a step is an error on all that depend on it."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh, lamb = init_device_mesh("cpu", (WORLD,)), "LAMB"
    rows = {  # message: options of the step, the rate
        "param_groups[0].lr: expected a number, got 'small'": ({}, "small"),
        "copy_out: expected a dict, or a list": ({"copy_out": []}, 0.1),
        "clip_value: must be > 0": ({"clip_value": -1.0}, 0.1),
    }
    kinds = [("AdamW", {}), ("AdamW", {"stats": True}), ("AdamW", {"nonfinite": "raise"}),
             ("AdamW", {"max_grad_norm": 1.0, "per_tensor": True}), (lamb, {})]  # fmt: skip

    def tried(call):
        try:
            call()
        except (TypeError, ValueError, RuntimeError) as exc:
            return str(exc)
        return ""

    def run(message, name, options, is_shard, by_parts):
        given, rate = rows[message]
        p = torch.nn.Parameter(torch.ones(8, 64))
        if is_shard:
            p = torch.nn.Parameter(distribute_tensor(torch.ones(8, 64), mesh, [Shard(0)]))
        p.grad = torch.ones_like(p)
        group = None if is_shard else dist.group.WORLD
        opt = getattr(fo, name)([p], lr=0.1, process_group=group)

        def step(**given):
            opt.step_params([p], **options, **given) if by_parts else opt.step(**options, **given)

        if RANK == 1:
            opt.param_groups[0]["lr"] = rate
        told = tried(lambda: step(**(given if RANK == 1 else {})))
        concerns = (name == lamb or bool(options)) and not (by_parts and not is_shard)
        if RANK == 1:
            assert message in told, told
        elif concerns:
            assert told.startswith("another rank cannot take this step"), told
        else:
            assert not told, told
        if RANK == 1 or concerns:
            own = p.to_local() if is_shard else p
            assert torch.equal(own, torch.ones_like(own)) and not opt.state
            opt.param_groups[0]["lr"] = 0.1
        if concerns:
            step()
            assert opt.last_step.step == 1

    for case in itertools.product(rows, kinds, (True, False), (True, False)):
        message, kind, *more = case
        try:
            run(message, *kind, *more)
        except Exception as exc:
            raise AssertionError(case) from exc

    # gradients that are redistributed by all, between and beside faults of one
    wrongs = ["rate", *itertools.product(("state", "copy"), range(4))]
    for wrong, by_parts in itertools.product(wrongs, (True, False)):
        params = [torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
                  for _ in range(4)]  # fmt: skip
        for p in params:
            p.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
        opt, copies, where = fo.SGD(params, lr=0.5, momentum=0.9), None, "lr: expected a number"
        if RANK == 1 and wrong == "rate":
            opt.param_groups[0]["lr"] = "small"
        elif RANK == 1:
            kind, k = wrong
            if kind == "state":  # found before the gradient is redistributed
                opt.state[params[k]] = where = "its state is a str"
            else:  # and after that
                copies, where = {params[k]: torch.ones(4, dtype=torch.int32)}, "copy_out of param"
        given = {} if copies is None else {"copy_out": copies}
        step = functools.partial(opt.step_params, params) if by_parts else opt.step
        told = tried(functools.partial(step, **given))
        assert (where in told) if RANK == 1 else not told, (wrong, told)
        changed = torch.full((4,), 1 - 0.5 * WORLD if RANK == 0 else 1.0)
        assert all(torch.equal(p.to_local(), changed) for p in params), wrong

    # groups, and state dicts
    p = torch.nn.Parameter(torch.ones(4))
    for group, error, match in (
        ("gloo", TypeError, "process_group: expected a torch.distributed.ProcessGroup, got str"),
        (dist.GroupMember.NON_GROUP_MEMBER, ValueError, "process_group: this rank is not in it"),
    ):
        try:
            fo.AdamW([p], process_group=group)
            raise AssertionError("made")
        except error as exc:
            assert match in str(exc), exc
    params = {}
    for place in ([Shard(0)], [Shard(1)], [Replicate()], None):
        x = torch.ones(64, 128)
        params[str(place)] = p = torch.nn.Parameter(
            x if place is None else distribute_tensor(x, mesh, place)
        )
        p.grad = torch.ones_like(p)
    for theirs, ours in itertools.permutations(params, 2):
        for options in ({}, {"state_dtype": "int8"}):
            opt, other = (fo.AdamW([params[k]], **options) for k in (theirs, ours))
            opt.step()
            told = tried(lambda opt=opt, other=other: other.load_state_dict(opt.state_dict()))
            if theirs == "None" and "Replicate" in ours:
                other.step()  # each rank has all of it
                continue
            where = "param_groups[0]['params'][0].exp_avg"
            fault = "is a DTensor, its parameter is not" if ours == "None" else "lies on the ranks"
            fault = "is a whole tensor, its parameter a shard" if theirs == "None" else fault
            assert told.startswith(where) and fault in told, (theirs, ours, told)
            assert not other.state


def trust_ratios():
    """Rates, counts and estimates are those of whole tensors, with and without a clip."""
    for name, options in (
        ("LAMB", {"lr": 0.05}),
        ("LAMB", {"lr": 0.05, "weight_decay": 0.3, "max_grad_norm": 0.1}),
        ("LARS", {"lr": 5.0, "weight_decay": 0.1}),
        ("AdamW", {"lr": 0.01, "cautious": True}),
        ("Lion", {"lr": 0.001, "cautious": True, "max_grad_norm": 0.1}),
        ("Prodigy", {"d0": 0.01}),
        ("Prodigy", {"d0": 0.01, "weight_decay": 0.1, "decouple": False, "max_grad_norm": 0.1}),
    ):
        model, opt = sharded(fo, name, base={}, **options)
        train(model, opt, range(4))
        peer = net()
        opt = getattr(fo, name)(peer.parameters(), **options)
        train_whole(peer, opt, range(4))
        for a, b in zip(full(model), peer.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=0, atol=2e-5)


def placements():
    """Gradients that lie on the ranks otherwise than the parameter; shards of a shard."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh, start = init_device_mesh("cpu", (WORLD,)), torch.arange(16.0).reshape(4, 4)
    for ours in (Replicate(), Shard(0), Shard(1)):
        for theirs in (Partial(), Replicate(), Shard(0), Shard(1)):
            p = torch.nn.Parameter(distribute_tensor(start.clone(), mesh, [ours]))
            is_sum = isinstance(theirs, Partial)
            make = DTensor.from_local if is_sum else distribute_tensor
            p.grad = make(start.clone(), mesh, [theirs])
            expected = start * (WORLD if is_sum else 1)
            opt = fo.SGD([p], lr=0.5, zero_grads=True, max_grad_norm=math.inf)
            opt.step()
            assert torch.equal(p.full_tensor(), start - 0.5 * expected), (ours, theirs)
            torch.testing.assert_close(opt.last_step.grad_norm, expected.double().norm().item())
            assert not p.grad.full_tensor().any() and p.grad.placements == (theirs,)
    p = torch.nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
    p.grad = distribute_tensor(start.clone(), mesh, [Shard(0)])
    before = p.full_tensor().clone()
    try:
        fo.SGD([p]).step(copy_out=[distribute_tensor(start.half(), mesh, [Replicate()])])
        raise AssertionError("written")
    except ValueError as exc:
        assert "copy_out of param_groups[0]['params'][0]: lies on the ranks as" in str(exc), exc
    assert torch.equal(p.full_tensor(), before)
    q = torch.nn.Parameter(before.clone())
    q.grad = p.grad
    try:
        fo.SGD([q]).step()
        raise AssertionError("written")
    except TypeError as exc:
        assert "params'][0].grad: is a DTensor, its parameter is not" in str(exc), exc
    strided = [_StridedShard(0, split_factor=2)]  # as of FSDP2 over tensor parallelism
    p = torch.nn.Parameter(DTensor.from_local(start.chunk(WORLD)[RANK].clone(), mesh, strided))
    p.grad = DTensor.from_local(start.chunk(WORLD)[RANK].clone(), mesh, strided)
    opt = fo.SGD([p], lr=0.5)
    opt.step(max_grad_norm=math.inf, stats=True)
    norm = start.double().norm().item()
    torch.testing.assert_close(opt.last_step.grad_norm, norm)
    torch.testing.assert_close(opt.last_step.stats.param_norm[0], 0.5 * norm)


def few_bytes():
    """Narrow state and parameters of shards: bits of the whole where a shard begins on a block."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    def place(x, mesh, placements):
        if placements != strided:
            return distribute_tensor(x.clone(), mesh, placements)
        own = x.chunk(2)[RANK % 2].chunk(2)[RANK // 2].clone()
        return DTensor.from_local(own, mesh, placements, shape=x.shape, stride=x.stride())

    strided = [_StridedShard(0, split_factor=2), Shard(0)]  # FSDP2 over tensor parallelism
    line, row, column = init_device_mesh("cpu", (WORLD,)), [Shard(0)], [Shard(1)]
    rows = [  # shape, mesh, placements, whether the bits agree, whether blocks are the whole's
        ((33, 64), line, row, True, True),
        ((34, 3, 128), line, row, True, True),
        ((1, 640), line, row, True, True),  # all but the first shard are empty
        ((512,), line, row, True, True),
        ((9, 64), line, [Replicate()], True, True),
        ((10, 33), line, row, False, False),
        ((100,), line, row, False, False),
        ((32, 3, 6), line, row, False, False),
        ((64, 3, 6), line, row, True, True),
        ((8, 256), line, column, False, True),
        ((8, 96), line, column, False, False),
        ((5, 96), line, row, False, False),
    ]
    if WORLD == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        rows = [
            ((33, 64), square, [Replicate(), Shard(0)], True, True),
            ((33, 64), square, [Shard(0), Replicate()], True, True),
            ((33, 64), square, [Shard(0), Shard(0)], True, True),
            ((32, 64), square, strided, True, True),
            ((33, 128), square, [Shard(0), Shard(1)], False, True),
            ((10, 33), square, [Replicate(), Shard(0)], False, False),
            *rows[:6],
        ]
    rules = [
        ("AdamW", {"lr": 0.01}),
        ("SGD", {"lr": 0.01, "momentum": 0.9}),
        ("Adagrad", {"lr": 0.01, "initial_accumulator_value": 0.3}),
    ]
    stores = [
        (torch.float32, {"state_dtype": "int8"}),
        (torch.float32, {"state_dtype": "bfloat16"}),
        (torch.bfloat16, {"master_bits": 24, "state_dtype": "int8"}),
        (torch.bfloat16, {"master_bits": 16}),
        (torch.float16, {}),
    ]

    def run(row, rule, options, store):
        shape, mesh, placements, same, has_blocks = row
        dtype, own = store
        own = {"min_8bit_size": 1, **options, **own}
        start = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        q, wide = (torch.nn.Parameter(start.to(t).clone()) for t in (dtype, torch.float32))
        p = torch.nn.Parameter(place(start, mesh, placements))
        first = torch.nn.Parameter(torch.ones(3))  # which has no gradient
        opt, peer = (getattr(fo, rule)([first, x], **own) for x in (p, q))
        best = getattr(fo, rule)([wide], **options)
        for step in range(4):
            q.grad = torch.randn(shape, generator=torch.Generator().manual_seed(9 + step)).to(dtype)
            wide.grad = q.grad.float()
            p.grad = place(q.grad, mesh, placements)
            for each in (opt, peer, best):
                each.step()
        whole = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in opt.state[p].items()}
        if same:
            assert torch.equal(p.full_tensor(), q)
            for key, value in peer.state[q].items():
                assert torch.equal(whole[key], value), key
        for x in (p.full_tensor(), q):  # against a run in float32
            error, moved = (x.float() - wide).norm(), (wide - start.float()).norm()
            limit = 0.1 * moved if dtype == torch.float32 else 2**-7 * wide.norm()
            assert error < limit < moved, (error, moved)
        if "int8" in own.values():
            saved, mine = opt.state_dict()["state"][1], opt.state[p]
            codes = {k: v for k, v in mine.items() if k.endswith("_codes")}
            for key, value in codes.items():
                name = key.removesuffix("_codes")
                assert value.placements == p.placements and value.dtype == torch.uint8
                assert hasattr(mine[f"{name}_blocks"], "to_local") == has_blocks
                assert (key in saved) == (f"{name}_blocks" in saved) == has_blocks
                assert has_blocks or saved[name].dtype == torch.float32
            assert codes and saved["step"] == 4
            refuses_others(opt, p, q.grad)

    def refuses_others(opt, p, grad):
        """Codes that lie on the ranks otherwise, as of other shards."""
        theirs = [Shard(0) if p.placements[0].is_replicate() else Replicate()]
        key = next(k for k in opt.state[p] if k.endswith("_codes"))
        codes = opt.state[p][key]
        opt.state[p][key] = distribute_tensor(
            codes.full_tensor(), p.device_mesh, theirs * len(p.placements)
        )
        before = p.full_tensor()
        try:
            opt.step()
        except ValueError as exc:
            assert f"params'][1].{key}: lies on the ranks as" in str(exc), exc
        else:
            raise AssertionError("stepped")
        assert torch.equal(p.full_tensor(), before)

    for case in itertools.product(rows, rules, stores):
        try:
            run(case[0], *case[1], case[2])
        except Exception as exc:
            raise AssertionError(case) from exc


def wide_net(module, **options):
    """A net of which one matrix is kept in blocks of the whole, and the rest in a shard's own."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5))
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    return model, module.AdamW(model.parameters(), **OPTIONS, **options)


NARROW = {"state_dtype": "int8", "min_8bit_size": 1}
SAVED = {  # by checkpoint
    "codes": (fo, NARROW),
    "numbers": (fo, {**NARROW, "state_dict_dtype": "float32"}),
    "bfloat16": (fo, {"state_dtype": "bfloat16", "state_dict_dtype": "float32"}),
    "float32": (torch.optim, {}),
}


def whole_state(opt):
    """State as numbers, whole, on every rank; and the codes that are the whole tensor's."""
    if isinstance(opt, fo.AdamW):
        opt = copy.copy(opt)
        codes = [{k: v.full_tensor() for k, v in own.items() if k.endswith("_codes")}
                 for own in opt.state_dict()["state"].values()]  # fmt: skip
        opt._state_dict_dtype = "float32"
    else:
        codes = []
    states = opt.state_dict()["state"].values()
    names = ("exp_avg", "exp_avg_sq")
    return [{k: own[k].full_tensor().float() for k in names} for own in states], codes


def few_save():
    """Resharding of narrow state, first part: train and save."""
    for name, (module, options) in SAVED.items():
        model, opt = wide_net(module, **options)
        for seed in range(3):
            opt.zero_grad()
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
            model(x.chunk(WORLD)[RANK]).square().mean().backward()
            opt.step()
        save(model, opt, f"few-{name}")
        states = whole_state(opt)
        if RANK == 0:
            torch.save(states, FOLDER / f"few-{name}.pt")


def few_load():
    """Second part, on other numbers of ranks: into the same format, and into others."""
    for before, after in [
        ("codes", "codes"), ("numbers", "numbers"), ("bfloat16", "bfloat16"),
        ("numbers", "float32"), ("bfloat16", "float32"),
        ("float32", "numbers"), ("float32", "bfloat16"), ("numbers", "bfloat16"),
    ]:  # fmt: skip
        module, options = SAVED[after]
        model, opt = wide_net(module, **options)
        load(model, opt, f"few-{before}")
        states, codes = torch.load(FOLDER / f"few-{before}.pt")
        now, codes_now = whole_state(opt)
        precision = {"float32": 0, "bfloat16": 2**-7}.get(after, 2**-3)
        for i, (a, b) in enumerate(zip(states, now, strict=True)):
            for key in a:
                exact = before == after == "bfloat16" or (before == after == "codes" and i == 0)
                torch.testing.assert_close(
                    b[key], a[key], rtol=0 if exact else precision, atol=0 if exact else 2**-13,
                    msg=f"{before} {after} {i} {key}",
                )  # fmt: skip
        if before == after == "codes":
            assert codes[0].keys() == {"exp_avg_codes", "exp_avg_sq_codes"}
            assert all(torch.equal(codes[0][k], codes_now[0][k]) for k in codes[0])
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
        model(x.chunk(WORLD)[RANK]).square().mean().backward()
        opt.step()
        assert all(float(own["step"]) == 4 for own in opt.state.values())
    model, opt = wide_net(torch.optim)
    try:
        load(model, opt, "few-codes")
    except BaseException as exc:  # a CheckpointException is no Exception
        assert "Missing key in checkpoint state_dict: optimizer.state." in str(exc), exc
    else:
        raise AssertionError("loaded")


def averages():
    """Evaluation on averages changes no later step, even if engines keep gathered weights."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))

    def computes_with(model, weights):
        whole = net()
        with torch.no_grad():
            for p, q in zip(whole.parameters(), weights, strict=True):
                p.copy_(q)
            torch.testing.assert_close(model(batch(99)), whole(batch(99)), rtol=0, atol=1e-6)

    for layers in (False, True):
        losses = {}
        for evaluates in (False, True):
            model = net()
            for layer in model if layers else []:
                if isinstance(layer, torch.nn.Linear):
                    fully_shard(layer, mesh=mesh, reshard_after_forward=False)
            fully_shard(model, mesh=mesh)  # the root always keeps what it gathered
            opt = fo.AdamW(model.parameters(), ema=0.9, **OPTIONS)
            losses[evaluates] = []
            for seed in range(4):
                opt.zero_grad()
                loss = model(batch(seed)).square().mean()
                loss.backward()
                opt.step()
                losses[evaluates].append(loss.item())
                if evaluates:
                    now = full(model)
                    mean = [average.full_tensor() for average in opt.ema_params().values()]
                    computes_with(model, now)
                    with opt.swap_ema():
                        computes_with(model, mean)
                    computes_with(model, now)
        assert losses[False] == losses[True], losses


def modes():
    """Train and eval mode on shards: the parameters, and what the model computes, of the whole."""
    from torch.distributed.fsdp import fully_shard

    model, whole = net(), net()
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)), reshard_after_forward=False)
    ours, theirs = (
        fo.ScheduleFreeAdamW(m.parameters(), lr=0.01, warmup_steps=2) for m in (model, whole)
    )

    def same():
        with torch.no_grad():
            torch.testing.assert_close(model(batch(99)), whole(batch(99)), rtol=0, atol=1e-6)
        for a, b in zip(full(model), full(whole), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

    for seed in range(4):
        for opt in (ours, theirs):
            opt.train()
        same()
        train(model, ours, [seed])
        train_whole(whole, theirs, [seed])
        same()
        y = full(model)
        average = [x.full_tensor() for x in ours.ema_params().values()]
        for opt in (ours, theirs):
            opt.eval()
        same()
        for x, p, before in zip(average, full(model), y, strict=True):
            torch.testing.assert_close(x, p, rtol=0, atol=0)
            assert not seed or not torch.equal(p, before)


def save(model, opt, name):
    state, opt_state = get_state_dict(model, opt)
    dcp.save({"model": state, "optimizer": opt_state}, checkpoint_id=FOLDER / name)


def load(model, opt, name):
    state, opt_state = get_state_dict(model, opt)
    both = {"model": state, "optimizer": opt_state}
    dcp.load(both, checkpoint_id=FOLDER / name)
    set_state_dict(model, opt, model_state_dict=both["model"], optim_state_dict=both["optimizer"])


def begin():
    """Resharding, first part (2 ranks): train and save."""

    def run(module):
        model, opt = sharded(module)
        train(model, opt, range(3))
        save(model, opt, f"begin-{module.__name__}")
        return model

    agree(run)


def go_on(before, after, seeds):
    def run(module):
        model, opt = sharded(module)
        load(model, opt, f"{before}-{module.__name__}")
        assert all(float(s["step"]) == seeds[0] for s in opt.state.values())
        train(model, opt, seeds)
        save(model, opt, f"{after}-{module.__name__}")
        return model

    agree(run)


def middle():
    """Second part (1 rank): load what 2 ranks saved."""
    go_on("begin", "middle", range(3, 6))


def end():
    """Third part (2 ranks again); compares the result with an uninterrupted run."""
    go_on("middle", "end", range(6, 9))
    model, opt = sharded(fo)
    load(model, opt, "end-fusedopt.torch")
    straight = net()
    train_whole(straight, torch.optim.AdamW(straight.parameters(), **OPTIONS), range(9))
    for a, b in zip(full(model), full(straight), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def train_whole(model, opt, seeds):
    for seed in seeds:
        opt.zero_grad()
        model(batch(seed, world=1)).square().mean().backward()
        opt.step()


def rank(number, world, scenarios):
    """One rank of a group, from its first scenario to its last."""
    global RANK, WORLD
    RANK, WORLD = number, world
    torch.set_num_threads(1)
    fusedopt.set_num_threads(max(1, fusedopt.get_num_threads() // world))
    # a file for each group: the addresses of a group that has ended stay in its file
    store = dist.FileStore(str(FOLDER / "-".join(["store", str(world), *scenarios])), world)
    dist.init_process_group("gloo", store=store, rank=number, world_size=world)
    for name in scenarios:
        start = time.perf_counter()
        globals()[name]()
        dist.barrier()
        seconds = time.perf_counter() - start
        print(f"rank {number} of {world}: {name}: passed in {seconds:.1f} s", flush=True)
    dist.destroy_process_group()


def fork(*arguments):
    """Start a rank; its process."""
    if process := os.fork():
        return process
    status = 1
    try:
        rank(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    # gloo's threads may hold work with tensors, and abort while the interpreter shuts down
    # (pytorch/pytorch#179291); test_processes.py tests how we end
    os._exit(status)


def main():
    for group in sys.argv[2:]:
        world, names = group.split(":")
        processes = {fork(i, int(world), names.split(",")) for i in range(int(world))}
        while processes:
            process, status = os.wait()
            processes.remove(process)
            if status:  # the others may wait for it
                for other in processes:
                    os.kill(other, signal.SIGKILL)
                sys.exit(f"{group}: a rank ended with status {status}")


if __name__ == "__main__":
    main()
