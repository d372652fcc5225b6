"""Real rank reduction on PEFT layers: smaller tensors, `rank_pattern` and `alpha_pattern` that keep the scale."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grit.layers import LoraPair

logger = logging.getLogger("grit")

_PREFIX = "base_model.model."


def pattern_key(name: str) -> str:
    """The name by which PEFT's rank_pattern knows a module."""
    name = name.split("[", 1)[0]
    return name.partition(_PREFIX)[2] or name


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

    PEFT sorts the keys when it saves and takes the first that fits the end of a module's name, so a key of the user's
    ("down_proj") would win over a module's own. So every module of the adapter that differs from the defaults gets a
    whole name (^), and nothing else stays.
    """
    inner: Any = next((m for m in model.modules() if hasattr(m, "peft_config")), None)
    if inner is None:
        logger.warning("GRIT: ranks have shrunk, but no peft_config knows; who saves the adapter must tell their ranks")
        return
    for adapter in {pair.adapter for pair in pairs}:
        config = inner.peft_config[adapter]
        layers = {
            f"^{pattern_key(name)}": (layer.r[adapter], layer.lora_alpha[adapter])
            for name, layer in inner.named_modules()
            if isinstance(getattr(layer, "lora_alpha", None), dict) and adapter in layer.lora_alpha
        }
        config.rank_pattern = {key: r for key, (r, _) in layers.items() if r != config.r}
        config.alpha_pattern = {key: alpha for key, (_, alpha) in layers.items() if alpha != config.lora_alpha}


def fit_to_checkpoint(
    model: nn.Module,
    pairs: list[LoraPair],
    folder: Path,
    base_rank: dict[str, int],
    optimizer: torch.optim.Optimizer | None = None,
) -> bool:
    """Before an adapter is loaded back: give each pair the rank that the checkpoint's rank_pattern says.

    Args:
        model: The PEFT model that the checkpoint will be loaded into.
        pairs: Its pairs.
        folder: With adapter_config.json.
        base_rank: Ranks of those that had not shrunk by then.
        optimizer: Holds the weights, if there is one already.

    Returns:
        Whether any pair changed.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return False
    from peft.utils.other import get_pattern_key

    patterns = json.loads(file.read_text(encoding="utf-8")).get("rank_pattern") or {}
    changed = []
    for pair in pairs:
        k = patterns.get(get_pattern_key(patterns.keys(), pattern_key(pair.name)), base_rank[pair.name])
        if k != pair.rank:
            a, b = pair.a, pair.b
            new_a, new_b = torch.zeros(k, a.shape[1], dtype=a.dtype), torch.zeros(b.shape[0], k, dtype=b.dtype)
            resize(pair, new_a, new_b, optimizer)
            if optimizer is not None:  # moments of other shapes
                optimizer.state.pop(pair.a, None)
                optimizer.state.pop(pair.b, None)
            changed.append(pair)
    if changed:
        write_patterns(model, changed)
    return bool(changed)
