"""A manager's layers sorted into groups anew, where ranks changed."""

from typing import TYPE_CHECKING

from torch import Tensor

from grit.capture import HookCapture
from grit.layers import LayerGroup, group_pairs
from grit.state import GroupState

if TYPE_CHECKING:
    from grit.manager import GRITManager


def regroup(manager: "GRITManager", changed: dict[str, dict[str, Tensor]]) -> None:
    """Sort the layers into groups anew after shapes changed; `changed` has the new state of those layers."""
    layers = {pair.name: state.layer(i) for state, i, pair in manager.layers()} | changed
    manager.groups = _grouped(manager)
    manager.states = [GroupState.of_layers(g, [layers[p.name] for p in g.pairs]) for g in manager.groups]
    if manager.capture is not None:
        manager.capture.close()
        manager.capture = HookCapture(
            manager.model, manager.groups, manager.config.normalize_delta, like=manager.capture
        )


def _grouped(manager: "GRITManager") -> list[LayerGroup]:
    """Groups by today's shapes, in the model's order: a resumed run stacks its layers as an undisturbed one."""
    place = {name: i for i, name in enumerate(manager.base_rank)}
    return group_pairs(sorted(manager.pairs(), key=lambda pair: place[pair.name]))


def rebuild(manager: "GRITManager") -> None:
    """Start anew on layers whose shapes changed from outside (a checkpoint about to be loaded)."""
    seen = {pair.name: state["samples"][i].clone() for state, i, pair in manager.layers()}
    manager.groups = _grouped(manager)
    manager.states = [GroupState.fresh(group, manager.config) for group in manager.groups]
    for state, i, pair in manager.layers():
        state["samples"][i] = seen[pair.name]  # who has reported has reported, whatever became of it
    if manager.capture is not None:
        manager.capture.close()
        manager.capture = None
        manager.open()
