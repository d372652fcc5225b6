"""Real rank reduction on PEFT layers: smaller tensors, `rank_pattern` and `alpha_pattern` that keep the scale."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grit.layers import LoraPair

_PREFIX = "base_model.model."


def pattern_key(name: str) -> str:
    """The name by which PEFT's rank_pattern knows a module."""
    return name.split("[", 1)[0].removeprefix(_PREFIX)


def resize(pair: LoraPair, new_a: Tensor, new_b: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put A [k, d_in] and B [d_out, k] in the place of the old ones; the scale s stays.

    The parameters are new objects: a graph that is still alive (the last loss, held by the training loop) remembers
    the old ones with their shapes. In the optimizer they take the old ones' places and state.
    """
    k = new_a.shape[0]
    layer: Any = pair.layer
    places = ((pair.module_a, "out_features", new_a), (layer.lora_B[pair.adapter], "in_features", new_b))
    for module, size, value in places:
        old: Any = module.weight
        new = nn.Parameter(value.to(old.device, old.dtype).contiguous())
        module.weight = new
        setattr(module, size, k)
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            if old in optimizer.state:
                optimizer.state[new] = optimizer.state.pop(old)
    layer.lora_alpha[pair.adapter] = _alpha(layer, pair.adapter, k)
    layer.r[pair.adapter] = k


def _alpha(layer: Any, adapter: str, k: int) -> float:
    scale = float(layer.scaling[adapter])
    rslora = getattr(layer, "use_rslora", {})
    alpha = scale * (k**0.5 if isinstance(rslora, dict) and rslora.get(adapter) else k)
    return int(alpha) if float(alpha).is_integer() else alpha


def write_patterns(model: nn.Module, pairs: list[LoraPair]) -> None:
    """Set rank_pattern and alpha_pattern in the model's `peft_config`, so that PEFT reloads what is there.

    Raises:
        ValueError: α/√r scaling (rsLoRA) cannot be told from the layer; or no peft_config on the model.
    """
    configs = getattr(model, "peft_config", None)
    if configs is None:
        raise ValueError("expected a PeftModel, which carries peft_config, got a model without")
    for pair in pairs:
        config = configs[pair.adapter]
        k = pair.rank
        alpha = pair.scale * (k**0.5 if config.use_rslora else k)
        key = pattern_key(pair.name)
        config.rank_pattern = {**(config.rank_pattern or {}), key: k}
        config.alpha_pattern = {**(config.alpha_pattern or {}), key: int(alpha) if alpha.is_integer() else alpha}


def fit_to_checkpoint(model: nn.Module, pairs: list[LoraPair], folder: Path) -> bool:
    """Before an adapter is loaded back: give each pair the rank that the checkpoint's rank_pattern says.

    Args:
        model: The PEFT model that the checkpoint will be loaded into.
        pairs: Its pairs.
        folder: With adapter_config.json.

    Returns:
        Whether any pair changed.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return False
    patterns = json.loads(file.read_text(encoding="utf-8")).get("rank_pattern") or {}
    changed = []
    for pair in pairs:
        k = patterns.get(pattern_key(pair.name), pair.rank)
        if k != pair.rank:
            a, b = pair.a, pair.b
            resize(pair, torch.zeros(k, a.shape[1], dtype=a.dtype), torch.zeros(b.shape[0], k, dtype=b.dtype))
            changed.append(pair)
    if changed:
        write_patterns(model, changed)
    return bool(changed)
