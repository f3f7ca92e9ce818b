"""torch's distributed engines with our step, in 2 gloo processes: equal to torch.optim's."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch_cases import since, torch

from fusedopt import _core, _threads

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

pytestmark = pytest.mark.slow("starts processes that import torch")
SCRIPT = Path(__file__).with_name("torch_ranks.py")


def ranks(folder, *groups):
    """Run groups such as "2:ddp,zero" after one another: each rank must report each scenario."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", SCRIPT, folder, *groups],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):  # the ranks too, where one waits for another
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, text
    for group in groups:
        world, names = group.split(":")
        for i, name in itertools.product(range(int(world)), names.split(",")):
            assert f"rank {i} of {world}: {name}: passed" in text, text


def test_engines(tmp_path):
    """DDP, also with gradients that are views of its buckets; ZeRO."""
    ranks(tmp_path, "2:ddp,ddp_buckets,zero,norms_of_parts", "2:memory")


@since("2.6")  # on CPUs
def test_fully_sharded(tmp_path):
    ranks(
        tmp_path,
        "2:fsdp,averages,modes,norms_of_shards,trust_ratios,placements,matrices,decisions,faults",
    )


@since("2.6")
def test_shards_in_few_bytes(tmp_path):
    """8-bit and 16-bit state of shards, and how it goes through torch.distributed.checkpoint."""
    ranks(tmp_path, "2:few_bytes,few_save", "1:few_load", "4:few_bytes,few_load,hybrid")


@since("2.6")
def test_checkpoints_reshard(tmp_path):
    """torch.distributed.checkpoint: saved by 2 ranks, loaded and saved by 1, loaded by 2."""
    ranks(tmp_path, "2:begin", "1:middle", "2:end")


def test_threads_under_torchrun():
    """Two ranks share the CPUs: torchrun's own OMP_NUM_THREADS=1 is no limit."""
    told = (  # in one write, which does not mix with that of the other rank
        "import os, sys, fusedopt;"
        "sys.stdout.write(f\"{os.environ['OMP_NUM_THREADS']} {fusedopt.info()['threads']}\\n\")"
    )
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
