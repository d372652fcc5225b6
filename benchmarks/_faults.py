"""The fault catalogue: ways in which preconditioning silently does nothing, or not what it says, on a tiny model.

Each fault is `benchmarks._notebook.NotebookKFAC` (or GRIT) with one thing done differently, and the diagnosis that the
probe must come to. In `benchmarks._clean_runs` nothing is wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import _faulty_grit as grit
from benchmarks import _faulty_kfac as kfac
from benchmarks import _faulty_steps as steps
from benchmarks._arrangements import IN_LOOP, IN_TRAINER, Make, accelerated, grit_with, of_four, placed, plain, sgd
from benchmarks._notebook import NotebookKFAC
from benchmarks._runners import Arrange, Setting, hf_trainer, plain_loop
from grit import GRITConfig
from probes import Verdict

SETTINGS = {"": Setting(), "other seed": Setting(seed=1), "other rate": Setting(lr=3e-3)}
"""Every fault is run with each of them."""

Run = Callable[[Setting], Verdict]
"""Trains and judges."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: Unique.
        expected: Diagnosis.
        run: Trains and judges.
    """

    name: str
    expected: str
    run: Run


def _loop(arrange: Arrange, **loop: Any) -> Run:
    return partial(plain_loop, arrange, **loop)


def _trainer(arrange: Arrange, **training: Any) -> Run:
    return partial(hf_trainer, arrange, **training)


def in_loop(make: Make, places: Sequence[str] = IN_LOOP, **loop: Any) -> Run:
    """A preconditioner in a plain loop, called where it belongs or elsewhere."""
    return _loop(placed(make, places), **loop)


def in_trainer(make: Make, places: Sequence[str] = IN_TRAINER, **training: Any) -> Run:
    """The same in a Trainer."""
    return _trainer(placed(make, places), **training)


FAULTS = [
    Fault("after the step, in a loop", "preconditioned_after_step", in_loop(NotebookKFAC, ["after_step"])),
    Fault("in on_optimizer_step", "preconditioned_after_step", in_trainer(NotebookKFAC, ["on_optimizer_step"])),
    Fault("in on_step_end", "preconditioned_after_step", in_trainer(NotebookKFAC, ["on_step_end"])),
    Fault("copy put back, in a loop", "gradient_restored", in_loop(kfac.Restores)),
    Fault("copy put back and clipped", "gradient_restored", _loop(placed(kfac.Restores, clip=0.01))),
    Fault("copy put back, in a Trainer", "gradient_restored", in_trainer(kfac.Restores)),
    Fault("second backward pass", "gradient_recomputed", _loop(steps.recomputed)),
    Fault("closure runs backward again", "gradient_recomputed", _loop(steps.recomputed_in_closure)),
    Fault(
        "first micro-batch only, in a Trainer",
        "gradient_recomputed",
        in_trainer(of_four(kfac.FirstOfThree), ["on_substep_end"], accumulation=4),
    ),
    Fault("fused kernels, hooks silent", "no_statistics", in_loop(kfac.fused)),
    Fault("fused kernels, in a Trainer", "no_statistics", in_trainer(kfac.fused)),
    Fault("factors all zero", "zero_factors", in_loop(kfac.ZeroStatistics)),
    Fault("factors of one side zero", "zero_factors", in_loop(kfac.ZeroGradientStatistics)),
    Fault("inverse missing", "empty_inverse", in_loop(kfac.NoInverse)),
    Fault("inverse zero", "empty_inverse", in_loop(kfac.ZeroInverse)),
    Fault("inverse not finite", "empty_inverse", in_loop(kfac.NonFiniteInverse)),
    Fault("inverse the identity", "empty_inverse", in_loop(kfac.IdentityInverse)),
    Fault("inverse the identity on one side", "empty_inverse", in_loop(kfac.HalfIdentityInverse)),
    Fault("absolute damping, unscaled δ", "damping_swamps_factors", in_loop(kfac.Swamped)),
    Fault("absolute damping, in a Trainer", "damping_swamps_factors", in_trainer(kfac.Swamped)),
    Fault("damping above both factors", "damping_swamps_factors", in_loop(kfac.SwampedOnBothSides)),
    Fault("scalar preconditioner", "scalar_preconditioner", in_loop(kfac.Scalar)),
    Fault("scalar, no readings", "scalar_preconditioner", in_loop(kfac.ScalarWithoutReadings)),
    Fault("scalar, grafted", "scalar_preconditioner", in_loop(kfac.GraftedScalar)),
    Fault("scalar, bf16 weights", "scalar_preconditioner", in_loop(kfac.Scalar, dtype=torch.bfloat16, clip=1e-3)),
    Fault("copies preconditioned", "nothing_changed", in_loop(kfac.OfCopies)),
    Fault("too few samples for ever", "nothing_changed", in_loop(kfac.WaitsForEver)),
    Fault("half of the modules", "modules_missing", in_loop(kfac.HalfOfTheLayers)),
    Fault("half of the modules, in a Trainer", "modules_missing", in_trainer(kfac.HalfOfTheLayers)),
    Fault("B left out", "modules_missing", in_loop(kfac.OneSide)),
    Fault("padding counted", "padding_counted", in_loop(kfac.CountsPadding)),
    Fault("padding counted, accumulation 4", "padding_counted", in_loop(kfac.CountsPadding, accumulation=4)),
    Fault("never refreshed", "stale_factors", in_loop(kfac.NeverRefreshed, steps=36)),
    Fault("never refreshed, interval not told", "stale_factors", in_loop(kfac.NeverRefreshedUntold, steps=168)),
    Fault("applied twice, in a loop", "applied_repeatedly", _loop(steps.twice)),
    Fault("callback registered twice", "applied_repeatedly", in_trainer(NotebookKFAC, IN_TRAINER * 2)),
    Fault("NaN to zero", "nan_to_zero", in_loop(kfac.NanToZero)),
    Fault("NaN gradient to zero", "nan_to_zero", in_loop(kfac.NanGradientToZero)),
    Fault("clipped to nothing", "clipped_to_nothing", _loop(placed(clip=1e-9))),
    Fault("clipped to nothing, SGD", "clipped_to_nothing", _loop(placed(optimizer=sgd, clip=1e-7))),
    Fault("callback not registered", "never_called", in_trainer(NotebookKFAC, [])),
    Fault("callback of an event that is none", "never_called", in_trainer(NotebookKFAC, ["on_before_optimizer_step"])),
    Fault("not called, in a loop", "never_called", in_loop(NotebookKFAC, [])),
    Fault("wrapper bypassed, in a loop", "wrapper_bypassed", _loop(steps.bypassed)),
    Fault("wrapper bypassed by accelerate", "wrapper_bypassed", _loop(partial(steps.bypassed, prepare=accelerated))),
    Fault("wrapper bypassed, in a Trainer", "wrapper_bypassed", _trainer(steps.bypassed_in_trainer)),
    Fault(
        "each micro-batch counted four times",
        "accumulation_overcounted",
        in_loop(of_four(kfac.Overcounts), accumulation=4),
    ),
    Fault(
        "each micro-batch counted four times, in a Trainer",
        "accumulation_overcounted",
        in_trainer(of_four(kfac.Overcounts), accumulation=4),
    ),
    Fault(
        "after each micro-batch",
        "applied_repeatedly",
        in_loop(of_four(), ["after_backward"], accumulation=4),
    ),
    Fault(
        "after each micro-batch, in a Trainer",
        "applied_repeatedly",
        in_trainer(of_four(), ["on_substep_end", *IN_TRAINER], accumulation=4),
    ),
    Fault(
        "counted twice under checkpointing", "samples_overcounted", in_loop(kfac.CountsInForward, checkpointing=True)
    ),
    Fault("GRIT after the step, in a loop", "preconditioned_after_step", _loop(grit.by_hand("after_step"))),
    Fault("GRIT in on_optimizer_step", "preconditioned_after_step", _trainer(grit.by_hand("on_optimizer_step"))),
    Fault("GRIT in on_step_end", "preconditioned_after_step", _trainer(grit.by_hand("on_step_end"))),
    Fault("GRIT bypassed", "wrapper_bypassed", _loop(grit.bypassed)),
    Fault("GRIT applied twice", "applied_repeatedly", _loop(grit.twice)),
    Fault(
        "GRIT with the authors' damping",
        "damping_swamps_factors",
        _loop(grit_with(GRITConfig.paper(lambda_kfac=0.0, lambda_reproj=0.0))),
    ),
    Fault("GRIT, statistics renewed no more", "stale_factors", _loop(grit.that_stops)),
    Fault(
        "GRIT, too few samples for ever",
        "nothing_changed",
        _loop(grit_with(GRITConfig(mode="adamw", kfac_min_samples=10**6))),
    ),
    Fault(
        "GRIT, statistics of the first step alone",
        "zero_factors",
        _loop(grit_with(GRITConfig(mode="adamw", grit_cov_update_freq=10_000))),
    ),
    Fault("GRIT, warm-up longer than the run", "nothing_changed", _loop(grit_with(GRITConfig(ng_warmup_steps=10_000)))),
    Fault("loss with the wrong sign", "diverging", _loop(plain, loss_factor=lambda step: -1.0)),
    Fault(
        "loss not a number", "not_finite", _loop(plain, loss_factor=lambda step: float("nan") if step % 3 == 0 else 1.0)
    ),
    Fault("another optimizer is watched", "no_samples", _loop(steps.of_other_weights)),
]
