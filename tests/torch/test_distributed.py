"""Under DistributedDataParallel: buffers written in place stay attached to what it broadcasts."""

from __future__ import annotations

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import normkit.torch as nk


def _work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), nk.BatchNorm1d(4), nn.Linear(4, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        optimizer.zero_grad()
        # two forwards before one backward: the second writes the buffers that the first one read
        loss = sum(model(torch.randn(6, 3, generator=generator) + rank).square().mean() for _ in range(2))
        loss.backward()
        optimizer.step()
    seen = model.module[1].running_mean.clone()
    model.eval()(torch.randn(6, 3, generator=generator))  # a forward broadcasts rank 0's buffers
    torch.save((seen, model.module.state_dict()), f"{folder}/{rank}.pt")
    dist.barrier()  # who leaves first ends the other's threads in the middle of something, now and then
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_work, (port, str(tmp_path)), nprocs=2)
    (first, state), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert not torch.equal(first, second), "each rank sees its own batches"
    assert state["1.num_batches_tracked"] == 6
    torch.testing.assert_close(other, state, rtol=0, atol=0)
    torch.testing.assert_close(state["1.running_mean"], first, rtol=0, atol=0)
