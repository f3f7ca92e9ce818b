"""Gradients of several micro-batches, added up in float32."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from fusedopt import _arrays, _check, _core, _options, _threads, _tree
from fusedopt._check import Array
from fusedopt._rows import Rows
from fusedopt.formats import Stored
from fusedopt.rule import Rule

ADD = Rule(name="add", options=(), states=(), constants=lambda step, options: {}, counts=False)
_ADD_PLAN = ADD.at({})


class GradAccumulator:
    """Adds gradients of micro-batches to buffers, and measures the sum at the same time.

    Each `add` reads the micro-batch's gradients and updates the buffers in one pass, which also
    sums the squares and counts non-finite elements: a step that clips or checks for them then needs
    no extra pass. ``opt.step(accumulator)`` consumes the sum: the buffers are zeroed in the pass
    that reads them. A call that raises has changed nothing; one that is interrupted has done all or
    nothing.

    Parameters
    ----------
    params : array or nesting of arrays, or list of groups
        As given to the optimizer; only dtypes, shapes and memory orders matter. Buffers are
        float32, for float64 arrays float64.

    Raises
    ------
    TypeError, ValueError, MemoryError
        Naming the leaf.

    Examples
    --------
    >>> import numpy as np, fusedopt
    >>> params = {"W": np.ones(3, np.float32)}
    >>> opt, sum_ = fusedopt.SGD(params, lr=1.0), fusedopt.GradAccumulator(params)
    >>> for micro_batch in range(4):
    ...     sum_.add({"W": np.full(3, 0.25, np.float16)})
    >>> opt.step(sum_, max_grad_norm=10.0).grad_norm
    1.7320508075688772
    >>> params["W"]
    array([0., 0., 0.], dtype=float32)
    """

    def __init__(self, params: Any) -> None:
        """Make the buffers, which are zero."""
        tree = [group["params"] for group in params] if _tree.is_groups(params) else params
        named = list(_tree.leaves("params", tree))
        self._reader = _tree.reader(tree)
        arrays = []
        for name, param in named:
            checked = _check.parameter(name, param)
            arrays.append(checked.data if isinstance(checked, Stored) else checked)
        specs = [_spec(array) for array in arrays]
        self._buffers: list[Array] = _core.allocate(specs)
        names = [name for name, _ in named]
        self._grad_names = ["grads" + name.removeprefix("params") for name in names]
        self._work = _arrays.ArrayList(ADD.name, ADD.state_names)
        none: list[Any] = [None] * len(names)
        self._work.add(
            names, self._grad_names, self._buffers, [[]] * len(names), none, 0, False,
            _threads.get_num_threads(),
        )  # fmt: skip
        self._work.keep_sums(len(names))
        self._rebuild = _tree.rebuilder(tree)
        self.zero()

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied: two would share the buffers."""
        raise TypeError(
            "GradAccumulator cannot be copied or pickled; make another one and add copies of "
            "`grads` to it"
        )

    def add(self, grads: Any, *, scale: float = 1.0) -> None:
        """Add the gradients of a micro-batch, times `scale`: all of them, or none.

        Parameters
        ----------
        grads : array or nesting of arrays
            Nested like `params`, of any dtype that a step takes; a leaf with None is skipped.
        scale : float, default 1
            Multiplies the gradients, in the buffers' dtype.

        Raises
        ------
        TypeError, ValueError
            Naming the leaf; nothing has been added.
        RuntimeError
            If another thread is adding to the same buffers, or steps with them.
        """
        how = _options.StepOptions(grad_scale=_check.number("scale", scale), measure=_options.PARAM)
        flat = self._reader.read("grads", grads)
        for name, grad in zip(self._grad_names, flat, strict=True):
            if isinstance(grad, Rows):
                raise ValueError(
                    f"{name}: a GradAccumulator takes no Rows; pass an array, or hand the rows of "
                    "several batches over as one"
                )
        self._work.step(
            lambda flat: (flat, [(_ADD_PLAN, 0, None, "")]), flat, _threads.get_num_threads(), how
        )

    @property
    def count(self) -> int:
        """Number of micro-batches in the sum."""
        return self._work.count

    @property
    def grads(self) -> Any:
        """The sums, nested like `params`: the live buffers, None for a leaf without gradients.

        They may be written, for example to add those of other ranks. After this has been read, a
        step does not use what `add` measured, and reads the buffers if it needs a norm.
        """
        self._work.drop_sums()
        return self._sums()

    def _sums(self) -> Any:
        return self._rebuild(
            [b if self._work.get_step(i) > 0 else None for i, b in enumerate(self._buffers)]
        )

    def zero(self) -> None:
        """Set the buffers to zero.

        Raises
        ------
        RuntimeError
            If another thread is adding to the same buffers, or steps with them.
        """
        self._work.clear()


def _spec(array: Array) -> tuple[tuple[int, ...], Any, tuple[int, ...]]:
    dtype = np.dtype(np.float64 if array.dtype == np.float64 else np.float32)
    strides = tuple(s // array.itemsize * dtype.itemsize for s in array.strides)
    return array.shape, dtype, strides
