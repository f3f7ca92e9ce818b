"""FSDP2 on two CPU processes: each keeps and steps half of every parameter."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

import fusedopt.torch as fo


def train(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 1))
    mesh = dist.init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh)
    opt = fo.AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)  # the norm of the whole model

    torch.manual_seed(rank)  # each rank has other batches
    for _ in range(50):
        x = torch.randn(32, 64)
        loss = (model(x) - x.mean(dim=1, keepdim=True)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    norms = [None, None]
    dist.all_gather_object(norms, opt.last_step.grad_norm)
    assert norms[0] == norms[1]
    if rank == 0:
        mine = sum(p.to_local().numel() for p in model.parameters())
        print(f"rank 0 keeps {mine} of {sum(p.numel() for p in model.parameters())} parameters")
        print(f"both ranks know the same norm; loss {loss.item():.3f}", flush=True)
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort while Python ends (pytorch#179291)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, args=(f"{folder}/store",), nprocs=2)
