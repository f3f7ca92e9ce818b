"""DeepSpeed ZeRO-Offload with fusedopt as its CPU optimizer.

    python bench/deepspeed_offload.py [--stage 1|2|3] [--steps 8] [--compare] [--resume]

With offload, DeepSpeed keeps float32 copies of the (bfloat16) parameters on the CPU and lets a
client optimizer step them. Two settings let that be fusedopt: ``zero_force_ds_cpu_optimizer:
false``, because DeepSpeed otherwise requires its own, which it compiles at run time, and
``zero_allow_untested_optimizer: true``. With `--compare` the same run is made with torch.optim, and
the losses must be equal within 1e-6. With `--resume` it is made again from a checkpoint of half of
it, and the losses must be the same.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import fusedopt.torch as fo


def config(stage: int) -> dict[str, Any]:
    """Return the configuration of DeepSpeed for a run."""
    return {
        "train_micro_batch_size_per_gpu": 8,
        "bf16": {"enabled": True},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
    }


def engine(optimizer: Callable[..., Any], stage: int) -> Any:
    """Return DeepSpeed's engine of a small net."""
    import deepspeed

    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8)]
    model = torch.nn.Sequential(*layers)
    client = optimizer(model.parameters(), lr=1e-2)
    made, *_ = deepspeed.initialize(model=model, optimizer=client, config=config(stage))
    return made


def train(made: Any, steps: range) -> list[float]:
    """Return the loss of each step."""
    losses = []
    for step in steps:
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
        loss = made(x).float().square().mean()
        made.backward(loss)
        made.step()
        losses.append(float(loss))
    return losses


def resumed(optimizer: Callable[..., Any], stage: int, steps: int) -> list[float]:
    """Return the losses of the second half of a run, in an engine that loads the first."""
    with tempfile.TemporaryDirectory() as folder:
        first = engine(optimizer, stage)
        train(first, range(steps // 2))
        first.save_checkpoint(folder)
        second = engine(optimizer, stage)
        second.load_checkpoint(folder)
        return train(second, range(steps // 2, steps))


def main() -> None:
    """Run as one rank, unless a launcher has set more."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--compare", action="store_true", help="with torch.optim.AdamW")
    parser.add_argument("--resume", action="store_true", help="from a checkpoint, too")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    ours = train(engine(fo.AdamW, options.stage), range(options.steps))
    print(f"stage {options.stage}, losses:", *(f"{loss:.5f}" for loss in ours))
    if options.compare:
        theirs = train(engine(torch.optim.AdamW, options.stage), range(options.steps))
        worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        if worst > 1e-6:
            raise SystemExit(f"torch.optim differs by {worst}: {theirs}")
        print("torch.optim: the same")
    for storage in (None, "int8") if options.resume else ():
        cls = partial(fo.AdamW, state_dtype=storage, min_8bit_size=1)
        whole = train(engine(cls, options.stage), range(options.steps))
        again = resumed(cls, options.stage, options.steps)
        if again != whole[options.steps // 2 :]:
            raise SystemExit(f"resumed, {storage}: {again}, not {whole}")
        print(f"resumed, state {storage or 'float32'}: the same")


if __name__ == "__main__":
    main()
