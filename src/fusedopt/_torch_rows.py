"""Sparse gradients of torch, in its coordinate format, and the rows that a step takes of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedopt import _core
from fusedopt import _torch_plain as _plain
from fusedopt._rows import Ordered, ordered


def in_order(name: str, param: Any, grad: Any, zeroes: bool) -> Ordered:
    """Return the rows of a sparse gradient: see `_rows.Ordered`; its values are a tensor.

    Rows are along all sparse axes. Indices may come in any order, and more than once.

    Raises
    ------
    TypeError, ValueError
        Naming the parameter, `name`.
    """
    where = f"{name}.grad"
    param = _plain.local(name, param)
    _plain.same_shape(where, grad, param)
    if not param.is_contiguous() or param.is_neg():
        raise ValueError(
            f"{name}: its rows do not follow one another in memory (strides {param.stride()}), as "
            "a sparse gradient needs them; make it contiguous, or the gradient dense"
        )
    given = grad.detach()
    indices, values = given._indices(), _plain.local(where, given._values())
    sizes = param.shape[: given.sparse_dim()]
    rows = np.zeros(indices.shape[1], np.int64)
    for axis, size in enumerate(sizes):
        own = indices[axis].numpy().astype(np.int64)  # a copy, which cannot change after the check
        bad, _ = _core.look_at_rows(own, size)
        if bad >= 0:
            raise ValueError(
                f"{where}: has an index of {own[bad]} along axis {axis}, which has {size}"
            )
        rows *= size
        rows += own
    if zeroes and not (values.is_contiguous() and not values.is_neg()):
        raise ValueError(f"{where}: its values have gaps, and zero_grads writes to them; drop it")
    values = values.resolve_neg().contiguous()
    count = int(np.prod(sizes, dtype=np.int64))
    return ordered(rows, values, count, _core.look_at_rows(rows, count)[1])
