"""The fault catalogue: ways in which preconditioning silently does nothing, or not what it says, on a tiny model.

Each fault is `benchmarks._notebook.NotebookKFAC` (or GRIT) with one thing done differently, and the diagnosis that the
probe must come to. `CLEAN` are runs in which nothing is wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._clean_runs import CLEAN, Clean
from benchmarks._faulty_kfac import (
    CountsInForward,
    CountsPadding,
    GraftedScalar,
    HalfIdentityInverse,
    HalfOfTheLayers,
    IdentityInverse,
    NanGradientToZero,
    NanToZero,
    NeverRefreshed,
    NeverRefreshedUntold,
    NoInverse,
    NonFiniteInverse,
    OfCopies,
    OneSide,
    Overcounts,
    Scalar,
    ScalarWithoutReadings,
    Swamped,
    SwampedOnBothSides,
    WaitsForEver,
    ZeroGradientStatistics,
    ZeroInverse,
    ZeroStatistics,
    fused,
)
from benchmarks._notebook import (
    NotebookKFAC,
    Setting,
    Setup,
    Wrapper,
    at,
    hf_trainer,
    plain_loop,
    weights_of,
)
from grit import GRITConfig, GRITManager, GritOptimizer
from probes import Verdict, grit_readings

__all__ = ["CLEAN", "FAULTS", "SETTINGS", "Clean", "Fault"]

SETTINGS = {"": Setting(), "other seed": Setting(seed=1), "other rate": Setting(lr=3e-3)}
"""Every fault is run with each of them."""


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
    run: Callable[[Setting], Verdict]


Make = Callable[[nn.Module], NotebookKFAC]


def adamw(model: nn.Module, setting: Setting, **options: Any) -> torch.optim.AdamW:
    """The optimizer of the Adam family, without weight decay."""
    return torch.optim.AdamW(weights_of(model), lr=setting.lr, weight_decay=0.0, **options)


def before_step(make: Make) -> Callable[[Any, Setting], Setup]:
    """Where it belongs, in a plain loop."""

    def arrange(model: Any, setting: Setting) -> Setup:
        kfac = make(model)
        return Setup(adamw(model, setting), kfac.watch(), before_step=lambda batch: kfac.apply())

    return arrange


def at_event(make: Make, event: str) -> Callable[[Any, Setting], Setup]:
    """In a Trainer, at one of its events."""

    def arrange(model: Any, setting: Setting) -> Setup:
        kfac = make(model)
        return Setup(adamw(model, setting), kfac.watch(), callbacks=[at(event, kfac.apply)])

    return arrange


def in_loop(make: Make, **loop: Any) -> Callable[[Setting], Verdict]:
    """A preconditioner that is wrong in itself, in a plain loop."""
    return partial(plain_loop, before_step(make), **loop)


def in_trainer(make: Make, event: str = "on_pre_optimizer_step", **training: Any) -> Callable[[Setting], Verdict]:
    """The same in a Trainer."""
    return partial(hf_trainer, at_event(make, event), **training)


# Around the step


def after_step(model: Any, setting: Setting) -> Setup:
    """Preconditioned when the optimizer has used the gradients."""
    kfac = NotebookKFAC(model)
    return Setup(adamw(model, setting), kfac.watch(), after_step=kfac.apply)


def _restoring(model: Any, kfac: NotebookKFAC) -> Callable[[], None]:
    def apply() -> None:
        copies = [p.grad.clone() for p in weights_of(model) if p.grad is not None]
        kfac.apply()
        for parameter, copy in zip(weights_of(model), copies, strict=True):
            parameter.grad = copy

    return apply


def restored(model: Any, setting: Setting) -> Setup:
    """A copy of the raw gradients is put back."""
    kfac = NotebookKFAC(model)
    restoring = _restoring(model, kfac)
    return Setup(adamw(model, setting), kfac.watch(), before_step=lambda batch: restoring())


def restored_and_clipped(model: Any, setting: Setting) -> Setup:
    """A copy is put back and then clipped, so that not a bit of it is as it was."""
    kfac = NotebookKFAC(model)
    restoring = _restoring(model, kfac)

    def before(batch: Any) -> None:
        restoring()
        torch.nn.utils.clip_grad_norm_(weights_of(model), 0.01)

    return Setup(adamw(model, setting), kfac.watch(), before_step=before)


def restored_in_trainer(model: Any, setting: Setting) -> Setup:
    """The same by a callback."""
    kfac = NotebookKFAC(model)
    return Setup(adamw(model, setting), kfac.watch(), callbacks=[at("on_pre_optimizer_step", _restoring(model, kfac))])


def recomputed(model: Any, setting: Setting) -> Setup:
    """A second backward pass overwrites what was preconditioned."""
    kfac = NotebookKFAC(model)

    def before(batch: dict[str, Tensor]) -> None:
        kfac.apply()
        model.zero_grad()
        model(**batch).loss.backward()

    return Setup(adamw(model, setting), kfac.watch(), before_step=before)


def recomputed_in_closure(model: Any, setting: Setting) -> Setup:
    """The optimizer's own closure computes gradients again."""
    kfac, optimizer = NotebookKFAC(model), adamw(model, setting)
    step, last = optimizer.step, dict[str, Any]()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(**last["batch"]).loss
        loss.backward()
        return loss

    def before(batch: dict[str, Tensor]) -> None:
        last["batch"] = batch
        kfac.apply()

    optimizer.step = lambda: step(closure)  # type: ignore[method-assign, assignment, misc]
    return Setup(optimizer, kfac.watch(), before_step=before)


def recomputed_in_trainer(model: Any, setting: Setting) -> Setup:
    """Preconditioned after the first of several micro-batches; the others add raw gradients to it."""
    kfac = NotebookKFAC(model, accumulation=4)
    return Setup(adamw(model, setting), kfac.watch(), callbacks=[at("on_substep_end", _first_of_three(kfac))])


def _first_of_three(kfac: NotebookKFAC) -> Callable[[], None]:
    seen = [0]

    def apply() -> None:
        if seen[0] % 3 == 0:  # a step of four micro-batches has three ends that are not its own
            kfac.apply()
        seen[0] += 1

    return apply


def twice(model: Any, setting: Setting) -> Setup:
    """Called by the loop, and once more by the wrapped optimizer."""
    kfac = NotebookKFAC(model)
    return Setup(Wrapper(adamw(model, setting), kfac), kfac.watch(), before_step=lambda batch: kfac.apply())


def twice_in_trainer(model: Any, setting: Setting) -> Setup:
    """The callback is registered twice."""
    kfac = NotebookKFAC(model)
    both = [at("on_pre_optimizer_step", kfac.apply), at("on_pre_optimizer_step", kfac.apply)]
    return Setup(adamw(model, setting), kfac.watch(), callbacks=both)


def each_micro_batch(model: Any, setting: Setting) -> Setup:
    """After every micro-batch the sum so far is preconditioned again."""
    kfac = NotebookKFAC(model, accumulation=4)
    return Setup(adamw(model, setting), kfac.watch(), after_backward=kfac.apply)


def each_micro_batch_in_trainer(model: Any, setting: Setting) -> Setup:
    """The same by callbacks."""
    kfac = NotebookKFAC(model, accumulation=4)
    events = ("on_substep_end", "on_pre_optimizer_step")
    return Setup(adamw(model, setting), kfac.watch(), callbacks=[at(event, kfac.apply) for event in events])


def unregistered(model: Any, setting: Setting) -> Setup:
    """Made, but nobody calls it (no add_callback; nothing in the loop)."""
    kfac = NotebookKFAC(model)
    return Setup(adamw(model, setting), kfac.watch())


def misspelt_event(model: Any, setting: Setting) -> Setup:
    """Registered for an event that no Trainer has."""
    kfac = NotebookKFAC(model)
    return Setup(adamw(model, setting), kfac.watch(), callbacks=[at("on_before_optimizer_step", kfac.apply)])


def bypassed(model: Any, setting: Setting) -> Setup:
    """The loop steps the optimizer inside the wrapper."""
    kfac = NotebookKFAC(model)
    wrapper = Wrapper(adamw(model, setting), kfac)
    return Setup(wrapper.optimizer, kfac.watch(), watched=wrapper)


def bypassed_by_accelerate(model: Any, setting: Setting) -> Setup:
    """Accelerate was given the optimizer inside the wrapper, and steps that."""
    from accelerate import Accelerator

    kfac = NotebookKFAC(model)
    wrapper = Wrapper(adamw(model, setting), kfac)
    return Setup(Accelerator(cpu=True).prepare(wrapper.optimizer), kfac.watch(), watched=wrapper)


def bypassed_in_trainer(model: Any, setting: Setting) -> Setup:
    """The Trainer holds the wrapper, accelerate holds what is inside it."""
    from transformers import Trainer

    kfac = NotebookKFAC(model)
    wrapper = Wrapper(adamw(model, setting), kfac)

    class Unwrapping(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.optimizer.step = wrapper.optimizer.step
            return super().training_step(*args, **kwargs)

    return Setup(wrapper, kfac.watch(), trainer=Unwrapping)


# Clipping


def clipped_to_nothing(model: Any, setting: Setting) -> Setup:
    """A limit on the natural gradient that was meant for something else."""
    kfac = NotebookKFAC(model)

    def before(batch: Any) -> None:
        kfac.apply()
        torch.nn.utils.clip_grad_norm_(weights_of(model), 1e-9)

    return Setup(adamw(model, setting), kfac.watch(), before_step=before)


def sgd_clipped_to_nothing(model: Any, setting: Setting) -> Setup:
    """The same under SGD, whose steps shrink as the gradient does."""
    kfac = NotebookKFAC(model)

    def before(batch: Any) -> None:
        kfac.apply()
        torch.nn.utils.clip_grad_norm_(weights_of(model), 1e-7)

    return Setup(torch.optim.SGD(weights_of(model), lr=setting.lr * 10), kfac.watch(), before_step=before)


# GRIT itself, in the wrong place or with the authors' numbers


def grit(model: Any, setting: Setting, config: GRITConfig) -> tuple[GRITManager, GritOptimizer]:
    """A manager and the optimizer that it belongs in."""
    manager = GRITManager(model, config)
    return manager, GritOptimizer(adamw(model, setting), manager)


def _by_hand(manager: GRITManager) -> Callable[[], None]:
    def apply() -> None:
        manager.update_statistics()
        if manager.inversion_due():
            manager.update_and_invert_factors()
        manager.precondition_gradients()
        manager.end_step()

    return apply


def grit_at_event(event: str, **settings: Any) -> Callable[[Any, Setting], Setup]:
    """GRIT's methods called by a callback instead of a GritOptimizer."""

    def arrange(model: Any, setting: Setting) -> Setup:
        manager = GRITManager(model, GRITConfig(mode="adamw")).open()
        told = {"preconditioner": (manager, "precondition_gradients"), "readings": grit_readings(manager)}
        return Setup(
            adamw(model, setting), told, callbacks=[at(event, _by_hand(manager))], close=lambda: manager.close(False)
        )

    return arrange


def grit_after_step(model: Any, setting: Setting) -> Setup:
    """The same in a plain loop."""
    manager = GRITManager(model, GRITConfig(mode="adamw")).open()
    told = {"preconditioner": (manager, "precondition_gradients"), "readings": grit_readings(manager)}
    return Setup(adamw(model, setting), told, after_step=_by_hand(manager), close=lambda: manager.close(False))


def grit_bypassed(model: Any, setting: Setting) -> Setup:
    """The optimizer inside the GritOptimizer steps. The manager says so when it is closed: NotAppliedError."""
    manager, optimizer = grit(model, setting, GRITConfig())
    told = {"readings": grit_readings(manager)}
    return Setup(optimizer.optimizer, told, watched=optimizer, close=lambda: manager.close(False))


def grit_twice(model: Any, setting: Setting) -> Setup:
    """Preconditioned by the loop and again by the GritOptimizer."""
    manager, optimizer = grit(model, setting, GRITConfig(mode="adamw"))
    told = {"preconditioner": (manager, "precondition_gradients"), "readings": grit_readings(manager)}
    return Setup(
        optimizer, told, before_step=lambda batch: manager.precondition_gradients(), close=lambda: manager.close(False)
    )


def grit_with(config: GRITConfig, prepare: Callable[[Any], None] = lambda model: None) -> Callable[..., Setup]:
    """GRIT as it is meant to be used, with settings that undo it."""

    def arrange(model: Any, setting: Setting) -> Setup:
        prepare(model)
        manager, optimizer = grit(model, setting, config)
        return Setup(optimizer, {"readings": grit_readings(manager)}, close=lambda: manager.close(False))

    return arrange


def grit_that_stops(model: Any, setting: Setting) -> Setup:
    """After ten steps nothing is taken into the statistics; inversions go on."""
    manager, optimizer = grit(model, setting, GRITConfig(mode="adamw", kfac_update_freq=4, grit_cov_update_freq=4))
    update = manager.update_statistics
    manager.update_statistics = lambda: update() if manager.step < 10 else None  # type: ignore[method-assign]
    return Setup(optimizer, {"readings": grit_readings(manager)}, close=lambda: manager.close(False))


# Training that goes wrong whatever is claimed


def plain(model: Any, setting: Setting) -> Setup:
    """AdamW."""
    return Setup(adamw(model, setting))


def of_other_weights(model: Any, setting: Setting) -> Setup:
    """The probe is given an optimizer that is not the one that steps."""
    return Setup(adamw(model, setting), watched=adamw(model, setting))


FAULTS = [
    Fault("after the step, in a loop", "preconditioned_after_step", partial(plain_loop, after_step)),
    Fault("in on_optimizer_step", "preconditioned_after_step", in_trainer(NotebookKFAC, "on_optimizer_step")),
    Fault("in on_step_end", "preconditioned_after_step", in_trainer(NotebookKFAC, "on_step_end")),
    Fault("copy put back, in a loop", "gradient_restored", partial(plain_loop, restored)),
    Fault("copy put back and clipped", "gradient_restored", partial(plain_loop, restored_and_clipped)),
    Fault("copy put back, in a Trainer", "gradient_restored", partial(hf_trainer, restored_in_trainer)),
    Fault("second backward pass", "gradient_recomputed", partial(plain_loop, recomputed)),
    Fault("closure runs backward again", "gradient_recomputed", partial(plain_loop, recomputed_in_closure)),
    Fault(
        "first micro-batch only, in a Trainer",
        "gradient_recomputed",
        partial(hf_trainer, recomputed_in_trainer, accumulation=4),
    ),
    Fault("fused kernels, hooks silent", "no_statistics", in_loop(fused)),
    Fault("fused kernels, in a Trainer", "no_statistics", in_trainer(fused)),
    Fault("factors all zero", "zero_factors", in_loop(ZeroStatistics)),
    Fault("factors of one side zero", "zero_factors", in_loop(ZeroGradientStatistics)),
    Fault("inverse missing", "empty_inverse", in_loop(NoInverse)),
    Fault("inverse zero", "empty_inverse", in_loop(ZeroInverse)),
    Fault("inverse not finite", "empty_inverse", in_loop(NonFiniteInverse)),
    Fault("inverse the identity", "empty_inverse", in_loop(IdentityInverse)),
    Fault("inverse the identity on one side", "empty_inverse", in_loop(HalfIdentityInverse)),
    Fault("absolute damping, unscaled δ", "damping_swamps_factors", in_loop(Swamped)),
    Fault("absolute damping, in a Trainer", "damping_swamps_factors", in_trainer(Swamped)),
    Fault("damping above both factors", "damping_swamps_factors", in_loop(SwampedOnBothSides)),
    Fault("scalar preconditioner", "scalar_preconditioner", in_loop(Scalar)),
    Fault("scalar, no readings", "scalar_preconditioner", in_loop(ScalarWithoutReadings)),
    Fault("scalar, grafted", "scalar_preconditioner", in_loop(GraftedScalar)),
    Fault("scalar, bf16 weights", "scalar_preconditioner", in_loop(Scalar, dtype=torch.bfloat16, clip=1e-3)),
    Fault("copies preconditioned", "nothing_changed", in_loop(OfCopies)),
    Fault("too few samples for ever", "nothing_changed", in_loop(WaitsForEver)),
    Fault("half of the modules", "modules_missing", in_loop(HalfOfTheLayers)),
    Fault("half of the modules, in a Trainer", "modules_missing", in_trainer(HalfOfTheLayers)),
    Fault("B left out", "modules_missing", in_loop(OneSide)),
    Fault("padding counted", "padding_counted", in_loop(CountsPadding)),
    Fault("padding counted, accumulation 4", "padding_counted", in_loop(CountsPadding, accumulation=4)),
    Fault("never refreshed", "stale_factors", in_loop(NeverRefreshed, steps=36)),
    Fault("never refreshed, interval not told", "stale_factors", in_loop(NeverRefreshedUntold, steps=168)),
    Fault("applied twice, in a loop", "applied_repeatedly", partial(plain_loop, twice)),
    Fault("callback registered twice", "applied_repeatedly", partial(hf_trainer, twice_in_trainer)),
    Fault("NaN to zero", "nan_to_zero", in_loop(NanToZero)),
    Fault("NaN gradient to zero", "nan_to_zero", in_loop(NanGradientToZero)),
    Fault("clipped to nothing", "clipped_to_nothing", partial(plain_loop, clipped_to_nothing)),
    Fault("clipped to nothing, SGD", "clipped_to_nothing", partial(plain_loop, sgd_clipped_to_nothing)),
    Fault("callback not registered", "never_called", partial(hf_trainer, unregistered)),
    Fault("callback of an event that is none", "never_called", partial(hf_trainer, misspelt_event)),
    Fault("not called, in a loop", "never_called", partial(plain_loop, unregistered)),
    Fault("wrapper bypassed, in a loop", "wrapper_bypassed", partial(plain_loop, bypassed)),
    Fault("wrapper bypassed by accelerate", "wrapper_bypassed", partial(plain_loop, bypassed_by_accelerate)),
    Fault("wrapper bypassed, in a Trainer", "wrapper_bypassed", partial(hf_trainer, bypassed_in_trainer)),
    Fault(
        "each micro-batch counted four times",
        "accumulation_overcounted",
        in_loop(partial(Overcounts, accumulation=4), accumulation=4),
    ),
    Fault(
        "each micro-batch counted four times, in a Trainer",
        "accumulation_overcounted",
        in_trainer(partial(Overcounts, accumulation=4), accumulation=4),
    ),
    Fault("after each micro-batch", "applied_repeatedly", partial(plain_loop, each_micro_batch, accumulation=4)),
    Fault(
        "after each micro-batch, in a Trainer",
        "applied_repeatedly",
        partial(hf_trainer, each_micro_batch_in_trainer, accumulation=4),
    ),
    Fault(
        "counted twice under checkpointing",
        "samples_overcounted",
        in_loop(CountsInForward, checkpointing=True),
    ),
    Fault("GRIT after the step, in a loop", "preconditioned_after_step", partial(plain_loop, grit_after_step)),
    Fault(
        "GRIT in on_optimizer_step",
        "preconditioned_after_step",
        partial(hf_trainer, grit_at_event("on_optimizer_step")),
    ),
    Fault("GRIT in on_step_end", "preconditioned_after_step", partial(hf_trainer, grit_at_event("on_step_end"))),
    Fault("GRIT bypassed", "wrapper_bypassed", partial(plain_loop, grit_bypassed)),
    Fault("GRIT applied twice", "applied_repeatedly", partial(plain_loop, grit_twice)),
    Fault(
        "GRIT with the authors' damping",
        "damping_swamps_factors",
        partial(plain_loop, grit_with(GRITConfig.paper(lambda_kfac=0.0, lambda_reproj=0.0))),
    ),
    Fault("GRIT, statistics renewed no more", "stale_factors", partial(plain_loop, grit_that_stops)),
    Fault(
        "GRIT, too few samples for ever",
        "nothing_changed",
        partial(plain_loop, grit_with(GRITConfig(mode="adamw", kfac_min_samples=10**6))),
    ),
    Fault(
        "GRIT, statistics of the first step alone",
        "zero_factors",
        partial(plain_loop, grit_with(GRITConfig(mode="adamw", grit_cov_update_freq=10_000))),
    ),
    Fault(
        "GRIT, warm-up longer than the run",
        "nothing_changed",
        partial(plain_loop, grit_with(GRITConfig(ng_warmup_steps=10_000))),
    ),
    Fault("loss with the wrong sign", "diverging", partial(plain_loop, plain, loss_factor=lambda step: -1.0)),
    Fault(
        "loss not a number",
        "not_finite",
        partial(plain_loop, plain, loss_factor=lambda step: float("nan") if step % 3 == 0 else 1.0),
    ),
    Fault("another optimizer is watched", "no_samples", partial(plain_loop, of_other_weights)),
]
