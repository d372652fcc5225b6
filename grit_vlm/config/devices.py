"""Where a model is loaded, and in which precision: arguments for `from_pretrained`.

Priorities are those of document 003. It contradicts itself about stable_training (its table says CPU before CUDA, its
advice "usually selects CUDA"): here the table holds, so that training runs on the CPU unless `devices` leaves it out.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

PRIORITIES = {
    "stable_training": ("cpu", "cuda", "mps"),
    "auto_inference": ("cuda", "mps", "cpu"),
    "auto_performance": ("cuda", "mps", "cpu"),
    "memory_efficient": ("cuda", "cpu"),
}
MEMORY_SHARE = 0.8
"""Of a GPU's free memory, what memory_efficient lets the weights take; the rest is for activations."""


class DeviceError(ValueError):
    """An unknown strategy, or none of its devices is there."""


def available_devices() -> list[str]:
    """Of cuda, mps and cpu, those that this machine has."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, is_there in there.items() if is_there]


def _dtype(strategy: str, device: str) -> Any:
    """float32 where gradients are to be stable and on CPUs; else 16 bit, bfloat16 where the device computes in it."""
    import torch

    if strategy == "stable_training" or (device == "cpu" and strategy != "memory_efficient"):
        return torch.float32
    bfloat16 = device == "cpu" or (device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.bfloat16 if bfloat16 else torch.float16


def get_device_config(strategy: str, devices: Collection[str] | None = None) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained`: device_map, dtype, and with memory_efficient on a GPU max_memory.

    Args:
        strategy: stable_training | auto_inference | auto_performance | memory_efficient.
        devices: To choose from; default: those of this machine.

    Returns:
        device_map: {"": device}, the whole model on one; with max_memory "auto", which lets the rest go to the CPU.
        dtype: of the weights. max_memory: bytes for each GPU (`MEMORY_SHARE` of what is free).

    Raises:
        DeviceError: no such strategy (says which was meant perhaps), unknown devices, or none of the strategy's own.
    """
    if strategy not in PRIORITIES:
        near = difflib.get_close_matches(str(strategy), PRIORITIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DeviceError(f"expected one of {', '.join(PRIORITIES)}, got {strategy!r}{hint}")
    there = available_devices() if devices is None else devices
    if isinstance(there, str) or not set(there) <= {"cuda", "mps", "cpu"}:
        raise DeviceError(f"devices: expected some of cuda, mps and cpu, e.g. ['cuda', 'cpu']; got {there!r}")
    device = next((name for name in PRIORITIES[strategy] if name in there), None)
    if device is None:
        raise DeviceError(
            f"{strategy}: expected one of {', '.join(PRIORITIES[strategy])}, got {', '.join(sorted(there)) or 'none'}"
        )
    config: dict[str, Any] = {"device_map": {"": device}, "dtype": _dtype(strategy, device)}
    if strategy == "memory_efficient" and device == "cuda":
        import torch

        room: dict[int | str, int] = {"cpu": _free_memory()}
        for gpu in range(torch.cuda.device_count()):
            room[gpu] = int(MEMORY_SHARE * torch.cuda.mem_get_info(gpu)[0])
        config |= {"device_map": "auto", "max_memory": room}
    return config


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
