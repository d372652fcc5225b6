"""A `FisherManager` as a dictionary of tensors, numbers and text, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grit import records

if TYPE_CHECKING:
    from grit_vlm.core.manager import FisherManager

_NUMBERS = ("step", "skipped", "applied_steps", "inversions", "_skipped_in_a_row")


def save(manager: FisherManager) -> dict[str, Any]:
    """Everything that is needed to go on (loads with weights_only=True)."""
    return {
        "layers": {
            name: {
                "fisher": layer.fisher_matrix.state_dict(),
                "budget": layer.projection_budget or 0,
                "moments": manager.moments[name].state_dict() if name in manager.moments else {},
            }
            for name, layer in manager.by_pair.items()
        },
        "schedules": {name: schedule.state_dict() for name, schedule in manager.schedules.items()},
        "history": records.to_text(manager.history),
        "numbers": {name: getattr(manager, name) for name in _NUMBERS},
        "last_metrics": dict(manager.last_metrics),
        "measured": dict(manager.measured),
    }


def load(manager: FisherManager, state: dict[str, Any]) -> None:
    """Go on from `save`; the log file is rewritten to hold what led there.

    Raises:
        ValueError: the checkpoint has other layers; FisherError: it is of other estimates.
    """
    if odd := sorted(set(manager.by_pair) ^ set(state["layers"])):
        raise ValueError(f"expected a checkpoint of the same LoRA layers, got one that differs in: {odd[:6]}")
    for name, layer in manager.by_pair.items():
        saved = state["layers"][name]
        layer.fisher_matrix.load_state_dict(_on(saved["fisher"], layer.lora_A.device))
        layer.projection_budget = saved["budget"] or None
        if saved["moments"]:
            manager.moments[name].load_state_dict(_on(saved["moments"], layer.lora_A.device))
        if name in manager.moments and manager.moments[name].follows:
            manager.moments[name].adopt(layer.fisher_matrix)
    for name, schedule in manager.schedules.items():
        schedule.load_state_dict(state["schedules"].get(name, {}))
    for name in _NUMBERS:
        setattr(manager, name, state["numbers"][name])
    manager.history = records.from_text(state["history"])
    manager.last_metrics, manager.measured = dict(state["last_metrics"]), dict(state["measured"])
    records.append(manager.log_file, manager.history, anew=True)


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _on(inner, device) for key, inner in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value
