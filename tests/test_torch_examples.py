"""The PyTorch examples under bench/ run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch_cases import since

pytestmark = pytest.mark.slow("trains in processes that import torch")
BENCH = Path(__file__).parent.parent / "bench"


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


@pytest.mark.slow("runs the benchmark")
@since("2.6")  # FSDP2 on CPUs
def test_offload(tmp_path):
    """All parts of its report, of small models."""
    file = tmp_path / "report.md"
    run("offload.py", "--all", "3", "--gb", "0.01", "--fsdp", "0.0005", "--markdown", file)
    text = file.read_text()
    assert "No figures" not in text, text
    assert re.search(r"^## FSDP2 with CPUOffloadPolicy: 0.0005B parameters", text, re.M)
    assert len(re.findall(r"^\| fusedopt.torch.AdamW[^|]* \| \d+\.\d\d \|", text, re.M)) == 10
    assert re.search(r"^## Threads: ms \(times as fast as on 1\)", text, re.M)


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_deepspeed_offload(stage):
    """With the same losses as torch.optim.AdamW, and from a checkpoint as without it."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install deepspeed")
    text = run("deepspeed_offload.py", "--stage", stage, "--compare", "--resume")
    for same in ("torch.optim", "resumed, state float32", "resumed, state int8"):
        assert f"{same}: the same" in text, text
