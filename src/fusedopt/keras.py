"""The optimizers for Keras 3: Keras's own classes, whose update is one call on its torch backend.

>>> import keras
>>> import fusedopt.keras as fk
>>> opt = fk.Adam(3e-4)  # for model.compile(optimizer=opt, ...)
>>> isinstance(opt, keras.optimizers.Adam)
True

A class here overrides the update of its namesake in `keras.optimizers` and nothing else. So
arguments, variables and their names, `.keras` files, weight decay, clipping, averages, gradient
accumulation and the scale of the loss are Keras's.

The update is Keras's own where Keras runs on another backend than torch, for variables that are not
float32 or float64 on the CPU, and in a step that torch.compile compiles (`jit_compile=True`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

try:
    import keras
    from keras.src.backend.common.stateless_scope import in_stateless_scope
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        f'fusedopt.keras needs Keras 3 and its backend: pip install "fusedopt[keras]" ({exc})'
    ) from exc

import fusedopt
from fusedopt import _arrays, _threads
from fusedopt.optimizer import Optimizer
from fusedopt.rule import Constants, Rule

_IS_TORCH = keras.backend.backend() == "torch"
if _IS_TORCH:
    import torch

    from fusedopt._torch_fused import mark_written

    _KINDS = (torch.Tensor, torch.nn.Parameter)

_DOC = """`keras.optimizers.{name}`, all variables of which are updated in one pass and one call.

Arguments, variables, files and what surrounds the update are Keras's, and so is the formula, with
Keras's place of epsilon. The update is fusedopt's on the torch backend, for float32 and float64
variables on the CPU, and Keras's own otherwise. Constants are computed in double; Keras computes
them in the dtype of the variables.

Raises
------
ValueError
    Naming the variable, where its gradient does not fit; the update has written nothing. Keras
    decays weights before it.
"""


class _Fused:
    """The update: a base class before a class of Keras."""

    _rule: ClassVar[Rule]
    _slots: ClassVar[tuple[str, ...]]  # attributes with the variables of each of the rule's states
    _constants: Callable[[float], Constants]  # at a rate

    def _backend_update_step(
        self, grads: Any, trainable_variables: Any, learning_rate: Any
    ) -> None:
        """Update all variables; Keras calls it when gradients are clipped and weights decayed."""
        if not _IS_TORCH or not self._step(grads, trainable_variables, learning_rate):
            update: Any = super()
            update._backend_update_step(grads, trainable_variables, learning_rate)

    def _step(self: Any, grads: Any, variables: Any, learning_rate: Any) -> bool:
        """Take the step in one call, if it is one for tensors on the CPU; return whether it was."""
        if in_stateless_scope() or torch.compiler.is_compiling():  # there is no memory to write to
            return False
        with torch.no_grad():
            leaves = self._list(variables)
            if leaves is None or not all(map(_fits, grads, leaves.params)):
                return False
            rate, done = float(learning_rate), int(self.iterations)
            plan = self._constants(rate), 0, None, ""
            arrays = [grad.numpy() for grad in grads]
            leaves.work.set_steps(done, [done] * len(arrays))
            leaves.work.step(lambda grads: (grads, [plan]), arrays, _threads.get_num_threads())
            mark_written(leaves.params)
        return True

    def _list(self: Any, variables: Any) -> _Leaves | None:
        """Return the variables and their state, as in the last step unless one has moved."""
        places = [self._get_variable_index(variable) for variable in variables]
        states = [getattr(self, slot, None) for slot in self._slots]  # none or empty if not used
        kept = [[column[i]._value for i in places] if column else None for column in states]
        params = [variable._value for variable in variables]
        tensors = [*params, *(x for column in kept for x in column or ())]
        if not all(type(x) in _KINDS for x in tensors):
            return None
        known, where = _LISTS.get(self), [x.data_ptr() for x in tensors]
        if known is not None and known.where == where:
            return known
        if not all(map(_is_plain, tensors)):
            return None
        nothing = [None] * len(params)
        rows = zip(
            *([x.numpy() for x in column] if column else nothing for column in kept), strict=True
        )
        names = [variable.path for variable in variables]
        work = _arrays.ArrayList(self._rule.name, self._rule.state_names)
        work.add(
            names, [f"gradient of {name}" for name in names], [x.numpy() for x in params],
            list(rows), nothing, group=0, zero=False, threads=_threads.get_num_threads(),
        )  # fmt: skip
        _LISTS[self] = leaves = _Leaves(params, where, work)
        return leaves


@dataclass
class _Leaves:
    """The variables of a step and their state, as tensors, addresses and arrays in their memory."""

    params: list[Any]
    where: list[int]
    work: _arrays.ArrayList


# of each optimizer, which Keras may save or copy with all its attributes
_LISTS: WeakKeyDictionary[Any, _Leaves] = WeakKeyDictionary()


def _is_plain(x: Any) -> bool:
    return x.dtype in (torch.float32, torch.float64) and x.is_cpu and x.is_contiguous()


def _fits(grad: Any, param: Any) -> bool:
    return (
        type(grad) in _KINDS
        and grad.dtype is param.dtype
        and grad.is_cpu
        and grad.layout is torch.strided
        and not grad.is_neg()
    )


def _at(cls: type[Optimizer], **options: Any) -> Constants:
    return cls.rule.at(cls.rule.defaults | options)


def _adam(self: Any, rate: float) -> Constants:
    betas = self.beta_1, self.beta_2
    return _at(fusedopt.Adam, lr=rate, betas=betas, eps=self.epsilon, eps_hat=True)


def _sgd(self: Any, rate: float) -> Constants:
    """Add to each variable a buffer that sums gradients times ``-rate``."""
    own = _at(fusedopt.SGD, lr=-1.0, momentum=self.momentum, nesterov=self.nesterov)
    return own._replace(
        of_rule=lambda step, options: own.of_rule(step, options) | {"first": 0.0}, grad_scale=-rate
    )


def _lion(self: Any, rate: float) -> Constants:
    return _at(fusedopt.Lion, lr=rate, betas=(self.beta_1, self.beta_2))


def _rmsprop(self: Any, rate: float) -> Constants:
    return _at(
        fusedopt.RMSprop, lr=rate, alpha=self.rho, eps=self.epsilon, momentum=self.momentum,
        eps_in_sqrt=True,
    )  # fmt: skip


def _adagrad(self: Any, rate: float) -> Constants:
    return _at(fusedopt.Adagrad, lr=rate, eps=self.epsilon, eps_in_sqrt=True)


_MOMENTS = ("_momentums", "_velocities", "_velocity_hats")
_TABLE: dict[str, tuple[type[Optimizer], tuple[str, ...], Any]] = {
    "Adam": (fusedopt.Adam, _MOMENTS, _adam),
    "AdamW": (fusedopt.Adam, _MOMENTS, _adam),  # Keras decays the weights before
    "SGD": (fusedopt.SGD, ("momentums",), _sgd),
    "Lion": (fusedopt.Lion, ("_momentums",), _lion),
    "RMSprop": (
        fusedopt.RMSprop,
        ("_velocities", "_momentums", "_average_gradients"),
        _rmsprop,
    ),
    "Adagrad": (fusedopt.Adagrad, ("_accumulators",), _adagrad),
}
__all__ = list(_TABLE)


def _keras_class(name: str) -> type[Any]:
    cls, slots, constants = _TABLE[name]
    body = {
        "__module__": __name__, "__qualname__": name, "__doc__": _DOC.format(name=name),
        "_rule": cls.rule, "_slots": slots, "_constants": constants,
    }  # fmt: skip
    made = type(name, (_Fused, getattr(keras.optimizers, name)), body)
    return keras.saving.register_keras_serializable("fusedopt")(made)


globals().update({name: _keras_class(name) for name in _TABLE})


def __getattr__(name: str) -> type[Any]:
    """Raise AttributeError; here so that type checkers know that there are classes."""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
