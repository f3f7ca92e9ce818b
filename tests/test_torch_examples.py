"""The PyTorch examples under bench/ run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow("trains in processes that import torch")
BENCH = Path(__file__).parent.parent / "bench"
pytest.importorskip("torch", reason="tests the PyTorch adapter: extra `torch`")


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", BENCH / script, *arguments],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_finetune():
    text = run("finetune_torch.py", "--steps", "4", "--width", "32")
    losses = dict(re.findall(r"^(\S.*?)  +(\d+\.\d+) ", text, re.M))
    assert len(losses) == 4
    ours, theirs = losses["fusedopt.torch.AdamW"], losses["torch.optim.AdamW"]
    assert abs(float(ours) - float(theirs)) < 1e-3


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_deepspeed_offload(stage):
    """With the same losses as torch.optim.AdamW."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install deepspeed")
    text = run("deepspeed_offload.py", "--stage", stage, "--compare")
    assert "torch.optim: the same" in text
