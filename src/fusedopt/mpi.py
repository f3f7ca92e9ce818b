"""Optimizers whose state is spread over ranks: ZeRO-1, over mpi4py or torch.distributed.

Each rank has all parameters and its own gradients. A step adds the gradients over ranks, so that
each rank gets the sum for its part; steps that part; and copies the parts to all ranks. An
optimizer of the class itself, `Sharded._inner`, steps the parts: its leaves are views of them.

No rank may raise alone after the point where others wait for it. What can fail comes first, then
the ranks agree that nothing has failed, then data travels. Signals are deferred meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from math import lcm
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from fusedopt import (
    _arrays,
    _check,
    _checkpoint,
    _core,
    _fitting,
    _options,
    _parts,
    _shards,
    _storage,
    _threads,
    _tree,
)  # fmt: skip
from fusedopt._check import Array
from fusedopt._comms import MPI, DeferredSignals, TorchDistributed, agree, comm_of
from fusedopt._options import Reduction, StepResult
from fusedopt._parts import Comm
from fusedopt._rows import Rows
from fusedopt._spread import Named, Parts, Spread
from fusedopt.accumulate import GradAccumulator
from fusedopt.formats import flat, memory_order
from fusedopt.optimizer import Optimizer
from fusedopt.rule import Options, Rule

__all__ = ["Comm", "MPI", "Sharded", "TorchDistributed"]

T = TypeVar("T")


class Sharded:
    """An optimizer whose state is spread over ranks; steps with the mean of their gradients.

    All ranks make it of equal parameters and options, and call its methods together, in the same
    order. Each has ``1 / ranks`` of the state. The parameters after a step are those of an
    optimizer of the class itself that steps with the mean of the gradients: to the bit on 1 and on
    2 ranks, and within the rounding of the sum on more; what depends on a norm over a leaf that is
    cut (a clip, a trust ratio) is within the rounding of that. Sums are taken in the order of the
    ranks, so that all runs on as many ranks give the same bits.

    A call that raises on one rank before data travels (a gradient of the wrong shape, no memory, a
    signal's exception) raises on all of them, on the others a RuntimeError with its message, and
    has changed nothing. After that, exceptions of signals wait until the call has ended. An error
    of a disk that has state raises on all ranks too: if parts were stepped, none takes another step
    until a checkpoint of parameters and state is loaded.

    Parameters
    ----------
    cls : class
        One of the package's optimizers, such as `fusedopt.AdamW`. With a rule that needs whole
        matrices each leaf is on one rank.
    params : array, nesting of arrays, or list of groups
        As for the class, equal on all ranks; no `Stored`.
    comm : mpi4py.MPI.Intracomm, ProcessGroup, or `Comm`
        The ranks.
    wire_dtype : None or "bfloat16", default None
        In which dtype gradients travel: None for their own; or rounded to bfloat16, also those of
        this rank, before they are added in float32.
    **options
        As for the class.

    Raises
    ------
    TypeError, ValueError
        Naming the leaf, the option, or what is not the same on all ranks.

    Examples
    --------
    >>> from mpi4py import MPI  # doctest: +SKIP
    >>> opt = fusedopt.mpi.Sharded(fusedopt.AdamW, params, MPI.COMM_WORLD)  # doctest: +SKIP
    >>> opt.step(grads, max_grad_norm=1.0)  # doctest: +SKIP
    StepResult(step=1, updated=12, grad_norm=3.2, clip_factor=0.31)
    """

    def __init__(
        self,
        cls: type[Optimizer],
        params: Any,
        comm: Any,
        *,
        wire_dtype: str | None = None,
        **options: Any,
    ) -> None:
        """Cut the parameters, and make the optimizer of this rank's parts."""
        self._comm = comm_of(comm)
        with self._deferring() as signals:
            self._together(
                lambda: self._make(cls, params, wire_dtype, options), self._described, signals
            )

    def _make(self, cls: Any, params: Any, wire_dtype: Any, options: Options) -> None:
        if not (isinstance(cls, type) and issubclass(cls, Optimizer) and hasattr(cls, "rule")):
            raise TypeError(f"cls: expected a class as fusedopt.AdamW, got {cls!r}")
        if wire_dtype not in (None, "bfloat16"):
            raise ValueError(f"wire_dtype: expected None or 'bfloat16', got {wire_dtype!r}")
        self._wire: str = wire_dtype or ""
        self._spread = Spread(self._comm, not cls.rule.needs_whole)
        self._whole = self._spread.whole
        self._inner: Optimizer = cls.__new__(cls)

        def begin(parts: Parts) -> None:
            self._inner._parts = parts
            cls.__init__(self._inner, params, **options)

        if _tree.is_groups(params):
            leaves = [_leaves(i, group["params"]) for i, group in enumerate(params)]
            unit = _unit(cls.rule, options, *params)
        else:
            leaves, unit = [_leaves(None, params)], _unit(cls.rule, options)
        self._spread.add(sum(leaves, []), unit, begin)
        self._spread.mover = self._spread.plan()

    def _described(self, *new: Options) -> dict[str, str]:
        """Return what must be equal on all ranks; `new` are options of groups that are added."""
        about = [
            f"{name} {param.dtype} {param.shape}, strides {param.strides}"
            for name, param in zip(self._whole.names, self._spread.params, strict=True)
        ]
        return {
            "cls": self._inner._class_name(),
            "wire_dtype": self._wire,
            "params": "\n".join(about),
            "options": self._group_options(*new),
            "state_dir": "none" if self._inner._disk is None else "a folder",
        }

    def _group_options(self, *new: Options) -> str:
        return "\n".join(
            f"{name}={'a schedule' if callable(value) else value!r}"
            for options in (*(group.options for group in self._inner._groups), *new)
            for name, value in options.items()
        )

    def _together(
        self,
        prepare: Callable[[], T],
        said: Callable[[], Mapping[str, str]] | None = None,
        signals: DeferredSignals | None = None,
    ) -> T:
        """Return what `prepare` returns; raise on all ranks if it raises on one."""
        fault: BaseException | None = None
        value: Any = None
        about = None
        try:
            value = prepare()
            about = None if said is None else said()
            if signals is not None:
                signals.check()
        except BaseException as exc:
            fault = exc
        agree(self._comm, fault, about)
        return value  # type: ignore[no-any-return]

    def _settled(
        self, act: Callable[[Callable[..., None]], object], signals: DeferredSignals
    ) -> None:
        """Call `act(settle)`, which calls `settle` when nothing more can fail.

        There the ranks agree: what one raises before raises on all, and so do texts that differ.
        """
        is_alone = True

        def settle(said: Mapping[str, str] | None = None) -> None:
            nonlocal is_alone
            signals.check()
            is_alone = False
            agree(self._comm, None, said)

        try:
            act(settle)
        except BaseException as exc:
            if is_alone:
                agree(self._comm, exc)
            raise

    def _deferring(self) -> DeferredSignals:
        return DeferredSignals(self._comm.size > 1)

    # -------------------------------------------------------------- what there is

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add parameters with options of their own, the same on all ranks.

        The parts of other leaves stay where they are. The new leaves are cut so that ranks have
        about equally much of all.

        Parameters
        ----------
        group : dict
            As for `Optimizer.add_param_group`; no `Stored`.

        Raises
        ------
        TypeError, ValueError
            As `Optimizer.add_param_group`; and naming what is not the same on all ranks.
        RuntimeError
            With the message of another rank that cannot add the group.
        """
        inner, mover = self._inner, self._spread.mover

        def add(settle: Callable[[Mapping[str, str]], None]) -> None:
            leaves, unit = [], _core.TILE
            if isinstance(group, Mapping) and "params" in group:  # else the class refuses it
                leaves = _leaves(len(inner._groups), group["params"])
                unit = _unit(inner.rule, inner.defaults, group)

            def plan(options: Options) -> None:
                nonlocal mover
                mover = self._spread.plan()
                settle(self._described(options))

            def begin(parts: Parts) -> None:
                before = inner._parts
                inner._parts = {**(before or {}), **parts}
                try:
                    with inner._work:
                        inner._add_param_group(group, plan)
                except BaseException:
                    inner._parts = before
                    raise

            self._spread.add(leaves, unit, begin)

        with self._whole, DeferredSignals(True) as signals:
            self._settled(add, signals)
            self._spread.mover = mover

    @property
    def rule(self) -> Rule:
        """The rule of the class."""
        return self._inner.rule

    @property
    def defaults(self) -> Options:
        """The options of a group that gives none."""
        return self._inner.defaults

    @property
    def param_groups(self) -> list[Options]:
        """The groups, as those of the class itself; changes must be made on all ranks."""
        return self._inner.param_groups

    @property
    def state(self) -> dict[str, dict[str, Any]]:
        """The state of this rank's part, by leaf name: flat arrays; see `parts`."""
        return self._inner.state

    @property
    def parts(self) -> dict[str, range]:
        """The elements of each leaf, in memory order, that are this rank's part."""
        return self._spread.ranges()

    def memory(self, grad_itemsize: int | None = None) -> dict[str, dict[str, float]]:
        """Return bytes on this rank per parameter of all ranks; it needs no other rank.

        Parameters
        ----------
        grad_itemsize : int, optional
            Bytes of an element of the gradients; by default those of the parameters.

        Returns
        -------
        dict
            As of `Optimizer.memory`. The residual bits and the state are those of this rank's part.
            ``param`` are the whole parameters, of which a step reads the part and writes all;
            ``grad`` the whole gradients, which are read once. With more ranks than one, ``sums``
            is the part of the gradients' sums, kept from the first step on, and ``buffers`` what
            data goes through on its way to other ranks, which does not count as moved.
        """
        params, kept = self._spread.params, self._inner._kept()
        whole = sum(param.nbytes for param in params)
        more = {"param": (whole, kept["param"] + whole)}
        if self._comm.size > 1:
            sums = self._spread.sum_bytes()
            more |= {"sums": (sums, 2 * sums), "buffers": (self._spread.mover.nbytes, 0)}
        return _storage.memory(params, kept, grad_itemsize, more)

    def __repr__(self) -> str:
        """Say what is sharded, and over how many ranks."""
        total = sum(param.size for param in self._spread.params)
        own = sum(map(len, self.parts.values()))
        return (
            f"Sharded({self._inner._class_name()}, {total:,} elements, {own:,} of them on rank "
            f"{self._comm.rank} of {self._comm.size})"
        )

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied: the arrays belong to the caller."""
        raise TypeError("Sharded works on its caller's arrays and cannot be copied or pickled")

    # -------------------------------------------------------------- the step

    def step(self, grads: Any, *, copy_out: Any = None, **options: Any) -> StepResult:
        """Step with the mean of the ranks' gradients; the parameters are then equal on all ranks.

        Parameters
        ----------
        grads, copy_out, **options
            As for `Optimizer.step`, except `reduce`. The same leaves must have a gradient, of the
            same dtype, on all ranks, and the options must be equal.

        Returns
        -------
        StepResult
            The same on all ranks; norms of gradients are those of the mean.

        Raises
        ------
        TypeError, ValueError, FloatingPointError
            As `Optimizer.step`; and if gradients, options or `param_groups` of ranks differ.
        RuntimeError
            With the message of another rank that cannot take the step.
        """
        with self._whole, self._deferring() as signals:
            return self._step(grads, copy_out, options, signals)

    def _step(
        self, grads: Any, copy_out: Any, given: Options, signals: DeferredSignals
    ) -> StepResult:
        inner, mover, size = self._inner, self._spread.mover, self._comm.size
        sources: list[Array | None] = []
        sums: list[Array | None] = []
        has_begun, is_alone = False, True  # whether the others do not know of an exception
        steps = inner._work.count

        def agree_on_disk(fault: BaseException | None = None) -> None:
            self._agree_on_disk(fault, inner._work.count != steps)

        def begin() -> None:
            nonlocal has_begun, is_alone
            signals.check()
            has_begun, is_alone = True, False  # from here on all ranks raise, or none
            agree(self._comm, None, self._said(sources, how, copies))
            flats = [None if total is None else flat(total) for total in sums]
            mover.add(sources, flats, self._wire)
            is_alone = inner._disk is not None  # which alone can fail from now on

        def add(array: Array, most: bool = False) -> None:
            nonlocal is_alone
            is_alone = False
            agree_on_disk()
            _parts.add_over_ranks(self._comm, array, most=most)
            is_alone = inner._disk is not None

        try:
            accumulator = grads if isinstance(grads, GradAccumulator) else None
            if accumulator is not None:
                grads = accumulator._sums()
            _check.refuse_unknown("step", given, [*_options.CHECKS, "copy_out"])
            how = _options.step_options((inner._own_step or {}) | given)
            whole = inner._flatten(grads, "grads")
            copies = None if copy_out is None else inner._flatten(copy_out, "copy_out")
            for name, grad in zip(self._whole.grad_names, whole, strict=True):
                if isinstance(grad, Rows):
                    raise TypeError(
                        f"{name}: Sharded adds arrays over ranks; pass an array, not Rows"
                    )
            self._whole.check(whole, None, how, copies)
            taken = [
                None if grad is None else _check.gradient(name, grad, param)
                for name, grad, param in zip(
                    self._whole.grad_names, whole, self._spread.params, strict=True
                )
            ]
            sources += [None if grad is None else flat(grad) for grad in taken]
            sums += self._spread.sums(taken)
            pieces = None
            if copies is not None:
                pieces = [
                    None if copy is None else self._spread.part(i, copy)
                    for i, copy in enumerate(copies)
                ]
            reduction = None if size == 1 else _Sums(begin, add, partial(add, most=True))
            if size > 1:  # the gradients of the inner step are sums
                its = replace(how, grad_scale=how.grad_scale / size, zero_grads=False)
            else:
                its = how if accumulator is None else replace(how, zero_grads=True)
            bare = inner._bare and len(inner._groups) == 1
            nothing: Any = None if bare else [None] * len(inner._groups)
            result = inner._work.step(
                lambda own: (own, inner._prepare(nothing)[1]),
                sums,
                _threads.of(inner._threads),
                its,
                pieces,
                reduction,
                accumulator._work if accumulator is not None and size == 1 else None,
            )
        except BaseException as exc:
            if size > 1 and is_alone:
                if has_begun:
                    agree_on_disk(exc)
                else:
                    agree(self._comm, exc)
            raise
        if size == 1:
            return result
        agree_on_disk()
        spread = self._spread
        if not result.skipped:
            mover.gather(
                [
                    None if grad is None else flat(spread.part(i, spread.params[i]))
                    for i, grad in enumerate(taken)
                ],
                [flat(param) for param in spread.params],
            )
        if copies is not None and pieces is not None:
            mover.gather(
                [None if piece is None else flat(piece) for piece in pieces],
                [None if copy is None else flat(copy) for copy in copies],
            )
        if accumulator is not None:
            accumulator.zero()
        elif how.zero_grads:
            for grad in whole:
                if grad is not None:
                    grad.fill(0)
        return result

    def _agree_on_disk(self, fault: BaseException | None, has_stepped: bool) -> None:
        """Raise on all ranks if the disk of one has failed, before sums over ranks and at the end.

        If a rank has stepped its part, none takes another step until a checkpoint is loaded, as
        after a failure of its own disk.
        """
        disk = self._inner._disk
        if disk is None:
            return
        is_cut_off = any(self._comm.gather(has_stepped or disk.lost is not None))
        outcome = "parameters and state are of two steps; load a checkpoint of both"
        try:
            agree(self._comm, fault, outcome=outcome if is_cut_off else "nothing has changed")
        except BaseException as exc:
            if is_cut_off:
                disk.lost = disk.lost or exc
            raise

    def _said(
        self,
        sources: Sequence[Array | None],
        how: _options.StepOptions,
        copies: Sequence[Array | None] | None,
    ) -> dict[str, str]:
        """Return what must be equal on all ranks in a step."""
        return {
            "grads": _kinds(self._whole.grad_names, sources),
            "options of the step": repr(how),
            "copy_out": "" if copies is None else _kinds(self._whole.names, copies),
            "param_groups": self._group_options(),
            "steps": str(self._inner._work.count),
        }

    # -------------------------------------------------------------- averages and masters

    def ema_params(self) -> dict[str, Array]:
        """Return the averages of the parameters by leaf name, as copies; see `Optimizer`."""
        with self._whole, self._deferring() as signals:
            parts = self._together(self._inner.ema_params, signals=signals)
            by_leaf = [parts.get(name) for name in self._whole.names]
            return self._named(self._gathered(by_leaf, signals))

    def swap_ema(self) -> AbstractContextManager[None]:
        """Put the averages in the place of the parameters for a block; see `Optimizer`.

        All ranks have such a block, and make no other call of the optimizer within it.
        """

        def show() -> list[Array | None]:
            with self._deferring() as signals:
                return self._gathered(self._together(self._averages, signals=signals), signals)

        return _arrays.Swap(self._whole, show)

    def _averages(self) -> list[Array | None]:
        if self._inner.rule.average is None:
            self._inner.ema_params()  # raises if there are none
        with self._inner._work:
            return self._inner._shown_averages()

    def master_params(self) -> dict[str, Array]:
        """Return the parameters as steps compute with them, as copies; see `Optimizer`."""
        with self._whole, self._deferring() as signals:
            parts = self._together(self._inner.master_params, signals=signals)
            return self._named(self._gathered(list(parts.values()), signals))

    def _gathered(
        self, parts: Sequence[Array | None], signals: DeferredSignals
    ) -> list[Array | None]:
        """Return the whole arrays of which each rank has parts, None where it has None."""
        wholes = self._together(
            lambda: [
                None if part is None else np.empty_like(param, part.dtype, subok=False)
                for part, param in zip(parts, self._spread.params, strict=True)
            ],
            signals=signals,
        )
        self._spread.mover.gather(
            [None if part is None else flat(part) for part in parts],
            [None if whole is None else flat(whole) for whole in wholes],
        )
        return wholes

    def _named(self, arrays: Iterable[Array | None]) -> dict[str, Array]:
        named = zip(self._whole.names, arrays, strict=True)
        return {name: array for name, array in named if array is not None}

    # -------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state on each rank, as the class itself does, in copies.

        The class itself can load it, and `load_state_dict` loads a state dict of the class.
        """
        with self._whole, self._deferring() as signals:
            return self._collected(None, signals)

    def _collected(self, root: int | None, signals: DeferredSignals) -> dict[str, Any]:
        """Return the state dict with the whole state on `root`, or on all ranks."""

        def allocate() -> tuple[dict[str, Any], _shards.Collection]:
            found = self._inner.state_dict()
            has_wholes = root in (None, self._comm.rank)
            return found, _shards.collect(
                self._inner.rule,
                [group.options for group in self._inner._groups for _ in group.leaves],
                found["state"],
                self._spread.params,
                self._spread.cuts,
                has_wholes,
            )

        found, parts = self._together(allocate, signals=signals)
        self._spread.mover.gather(parts.parts, parts.wholes, parts.cuts, root)
        return found | {"state": parts.state}

    def load_state_dict(self, state_dict: Mapping[str, Any], *, convert: bool = False) -> None:
        """Take over a `state_dict`, each rank its part; see `Optimizer.load_state_dict`.

        Raises
        ------
        TypeError, ValueError
            If it does not fit, on any rank; nothing has changed.
        """
        with self._whole, self._deferring() as signals:
            self._load(
                lambda: [_shards.whole_source(state_dict, self._spread.named())], convert, signals
            )

    def _load(
        self,
        read: Callable[[], list[_shards.Source]],
        convert: bool,
        signals: DeferredSignals,
        path: str | os.PathLike[str] = "",
        params: bool | None = False,
    ) -> None:
        inner, step = self._inner, 0

        def fit() -> tuple[Any, ...]:
            nonlocal step
            _check.optional(_check.flag)("params", params)
            sources = read()
            try:
                given = _shards.part_of(
                    sources, inner.rule, inner.state, self.parts, self._spread.is_cut
                )
                own = given.pop("params", None)
                if params and own is None:
                    raise ValueError("has no parameters; it was saved without params=True")
                pairs, step, *rest = inner._fit_state_dict(given, convert)
                if own is not None and params is not False:
                    pairs += _fitting.fit_params(self._whole.names, self._spread.params, own)
                return pairs, step, *rest
            except (TypeError, ValueError) as exc:
                if not path:
                    raise
                raise ValueError(f"{os.fspath(path)}: {exc}") from exc

        def said() -> dict[str, str]:
            return {"params": repr(params), "step of the state": str(step)}

        with inner._work:
            inner._work.restore(*self._together(fit, said, signals))

    def save(
        self, path: str | os.PathLike[str], *, params: bool = False, by_rank: bool = False
    ) -> None:
        """Write the state to a file, which appears whole or not at all.

        Parameters
        ----------
        path : path
            Ends in ``.npz`` or ``.safetensors``. Rank 0 collects the state and writes the file as
            the class itself does, which can load it.
        params : bool, default False
            Write the parameters too; not with `by_rank`, as all ranks have the same.
        by_rank : bool, default False
            Let each rank write its part, to ``<path without ending>.<rank>-of-<ranks><ending>``, in
            a folder that all ranks see when they load. With `state_dir` this alone needs no memory
            for the whole state. The files replace older ones when all are written; a save to the
            same path that is killed at that moment may leave files of two steps, which `load`
            refuses: use another path for each save.

        Raises
        ------
        OSError, ValueError
            On the rank that cannot write; a RuntimeError with its message on the others.
        RuntimeError
            If a step was cut off by an error of a disk that has state.
        """

        def check() -> None:
            _check.flag("params", params)
            _check.flag("by_rank", by_rank)
            if params and by_rank:
                raise ValueError("params=True: not with by_rank=True; save the parameters once")
            _checkpoint.known(path)
            if self._inner._disk is not None:
                self._inner._disk.refuse_lost()

        with self._whole, self._deferring() as signals:
            self._together(check, lambda: {"by_rank": repr(by_rank)}, signals)
            rank, size = self._comm.rank, self._comm.size
            if by_rank:

                def write_part(settle: Callable[..., None]) -> None:
                    arrays, meta = _checkpoint.pack(self._inner.state_dict())
                    about = {
                        name: [its.start, its.stop, list(param.shape), memory_order(param)]
                        for (name, its), param in zip(
                            self.parts.items(), self._spread.params, strict=True
                        )
                    }
                    target = _shards.file_of(Path(path), rank, size)
                    _checkpoint.write(target, arrays, meta | {"parts": about}, settle)

                def write() -> None:
                    self._settled(write_part, signals)

            else:
                whole = self._collected(0, signals)

                def write() -> None:
                    if rank == 0:
                        own = self._spread.named() if params else None
                        _checkpoint.write(path, *_checkpoint.pack(whole, own), signals.check)

            self._together(write)  # a signal that comes when files are there changes no outcome

    def load(
        self,
        path: str | os.PathLike[str],
        *,
        params: bool | None = None,
        convert: bool = False,
        by_rank: bool = False,
    ) -> None:
        """Read what `save` wrote on any number of ranks, or a file of the class itself.

        Parameters
        ----------
        path, params, convert
            As for `Optimizer.load`.
        by_rank : bool, default False
            Read the files of such a `save`. Each rank reads all of them, one after the other, and
            keeps those that have elements of its part until it has taken them over.

        Raises
        ------
        OSError, ValueError
            Naming the file, if it is not there, damaged, or does not fit; nothing has changed.
        """

        def read() -> list[_shards.Source]:
            named, disk = self._spread.named(), self._inner._disk
            if _check.flag("by_rank", by_rank):
                return _shards.read_by_rank(Path(path), self.parts, named, disk)
            return _shards.read(Path(path), named, disk)

        with self._whole, self._deferring() as signals:
            self._load(read, convert, signals, path, params)


class _Sums(Reduction):
    """Sums over the ranks of a communicator, and what comes before them in a step."""

    def __init__(
        self,
        begin: Callable[[], None],
        add: Callable[[Array], object],
        most: Callable[[Array], object],
    ) -> None:
        super().__init__(add, most)
        self._begin = begin

    def begin(self) -> None:
        self._begin()


def _leaves(group: int | None, tree: Any) -> list[Named]:
    """Return the leaves of a group, with the names that `Optimizer` gives them."""
    where = "" if group is None else f"[{group}]"
    root = f"params{where}['params']" if where else "params"
    grads = [name for name, _ in _tree.leaves(f"grads{where}", tree)]
    named = zip(_tree.leaves(root, tree), grads, strict=True)
    return [(name, grad, leaf) for (name, leaf), grad in named]


def _unit(rule: Rule, *options: Mapping[str, Any]) -> int:
    """Return the number at whose multiples leaves are cut, if they may be, for options of groups.

    It is a multiple of a tile, so that blocks, noise and sums are as in the whole leaf, and of the
    distance of samples.
    """
    unit = _core.TILE
    for its in options:
        for state in rule.states:
            if state.is_by_row(its):
                raise ValueError(
                    f"{state.by_row}: keeps a number for each row, and Sharded cuts parameters "
                    "within rows; leave it out, or step whole parameters on each rank"
                )
        for name in rule.fixed:
            every = its.get(name, 1)
            if isinstance(every, int) and every > 0:  # the class refuses all others
                unit = lcm(unit, every)
    return unit


def _kinds(names: Sequence[str], arrays: Sequence[Array | None]) -> str:
    return "\n".join(
        f"{name} {None if array is None else array.dtype}"
        for name, array in zip(names, arrays, strict=True)
    )
