"""torch's distributed engines with our step, in 2 gloo processes: equal to torch.optim's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch_cases import since, torch

from fusedopt import _core, _threads

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

SCRIPT = Path(__file__).with_name("torch_ranks.py")


def ranks(world, folder, *scenarios):
    """Run scenarios on `world` processes; each process must report that each has passed."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", SCRIPT, str(rank), str(world), folder, *scenarios],
            env=os.environ | {"LOCAL_WORLD_SIZE": str(world)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        texts = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, text) in enumerate(zip(processes, texts, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {world}:\n{text}"
        assert all(f"{name}: passed" in text for name in scenarios), text


def test_engines(tmp_path):
    """DDP, also with gradients that are views of its buckets; ZeRO."""
    ranks(2, tmp_path, "ddp", "ddp_buckets", "zero", "norms_of_parts")


def test_memory_of_one_rank(tmp_path):
    ranks(2, tmp_path, "memory")


@since("2.6")  # on CPUs
def test_fully_sharded(tmp_path):
    ranks(2, tmp_path, "fsdp", "averages", "modes", "norms_of_shards", "trust_ratios", "placements")
    ranks(2, tmp_path, "matrices", "decisions", "faults")


@since("2.6")
def test_shards_in_few_bytes(tmp_path):
    """8-bit and 16-bit state of shards, and how it goes through torch.distributed.checkpoint."""
    ranks(2, tmp_path, "few_bytes", "few_save")
    ranks(1, tmp_path, "few_load")
    ranks(4, tmp_path, "few_bytes", "few_load", "hybrid")


@since("2.6")
def test_checkpoints_reshard(tmp_path):
    """torch.distributed.checkpoint: saved by 2 ranks, loaded and saved by 1, loaded by 2."""
    ranks(2, tmp_path, "begin")
    ranks(1, tmp_path, "middle")
    ranks(2, tmp_path, "end")


def test_threads_under_torchrun():
    """Two ranks share the CPUs: torchrun's own OMP_NUM_THREADS=1 is no limit."""
    told = "import os, fusedopt; print(os.environ['OMP_NUM_THREADS'], fusedopt.info()['threads'])"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "--no-python", sys.executable, "-c", told],
        env={k: v for k, v in os.environ.items() if not k.endswith("NUM_THREADS")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    count, why = _threads.default_threads({"LOCAL_WORLD_SIZE": "2"})
    why = f"{why}; not the launcher's OMP_NUM_THREADS=1"
    if _core.backend() == "serial":
        why = "built without threads"
    assert done.stdout.splitlines() == [f"1 {count} ({why})"] * 2, done.stderr
