"""Sums over the ranks of a distributed run; on one rank nothing happens."""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Ranks that train together; 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensors: list[Tensor]) -> None:
    """Add every tensor up over the ranks, in place; one message for each dtype and device."""
    if world_size() == 1 or not tensors:
        return
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        buckets.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for members in buckets.values():
        flat = torch.cat([t.reshape(-1) for t in members])
        dist.all_reduce(flat)
        for target, part in zip(members, torch.split(flat, [t.numel() for t in members]), strict=True):
            target.copy_(part.view_as(target))
