"""DeepSpeed ZeRO-Offload with fusedopt as its CPU optimizer.

    python bench/deepspeed_offload.py [--stage 1|2|3] [--steps 8] [--compare]

With offload, DeepSpeed keeps float32 copies of the (bfloat16) parameters on the CPU and lets a
client optimizer step them. Two settings let that be fusedopt: ``zero_force_ds_cpu_optimizer:
false``, because DeepSpeed otherwise requires its own, which it compiles at run time, and
``zero_allow_untested_optimizer: true``. With `--compare` the same run is made with torch.optim, and
the losses must be equal within 1e-6.
"""

from __future__ import annotations

import argparse
import os
import socket
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


def train(optimizer: type[torch.optim.Optimizer], stage: int, steps: int) -> list[float]:
    """Return the loss of each step of a small net."""
    import deepspeed

    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8)]
    model = torch.nn.Sequential(*layers)
    client = optimizer(model.parameters(), lr=1e-2)  # type: ignore[call-arg]
    engine, *_ = deepspeed.initialize(model=model, optimizer=client, config=config(stage))
    losses = []
    for step in range(steps):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
        loss = engine(x).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def main() -> None:
    """Run as one rank, unless a launcher has set more."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--compare", action="store_true", help="with torch.optim.AdamW")
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
    ours = train(fo.AdamW, options.stage, options.steps)
    print(f"stage {options.stage}, losses:", *(f"{loss:.5f}" for loss in ours))
    if options.compare:
        theirs = train(torch.optim.AdamW, options.stage, options.steps)
        worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        if worst > 1e-6:
            raise SystemExit(f"torch.optim differs by {worst}: {theirs}")
        print("torch.optim: the same")


if __name__ == "__main__":
    main()
