"""Faults of GRIT: called in the wrong place, bypassed, repeated, or cut off from its statistics."""

from typing import Any

from benchmarks._arrangements import adamw, called, grit_optimizer, grit_setup
from benchmarks._runners import Arrange, Setting, Setup
from grit import GRITConfig, GRITManager


def by_hand(place: str) -> Arrange:
    """GRIT's methods called at a place (see `benchmarks._arrangements.called`) instead of a GritOptimizer."""

    def arrange(model: Any, setting: Setting) -> Setup:
        manager = GRITManager(model, GRITConfig(mode="adamw")).open()

        def apply() -> None:
            manager.update_statistics()
            if manager.inversion_due():
                manager.update_and_invert_factors()
            manager.precondition_gradients()
            manager.end_step()

        return grit_setup(manager, adamw(model, setting), by_hand=True, **called(apply, [place]))

    return arrange


def bypassed(model: Any, setting: Setting) -> Setup:
    """The optimizer inside the GritOptimizer steps. The manager says so when it is closed: NotAppliedError."""
    optimizer = grit_optimizer(model, setting, GRITConfig())
    return grit_setup(optimizer.manager, optimizer.optimizer, watched=optimizer)


def twice(model: Any, setting: Setting) -> Setup:
    """Preconditioned by the loop and again by the GritOptimizer."""
    optimizer = grit_optimizer(model, setting, GRITConfig(mode="adamw"))
    manager = optimizer.manager
    return grit_setup(manager, optimizer, by_hand=True, before_step=lambda: manager.precondition_gradients())


def that_stops(model: Any, setting: Setting) -> Setup:
    """After ten steps nothing is taken into the statistics; inversions go on."""
    config = GRITConfig(mode="adamw", kfac_update_freq=4, grit_cov_update_freq=4)
    optimizer = grit_optimizer(model, setting, config)
    manager = optimizer.manager
    update = manager.update_statistics
    manager.update_statistics = lambda: update() if manager.step < 10 else None  # type: ignore[method-assign]
    return grit_setup(manager, optimizer)
