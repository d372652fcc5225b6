"""How many directions each layer of a `FisherManager` keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from grit_vlm.utils.projection import MultiModalProjector, ProjectionSchedule, create_scheduler

if TYPE_CHECKING:
    from grit_vlm.core.manager import FisherManager


def schedules(manager: FisherManager) -> dict[str, ProjectionSchedule]:
    """Modality → budget a layer over the steps, of modalities that are projected."""
    found: dict[str, ProjectionSchedule] = {}
    for name, layer in manager.grit_layers.items():
        c, modality = layer.config, manager.modality[name]
        if c.enable_projection and modality not in found:
            ends = (c.projection_budget_start, c.projection_budget_end)
            found[modality] = create_scheduler(c.projection_schedule, *ends, manager.total_steps)
    return found


def projections(manager: FisherManager) -> dict[str, dict[str, int]]:
    """Modality → layer → directions at this step, shared out by `MultiModalProjector`.

    Only layers that are projected and whose estimate is ready. What one modality has no directions for goes to others
    with the same estimate, whose directions are of the same kind; none of it to or from one whose budget is fixed.
    """
    members: dict[str, list[str]] = {}
    for name, modality in manager.modality.items():
        layer = manager.grit_layers[name]
        if modality in manager.schedules and layer.config.enable_projection and layer.ready:
            members.setdefault(modality, []).append(name)
    if not members:
        return {}
    values = {
        modality: [manager.grit_layers[name].fisher_matrix.direction_values() for name in names]
        for modality, names in members.items()
    }
    wanted = {m: len(names) * manager.schedules[m].budget(manager.step) for m, names in members.items()}
    shares: dict[str, list[int]] = {}
    for among in _alike(manager, members):
        shares |= MultiModalProjector().share_out({m: values[m] for m in among}, {m: wanted[m] for m in among})
    return {modality: dict(zip(names, shares[modality], strict=True)) for modality, names in members.items()}


def _alike(manager: FisherManager, members: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Modalities that may hand directions to each other."""
    groups: dict[str, list[str]] = {}
    for modality, names in members.items():
        schedule = manager.schedules[modality]
        estimate = manager.grit_layers[names[0]].config.fisher_approximation
        groups.setdefault(modality if schedule.start == schedule.end else f"any {estimate}", []).append(modality)
    return list(groups.values())
