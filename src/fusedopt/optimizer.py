"""The base class of all optimizers: leaves, groups, state, the step, checkpoints.

A rule's own file (optim/adam.py, ...) has its options, state and constants (`rule.Rule`); this file
is independent of rules.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache, partial
from typing import Any, ClassVar, NoReturn, get_type_hints

import numpy as np

from fusedopt import (
    _arrays,
    _check,
    _checkpoint,
    _disk,
    _fitting,
    _groups,
    _options,
    _storage,
    _threads,
    _tree,
)  # fmt: skip
from fusedopt._check import Array
from fusedopt._ieee import ieee
from fusedopt._options import Reduction, StepOptions, StepResult
from fusedopt.accumulate import GradAccumulator
from fusedopt.formats import Stored
from fusedopt.rule import Common, Options, Rule


class _Default:
    """Marks an option that `step` was not given: the constructor's value counts, or that shown."""

    def __init__(self, shown: object) -> None:
        self._shown = shown

    def __repr__(self) -> str:
        return repr(self._shown)


_ONE: Any = _Default(1.0)
_TWO: Any = _Default(2.0)
_NONE: Any = _Default(None)
_NO: Any = _Default(False)
_PROPAGATE: Any = _Default("propagate")
# what the constructor takes
_OF_ALL_STEPS = tuple(name for name in _options.DEFAULTS if name != "grad_scale")


@cache
def _common_types() -> dict[str, Any]:
    """Return the types of `Common`, once: evaluating them takes much of a class's import time."""
    return get_type_hints(Common)


class Optimizer:
    """Base of the optimizers; see `Adam`, `AdamW`, `SGD`.

    A subclass has its rule, a `Rule`: the options, the state, and the constants of a step.

    Parameters
    ----------
    params : array, nesting of arrays, or list of groups
        float32, float64, float16 or bfloat16 (of ml_dtypes), or `fusedopt.formats.Stored`.
    state_dtype : None, "float32", "bfloat16" ("bf16") or "int8", default None
        How moments are kept between steps: in float32 (float64 for float64 parameters), in 2 bytes
        or in 1 + 1 / 64 bytes for each element; see `fusedopt.formats` for what that costs in
        precision. Such a dtype of NumPy, ml_dtypes or torch means the same. A rule refuses a format
        in which its state would lose what the rule needs, for arrays of any size; its documentation
        says why.
    master_bits : None, 16, 24 or 32, default None
        Bits of the number whose upper half a bfloat16 parameter shows; the other bits are kept as
        state. 32, the default, loses nothing; what 24 or 16 cut off is rounded stochastically in
        each step. A float16 parameter has 16. It is an error if no parameter is 16 bits wide.
    min_8bit_size : int, default 4096
        Parameters with fewer elements keep float32 state where `state_dtype` is ``"int8"``.
    seed : int, default 0
        Of stochastic rounding, which depends on it, the step, the number of the leaf and the
        element, and on nothing else.
    ema : None or float in [0, 1), default None
        Decay of a running average of the parameters, kept as state ``ema`` in float32 (float64 of
        float64 parameters) and updated in the same pass: ``ema + (1 - decay) * (param - ema)``. It
        begins as the parameters. See `ema_params` and `swap_ema`.
    ema_warmup : bool, default False
        Limit the decay of step t to ``(1 + t) / (10 + t)``, so that the first parameters soon lose
        their weight.
    max_grad_norm, norm_type, per_tensor, clip_value, nonfinite, stats, zero_grads : optional
        Defaults of the options of `step`. They are not part of a group or a checkpoint.
    threads : int, optional
        Most threads for this optimizer's steps, from 1 to 256; by default what `get_num_threads`
        returns at that time. Not part of a checkpoint.
    state_dir : path, optional
        A folder on a disk for state that is larger than memory, made if it is not there. State
        arrays of at least 1 MiB then are in a file in it, through which each step streams, with at
        most 256 MiB of it in memory; the bits are the same. The file has no name and disappears
        when the process ends; `save` writes checkpoints as always. Linux and other Unix systems
        only. Not part of a checkpoint.
    """

    rule: ClassVar[Rule]
    # by name of a leaf, where this optimizer has parts of the arrays (mpi.py) and not the whole
    # ones: the part, the index of its first element, and the elements of the whole
    _parts: Mapping[str, tuple[Array, int, int]] | None = None

    def __init_subclass__(cls) -> None:
        """Show the options that all have by name where the signature is asked for."""
        if "rule" in vars(cls):
            shown = inspect.signature(cls.__init__)
            defaults = _options.DEFAULTS | cls.rule.defaults
            own = [p for p in shown.parameters.values() if p.kind is not p.VAR_KEYWORD][1:]
            common = [
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name),
                    annotation=kind,
                )
                for name, kind in _common_types().items()
            ]  # fmt: skip
            cls.__signature__ = shown.replace(parameters=own + common)  # type: ignore[attr-defined]

    def __init__(
        self,
        params: Any,
        *,
        threads: int | None = None,
        state_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        """Take over the leaves of `params`."""
        if not hasattr(self, "rule"):
            raise TypeError("Optimizer is the base class; make an Adam, AdamW, SGD, ...")
        self._threads = None if threads is None else _threads.check("threads", threads)
        given = {name: options.pop(name) for name in _OF_ALL_STEPS if name in options}
        self._own_step = given or None  # defaults of `step`
        if given:
            _options.step_options(given)
        known = [*self.rule.defaults, *_OF_ALL_STEPS, "threads", "state_dir"]
        _check.refuse_unknown(type(self).__name__, options, known)
        self.defaults: Options = self.rule.check(self.rule.defaults | options)
        self.param_groups: list[Options] = []
        self._work = _arrays.ArrayList(self.rule.name, self.rule.state_names)
        self._disk = None if state_dir is None else _disk.Disk(state_dir)
        self._work.disk = self._disk
        self._groups: list[_groups.Group] = []
        self._plans: list[Any] | None = None  # of the groups, if steps do not change them
        self._reader: _arrays.Reader | None = None  # of gradients that are no list of groups
        self._has_new_options = True  # of a group, for `Rule.row`
        self._advanced: list[Options] = []  # of the groups, in this step
        self._bare = not _tree.is_groups(params)
        if isinstance(params, dict) and "params" in params and params.keys() & self.rule.checks:
            raise TypeError("params: a group, which must be in a list: [{'params': ..., ...}]")
        for group in [{"params": params}] if self._bare else params:
            self.add_param_group(group)
        if not len(self._work):
            raise ValueError("params: no arrays in it; there is nothing to optimize")
        bits = self.defaults["master_bits"]
        _storage.refuse_master(bits, (param.itemsize for param in self._work.params))

    # -------------------------------------------------------------- groups and state

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add parameters with options of their own.

        From then on `step` takes a list with the gradients of each group.

        Parameters
        ----------
        group : dict
            ``params``, a nesting of arrays as for the constructor, and any options that differ from
            the constructor's.

        Raises
        ------
        TypeError, ValueError
            Naming the leaf or the option; the optimizer is as it was.
        RuntimeError
            If another thread is inside a call of the same optimizer.
        """
        with self._work:
            self._add_param_group(group)

    def _add_param_group(
        self, group: Mapping[str, Any], settle: Callable[[Options], None] | None = None
    ) -> None:
        """Add a group; or none, if `settle` raises, the last that can fail: it gets the options."""
        number = len(self._groups)
        self._check_groups()
        where = "" if self._bare and number == 0 else f"params[{number}]"
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(f"{where}: expected a dict with 'params', got {type(group).__name__}")
        _groups.refuse_unknown(where, group, self.rule.defaults)
        options = self.rule.check(
            {name: group.get(name, self.defaults[name]) for name in self.rule.defaults},
            where=where and f"{where}.",
        )
        options = self.rule.begun(options)
        first = self.rule.beginning(options, self._work.count + 1)
        tree, root = group["params"], f"{where}['params']" if where else "params"
        named = list(_tree.leaves(root, tree))
        names, params = [name for name, _ in named], [leaf for _, leaf in named]
        grads = [name for name, _ in _tree.leaves("grads" + where.removeprefix("params"), tree)]
        taken = set(self._work.names)
        for name in names:
            if name in taken:
                raise ValueError(f"{name}: two parameters have this name; use other dict keys")
            taken.add(name)
        origins, sizes = [0] * len(names), None
        if self._parts is not None and names:
            parts = [self._parts[name] for name in names]
            params, origins, sizes = (list(column) for column in zip(*parts, strict=True))
        stored, states = _storage.allocate(names, params, self.rule, options, sizes, self._disk)
        layouts = [self.rule.layout(param.shape, options) for param in stored]
        shown, old = {"params": tree, **options}, len(self._work)
        leaves, nodes = range(old, old + len(names)), list(_tree.nodes(root, tree))
        made = _groups.Group(tree, _tree.reader(tree), nodes, leaves, self.rule.uses(options))
        made.note(self.rule, shown, options)
        known, threads = [*self._groups, made], _threads.of(self._threads)
        is_settled = False  # which the number of leaves does not say of a group without any

        def begin() -> None:
            nonlocal is_settled
            _storage.begin_all(names, stored, states, self.rule, first, leaves.start, origins)
            if settle is not None:
                settle(options)
            is_settled = True

        self._has_new_options = True
        self.param_groups.append(shown)
        try:
            self._work.add(
                names, grads, stored, states, layouts, number, True, threads, begin, origins
            )
        finally:  # a signal's exception may come right after the call; nothing here can fail
            if is_settled and len(self._work) == leaves.stop:
                self._groups, self._plans = known, None
                self._reader = made.reader if self._bare and number == 0 else None
            else:
                self.param_groups.pop()

    def _check_groups(self) -> None:
        """Raise if `param_groups` is no list with a dict for each group."""
        given = self.param_groups
        if type(given) is not list:
            raise TypeError(f"param_groups: expected a list, got {type(given).__name__}")
        if len(given) != len(self._groups):
            raise ValueError(
                f"param_groups: has {len(given)} entries for {len(self._groups)} groups of "
                "this optimizer; use add_param_group"
            )
        for i, group in enumerate(given):
            if not isinstance(group, dict):
                raise TypeError(f"param_groups[{i}]: expected a dict, got {type(group).__name__}")

    @property
    def state(self) -> dict[str, dict[str, Any]]:
        """State by leaf name: ``step`` (int) and the live arrays, in the parameter's shape.

        Arrays in a narrow format are `fusedopt.formats.Stored`. A bfloat16 parameter with a longer
        master has the bits that it lacks under ``residual``.
        """
        state = {}
        for i, (name, stored, arrays) in enumerate(
            zip(self._work.names, self._work.stored, self._work.states, strict=True)
        ):
            state[name] = {"step": self._work.get_step(i)} | {
                key: a for key, a in zip(self.rule.slots, arrays, strict=True) if a is not None
            }
            if isinstance(stored, Stored) and stored.extra is not None:
                state[name]["residual"] = stored.extra
        return state

    def master_params(self) -> dict[str, Array]:
        """Return the parameters as steps compute with them, by leaf name, in float32 or float64.

        For a bfloat16 parameter this is the longer number whose upper half it shows. Arrays are
        copies, except those that are float32 or float64 themselves.

        Raises
        ------
        RuntimeError
            Within a block of `swap_ema`, and if another thread is inside a call.
        """
        with self._work:
            return {
                name: stored.decode() if isinstance(stored, Stored) else stored
                for name, stored in zip(self._work.names, self._work.stored, strict=True)
            }

    def memory(self, grad_itemsize: int | None = None) -> dict[str, dict[str, float]]:
        """Return bytes per parameter, by part: what is resident, and what a step moves.

        Parameters
        ----------
        grad_itemsize : int, optional
            Bytes of an element of the gradients; by default those of the parameters.

        Returns
        -------
        dict
            ``param``, ``grad``, ``residual`` and the state's names, and ``total``; of each
            ``resident``, bytes kept between steps, on disk too, and ``moved``, bytes read and
            written by a step that finds nothing in the cache. Gradients are the caller's and count
            as moved only.
        """
        return _storage.memory(self._work.params, self._kept(), grad_itemsize, {})

    def _kept(self) -> dict[str, int]:
        """Return the bytes of the parameters, their residual bits and each state."""
        return _storage.kept(self._work.stored, self._work.states, self.rule.slots)

    def __repr__(self) -> str:
        """Name, options of the groups, and size."""
        total = sum(param.size for param in self._work.params)
        groups = "; ".join(
            ", ".join(f"{name}={group[name]!r}" for name in self.rule.defaults)
            for group in self.param_groups
        )
        return f"{type(self).__name__}({len(self._work)} arrays, {total:,} elements; {groups})"

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied: the arrays belong to the caller."""
        raise TypeError(
            f"{type(self).__name__} works on its caller's arrays and cannot be copied or pickled; "
            "make one on the other arrays and give it state_dict()"
        )

    # -------------------------------------------------------------- the step

    def step(
        self,
        grads: Any,
        *,
        grad_scale: float = _ONE,
        max_grad_norm: float | None = _NONE,
        norm_type: float = _TWO,
        per_tensor: bool = _NO,
        clip_value: float | None = _NONE,
        nonfinite: str = _PROPAGATE,
        stats: bool = _NO,
        zero_grads: bool = _NO,
        copy_out: Any = None,
        reduce: Callable[[Array], object] | None = None,
    ) -> StepResult:
        """Update all parameters in place, in one pass.

        All options are applied in the same pass, in this order: gradients are scaled, clipped by
        their norm, clipped by value; the rule; then averages, copies, statistics, zeros. Only a
        norm, and the search for infinite and NaN elements, must come before the first write: one
        read of the gradients for both.

        Parameters
        ----------
        grads : array or nesting of arrays, or GradAccumulator
            Nested as `params` were: float32, float64, float16 or bfloat16 arrays of the parameter's
            shape; or `Rows`, if only some rows of a parameter have a gradient and the rule supports
            that. Where a leaf, or a whole part of the nesting, is None, parameters, state and step
            counts do not change. With groups, a list with one entry for each. A gradient in another
            memory order than its parameter is copied first. The gradients themselves are not
            changed, unless `zero_grads` says so.
        grad_scale : float, default 1
            Multiplies the gradients on the fly; 1 / scale where a loss was scaled.
        max_grad_norm : float > 0, optional
            Gradients, after `grad_scale`, whose norm over all groups is larger are multiplied by
            ``max_grad_norm / (norm + 1e-6)``, as by ``torch.nn.utils.clip_grad_norm_``; inf
            measures the norm alone.
        norm_type : 2 or inf, default 2
            Which norm: of the squares, or the largest magnitude.
        per_tensor : bool, default False
            Clip each leaf by its own norm.
        clip_value : float > 0, optional
            Limit every element to [-clip_value, clip_value].
        nonfinite : {"propagate", "skip", "raise"}, default "propagate"
            What to do if a gradient has an infinite or NaN element: compute with it; change nothing
            of the optimizer, neither a parameter nor a step count; or raise. The gradients are
            tested as they are given, before any scale.
        stats : bool, default False
            Measure each leaf, see `StepStats`.
        zero_grads : bool, default False
            Set the gradients to 0, those of a skipped step too.
        copy_out : nesting of arrays, optional
            Nested as `params`: float16, bfloat16 (or float32, or float64 of float64 parameters)
            arrays that get the parameters after the step, rounded to nearest; also those without a
            gradient, and those of a skipped step. The number that the step has computed is rounded,
            not the parameter in its own format. None: no copy of that leaf.
        reduce : callable(array), optional
            Sums a float64 array over ranks, in place, as ``comm.Allreduce(MPI.IN_PLACE, array)``
            does. For leaves that are cut into parts, one for each rank, in the same order on all
            ranks: the norms that a step needs or returns (the clip's, trust ratios, statistics) are
            then those of the whole leaves, and ranks agree on what to skip. Called before the first
            write and, with `stats`, again after the last: what it raises then comes from a step
            that has been taken and counted. It is not called where the step needs no such sum. A
            maximum is not a sum: `norm_type` inf is refused, and ``max_update`` remains this
            rank's.

        Returns
        -------
        StepResult

        Raises
        ------
        TypeError, ValueError
            Naming the leaf or the option; nothing has been written.
        FloatingPointError
            Naming the gradients that are not finite, where `nonfinite` is "raise"; nothing has been
            written.
        RuntimeError
            If another thread is inside a call of the same optimizer; nothing has been written.
        """
        accumulator = grads._work if isinstance(grads, GradAccumulator) else None
        if (
            (max_grad_norm is _NONE or max_grad_norm is None) and clip_value is _NONE
            and copy_out is None and reduce is None and grad_scale is _ONE and norm_type is _TWO
            and nonfinite is _PROPAGATE and per_tensor is _NO and (stats is _NO or stats is False)
            and zero_grads is _NO and accumulator is None and self._own_step is None
        ):  # fmt: skip
            return self._take_step(grads)
        given: dict[str, Any] = {
            "grad_scale": grad_scale, "max_grad_norm": max_grad_norm, "norm_type": norm_type,
            "per_tensor": per_tensor, "clip_value": clip_value, "nonfinite": nonfinite,
            "stats": stats, "zero_grads": zero_grads if accumulator is None else True,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if not isinstance(value, _Default)}
        if self._own_step is not None:
            given = self._own_step | given
        how = _options.step_options(given, knows_norm=accumulator is not None and reduce is None)
        reduction = None
        if reduce is not None:
            if not callable(reduce):
                raise TypeError(f"reduce: expected a callable, got {type(reduce).__name__}")
            if self.rule.needs_whole:
                raise ValueError(
                    f"reduce: {self._class_name()} computes with whole matrices, and reduce is for "
                    "parts of leaves; let each rank step other matrices"
                )
            if how.norm_type != 2:
                raise ValueError("norm_type: reduce sums over ranks; only the norm 2 is of a sum")
            reduction = Reduction(reduce)
        copies = None if copy_out is None else self._flatten(copy_out, "copy_out")
        return self._take_step(grads, how, copies, reduction, accumulator)

    def _take_step(
        self,
        grads: Any,
        options: StepOptions | None = None,
        copies: list[Array | None] | None = None,
        reduction: Reduction | None = None,
        source: _arrays.ArrayList | None = None,
    ) -> StepResult:
        """Take a step in C; `source` has the sums of an accumulator that `grads` is."""
        threads = _threads.of(self._threads)
        return self._work.step(
            self._prepare, grads, threads, options, copies, reduction, source, self
        )

    def _prepare(self, grads: Any) -> tuple[list[Array | None], list[Any]]:
        """Return the gradient of each leaf, and the plan of each group as its options are now."""
        if isinstance(grads, GradAccumulator):
            grads = grads._sums()
        flat = self._flatten(grads, "grads")
        if not _arrays.are_settled(self.param_groups, self._groups):
            self._plans, self._has_new_options = None, True
            self._check_groups()
            for i, group in enumerate(self._groups):
                for node in group.nodes:
                    _tree.refuse_change(*node)
                self._read_options(i, group)
        return flat, self._renewed_plans() if self._plans is None else self._plans

    def _renewed_plans(self) -> list[Any]:
        """Return the plan of each group as its options are now."""
        if self._has_new_options:
            self._work.use_row(self.rule.row(group.options for group in self._groups))
            self._has_new_options = False
        for group in self._groups:
            if group.schedule is not None:
                group.schedule_rate(self.rule, self._work.count + 1)
        if self.rule.remembers:
            return self._advance()
        plans = [group.plan for group in self._groups]
        if all(group.schedule is None for group in self._groups):
            self._plans = plans  # valid until an option of a group changes
        return plans

    def _advance(self) -> list[Any]:
        """Return the plans of the groups in this step, with what the rule remembers.

        The list writes that where it is kept when the step has succeeded.
        """
        advanced = [
            self.rule.advanced(group.options, f"param_groups[{i}]: in this step ")
            for i, group in enumerate(self._groups)
        ]
        if self.rule.share is not None:
            advanced = self.rule.share(advanced)
        self._advanced = advanced
        if self.rule.settle is None:
            self._note_writes(advanced)
        else:
            self._work.writes, self._work.settler = [], self._settle  # for this step
        return [self.rule.plan(options) for options in advanced]

    def _settle(self, first: float, second: float) -> list[Any] | None:
        """Return the groups' plans from the sums of a rule; None if the step changes nothing."""
        assert self.rule.settle is not None
        settled = self.rule.settle(self._advanced, first, second)
        if settled is None:
            return None
        self._note_writes(settled)
        self._advanced = settled
        return [self.rule.plan(options) for options in settled]

    def _note_writes(self, advanced: list[Options]) -> None:
        """Record what the rule remembers after the step, for the list to write when it succeeds."""
        self._work.writes = [
            write
            for options, shown, group in zip(advanced, self.param_groups, self._groups, strict=True)
            for write in self.rule.writes(options, shown, group.options, group.seen)
        ]

    def _flatten(self, tree: Any, name: str) -> list[Array | None]:
        if self._reader is not None:
            return self._reader.read(name, tree)
        if not isinstance(tree, (list, tuple)) or len(tree) != len(self._groups):
            raise ValueError(
                f"{name}: expected a list with one entry for each of the {len(self._groups)} groups"
            )
        flat: list[Array | None] = []
        for i, group in enumerate(self._groups):
            flat += group.reader.read(f"{name}[{i}]", tree[i])
        return flat

    def _read_options(self, i: int, group: _groups.Group) -> None:
        """Take the options of group `i` as they are now, checked."""
        given = self.param_groups[i]
        if given.get("params") is not group.tree:
            raise ValueError(f"param_groups[{i}]['params']: was replaced; use add_param_group")
        where = f"param_groups[{i}]"
        _groups.refuse_unknown(where, given, self.rule.checks)
        missing = [name for name in self.rule.checks if name not in given]
        if missing:
            raise ValueError(f"{where}: has no {missing[0]!r}, which steps need")
        options = group.check(self.rule, given, where)
        used = self.rule.uses(options)
        if used != self.rule.uses(group.options):
            for leaf in group.leaves:
                self._work.use_states(leaf, used)
        group.note(self.rule, given, options)

    # -------------------------------------------------------------- averages

    def ema_params(self) -> dict[str, Array]:
        """Return the running averages of the parameters by leaf name: the live arrays.

        Of a rule that takes its steps by an average (Schedule-Free) copies of that.

        Raises
        ------
        ValueError
            If no group has `ema`.
        RuntimeError
            Of such a rule, within a block of `swap_ema`, and if another thread is inside a call.
        """
        if self.rule.average is not None:
            with self._work:
                return dict(zip(self._work.names, self._own_averages(), strict=True))
        averages = {
            name: arrays[-1]
            for name, arrays in zip(self._work.names, self._work.states, strict=True)
            if arrays[-1] is not None
        }
        if not averages:
            raise ValueError("there is no average: make the optimizer with ema=0.999 or the like")
        return averages  # type: ignore[return-value]

    def swap_ema(self) -> AbstractContextManager[None]:
        """Put the averages in the place of the parameters for a ``with`` block.

        That is, what `ema_params` returns. A copy of the parameters is kept meanwhile; they are
        restored when the block ends, however it ends. 16-bit parameters show the average rounded to
        nearest. Values written to them in the block are lost.

        Raises
        ------
        ValueError
            If no group has `ema`.
        MemoryError
            If there is no memory for the copy.
        RuntimeError
            If another thread is inside a call of the same optimizer; and from any call that would
            change it within the block.
        """
        if self.rule.average is None:
            self.ema_params()
        return _arrays.Swap(self._work, self._shown_averages)

    def _shown_averages(self) -> list[Array | None]:
        """Return what each parameter shows of its average, or None."""
        averages: Any = [its[-1] for its in self._work.states]
        if self.rule.average is not None:
            averages = self._own_averages()
        return [
            None if average is None else _storage.shown(stored, average)
            for stored, average in zip(self._work.stored, averages, strict=True)
        ]

    @ieee
    def _own_averages(self) -> list[Array]:
        """Compute the averages by which the rule takes its steps: see `rule.Average`."""
        average = self.rule.average
        assert average is not None
        place = self.rule.state_names.index(average.state)
        found = []
        for group in self._groups:
            extent = 1 - 1 / average.weight(group.options)
            for i in group.leaves:
                stored, z = self._work.stored[i], self._work.states[i][place]
                y = stored.decode() if isinstance(stored, Stored) else stored
                x = np.empty_like(y, subok=False)
                with np.errstate(all="ignore"):
                    np.subtract(z, y, out=x)  # type: ignore[arg-type]
                    np.multiply(x, x.dtype.type(extent), out=x)
                    np.add(x, y, out=x)
                found.append(x)
        return found

    # -------------------------------------------------------------- steps that are undone

    def _rehearsal(self, copy_out: Any = None) -> tuple[list[tuple[Any, ...]], Callable[[], None]]:
        """Return what undoes steps, for `_copies.undone`, and what to call before the first.

        Arrays are copied. Options, and everything else that is not in the list, are replaced by
        copies, so that the original objects stay as they are.
        """
        self._check_groups()
        work, saved = self._work, dict(vars(self))
        arrays = [array for array in (*work.stored, *sum(work.states, [])) if array is not None]
        if copy_out is not None:
            arrays += [array for array in self._flatten(copy_out, "copy_out") if array is not None]
        pairs = [(a, a.copy(order="K")) for array in arrays for a in _storage.parts(array)]
        steps = [work.get_step(i) for i in range(len(work))]
        saved |= {"_has_new_options": True, "_plans": None}
        undo: list[tuple[Any, ...]] = [
            ("arrays", work.restore, pairs, work.count, steps, [], []),
            ("optimizer", vars(self).clear),
            ("optimizer", vars(self).update, saved),
        ]
        exchanged = {
            "param_groups": [dict(group) for group in self.param_groups],
            "_groups": [
                replace(group, options=dict(group.options), seen=None) for group in self._groups
            ],
            "_plans": None,
        }
        return undo, partial(vars(self).update, exchanged)

    # -------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state: ``optimizer``, ``step``, ``state`` by leaf name, ``param_groups``.

        The arrays are the live ones; copy them to keep them. The parameters are not part of it. An
        option with an invalid value, such as a rate of NaN, is saved as the last step used it, and
        so are all of a group that do not go together or with its arrays, so that every saved state
        can be loaded.
        """
        names = self._work.names
        groups = []
        for i, group in enumerate(self._groups):
            try:
                given = dict(self.param_groups[i])
            except (TypeError, ValueError, IndexError, KeyError):  # no step would take them
                given = {}
            mine = names[group.leaves.start : group.leaves.stop]
            groups.append({"params": mine} | group.valid(self.rule, given))
        return {
            "optimizer": self._class_name(),
            "step": self._work.count,
            "state": self.state,
            "param_groups": groups,
        }

    @classmethod
    def _class_name(cls) -> str:
        """Return the name of the class that has the rule: this one, or one that it derives from."""
        return next(
            base.__name__ for base in cls.__mro__ if base.__module__.startswith("fusedopt.optim.")
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], *, convert: bool = False) -> None:
        """Take over step counts, state (copied) and options from a `state_dict`.

        State in another format than this optimizer's is refused, or, with `convert`, decoded and
        stored in this one's; storage options (`state_dtype`, ...) remain this optimizer's.

        A learning rate that is a schedule is not taken from, nor replaced by, a file: where `lr` is
        None in `state_dict`, or a schedule here and a number there, the optimizer keeps its own.

        State that the loaded options do not use (of momentum that was switched off) may be missing
        in this optimizer.

        Raises
        ------
        TypeError, ValueError
            If it does not fit, naming what; the optimizer is as it was.
        RuntimeError
            If another thread is inside a call of the same optimizer.
        """
        with self._work:
            self._work.restore(*self._fit_state_dict(state_dict, convert))

    def _fit_state_dict(
        self,
        state_dict: Mapping[str, Any],
        convert: bool,
        params: Mapping[str, Any] | None = None,
    ) -> tuple[Any, ...]:
        """Check a state dict, and parameters; return what to restore."""
        try:
            step = state_dict["step"]
            given = {
                "state": dict(state_dict["state"]),
                "param_groups": list(state_dict["param_groups"]),
            }
        except (KeyError, TypeError, ValueError, IndexError) as exc:
            raise ValueError("state dict: expected 'step', 'state' and 'param_groups'") from exc
        theirs = state_dict.get("optimizer", self._class_name())
        if theirs != self._class_name():
            raise ValueError(
                f"state dict: of {theirs}, and this optimizer is {self._class_name()}; "
                f"load it into {theirs}, as the same state means something else in another rule"
            )
        self._check_groups()
        step = _check.steps("state dict: step", step)
        now = [
            group.valid(self.rule, shown)
            for group, shown in zip(self._groups, self.param_groups, strict=True)
        ]
        pairs, steps, options = _fitting.fit(
            self.rule, self._groups, now, self._work.stored, self.state, given, convert,
            self._origins(),
        )  # fmt: skip
        if params is not None:
            pairs += _fitting.fit_params(self._work.names, self._work.stored, params)
        return pairs, step, steps, self.param_groups, options

    def _origins(self) -> list[int]:
        """Return where in its array each leaf begins."""
        if self._parts is None:
            return [0] * len(self._work)
        return [self._parts[name][1] for name in self._work.names]

    def save(self, path: str | os.PathLike[str], *, params: bool = False) -> None:
        """Write `state_dict` to a file, which appears whole or not at all.

        Parameters
        ----------
        path : path
            Ends in ``.npz`` or ``.safetensors`` (which takes the extra of that name to load). The
            file is written beside it under a temporary name, synced and renamed; a symbolic link
            stays one. What an earlier save of the same path left when it was killed is removed. A
            callable `lr` is not stored.
        params : bool, default False
            Write the parameters too, under their leaf names: then both are of the same step, which
            two files cannot promise. bfloat16 is stored as its bits in uint16.

        Raises
        ------
        ValueError
            For another ending.
        OSError
            Naming the file, if it cannot be written, is read-only or not a regular file; an old
            file is unchanged.
        RuntimeError
            If another thread is inside a call of the same optimizer: the file would hold a mixture.
            If a step was interrupted by an error of the disk that holds the state.
        """
        _check.flag("params", params)
        with self._work:
            if self._disk is not None:
                self._disk.refuse_lost()
            own = dict(zip(self._work.names, self._work.params, strict=True)) if params else None
            _checkpoint.write(path, *_checkpoint.pack(self.state_dict(), own))

    def load(
        self, path: str | os.PathLike[str], *, params: bool | None = None, convert: bool = False
    ) -> None:
        """Read a file of `save`; see `load_state_dict`.

        Parameters
        ----------
        path : path
        params : bool, optional
            Whether to take over the parameters, which are written into the caller's arrays; True
            demands that the file has them. By default they are taken over if it has them.
        convert : bool, default False
            See `load_state_dict`. Parameters are not converted.

        Raises
        ------
        OSError, ValueError
            Naming the file, if it is not there, damaged, foreign, or does not fit, naming the leaf;
            the optimizer is as it was. Files are never unpickled.
        RuntimeError
            If another thread is inside a call of the same optimizer.
        """
        _check.optional(_check.flag)("params", params)
        arrays, meta = _checkpoint.read(path, self._disk)
        try:
            state_dict = _checkpoint.unpack(arrays, meta)
            own = state_dict.pop("params", None)
            if params and own is None:
                raise ValueError("has no parameters; it was saved without params=True")
            with self._work:
                self._work.restore(
                    *self._fit_state_dict(state_dict, convert, None if params is False else own)
                )
        except (TypeError, ValueError) as exc:
            raise ValueError(f"{os.fspath(path)}: {exc}") from exc
