"""The optimizers for PyTorch on the CPU: torch's own classes with fusedopt's step.

>>> import torch
>>> import fusedopt.torch as fo
>>> model = torch.nn.Linear(3, 2)
>>> opt = fo.AdamW(model.parameters(), lr=3e-4)
>>> model(torch.ones(1, 3)).sum().backward()
>>> opt.step()
>>> isinstance(opt, torch.optim.AdamW)
True

There is a class for each optimizer of `fusedopt`. Where `torch.optim` has a namesake the class is a
subclass of it and inherits all but the step: arguments, groups, state, ``state_dict``, hooks. So
what works with torch's works with these (schedulers, GradScaler, checkpoints, DDP, FSDP2), and a
run can change from one to the other and back. The others are subclasses of `torch.optim.Optimizer`
with the arguments of their namesake in `fusedopt`.

`GradAccumulator` adds up gradients of micro-batches in host memory. `range_test` sweeps over
learning rates, undoes its steps and suggests a rate.
"""

from __future__ import annotations

import inspect
from typing import Any

try:
    import torch
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        'fusedopt.torch needs PyTorch 2.4 or newer: pip install "fusedopt[torch]"'
    ) from exc

import fusedopt
from fusedopt._torch_accumulate import GradAccumulator as GradAccumulator
from fusedopt._torch_average import Averaging
from fusedopt._torch_fused import Fused
from fusedopt._torch_options import plain_base
from fusedopt._torch_tune import range_test as range_test
from fusedopt.optim.adam import SPARSE_ADAM
from fusedopt.optimizer import Optimizer
from fusedopt.rule import Rule

_DOC = """{first}

Parameters
----------
{own}
state_dtype : {{None, "float32", "bfloat16", "int8"}}, default None
    How the state is kept: in float32, whatever the parameter's dtype, unless a narrower dtype is
    asked for (float64 of float64 parameters); some rules refuse narrow ones. See
    `fusedopt.Optimizer`.
master_bits : {{None, 16, 24, 32}}, default None
    Bits of a 16-bit parameter that steps compute with, rounded stochastically to 24 and 16. None:
    32 of a bfloat16 parameter, whose hidden 16 bits are kept as ``residual`` in its state; 16 of
    float16.
min_8bit_size : int, default 4096
    Tensors of fewer elements keep float32 state instead of int8.
seed : int, default 0
    Of the stochastic rounding.
ema : float in [0, 1), optional
    Decay of a running average of the parameters, kept as state ``ema`` and updated in the pass; see
    `ema_params` and `swap_ema`. `ema_warmup` as for `fusedopt.Optimizer`.
max_grad_norm, norm_type, per_tensor, clip_value, nonfinite, stats, zero_grads
    What each step does around the rule, in its pass: see `fusedopt.Optimizer.step`. They are of the
    optimizer, not of a group; `step` takes them too, for one step. Gradients stay as they are
    unless `zero_grads` is True. ``last_step``, a `fusedopt.StepResult`, has the norm and the
    statistics. Norms of sharded DTensors (FSDP2) are of the whole tensors: their squares are summed
    over the mesh.
process_group : torch.distributed.ProcessGroup, optional
    Of ranks that each step other parameters of one model (ZeroRedundancyOptimizer, pipelines): a
    norm is then that of the parameters of all.
state_dict_dtype : {{None, "float32"}}, default None
    "float32": ``state_dict()`` has narrow state as float32 numbers under torch's names, and groups
    without the options from `state_dtype` to `ema_warmup`, so that it loads into torch.optim and
    into other formats. None: state as it is kept. See the notes.
threads : int, optional
    Most threads for this optimizer's steps; by default `fusedopt.get_num_threads`.
state_dir : path, optional
    A folder on a disk for state that is larger than memory: see `fusedopt.Optimizer`. What is made
    or loaded for a parameter is in memory until it is written there; a copy of the optimizer keeps
    its state in memory. Not for parameters that are DTensors.

Raises
------
TypeError, ValueError
    For an option that no step could take, and for `capturable` and `differentiable`.

Notes
-----
Results are {bits}{agreement}. A step that raises has changed
nothing. Parameters are float32, float64, bfloat16 or float16, on the CPU{others}.

8-bit state is kept as ``NAME_codes`` and, one byte for each 64 of them in the order of the index,
``NAME_blocks``, both uint8. These names are not torch's: `load_state_dict` here converts from and
to codes, but a class of torch.optim misses ``NAME`` in its first step (SGD begins its momentum
anew), and torch.distributed.checkpoint, which loads by name, refuses them for a missing key:
``state_dict_dtype="float32"`` saves, and loads, ``NAME`` itself. Numbers that are decoded and
encoded again agree within the format's error, not in all bits.

A DTensor's shard takes the bits of the whole tensor if it is contiguous in that and begins on a
block of 64 elements, as the rows of a matrix whose rows are a multiple of 64 do (of bfloat16 state
and 16-bit parameters too, whose noise depends on an element's index in the whole tensor). Others
have blocks of their own, and agree within the format's error. Where blocks of a shard are not
blocks of the whole tensor, ``state_dict()`` has float32 numbers: a checkpoint of another kind of
shards then misses a key, unless both have ``state_dict_dtype="float32"``.

torch.distributed.checkpoint also refuses a bfloat16 model's checkpoint of torch.optim, which has no
``residual``: load it with ``planner=DefaultLoadPlanner(allow_partial_load=True)``.
"""

_TORCHS = """params, {names}
    As for `torch.optim.{name}`.
foreach : bool, optional
    Where torch has it: accepted and without effect.
fused : bool, optional
    Where torch has it: if True, GradScaler leaves the unscaling to the step, which does it in its
    pass. Unlike torch's own, which writes unscaled gradients to ``.grad``, the step leaves
    ``.grad`` scaled. No other effect.
capturable, differentiable : bool, default False
    Refused where True."""

_OURS = """params, {names}
    As for `fusedopt.{name}`; `lr` is a number."""

_IGNORED = """
{names} : optional
    Accepted and without effect."""

_MODES = """

``train()`` must be called before the first step, and again after ``eval()``, which puts the average
x, which is to be evaluated and deployed, in the place of the parameters; both may be called twice.
They round, as x and y are computed from one another: the block of `swap_ema` restores every bit.
``state_dict()`` in train mode warns once, because a model that is saved beside it holds y, which is
right to resume a run and wrong to evaluate. State dicts load into the class that made the rule
known and the other way round; the mode is in them, so save and load model and optimizer together.
"""
_BITS = """the bits of `fusedopt.reference.{function}`{near}"""
_NEAR = """, within a few
units in the last place of torch's"""
_OUTSIDE = """those of two passes, rounded as in `fusedopt.reference.{function}`, and of torch's own
operations in bfloat16 on each direction between them: their bits are not promised"""
_WHOLE = """. A shard of a
DTensor is refused"""

_AGREEMENT = """. State and ``state_dict`` are torch's, and load into either;
groups have our own options only where they are not the default. What differs: state of 16-bit
parameters is float32; tensors that overlap are refused; the version counter of each parameter is
raised, that of its state is not.

Torch's own step steps parameters on other devices, after all checks and before the others, and
their state is torch's. Beside such parameters `ema`, options that torch does not have, and options
of a step are refused. If torch's step raises, parameters on other devices are as it left them, and
the others as they were"""


def _torch_class(fast: type[Optimizer]) -> type[Any]:
    """Return the class of an optimizer for torch: its namesake's, with our step."""
    return _class_of(fast.__name__, fast.rule.for_tensors)


def _class_of(name: str, rule: Rule) -> type[Any]:
    peer = getattr(torch.optim, name, None)
    base = peer or plain_base(rule)
    rows = [row for row in rule.options if row.term != "l1"]  # which is of no torch optimizer
    known = inspect.signature(base).parameters
    extras = {row.name: row for row in rows if row.name not in known}
    names = ", ".join(row.name for row in rows if row.name in known)
    ignored = [row.name for row in rule.ignored]
    agreement = _WHOLE if rule.needs_whole else ""
    agreement += _AGREEMENT if peer else ""
    if numbers := ", ".join(name for name, _ in rule.numbers):
        agreement += f";\n{numbers} of a parameter is noted in its state when a state dict is made"
    doc = _DOC.format(
        first=f"`{'torch.optim' if peer else 'fusedopt'}.{name}` for CPU tensors, all of them "
        "stepped in one pass and one call.",
        own=(_TORCHS if peer else _OURS).format(names=names, name=name)
        + (f"\n{', '.join(extras)}\n    As for `fusedopt.{name}`; of a group." if extras else "")
        + (_IGNORED.format(names=", ".join(ignored)) if ignored else ""),
        function=name.lower(),
        agreement=agreement,
        others=" or, where torch steps them, elsewhere" if peer else "",
        bits=(_BITS if rule.outside is None else _OUTSIDE).format(
            function=name.lower(), near=_NEAR if peer else ""
        ),
        modes=_MODES.rstrip() if rule.average else "",
    )
    body = {
        "__module__": __name__, "__qualname__": name, "__doc__": doc, "_rule": rule,
        "_is_torchs": peer is not None, "_extras": extras,
    }  # fmt: skip
    ours = (Averaging, Fused) if rule.average else (Fused,)
    return type(name, (*ours, base), body)


_CLASSES = [cls for cls in vars(fusedopt).values() if hasattr(cls, "rule")]
__all__ = [cls.__name__ for cls in _CLASSES]
globals().update({cls.__name__: _torch_class(cls) for cls in _CLASSES})


class SparseAdam(_class_of("SparseAdam", SPARSE_ADAM)):  # type: ignore[misc]
    """`torch.optim.SparseAdam` for CPU tensors: Adam on the rows that have a gradient.

    All gradients are sparse, as of ``Embedding(sparse=True)``; indices may come in any order
    and more than once. A step costs what these rows cost, one call for all tables.

    Parameters
    ----------
    params, lr, betas, eps, maximize
        As for `torch.optim.SparseAdam`.
    **options
        As for `Adam`, from `state_dtype` to `threads`, but `ema`. Narrow state needs rows of a
        multiple of 64 elements; norms and statistics are of the rows that have a gradient.

    Raises
    ------
    TypeError, ValueError
        As torch does, and for `ema`, which would average all rows, in the first step.
    RuntimeError
        From `step`, as torch does, for a dense gradient; nothing has been written.

    Notes
    -----
    Results are the bits of `fusedopt.reference.Adam` with ``eps_hat=True`` and `fusedopt.Rows`,
    within a few units in the last place of torch's. A ``state_dict`` loads into either; `state`
    counts steps in a tensor, where torch has an int.
    """

    _is_lazy = _needs_rows = True

    def _shown(self, own: Any) -> Any:
        """Return the state of a parameter: steps as an int, by which torch computes in double."""
        shown = super()._shown(own)
        if isinstance(shown, dict) and isinstance(shown.get("step"), torch.Tensor):
            shown["step"] = int(shown["step"])
        return shown

    @staticmethod
    def _refuse_dense() -> None:
        raise RuntimeError(
            "SparseAdam does not support dense gradients, please consider Adam instead"
        )


def __getattr__(name: str) -> type[Any]:
    """Raise AttributeError; here so that type checkers know that there are classes."""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
