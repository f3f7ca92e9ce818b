"""Trainers that others wrote, with our optimizers in the place of torch's: tests/torch_clients.py.

docs/integrations.md has the versions. Those that are not installed are skipped.
"""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch_cases import since, torch

pytestmark = pytest.mark.slow("starts processes that import torch and trainers")
SCRIPT = Path(__file__).with_name("torch_clients.py")


def run(client, folder, world=1):
    """Run a client in processes of its own, as it sets torch, signals and threads for all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    several = {
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    processes = []
    for rank in range(world):
        own = several | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", SCRIPT, folder, client],
                env=os.environ | quiet | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        texts = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, texts, strict=True):
        assert process.returncode == 0, text
        assert f"{client}: passed" in text, text


CLIENTS = {
    "hf_trainer": "transformers accelerate",
    "trl": "trl datasets transformers accelerate",
    "peft": "peft transformers accelerate",
    "accelerate": "accelerate",
    "lightning": "pytorch_lightning",
    "torchao": "torchao",
    "megatron": "megatron.core",
    "timm": "timm",
}


def needs(modules):
    """Skip a test, saying what to install, unless all of some modules are there."""
    for module in modules.split():
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # of the package that it is in
            found = None
        if found is None:
            names = modules.replace("_", "-").replace(".", "-")
            pytest.skip(f"tests clients of torch: pip install {names}")


@since("2.6")
@pytest.mark.parametrize("client", CLIENTS)
def test_client(client, tmp_path):
    needs(CLIENTS[client])
    run(client, tmp_path)


@since("2.6")
@pytest.mark.parametrize("client", ["accelerate_fsdp", "verl"])
def test_client_on_two_ranks(client, tmp_path):
    """FSDP2 whose parameters are on the CPU."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    needs({"accelerate_fsdp": "accelerate", "verl": "verl"}[client])
    run(client, tmp_path, world=2)
