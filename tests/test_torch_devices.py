"""Parameters on another device beside those on the CPU, in one optimizer."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch_cases import torch

SCRIPT = Path(__file__).with_name("torch_device.py")
MAKES = "_setup_privateuseone_for_python_backend"


@pytest.mark.slow("starts a process that imports torch")
@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, MAKES), reason="this torch makes no device"
)
def test_a_device_of_torchs_own_making():
    """In a process of its own, as a device is for good."""
    command = [sys.executable, SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["passed"], done.stderr
