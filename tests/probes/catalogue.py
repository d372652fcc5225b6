"""The fault catalogue: ways in which preconditioning silently does nothing, or not what it says, on a tiny model.

Each fault is `NotebookKFAC` (or GRIT) with one thing done differently, and the diagnosis that the probe must come to;
in the clean runs at the end nothing is wrong. `make probe-faults` runs every fault with each of `SETTINGS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit import GRITConfig, GRITManager, GritOptimizer, GritTrainer
from probes import Verdict
from tests.probes import notebook as kfac
from tests.probes.notebook import NotebookKFAC, Wrapper
from tests.probes.worlds import Arrange, Setting, Setup, at, fuse, hf_trainer, plain_loop, weights_of

Make = Callable[[Any], NotebookKFAC]

IN_LOOP, IN_TRAINER = ("before_step",), ("on_pre_optimizer_step",)
"""Where preconditioning belongs."""


def adamw(model: Any, setting: Setting, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(weights_of(model), lr=setting.lr, **{"weight_decay": 0.0, **options})


def sgd(model: Any, setting: Setting, factor: float = 10.0, **options: Any) -> torch.optim.SGD:
    """SGD, with the learning rate times a factor."""
    return torch.optim.SGD(weights_of(model), lr=factor * setting.lr, **options)


def accelerated(optimizer: Optimizer) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(optimizer)


def plain(model: Any, setting: Setting, **options: Any) -> Setup:
    return Setup(adamw(model, setting, **options))


def of_four(make: type[NotebookKFAC] = NotebookKFAC) -> Make:
    """A preconditioner that knows of four micro-batches in a step."""
    return partial(make, accumulation=4)


def called(do: Callable[[], Any], places: Sequence[str]) -> dict[str, Any]:
    """Arguments of `Setup` that have `do` called: at fields of `Setup` in a loop, at events (`on_…`) in a Trainer."""
    events = [place for place in places if place.startswith("on_")]
    return {"callbacks": [at(event, do) for event in events]} | {place: do for place in places if place not in events}


def placed(
    make: Make = NotebookKFAC,
    places: Sequence[str] = IN_LOOP,
    optimizer: Callable[[Any, Setting], Optimizer] = adamw,
    clip: float = 0.0,
) -> Arrange:
    """A preconditioner that is called beside the optimizer, its gradients then clipped to the norm `clip`; 0 = not."""

    def arrange(model: Any, setting: Setting) -> Setup:
        kfac = make(model)

        def apply() -> None:
            kfac.apply()
            if clip:
                torch.nn.utils.clip_grad_norm_(weights_of(model), clip)

        return Setup(optimizer(model, setting), kfac.watch(), **called(apply, places))

    return arrange


def wrapped(model: Any, setting: Setting) -> Setup:
    kfac = NotebookKFAC(model)
    return Setup(Wrapper(adamw(model, setting), kfac), kfac.watch())


def grit_setup(manager: GRITManager, optimizer: Any, *, by_hand: bool = False, **around: Any) -> Setup:
    """GRIT in a loop, its manager closed at the end without a check whether it was applied.

    `by_hand`: the manager's own method is called to precondition, and watched.
    """
    told: dict[str, Any] = {"readings": manager.readings}
    if by_hand:
        told["preconditioner"] = (manager, "precondition_gradients")
    return Setup(optimizer, told, close=lambda: manager.close(False), **around)


def grit_optimizer(model: Any, setting: Setting, config: GRITConfig) -> GritOptimizer:
    manager = GRITManager(model, config)
    inner = sgd(model, setting, momentum=0.9) if config.mode == "sgd" else adamw(model, setting)
    return GritOptimizer(inner, manager)


def grit_with(config: GRITConfig, prepare: Callable[[Any], None] = lambda model: None) -> Arrange:
    """GRIT as it is meant to be used; some settings undo it."""

    def arrange(model: Any, setting: Setting) -> Setup:
        prepare(model)
        optimizer = grit_optimizer(model, setting, config)
        return grit_setup(optimizer.manager, optimizer)

    return arrange


# Faults around the step: a right preconditioner whose work is undone, repeated or never asked for


def cleared(again: bool) -> Arrange:
    """zero_grad() comes after preconditioning; `again`: a second backward pass, too."""

    def arrange(model: Any, setting: Setting) -> Setup:
        kfac = NotebookKFAC(model)

        def before() -> None:
            kfac.apply()
            model.zero_grad()
            if again:
                model(**kfac.batch).loss.backward()

        return Setup(adamw(model, setting), kfac.watch(), before_step=before)

    return arrange


def by_closure(inside: bool) -> Arrange:
    """The optimizer's own closure computes gradients (again, where they are preconditioned outside of it)."""

    def arrange(model: Any, setting: Setting) -> Setup:
        kfac, optimizer = NotebookKFAC(model), adamw(model, setting)
        step = optimizer.step

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(**kfac.batch).loss
            loss.backward()
            if inside:
                kfac.apply()
            return loss

        optimizer.step = lambda: step(closure)  # type: ignore[method-assign, assignment, misc]
        around: dict[str, Any] = {"after_backward": model.zero_grad} if inside else {"before_step": kfac.apply}
        return Setup(optimizer, kfac.watch(), **around)

    return arrange


def called_twice(model: Any, setting: Setting) -> Setup:
    setup = wrapped(model, setting)
    setup.before_step = setup.optimizer.kfac.apply
    return setup


def wrapper_bypassed(
    model: Any, setting: Setting, prepare: Callable[[Any], Any] = lambda optimizer: optimizer
) -> Setup:
    """The optimizer inside the wrapper steps, or what `prepare` makes of it."""
    setup = wrapped(model, setting)
    setup.watched, setup.optimizer = setup.optimizer, prepare(setup.optimizer.optimizer)
    return setup


def bypassed_in_trainer(model: Any, setting: Setting) -> Setup:
    """The Trainer holds the wrapper, accelerate holds what is inside it."""
    from transformers import Trainer

    setup = wrapped(model, setting)
    wrapper: Wrapper = setup.optimizer

    class Unwrapping(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.optimizer.step = wrapper.optimizer.step
            return super().training_step(*args, **kwargs)

    setup.trainer = Unwrapping
    return setup


def of_other_weights(model: Any, setting: Setting) -> Setup:
    return Setup(adamw(model, setting), watched=adamw(model, setting))


# Weights that do not move


def held(weights: Callable[[Any], list[Any]], preconditioned: bool = True) -> Arrange:
    """An optimizer of some weights, or of copies."""

    def arrange(model: Any, setting: Setting) -> Setup:
        kfac = NotebookKFAC(model)
        optimizer = torch.optim.AdamW(weights(model), lr=setting.lr)
        return Setup(optimizer, kfac.watch() if preconditioned else {}, before_step=kfac.apply)

    return arrange


def copies_of(model: Any) -> list[Any]:
    return [torch.nn.Parameter(weight.detach().clone()) for weight in weights_of(model)]


def side_of(letter: str, model: Any) -> list[Any]:
    return [p for name, p in model.named_parameters() if p.requires_grad and f"lora_{letter}" in name]


def by_rates(rate_a: float, rate_b: float, preconditioned: bool = True) -> Arrange:
    """A and B with learning rates of their own, as factors."""

    def arrange(model: Any, setting: Setting) -> Setup:
        kfac = NotebookKFAC(model)
        groups = [{"params": side_of(x, model), "lr": setting.lr * r} for x, r in (("A", rate_a), ("B", rate_b))]
        told = kfac.watch() if preconditioned else {}
        return Setup(torch.optim.AdamW(groups), told, before_step=kfac.apply if preconditioned else lambda: None)

    return arrange


def put_back(wanted: Callable[[str], bool], preconditioned: bool = True, in_hook: bool = False) -> Arrange:
    """The weights of before the step are put back after it, by the loop or by a hook of the optimizer."""

    def arrange(model: Any, setting: Setting) -> Setup:
        kfac = NotebookKFAC(model)
        chosen = [p for name, p in model.named_parameters() if p.requires_grad and wanted(name)]
        saved: list[Tensor] = []

        def before() -> None:
            if preconditioned:
                kfac.apply()
            saved[:] = [p.detach().clone() for p in chosen]

        def after() -> None:
            for p, old in zip(chosen, saved, strict=True):
                p.data.copy_(old)

        optimizer = adamw(model, setting)
        if in_hook:
            optimizer.register_step_post_hook(lambda *_: after())
        told = kfac.watch() if preconditioned else {}
        return Setup(optimizer, told, before_step=before, after_step=(lambda: None) if in_hook else after)

    return arrange


def step_that_does_nothing(model: Any, setting: Setting) -> Setup:
    kfac = NotebookKFAC(model)

    class Idle(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            """Nothing."""

    return Setup(Idle(weights_of(model), lr=setting.lr), kfac.watch(), before_step=kfac.apply)


def detached(model: Any, setting: Setting) -> Setup:
    """The first layer's output is detached, so nothing below the second learns."""
    model.base_model.model.model.layers[0].register_forward_hook(
        lambda module, args, out: tuple(o.detach() for o in out) if isinstance(out, tuple) else out.detach()
    )
    kfac = NotebookKFAC(model)
    return Setup(adamw(model, setting), kfac.watch(), before_step=kfac.apply)


# Other optimizers and other places


class Noisy(torch.optim.Optimizer):
    """Steps of a random direction, or uphill; claims nothing."""

    def __init__(self, weights: Any, lr: float, uphill: bool = False):
        super().__init__(weights, {"lr": lr})
        self.uphill, self.generator = uphill, torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.any():
                    away = p.grad / p.grad.norm() if self.uphill else torch.randn(p.shape, generator=self.generator)
                    p.add_(away, alpha=0.1 * group["lr"])


class OfMasters(torch.optim.Optimizer):
    """Steps master weights, with gradients that a hook took along in backward, not with those in `.grad`."""

    def __init__(self, weights: list[Any], lr: float):
        super().__init__(weights, {"lr": lr})
        self.masters = {p: torch.nn.Parameter(p.detach().clone()) for p in weights}
        self.own = torch.optim.AdamW(list(self.masters.values()), lr=lr, weight_decay=0.0)
        for p in weights:
            p.register_hook(lambda g, p=p: setattr(self.masters[p], "grad", g.detach().clone()))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.own.step()
        for p, master in self.masters.items():
            p.copy_(master)


def of_masters(model: Any, setting: Setting) -> Setup:
    kfac = NotebookKFAC(model)
    return Setup(OfMasters(weights_of(model), setting.lr), kfac.watch(), before_step=kfac.apply)


def of_each(kfac: NotebookKFAC, weight: Any, gradient: Tensor) -> Tensor:
    """One gradient, preconditioned."""
    for layer in kfac.layers.values():
        for own, side in ((layer.a, "g"), (layer.b, "a")):
            inverse = layer.inverse.get(side)
            if own is weight and inverse is not None:
                return kfac.product(gradient, inverse, side)
    return gradient


def in_backward(place: str, make: Make = NotebookKFAC) -> Arrange:
    """Preconditioned while backward runs: by hooks on the parameters, set before the probe's."""

    def arrange(model: Any, setting: Setting) -> Setup:
        kfac = make(model)
        for weight in kfac.weights:
            if place == "register_hook":
                weight.register_hook(lambda g, weight=weight: of_each(kfac, weight, g))
            else:
                weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", of_each(kfac, p, p.grad)))
        return Setup(
            adamw(model, setting),
            {"readings": kfac.readings},
            before_step=kfac.update_inverses,
        )

    return arrange


def in_pre_hook(model: Any, setting: Setting) -> Setup:
    kfac, optimizer = NotebookKFAC(model), adamw(model, setting)
    optimizer.register_step_pre_hook(lambda *_: kfac.apply())
    return Setup(optimizer, kfac.watch())


def in_subclass(model: Any, setting: Setting) -> Setup:
    kfac = NotebookKFAC(model)

    class Preconditioned(torch.optim.RAdam):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            kfac.apply()
            super().step()

    return Setup(Preconditioned(weights_of(model), lr=setting.lr), kfac.watch())


def by_hand(model: Any, setting: Setting) -> Setup:
    """Gradients of autograd.grad, put into `.grad` preconditioned."""
    kfac = NotebookKFAC(model)
    kept = weights_of(model)

    def before() -> None:
        model.zero_grad()
        gradients = torch.autograd.grad(model(**kfac.batch).loss, kept)
        for weight, gradient in zip(kept, gradients, strict=True):
            weight.grad = gradient.clone()
        kfac.apply()

    return Setup(adamw(model, setting), kfac.watch(), after_backward=model.zero_grad, before_step=before)


def another_takes_over(model: Any, setting: Setting) -> Setup:
    """After half of the run."""
    kfac, first, second = NotebookKFAC(model), adamw(model, setting), adamw(model, setting)

    class Both:
        param_groups, steps = first.param_groups, 0

        def step(self) -> None:
            self.steps += 1
            (first if self.steps <= 12 else second).step()

        def zero_grad(self) -> None:
            first.zero_grad()

    return Setup(Both(), kfac.watch(), watched=first, before_step=kfac.apply)


# Faults of GRIT: called in the wrong place, bypassed, repeated, or cut off from its statistics


def grit_by_hand(place: str) -> Arrange:
    """GRIT's methods called at a place instead of a GritOptimizer."""

    def arrange(model: Any, setting: Setting) -> Setup:
        manager = GRITManager(model, GRITConfig(mode="adamw")).open()

        def apply() -> None:
            manager.update_statistics()
            if manager.curvature.refresh_due(manager.step):
                manager.update_and_invert_factors()
            manager.precondition_gradients()
            manager.end_step()

        return grit_setup(manager, adamw(model, setting), by_hand=True, **called(apply, [place]))

    return arrange


def grit_bypassed(model: Any, setting: Setting) -> Setup:
    """The optimizer inside the GritOptimizer steps. The manager says so when it is closed: NotAppliedError."""
    optimizer = grit_optimizer(model, setting, GRITConfig())
    return grit_setup(optimizer.manager, optimizer.optimizer, watched=optimizer)


def grit_twice(model: Any, setting: Setting) -> Setup:
    """Preconditioned by the loop and again by the GritOptimizer."""
    optimizer = grit_optimizer(model, setting, GRITConfig(mode="adamw"))
    manager = optimizer.manager
    return grit_setup(manager, optimizer, by_hand=True, before_step=lambda: manager.precondition_gradients())


def grit_that_stops(model: Any, setting: Setting) -> Setup:
    """After ten steps nothing is taken into the statistics; inversions go on."""
    config = GRITConfig(mode="adamw", kfac_update_freq=4, grit_cov_update_freq=4)
    optimizer = grit_optimizer(model, setting, config)
    manager = optimizer.manager
    update = manager.update_statistics
    manager.update_statistics = lambda: update() if manager.step < 10 else None
    return grit_setup(manager, optimizer)


# The faults

SETTINGS = {"": Setting(), "other seed": Setting(seed=1), "other rate": Setting(lr=3e-3)}
"""Every fault is run with each of them."""

Run = Callable[..., Verdict]
"""Trains with a setting (default: the first) and judges."""


@dataclass(frozen=True)
class Fault:
    name: str
    expected: str  # diagnosis
    run: Run


_looped: Callable[..., Run] = partial(partial, plain_loop)
_trained: Callable[..., Run] = partial(partial, hf_trainer)


def in_loop(make: Make, places: Sequence[str] = IN_LOOP, **loop: Any) -> Run:
    return _looped(placed(make, places), **loop)


def in_trainer(make: Make, places: Sequence[str] = IN_TRAINER, **training: Any) -> Run:
    return _trained(placed(make, places), **training)


def in_both(name: str, expected: str, make: Make, **more: Any) -> list[Fault]:
    ways = {"a loop": in_loop(make, **more), "a Trainer": in_trainer(make, **more)}
    return [Fault(f"{name}, in {way}", expected, run) for way, run in ways.items()]


notebook, notebook_in_trainer = placed(), placed(places=IN_TRAINER)

FAULTS = [
    Fault("after the step, in a loop", "preconditioned_after_step", in_loop(NotebookKFAC, ["after_step"])),
    Fault("in on_optimizer_step", "preconditioned_after_step", in_trainer(NotebookKFAC, ["on_optimizer_step"])),
    Fault("in on_step_end", "preconditioned_after_step", in_trainer(NotebookKFAC, ["on_step_end"])),
    *in_both("copy put back", "gradient_restored", kfac.Restores),
    Fault("copy put back and clipped", "gradient_restored", _looped(placed(kfac.Restores, clip=0.01))),
    Fault("second backward pass", "gradient_recomputed", _looped(cleared(again=True))),
    Fault("closure runs backward again", "gradient_recomputed", _looped(by_closure(inside=False))),
    Fault(
        "first micro-batch only, in a Trainer",
        "gradient_recomputed",
        in_trainer(of_four(kfac.FirstOfThree), ["on_substep_end"], accumulation=4),
    ),
    *in_both("fused kernels, hooks silent", "no_statistics", kfac.fused),
    Fault("factors all zero", "zero_factors", in_loop(kfac.ZeroStatistics)),
    Fault("factors of one side zero", "zero_factors", in_loop(kfac.ZeroGradientStatistics)),
    Fault("inverse missing", "empty_inverse", in_loop(kfac.NoInverse)),
    Fault("inverse zero", "empty_inverse", in_loop(kfac.ZeroInverse)),
    Fault("inverse not finite", "empty_inverse", in_loop(kfac.NonFiniteInverse)),
    Fault("inverse the identity", "empty_inverse", in_loop(kfac.IdentityInverse)),
    Fault("inverse the identity on one side", "empty_inverse", in_loop(kfac.HalfIdentityInverse)),
    *in_both("absolute damping, unscaled δ", "damping_swamps_factors", kfac.Swamped),
    Fault("damping above both factors", "damping_swamps_factors", in_loop(kfac.SwampedOnBothSides)),
    Fault("scalar preconditioner", "scalar_preconditioner", in_loop(kfac.Scalar)),
    Fault("scalar, no readings", "scalar_preconditioner", in_loop(kfac.ScalarWithoutReadings)),
    Fault("scalar, grafted", "scalar_preconditioner", in_loop(kfac.GraftedScalar)),
    Fault("scalar, bf16 weights", "scalar_preconditioner", in_loop(kfac.Scalar, dtype=torch.bfloat16, clip=1e-3)),
    Fault("copies preconditioned", "nothing_changed", in_loop(kfac.OfCopies)),
    Fault("too few samples for ever", "nothing_changed", in_loop(kfac.WaitsForEver)),
    *in_both("half of the modules", "modules_missing", kfac.HalfOfTheLayers),
    Fault("B left out", "modules_missing", in_loop(kfac.OneSide)),
    Fault("padding counted", "padding_counted", in_loop(kfac.CountsPadding)),
    Fault("padding counted, accumulation 4", "padding_counted", in_loop(kfac.CountsPadding, accumulation=4)),
    Fault("never refreshed", "stale_factors", in_loop(kfac.NeverRefreshed, steps=36)),
    Fault("never refreshed, interval not told", "stale_factors", in_loop(kfac.NeverRefreshedUntold, steps=180)),
    Fault("applied twice, in a loop", "applied_repeatedly", _looped(called_twice)),
    Fault("callback registered twice", "applied_repeatedly", in_trainer(NotebookKFAC, IN_TRAINER * 2)),
    Fault("NaN to zero", "nan_to_zero", in_loop(kfac.NanToZero)),
    Fault("NaN gradient to zero", "nan_to_zero", in_loop(kfac.NanGradientToZero)),
    Fault("clipped to nothing", "clipped_to_nothing", _looped(placed(clip=1e-9))),
    Fault("clipped to nothing, SGD", "clipped_to_nothing", _looped(placed(optimizer=sgd, clip=1e-7))),
    Fault("callback not registered", "never_called", in_trainer(NotebookKFAC, [])),
    Fault("callback of an event that is none", "never_called", in_trainer(NotebookKFAC, ["on_before_optimizer_step"])),
    Fault("not called, in a loop", "never_called", in_loop(NotebookKFAC, [])),
    Fault("wrapper bypassed, in a loop", "wrapper_bypassed", _looped(wrapper_bypassed)),
    Fault(
        "wrapper bypassed by accelerate", "wrapper_bypassed", _looped(partial(wrapper_bypassed, prepare=accelerated))
    ),
    Fault("wrapper bypassed, in a Trainer", "wrapper_bypassed", _trained(bypassed_in_trainer)),
    *in_both(
        "each micro-batch counted four times", "accumulation_overcounted", of_four(kfac.Overcounts), accumulation=4
    ),
    Fault("after each micro-batch", "applied_repeatedly", in_loop(of_four(), ["after_backward"], accumulation=4)),
    Fault(
        "after each micro-batch, in a Trainer",
        "applied_repeatedly",
        in_trainer(of_four(), ["on_substep_end", *IN_TRAINER], accumulation=4),
    ),
    Fault(
        "counted twice under checkpointing", "samples_overcounted", in_loop(kfac.CountsInForward, checkpointing=True)
    ),
    Fault("GRIT after the step, in a loop", "preconditioned_after_step", _looped(grit_by_hand("after_step"))),
    Fault("GRIT in on_optimizer_step", "preconditioned_after_step", _trained(grit_by_hand("on_optimizer_step"))),
    Fault("GRIT in on_step_end", "preconditioned_after_step", _trained(grit_by_hand("on_step_end"))),
    Fault("GRIT bypassed", "wrapper_bypassed", _looped(grit_bypassed)),
    Fault("GRIT applied twice", "applied_repeatedly", _looped(grit_twice)),
    Fault(
        "GRIT with the authors' damping",
        "damping_swamps_factors",
        _looped(grit_with(GRITConfig.paper(lambda_kfac=0.0, lambda_reproj=0.0))),
    ),
    Fault("GRIT, statistics renewed no more", "stale_factors", _looped(grit_that_stops)),
    Fault(
        "GRIT, too few samples for ever",
        "nothing_changed",
        _looped(grit_with(GRITConfig(mode="adamw", kfac_min_samples=10**6))),
    ),
    Fault(
        "GRIT, statistics of the first step alone",
        "zero_factors",
        _looped(grit_with(GRITConfig(mode="adamw", grit_cov_update_freq=10_000))),
    ),
    Fault(
        "GRIT, warm-up longer than the run", "nothing_changed", _looped(grit_with(GRITConfig(ng_warmup_steps=10_000)))
    ),
    # Not in every step
    Fault("every 10th step", "steps_missing", in_loop(kfac.sometimes(lambda step: step % 10 == 0), steps=60)),
    Fault(
        "every 10th step, not called else",
        "steps_missing",
        in_loop(kfac.seldom_called(lambda step: step % 10 == 0), steps=60),
    ),
    Fault("all but every 10th step", "steps_missing", in_loop(kfac.sometimes(lambda step: step % 10 > 0), steps=60)),
    *in_both("odd steps", "steps_missing", kfac.sometimes(lambda step: step % 2 == 1)),
    Fault("even steps", "steps_missing", in_loop(kfac.sometimes(lambda step: step % 2 == 0))),
    *in_both("stops after 15 of 24 steps", "steps_missing", kfac.sometimes(lambda step: step < 15)),
    Fault("stops after a third of the steps", "steps_missing", in_loop(kfac.sometimes(lambda step: step < 8))),
    Fault("called once", "steps_missing", in_loop(kfac.seldom_called(lambda step: step == 12))),
    Fault("called in the last steps alone", "steps_missing", in_loop(kfac.seldom_called(lambda step: step > 20))),
    Fault(
        "in a third of the steps at random",
        "steps_missing",
        in_loop(kfac.sometimes(lambda step: step * 7919 % 97 < 33), steps=60),
    ),
    Fault("one layer a step, in turns", "steps_missing", in_loop(kfac.InTurns, steps=60)),
    # Weights that do not move
    Fault("the optimizer has copies", "not_moving", _looped(held(copies_of))),
    Fault("the optimizer has copies, nothing claimed", "not_moving", _looped(held(copies_of, False))),
    Fault("the optimizer has A alone", "not_moving", _looped(held(partial(side_of, "A")))),
    Fault("the optimizer has B alone", "not_moving", _looped(held(partial(side_of, "B")))),
    Fault("rate 0", "not_moving", _looped(by_rates(0.0, 0.0))),
    Fault("rate 0, nothing claimed", "not_moving", _looped(by_rates(0.0, 0.0, False))),
    Fault("rate 0 of A", "not_moving", _looped(by_rates(0.0, 1.0))),
    Fault("rate 0 of A, nothing claimed", "not_moving", _looped(by_rates(0.0, 1.0, False))),
    Fault("rate 0 of B", "not_moving", _looped(by_rates(1.0, 0.0))),
    Fault("rate 0 after half of the steps", "not_moving", _looped(notebook, schedule=lambda step: float(step < 12))),
    Fault("weights put back", "not_moving", _looped(put_back(lambda name: True))),
    Fault("weights put back by a hook", "not_moving", _looped(put_back(lambda name: True, in_hook=True))),
    Fault("weights put back, nothing claimed", "not_moving", _looped(put_back(lambda name: True, False))),
    Fault("one layer's weights put back", "not_moving", _looped(put_back(lambda name: "layers.1.self" in name))),
    Fault("cleared before the step", "not_moving", _looped(cleared(again=False))),
    Fault("a step that does nothing", "not_moving", _looped(step_that_does_nothing)),
    Fault(
        "bf16 weights, rate too small",
        "not_moving",
        _looped(placed(optimizer=lambda m, s: adamw(m, Setting(lr=1e-3 * s.lr))), dtype=torch.bfloat16),
    ),
    Fault("first layer detached", "no_gradient", _looped(detached)),
    # Uphill, or anywhere
    *in_both("gradients negated", "uphill", kfac.then(kfac.negate)),
    Fault("gradients negated, SGD", "uphill", _looped(placed(kfac.then(kfac.negate), optimizer=sgd))),
    Fault("one layer negated", "uphill", in_loop(kfac.then(lambda g, step: kfac.negate(g[:2], step)))),
    Fault(
        "every other step negated",
        "uphill",
        in_loop(kfac.then(lambda g, step: kfac.negate(g, step) if step % 2 else None)),
    ),
    Fault("inverse with the wrong sign", "uphill", in_loop(kfac.NegativeInverse)),
    Fault("damping with the wrong sign", "uphill", in_loop(kfac.Indefinite)),
    Fault("maximize=True", "uphill", _looped(placed(optimizer=partial(adamw, maximize=True)))),
    Fault("maximize=True, nothing claimed", "uphill", _looped(partial(plain, maximize=True))),
    Fault(
        "steps uphill, nothing claimed",
        "uphill",
        _looped(lambda model, setting: Setup(Noisy(weights_of(model), setting.lr, uphill=True))),
    ),
    *in_both("gradients replaced by noise", "unrelated_to_gradient", kfac.then(kfac.noise)),
    Fault(
        "half of the gradients noise",
        "unrelated_to_gradient",
        in_loop(kfac.then(lambda g, step: kfac.noise(g[::2], step))),
    ),
    Fault("entries shuffled", "unrelated_to_gradient", in_loop(kfac.then(kfac.shuffle))),
    Fault("gradients of other tensors", "unrelated_to_gradient", in_loop(kfac.then(kfac.rotate_tensors))),
    Fault(
        "steps of noise, nothing claimed",
        "unrelated_to_gradient",
        _looped(lambda model, setting: Setup(Noisy(weights_of(model), setting.lr))),
    ),
    # Of another name
    Fault(
        "so large that its square overflows",
        "gradient_overflow",
        in_loop(kfac.then(lambda g, step: [x.mul_(1e25) for x in g if step > 8])),
    ),
    Fault(
        "every 10th step negated",
        "uphill",
        in_loop(kfac.then(lambda g, step: kfac.negate(g, step) if step % 10 == 0 else None), steps=60),
    ),
    Fault("one layer alone", "modules_missing", in_loop(kfac.OneLayer)),
    Fault(
        "a number drawn anew", "scalar_preconditioner", in_loop(kfac.then(kfac.by_one_number(0.1, 3.0), kfac.Untouched))
    ),
    Fault(
        "a number drawn anew below 1",
        "scalar_preconditioner",
        in_loop(kfac.then(kfac.by_one_number(0.05, 1.0), kfac.Untouched)),
    ),
    Fault(
        "a number drawn anew for each tensor",
        "scalar_preconditioner",
        in_loop(kfac.then(kfac.by_one_number(0.1, 3.0, each=True), kfac.Untouched)),
    ),
    Fault(
        "a number drawn anew for each tensor, SGD",
        "scalar_preconditioner",
        _looped(placed(kfac.then(kfac.by_one_number(0.1, 3.0, each=True), kfac.Untouched), optimizer=sgd)),
    ),
    *in_both("a constant diagonal", "diagonal_preconditioner", kfac.then(kfac.by_a_diagonal, kfac.Untouched)),
    Fault("factors underflow in float16", "zero_factors", in_loop(kfac.Underflows)),
    Fault("masters step with gradients of their own", "gradient_not_used", _looped(of_masters)),
    Fault("nothing done in backward", "nothing_changed", _looped(in_backward("register_hook", kfac.WaitsForEver))),
    Fault(
        "half of the modules, in backward",
        "modules_missing",
        _looped(in_backward("register_hook", kfac.HalfOfTheLayers)),
    ),
    Fault(
        "scalar, in backward",
        "scalar_preconditioner",
        _looped(in_backward("register_post_accumulate_grad_hook", kfac.Scalar)),
    ),
    Fault("loss with the wrong sign", "diverging", _looped(plain, loss_factor=lambda step: -1.0)),
    Fault(
        "loss not a number",
        "not_finite",
        _looped(plain, loss_factor=lambda step: float("nan") if step % 3 == 0 else 1.0),
    ),
    Fault("another optimizer takes over", "steps_unseen", _looped(another_takes_over)),
    Fault("another optimizer is watched", "no_samples", _looped(of_other_weights)),
]


# Clean runs


@dataclass(frozen=True)
class Clean:
    """One run without a fault; expected: `effective` (diagnosis none) or `no_effect` (diagnosis equals_shadow)."""

    name: str
    run: Run
    expected: str = "effective"


def grit_trainer(model: Any, setting: Setting, **settings: Any) -> Setup:
    manager = GRITManager(model, GRITConfig(**settings))
    return Setup(None, {"readings": manager.readings}, trainer=partial(GritTrainer, grit_manager=manager))


def riemannian(model: Any, setting: Setting, claims: bool = False) -> Setup:
    from peft.optimizers import create_riemannian_optimizer

    return Setup(create_riemannian_optimizer(model, torch.optim.AdamW, lr=setting.lr), {"claims": claims})


def clipped(model: Any, setting: Setting) -> Setup:
    """By the loop, and the probe is not told."""
    norm = torch.nn.utils.clip_grad_norm_
    return Setup(adamw(model, setting), before_step=lambda: norm(weights_of(model), 0.1))


def loraplus(model: Any, setting: Setting) -> Setup:
    from peft.optimizers import create_loraplus_optimizer

    return Setup(create_loraplus_optimizer(model, torch.optim.AdamW, lr=setting.lr, loraplus_lr_ratio=8.0))


def _decay(step: int) -> float:
    return min(1.0, (step + 1) / 5) * (1 - step / 60)


A, B, C, D = Setting(), Setting(seed=1), Setting(seed=2, lr=3e-3), Setting(seed=3, lr=2e-2)


def _grit(*setting: Setting, accumulation: int = 1, **config: Any) -> Run:
    return _looped(grit_with(GRITConfig(**config)), *setting, accumulation=accumulation)


with_momentum: Arrange = lambda model, setting: Setup(sgd(model, setting, momentum=0.9))  # noqa: E731

CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}

CLEAN = [
    *(
        Clean(f"NotebookKFAC, seed {s.seed}, rate {s.lr:g}", _looped(notebook, s))
        for s in (A, B, C, D, Setting(4, 1e-3), Setting(5, 5e-3))
    ),
    Clean("NotebookKFAC, accumulation 4", _looped(placed(of_four()), accumulation=4)),
    Clean("NotebookKFAC, checkpointing", _looped(notebook, checkpointing=True)),
    Clean("NotebookKFAC, clipped before", _looped(notebook, B, clip=0.5)),
    Clean("NotebookKFAC, clipped after", _looped(placed(clip=1.0), C)),
    Clean("NotebookKFAC, schedule", _looped(notebook, schedule=_decay)),
    Clean("NotebookKFAC, wrapper", _looped(wrapped)),
    Clean("NotebookKFAC, wrapper, in a Trainer", _trained(wrapped, B)),
    Clean("NotebookKFAC, SGD, clipped", _looped(placed(optimizer=partial(sgd, factor=1.0, momentum=0.9), clip=1.0))),
    Clean("NotebookKFAC, in hooks of the parameters", _looped(in_backward("register_hook"))),
    Clean("NotebookKFAC, in hooks after accumulation", _looped(in_backward("register_post_accumulate_grad_hook"), B)),
    Clean("NotebookKFAC, in hooks of the parameters, other seed and rate", _looped(in_backward("register_hook"), C)),
    Clean("NotebookKFAC, in the closure", _looped(by_closure(inside=True))),
    Clean("NotebookKFAC, in a hook before the step", _looped(in_pre_hook, B)),
    Clean("NotebookKFAC, in a subclass's step", _looped(in_subclass)),
    Clean("NotebookKFAC, gradients put in by hand", _looped(by_hand)),
    Clean("NotebookKFAC, rates of A and B", _looped(by_rates(0.5, 2.0))),
    Clean("NotebookKFAC, bf16 weights", _looped(notebook, dtype=torch.bfloat16)),
    Clean("NotebookKFAC, in a Trainer", _trained(notebook_in_trainer)),
    Clean("NotebookKFAC, in a Trainer, other seed and rate", _trained(notebook_in_trainer, C)),
    Clean("NotebookKFAC, in a Trainer, accumulation 4", _trained(placed(of_four(), IN_TRAINER), accumulation=4)),
    Clean("NotebookKFAC, in a Trainer, checkpointing", _trained(notebook_in_trainer, **CHECKPOINTING)),
    Clean("NotebookKFAC, in a Trainer, no clipping", _trained(notebook_in_trainer, B, clip=0.0)),
    Clean("GRIT eigen_adamw, power 0", _grit(eigen_power=0.0)),
    Clean("GRIT eigen_adamw, power 1", _grit(eigen_power=1.0)),
    Clean("GRIT eigen_adamw, power 1, seed 1", _grit(B)),
    Clean("GRIT eigen_adamw, capture gradients", _grit(C, capture="gradients")),
    Clean("GRIT adamw", _grit(mode="adamw")),
    Clean("GRIT adamw, capture hooks", _grit(D, mode="adamw", capture="hooks")),
    Clean("GRIT adamw, capture gradients", _grit(B, mode="adamw", capture="gradients")),
    Clean(
        "GRIT adamw, fused layers, capture auto",
        _looped(grit_with(GRITConfig(mode="adamw", capture="auto"), prepare=fuse)),
    ),
    Clean("GRIT sgd", _grit(mode="sgd")),
    Clean("GRIT sgd, capture gradients", _grit(B, mode="sgd", capture="gradients")),
    Clean("GRIT adamw, paper pairing", _grit(mode="adamw", pairing="paper")),
    Clean("GRIT, lr_ratio_b 8", _grit(C, lr_ratio_b=8.0)),
    Clean("GRIT, reprojection", _grit(reprojection_freq=10, reprojection_k=3, min_lora_rank=2)),
    Clean("GRIT, warm-up of 12 steps", _grit(ng_warmup_steps=12)),
    Clean("GRIT adamw, warm-up of 12 steps", _grit(mode="adamw", ng_warmup_steps=12)),
    Clean("GRIT, accumulation 4", _grit(accumulation=4, mode="adamw")),
    Clean("GRIT, clipped", _grit(max_grad_norm=0.5)),
    Clean("GRIT, regularisers", _grit(mode="adamw", lambda_kfac=1e-4, lambda_reproj=1e-4)),
    Clean("GritTrainer, eigen_adamw", _trained(grit_trainer)),
    Clean("GritTrainer, adaptive schedule", _trained(partial(grit_trainer, adaptive_schedule=True, adaptive_window=5))),
    Clean("GritTrainer, adamw, accumulation 4", _trained(partial(grit_trainer, mode="adamw"), B, accumulation=4)),
    Clean("GritTrainer, checkpointing", _trained(grit_trainer, **CHECKPOINTING)),
    Clean("PEFT's Riemannian optimizer", _looped(riemannian, C)),
    Clean("PEFT's Riemannian optimizer, claiming", _looped(partial(riemannian, claims=True), Setting(1, 1e-3))),
    Clean("PEFT's LoRA+", _looped(loraplus, C)),
    Clean("SGD with momentum", _looped(with_momentum)),
    Clean("SGD with momentum, in a Trainer", _trained(with_momentum, B)),
    Clean("Adagrad", _looped(lambda model, setting: Setup(torch.optim.Adagrad(weights_of(model), lr=setting.lr)))),
    *(Clean(f"AdamW, seed {s.seed}, rate {s.lr:g}", _looped(plain, s), "no_effect") for s in (A, B, C, D)),
    Clean("AdamW, clipped", _looped(plain, clip=0.1), "no_effect"),
    Clean("AdamW, clipped, the probe is not told", _looped(clipped), "no_effect"),
    Clean("AdamW, accumulation 4", _looped(plain, accumulation=4), "no_effect"),
    Clean("AdamW, weight decay", _looped(partial(plain, weight_decay=0.1)), "no_effect"),
    Clean("AdamW, schedule", _looped(plain, schedule=_decay), "no_effect"),
    Clean("AdamW, bf16 weights", _looped(plain, dtype=torch.bfloat16), "no_effect"),
    Clean("AdamW, bf16 weights, fused", _looped(partial(plain, fused=True), dtype=torch.bfloat16), "no_effect"),
    Clean("AdamW, checkpointing", _looped(plain, checkpointing=True), "no_effect"),
    Clean("AdamW, other betas", _looped(partial(plain, betas=(0.8, 0.95), eps=1e-6)), "no_effect"),
    Clean("AdamW, DoRA", _looped(plain, use_dora=True), "no_effect"),
    Clean(
        "AdamW, by accelerate", _looped(lambda model, setting: Setup(accelerated(adamw(model, setting)))), "no_effect"
    ),
    Clean("AdamW, the Trainer's own", _trained(lambda model, setting: Setup(None)), "no_effect"),
    Clean("AdamW, in a Trainer, accumulation 4", _trained(plain, B, accumulation=4, clip=0.1), "no_effect"),
    Clean("AdamW, in a Trainer, cosine", _trained(plain, lr_scheduler_type="cosine", warmup_steps=5), "no_effect"),
]
