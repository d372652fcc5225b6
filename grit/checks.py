"""Settings against the machine and the model."""

import torch

from grit.config import GRITConfig
from grit.distributed import world_size
from grit.errors import NotAppliedError
from grit.layers import LoraPair


def check(config: GRITConfig, pairs: list[LoraPair]) -> None:
    """What only the machine and the model can tell about the settings.

    Raises:
        ValueError: a device that is not there, a min_lora_rank above the model's, or rank_shrink "events" in a
            distributed run, where DDP's buckets fix the shapes.
    """
    if config.kfac_inversion_device != "auto":
        try:
            torch.empty(0, device=config.kfac_inversion_device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"kfac_inversion_device: expected 'auto' or a device of this machine, got "
                f"{config.kfac_inversion_device!r}: {str(error).splitlines()[0]}"
            ) from error
    if world_size() > 1 and config.rank_shrink == "events":
        raise ValueError("rank_shrink: expected 'end' or 'never' in a distributed run, got 'events'")
    smallest = min(pairs, key=lambda p: p.rank)
    if config.min_lora_rank > smallest.rank:
        raise ValueError(
            f"min_lora_rank: expected at most the smallest rank, {smallest.rank} ({smallest.name}), "
            f"got {config.min_lora_rank}"
        )


def check_applied(steps: int, backward_passes: bool) -> None:
    """Whether what was captured was ever used.

    Raises:
        NotAppliedError: hooks saw backward passes, but no step came through a GritOptimizer.
    """
    if backward_passes and steps == 0:
        raise NotAppliedError(
            "GRIT saw backward passes, but no optimizer step went through GRIT, so nothing was preconditioned; "
            "wrap the optimizer: GritOptimizer(optimizer, manager), or train with GritTrainer"
        )
