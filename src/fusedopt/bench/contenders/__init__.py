"""The table of contenders. `ROWS` maps names to rows, in the order of a report."""

from __future__ import annotations

from typing import Any

from fusedopt.bench.cases import OPTIMIZERS, takers
from fusedopt.bench.contenders._base import Contender, Row
from fusedopt.bench.contenders.arrays import (
    Functional,
    Fusedopt,
    FusedoptShort,
    InPlace,
    Limit,
    Numba,
    ScikitLearn,
    Thinc,
)
from fusedopt.bench.contenders.graphs import Keras, Optax
from fusedopt.bench.contenders.torch import BitsAndBytes, FusedoptTorch, Torch

__all__ = ["AGAIN", "LIMIT", "OURS", "ROWS", "Contender", "Row", "keras_row"]

# In every round: the limit; fusedopt, to which all others are compared; and fusedopt again, on
# other arrays: the distance of its ratio from 1 is the error of the measurement.
LIMIT, OURS, AGAIN = "limit", "fusedopt", "fusedopt-again"


# Slow contenders, by the time of an element: smaller cases show as much of them as larger ones.
_10_NS: dict[str, Any] = {"most_elements": 10**7, "most_why": "takes 10 ns or more an element"}
_OURS: dict[str, Any] = {"optimizers": tuple(OPTIMIZERS), "traced": True}
_BF16, _INT8 = (_OURS | {"optimizers": takers(kind)} for kind in ("bfloat16", "int8"))
_FUSED: dict[str, Any] = {"optimizers": ("adagrad", *Row.optimizers)}  # of torch's fused step
_TORCH: dict[str, Any] = {
    "optimizers": (
        "adadelta",
        "adafactor",
        "adamax",
        "asgd",
        "nadam",
        "radam",
        "rmsprop",
        "rprop",
        *_FUSED["optimizers"],
    )
}
_3_NS: dict[str, Any] = {"most_elements": 15 * 10**7, "most_why": "takes 3 ns or more an element"}


def keras_row(backend: str, **more: Any) -> Row:
    """Return the row of Keras on a backend, which gets a process of its own."""
    return Row(
        f"keras-{backend}",
        f"Keras on {backend}",
        Keras,
        ("keras", backend),
        process=f"keras-{backend}",
        env={"KERAS_BACKEND": backend},
        temporaries=4,
        quick=False,
        **more,
    )


# Numba has a process of its own: its threads make torch's small operations 20 times slower.
ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row(LIMIT, "streaming limit", Limit, **_OURS),
        Row(OURS, "fusedopt", Fusedopt, **_OURS),
        Row(AGAIN, "fusedopt, again", Fusedopt, **_OURS),
        Row("functional", "fusedopt.functional", Functional, **_OURS),
        Row("fusedopt-torch", "fusedopt.torch", FusedoptTorch, ("torch",),
            optimizers=tuple(OPTIMIZERS)),
        Row("fusedopt-bf16", "fusedopt, bfloat16 state", Fusedopt, dtypes=("float32",),
            options={"state_dtype": "bfloat16"}, tolerance=0.05, **_BF16),
        Row("fusedopt-int8", "fusedopt, 8-bit state", Fusedopt, dtypes=("float32",),
            options={"state_dtype": "int8"}, tolerance=0.25, **_INT8),
        Row("fusedopt-short", "fusedopt, bfloat16 weights, 8-bit state", FusedoptShort,
            ("ml_dtypes",), dtypes=("float32",),
            options={"state_dtype": "int8", "master_bits": 24}, tolerance=0.25, temporaries=2,
            **_INT8),
        Row("numpy", "NumPy, in place", InPlace, temporaries=1, traced=True),
        Row("reference", "fusedopt.reference", Fusedopt, options={"plain": True}, temporaries=4,
            **_OURS, **_10_NS),
        Row("numba", "Numba, parallel loop", Numba, ("numba",), process="numba"),
        Row("torch-single", "torch, single tensor", Torch, ("torch",),
            options={"foreach": False}, temporaries=2, **_TORCH, **_3_NS),
        Row("torch-foreach", "torch, foreach", Torch, ("torch",), options={"foreach": True},
            temporaries=2, **_TORCH, **_3_NS),
        Row("torch-fused", "torch, fused", Torch, ("torch",), options={"fused": True},
            **_FUSED),
        Row("torch-compile", "torch, compiled", Torch, ("torch",), options={"compiled": True},
            temporaries=2, quick=False, most_tensors=8,
            most_why="compiling takes a third of a second for each tensor", **_TORCH),
        Row("optax", "optax, jitted, donated", Optax, ("optax", "jax"), temporaries=1),
        keras_row("jax"),
        keras_row("torch", **_3_NS),
        keras_row("numpy", **_10_NS),
        Row("scikit-learn", "scikit-learn's MLP", ScikitLearn, ("scikit-learn",),
            optimizers=("adam", "sgd"), temporaries=4, traced=True, **_10_NS),
        Row("thinc", "thinc", Thinc, ("thinc",), optimizers=("adam", "adamw"),
            dtypes=("float32",), temporaries=1, **_3_NS),
        Row("bitsandbytes", "bitsandbytes, 8-bit state", BitsAndBytes, ("bitsandbytes",),
            dtypes=("float32",), tolerance=0.1, **_10_NS),
    )
}  # fmt: skip
