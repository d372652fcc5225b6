"""Two gloo processes on this machine, for tests of what is distributed."""

import multiprocessing
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def _rank(rank, function, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        torch.save(function(rank, WORLD, folder), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_two_ranks(function, folder):
    """What function(rank, world, folder) gave on either rank; it is a function of a module, for it is pickled."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["peft"])  # imported once for both: it takes five seconds
    mp.start_processes(_rank, args=(function, port, folder), nprocs=WORLD, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
