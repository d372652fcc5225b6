"""The device and precision a model is loaded with, as arguments for `from_pretrained`.

The order of devices follows the library's first description (docs/grit_vlm.md): training runs on the CPU unless
`devices` excludes it.
"""

from collections.abc import Collection
from typing import Any

from grit.config import did_you_mean
from grit_vlm.errors import GritVlmError

PRIORITIES = {
    "stable_training": ("cpu", "cuda", "mps"),
    "auto_inference": ("cuda", "mps", "cpu"),
    "auto_performance": ("cuda", "mps", "cpu"),
    "memory_efficient": ("cuda", "cpu"),
}


def get_device_config(strategy: str, devices: Collection[str] | None = None) -> dict[str, Any]:
    """Arguments for `from_pretrained`: device_map and dtype. With memory_efficient the CPU takes what a GPU cannot.

    `devices` defaults to those of this machine. GritVlmError if the strategy supports none of them.
    """
    import torch

    if strategy not in PRIORITIES:
        raise GritVlmError(
            f"expected one of {', '.join(PRIORITIES)}, got {strategy!r}{did_you_mean(strategy, PRIORITIES)}"
        )
    if devices is None:
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        devices = [name for name, is_available in available.items() if is_available]
    device = next((name for name in PRIORITIES[strategy] if name in devices), None)
    if device is None:
        raise GritVlmError(
            f"{strategy}: expected one of {', '.join(PRIORITIES[strategy])}, got {', '.join(sorted(devices)) or 'none'}"
        )
    sparing = strategy == "memory_efficient"
    if strategy == "stable_training" or (device == "cpu" and not sparing):
        dtype = torch.float32
    else:  # GPUs before Ampere emulate bfloat16
        native = device == "cpu" or (device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
        dtype = torch.bfloat16 if native else torch.float16
    return {"device_map": "auto" if sparing and device == "cuda" else {"": device}, "dtype": dtype}
