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
MEMORY_SHARE = 0.8  # of a GPU's free memory goes to weights with memory_efficient; the rest is for activations


def get_device_config(strategy: str, devices: Collection[str] | None = None) -> dict[str, Any]:
    """Arguments for `from_pretrained`: device_map, dtype, and max_memory (bytes) for memory_efficient on a GPU.

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
    # float32 for stable gradients and on CPUs; otherwise bfloat16 if the device supports it natively.
    if strategy == "stable_training" or (device == "cpu" and strategy != "memory_efficient"):
        dtype = torch.float32
    elif device == "cpu" or (device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)):
        dtype = torch.bfloat16
    else:
        dtype = torch.float16
    if strategy != "memory_efficient" or device != "cuda":
        return {"device_map": {"": device}, "dtype": dtype}
    from accelerate.utils import get_max_memory

    memory = {place: n if place == "cpu" else int(MEMORY_SHARE * n) for place, n in get_max_memory().items()}
    return {"device_map": "auto", "dtype": dtype, "max_memory": memory}  # what does not fit goes to the CPU
