"""The fault catalogue: one function a fault, from the evidence to a finding, or None.

They stand in the order in which they are believed: what happens around the step first, then what becomes of the
gradient, then the preconditioner's own state, then its statistics, then the training.
"""

from collections.abc import Callable

from probes.evidence import Evidence
from probes.finding import Finding
from probes.gradient_faults import (
    clipped_to_nothing,
    damping_swamps,
    empty_inverse,
    gradient_lost,
    modules_missing,
    no_statistics,
    nothing_changed,
    scalar_preconditioner,
    zero_factors,
)
from probes.statistics_faults import diverging, overcounted, stale_factors
from probes.step_faults import (
    applied_repeatedly,
    gradient_recomputed,
    gradient_restored,
    never_called,
    preconditioned_after_step,
    wrapper_bypassed,
)

OF_A_CLAIM: tuple[Callable[[Evidence], Finding | None], ...] = (
    wrapper_bypassed,
    never_called,
    preconditioned_after_step,
    applied_repeatedly,
    gradient_recomputed,
    gradient_restored,
    no_statistics,
    zero_factors,
    empty_inverse,
    nothing_changed,
    gradient_lost,
    clipped_to_nothing,
    damping_swamps,
    scalar_preconditioner,
    modules_missing,
    overcounted,
    stale_factors,
)
"""Faults of something that says that it preconditions."""

OF_ANY: tuple[Callable[[Evidence], Finding | None], ...] = (diverging,)
"""Faults of any training."""
