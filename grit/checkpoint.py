"""A manager as a dictionary of tensors, numbers and text, and back."""

from typing import TYPE_CHECKING, Any

from grit import records
from grit.state import GroupState

if TYPE_CHECKING:
    from grit.manager import GRITManager

_NUMBERS = (
    "step",
    "skipped",
    "applied_steps",
    "inversions",
    "failed_inversions",
    "_skipped_in_a_row",
    "_last_inversion",
)


def save(manager: "GRITManager") -> dict[str, Any]:
    """Everything that is needed to go on: tensors, numbers and text only (loads with weights_only=True)."""
    return {
        "layers": {pair.name: state.layer(i) for state, i, pair in manager.layers()},
        "history": records.to_text(manager.history),
        "trend": manager.trend.state_dict(),
        "failed_in_a_row": dict(manager.failed_in_a_row),
        "numbers": {name: getattr(manager, name) for name in _NUMBERS},
        "last_metrics": dict(manager.last_metrics),
        "measured": dict(manager.measured),
    }


def load(manager: "GRITManager", state: dict[str, Any]) -> None:
    """Go on from `state_dict`; the log file is rewritten to hold what led there.

    Raises:
        ValueError: the checkpoint has other layers, other ranks, or is of another mode.
    """
    names, saved = [p.name for p in manager.pairs()], state["layers"]
    if set(names) != set(saved):
        odd = sorted(set(names) ^ set(saved))
        raise ValueError(f"expected a checkpoint of the same LoRA layers, got one that differs in: {odd[:6]}")
    odd = sorted({name for layer in saved.values() for name in layer} ^ set(manager.states[0].t))
    if odd:
        raise ValueError(f"expected a checkpoint of mode {manager.config.mode!r}, got one that differs in: {odd}")
    manager.states = [GroupState.of_layers(g, [saved[p.name] for p in g.pairs]) for g in manager.groups]
    for name in _NUMBERS:
        setattr(manager, name, state["numbers"][name])
    manager.history = records.from_text(state["history"])
    manager.trend.load_state_dict(state["trend"])
    manager.failed_in_a_row = dict(state["failed_in_a_row"])
    manager.last_metrics, manager.measured = dict(state["last_metrics"]), dict(state["measured"])
    records.append(manager.log_file, manager.history, anew=True)
