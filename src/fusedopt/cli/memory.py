"""Print the memory that an optimizer would take, in MB; allocates nothing."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import fusedopt
from fusedopt._memory import SIZES
from fusedopt.bench.cases import own_case


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("shapes", nargs="?", help="of the parameters: 30000x64,64x256,256")
    add("--model", metavar="MODULE:NAME", help="a torch model instead of shapes: what "
        "MODULE.NAME() returns on the device meta, as torchvision.models:resnet50")  # fmt: skip
    add("--optimizer", default="AdamW", metavar="CLASS", help="a class of fusedopt")
    add("--dtype", choices=SIZES, default="float32", help="of parameters given as shapes")
    add("--grad-dtype", choices=SIZES, help="of gradients (default: the parameters')")
    add("--state-dtype", choices=("float32", "bfloat16", "bf16", "int8"), help="of the state "
        "(default: float32)")  # fmt: skip
    add("--master-bits", type=int, choices=(16, 24, 32), help="of 16-bit parameters")
    add("--min-8bit-size", type=int, default=4096, help="smaller parameters keep float32 state")
    add("--ema", action="store_true", help="with an average of the parameters")


def prepare(options: argparse.Namespace) -> Callable[[], None]:
    """Return the function that prints the table."""
    if (options.shapes is None) == (options.model is None):
        raise ValueError("give either shapes, as 30000x64,64x256,256, or --model MODULE:NAME")
    params = _shapes(options.shapes) if options.model is None else _model(options.model)
    table = fusedopt.memory(
        params, options.optimizer, dtype=options.dtype, grad_dtype=options.grad_dtype,
        state_dtype=options.state_dtype, master_bits=options.master_bits,
        min_8bit_size=options.min_8bit_size, ema=0.999 if options.ema else None,
    )  # fmt: skip
    lines = [f"{'MB':12} {'resident':>12} {'moved':>12}"]
    for name, row in table.items():
        lines.append(f"{name:12} {row['resident'] / 1e6:12,.3f} {row['moved'] / 1e6:12,.3f}")
    lines.append(
        "resident: kept between steps, without gradients. moved: read and written by a step."
    )
    return lambda: print("\n".join(lines))


def _shapes(text: str) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    for name in text.replace(" ", "").split(","):
        case = own_case(name)
        if case is None:
            raise ValueError(f"shapes: {name!r} is no shape; expected one as 64x256")
        shapes += case.shapes
    return shapes


def _model(text: str) -> Any:
    """Return a torch model without the memory of its parameters."""
    module, _, name = text.partition(":")
    try:
        import torch

        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise ValueError(f"--model: {text!r}: {exc}; expected MODULE:NAME, and torch") from exc
    with torch.device("meta"):
        model = make()
    if not hasattr(model, "named_parameters"):
        raise ValueError(f"--model: {text}() returned {type(model).__name__}, no torch model")
    return model
