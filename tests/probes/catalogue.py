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


def in_both(name: str, make: Make, **more: Any) -> dict[str, Run]:
    return {f"{name}, in a loop": in_loop(make, **more), f"{name}, in a Trainer": in_trainer(make, **more)}


notebook, notebook_in_trainer = placed(), placed(places=IN_TRAINER)

_FAULTS: dict[str, dict[str, Run]] = {
    "preconditioned_after_step": {
        "after the step, in a loop": in_loop(NotebookKFAC, ["after_step"]),
        "in on_optimizer_step": in_trainer(NotebookKFAC, ["on_optimizer_step"]),
        "in on_step_end": in_trainer(NotebookKFAC, ["on_step_end"]),
        "GRIT after the step, in a loop": _looped(grit_by_hand("after_step")),
        "GRIT in on_optimizer_step": _trained(grit_by_hand("on_optimizer_step")),
        "GRIT in on_step_end": _trained(grit_by_hand("on_step_end")),
    },
    "gradient_restored": {
        **in_both("copy put back", kfac.Restores),
        "copy put back and clipped": _looped(placed(kfac.Restores, clip=0.01)),
    },
    "gradient_recomputed": {
        "second backward pass": _looped(cleared(again=True)),
        "closure runs backward again": _looped(by_closure(inside=False)),
        "first micro-batch only, in a Trainer": in_trainer(
            of_four(kfac.FirstOfThree), ["on_substep_end"], accumulation=4
        ),
    },
    "no_statistics": in_both("fused kernels, hooks silent", kfac.fused),
    "zero_factors": {
        "factors all zero": in_loop(kfac.ZeroStatistics),
        "factors of one side zero": in_loop(kfac.ZeroGradientStatistics),
        "GRIT, statistics of the first step alone": _looped(
            grit_with(GRITConfig(mode="adamw", grit_cov_update_freq=10_000))
        ),
        "factors underflow in float16": in_loop(kfac.Underflows),
    },
    "empty_inverse": {
        "inverse missing": in_loop(kfac.NoInverse),
        "inverse zero": in_loop(kfac.ZeroInverse),
        "inverse not finite": in_loop(kfac.NonFiniteInverse),
        "inverse the identity": in_loop(kfac.IdentityInverse),
        "inverse the identity on one side": in_loop(kfac.HalfIdentityInverse),
    },
    "damping_swamps_factors": {
        **in_both("absolute damping, unscaled δ", kfac.Swamped),
        "damping above both factors": in_loop(kfac.SwampedOnBothSides),
        "GRIT with the authors' damping": _looped(grit_with(GRITConfig.paper(lambda_kfac=0.0, lambda_reproj=0.0))),
    },
    "scalar_preconditioner": {
        "scalar preconditioner": in_loop(kfac.Scalar),
        "scalar, no readings": in_loop(kfac.ScalarWithoutReadings),
        "scalar, grafted": in_loop(kfac.GraftedScalar),
        "scalar, bf16 weights": in_loop(kfac.Scalar, dtype=torch.bfloat16, clip=1e-3),
        "a number drawn anew": in_loop(kfac.then(kfac.by_one_number(0.1, 3.0), kfac.Untouched)),
        "a number drawn anew below 1": in_loop(kfac.then(kfac.by_one_number(0.05, 1.0), kfac.Untouched)),
        "a number drawn anew for each tensor": in_loop(
            kfac.then(kfac.by_one_number(0.1, 3.0, each=True), kfac.Untouched)
        ),
        "a number drawn anew for each tensor, SGD": _looped(
            placed(kfac.then(kfac.by_one_number(0.1, 3.0, each=True), kfac.Untouched), optimizer=sgd)
        ),
        "scalar, in backward": _looped(in_backward("register_post_accumulate_grad_hook", kfac.Scalar)),
    },
    "nothing_changed": {
        "copies preconditioned": in_loop(kfac.OfCopies),
        "too few samples for ever": in_loop(kfac.WaitsForEver),
        "GRIT, too few samples for ever": _looped(grit_with(GRITConfig(mode="adamw", kfac_min_samples=10**6))),
        "GRIT, warm-up longer than the run": _looped(grit_with(GRITConfig(ng_warmup_steps=10_000))),
        "nothing done in backward": _looped(in_backward("register_hook", kfac.WaitsForEver)),
    },
    "modules_missing": {
        **in_both("half of the modules", kfac.HalfOfTheLayers),
        "B left out": in_loop(kfac.OneSide),
        "one layer alone": in_loop(kfac.OneLayer),
        "half of the modules, in backward": _looped(in_backward("register_hook", kfac.HalfOfTheLayers)),
    },
    "padding_counted": {
        "padding counted": in_loop(kfac.CountsPadding),
        "padding counted, accumulation 4": in_loop(kfac.CountsPadding, accumulation=4),
    },
    "stale_factors": {
        "never refreshed": in_loop(kfac.NeverRefreshed, steps=36),
        "never refreshed, interval not told": in_loop(kfac.NeverRefreshedUntold, steps=180),
        "GRIT, statistics renewed no more": _looped(grit_that_stops),
    },
    "applied_repeatedly": {
        "applied twice, in a loop": _looped(called_twice),
        "callback registered twice": in_trainer(NotebookKFAC, IN_TRAINER * 2),
        "after each micro-batch": in_loop(of_four(), ["after_backward"], accumulation=4),
        "after each micro-batch, in a Trainer": in_trainer(of_four(), ["on_substep_end", *IN_TRAINER], accumulation=4),
        "GRIT applied twice": _looped(grit_twice),
    },
    "nan_to_zero": {
        "NaN to zero": in_loop(kfac.NanToZero),
        "NaN gradient to zero": in_loop(kfac.NanGradientToZero),
    },
    "clipped_to_nothing": {
        "clipped to nothing": _looped(placed(clip=1e-9)),
        "clipped to nothing, SGD": _looped(placed(optimizer=sgd, clip=1e-7)),
    },
    "never_called": {
        "callback not registered": in_trainer(NotebookKFAC, []),
        "callback of an event that is none": in_trainer(NotebookKFAC, ["on_before_optimizer_step"]),
        "not called, in a loop": in_loop(NotebookKFAC, []),
    },
    "wrapper_bypassed": {
        "wrapper bypassed, in a loop": _looped(wrapper_bypassed),
        "wrapper bypassed by accelerate": _looped(partial(wrapper_bypassed, prepare=accelerated)),
        "wrapper bypassed, in a Trainer": _trained(bypassed_in_trainer),
        "GRIT bypassed": _looped(grit_bypassed),
    },
    "accumulation_overcounted": in_both(
        "each micro-batch counted four times", of_four(kfac.Overcounts), accumulation=4
    ),
    "samples_overcounted": {"counted twice under checkpointing": in_loop(kfac.CountsInForward, checkpointing=True)},
    "steps_missing": {
        "every 10th step": in_loop(kfac.sometimes(lambda step: step % 10 == 0), steps=60),
        "every 10th step, not called else": in_loop(kfac.seldom_called(lambda step: step % 10 == 0), steps=60),
        "all but every 10th step": in_loop(kfac.sometimes(lambda step: step % 10 > 0), steps=60),
        **in_both("odd steps", kfac.sometimes(lambda step: step % 2 == 1)),
        "even steps": in_loop(kfac.sometimes(lambda step: step % 2 == 0)),
        **in_both("stops after 15 of 24 steps", kfac.sometimes(lambda step: step < 15)),
        "stops after a third of the steps": in_loop(kfac.sometimes(lambda step: step < 8)),
        "called once": in_loop(kfac.seldom_called(lambda step: step == 12)),
        "called in the last steps alone": in_loop(kfac.seldom_called(lambda step: step > 20)),
        "in a third of the steps at random": in_loop(kfac.sometimes(lambda step: step * 7919 % 97 < 33), steps=60),
        "one layer a step, in turns": in_loop(kfac.InTurns, steps=60),
    },
    "not_moving": {
        "the optimizer has copies": _looped(held(copies_of)),
        "the optimizer has copies, nothing claimed": _looped(held(copies_of, False)),
        "the optimizer has A alone": _looped(held(partial(side_of, "A"))),
        "the optimizer has B alone": _looped(held(partial(side_of, "B"))),
        "rate 0": _looped(by_rates(0.0, 0.0)),
        "rate 0, nothing claimed": _looped(by_rates(0.0, 0.0, False)),
        "rate 0 of A": _looped(by_rates(0.0, 1.0)),
        "rate 0 of A, nothing claimed": _looped(by_rates(0.0, 1.0, False)),
        "rate 0 of B": _looped(by_rates(1.0, 0.0)),
        "rate 0 after half of the steps": _looped(notebook, schedule=lambda step: float(step < 12)),
        "weights put back": _looped(put_back(lambda name: True)),
        "weights put back by a hook": _looped(put_back(lambda name: True, in_hook=True)),
        "weights put back, nothing claimed": _looped(put_back(lambda name: True, False)),
        "one layer's weights put back": _looped(put_back(lambda name: "layers.1.self" in name)),
        "cleared before the step": _looped(cleared(again=False)),
        "a step that does nothing": _looped(step_that_does_nothing),
        "bf16 weights, rate too small": _looped(
            placed(optimizer=lambda m, s: adamw(m, Setting(lr=1e-3 * s.lr))), dtype=torch.bfloat16
        ),
    },
    "no_gradient": {"first layer detached": _looped(detached)},
    "uphill": {
        **in_both("gradients negated", kfac.then(kfac.negate)),
        "gradients negated, SGD": _looped(placed(kfac.then(kfac.negate), optimizer=sgd)),
        "one layer negated": in_loop(kfac.then(lambda g, step: kfac.negate(g[:2], step))),
        "every other step negated": in_loop(kfac.then(lambda g, step: kfac.negate(g, step) if step % 2 else None)),
        "inverse with the wrong sign": in_loop(kfac.NegativeInverse),
        "damping with the wrong sign": in_loop(kfac.Indefinite),
        "maximize=True": _looped(placed(optimizer=partial(adamw, maximize=True))),
        "maximize=True, nothing claimed": _looped(partial(plain, maximize=True)),
        "steps uphill, nothing claimed": _looped(
            lambda model, setting: Setup(Noisy(weights_of(model), setting.lr, uphill=True))
        ),
        "every 10th step negated": in_loop(
            kfac.then(lambda g, step: kfac.negate(g, step) if step % 10 == 0 else None), steps=60
        ),
    },
    "unrelated_to_gradient": {
        **in_both("gradients replaced by noise", kfac.then(kfac.noise)),
        "half of the gradients noise": in_loop(kfac.then(lambda g, step: kfac.noise(g[::2], step))),
        "entries shuffled": in_loop(kfac.then(kfac.shuffle)),
        "gradients of other tensors": in_loop(kfac.then(kfac.rotate_tensors)),
        "steps of noise, nothing claimed": _looped(lambda model, setting: Setup(Noisy(weights_of(model), setting.lr))),
    },
    "gradient_overflow": {
        "so large that its square overflows": in_loop(kfac.then(lambda g, step: [x.mul_(1e25) for x in g if step > 8]))
    },
    "diagonal_preconditioner": in_both("a constant diagonal", kfac.then(kfac.by_a_diagonal, kfac.Untouched)),
    "gradient_not_used": {"masters step with gradients of their own": _looped(of_masters)},
    "diverging": {"loss with the wrong sign": _looped(plain, loss_factor=lambda step: -1.0)},
    "not_finite": {
        "loss not a number": _looped(plain, loss_factor=lambda step: float("nan") if step % 3 == 0 else 1.0)
    },
    "steps_unseen": {"another optimizer takes over": _looped(another_takes_over)},
    "no_samples": {"another optimizer is watched": _looped(of_other_weights)},
}
FAULTS = [Fault(name, expected, run) for expected, runs in _FAULTS.items() for name, run in runs.items()]


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

_CLEAN: dict[str, dict[str, Run]] = {
    "effective": {
        **{
            f"NotebookKFAC, seed {s.seed}, rate {s.lr:g}": _looped(notebook, s)
            for s in (A, B, C, D, Setting(4, 1e-3), Setting(5, 5e-3))
        },
        "NotebookKFAC, accumulation 4": _looped(placed(of_four()), accumulation=4),
        "NotebookKFAC, checkpointing": _looped(notebook, checkpointing=True),
        "NotebookKFAC, clipped before": _looped(notebook, B, clip=0.5),
        "NotebookKFAC, clipped after": _looped(placed(clip=1.0), C),
        "NotebookKFAC, schedule": _looped(notebook, schedule=_decay),
        "NotebookKFAC, wrapper": _looped(wrapped),
        "NotebookKFAC, wrapper, in a Trainer": _trained(wrapped, B),
        "NotebookKFAC, SGD, clipped": _looped(placed(optimizer=partial(sgd, factor=1.0, momentum=0.9), clip=1.0)),
        "NotebookKFAC, in hooks of the parameters": _looped(in_backward("register_hook")),
        "NotebookKFAC, in hooks after accumulation": _looped(in_backward("register_post_accumulate_grad_hook"), B),
        "NotebookKFAC, in hooks of the parameters, other seed and rate": _looped(in_backward("register_hook"), C),
        "NotebookKFAC, in the closure": _looped(by_closure(inside=True)),
        "NotebookKFAC, in a hook before the step": _looped(in_pre_hook, B),
        "NotebookKFAC, in a subclass's step": _looped(in_subclass),
        "NotebookKFAC, gradients put in by hand": _looped(by_hand),
        "NotebookKFAC, rates of A and B": _looped(by_rates(0.5, 2.0)),
        "NotebookKFAC, bf16 weights": _looped(notebook, dtype=torch.bfloat16),
        "NotebookKFAC, in a Trainer": _trained(notebook_in_trainer),
        "NotebookKFAC, in a Trainer, other seed and rate": _trained(notebook_in_trainer, C),
        "NotebookKFAC, in a Trainer, accumulation 4": _trained(placed(of_four(), IN_TRAINER), accumulation=4),
        "NotebookKFAC, in a Trainer, checkpointing": _trained(notebook_in_trainer, **CHECKPOINTING),
        "NotebookKFAC, in a Trainer, no clipping": _trained(notebook_in_trainer, B, clip=0.0),
        "GRIT eigen_adamw, power 0": _grit(eigen_power=0.0),
        "GRIT eigen_adamw, power 1": _grit(eigen_power=1.0),
        "GRIT eigen_adamw, power 1, seed 1": _grit(B),
        "GRIT eigen_adamw, capture gradients": _grit(C, capture="gradients"),
        "GRIT adamw": _grit(mode="adamw"),
        "GRIT adamw, capture hooks": _grit(D, mode="adamw", capture="hooks"),
        "GRIT adamw, capture gradients": _grit(B, mode="adamw", capture="gradients"),
        "GRIT adamw, fused layers, capture auto": _looped(
            grit_with(GRITConfig(mode="adamw", capture="auto"), prepare=fuse)
        ),
        "GRIT sgd": _grit(mode="sgd"),
        "GRIT sgd, capture gradients": _grit(B, mode="sgd", capture="gradients"),
        "GRIT adamw, paper pairing": _grit(mode="adamw", pairing="paper"),
        "GRIT, lr_ratio_b 8": _grit(C, lr_ratio_b=8.0),
        "GRIT, reprojection": _grit(reprojection_freq=10, reprojection_k=3, min_lora_rank=2),
        "GRIT, warm-up of 12 steps": _grit(ng_warmup_steps=12),
        "GRIT adamw, warm-up of 12 steps": _grit(mode="adamw", ng_warmup_steps=12),
        "GRIT, accumulation 4": _grit(accumulation=4, mode="adamw"),
        "GRIT, clipped": _grit(max_grad_norm=0.5),
        "GRIT, regularisers": _grit(mode="adamw", lambda_kfac=1e-4, lambda_reproj=1e-4),
        "GritTrainer, eigen_adamw": _trained(grit_trainer),
        "GritTrainer, lr_ratio_b 4": _trained(partial(grit_trainer, lr_ratio_b=4.0)),
        "GritTrainer, adamw, accumulation 4": _trained(partial(grit_trainer, mode="adamw"), B, accumulation=4),
        "GritTrainer, checkpointing": _trained(grit_trainer, **CHECKPOINTING),
        "PEFT's Riemannian optimizer": _looped(riemannian, C),
        "PEFT's Riemannian optimizer, claiming": _looped(partial(riemannian, claims=True), Setting(1, 1e-3)),
        "PEFT's LoRA+": _looped(loraplus, C),
        "SGD with momentum": _looped(with_momentum),
        "SGD with momentum, in a Trainer": _trained(with_momentum, B),
        "Adagrad": _looped(lambda model, setting: Setup(torch.optim.Adagrad(weights_of(model), lr=setting.lr))),
    },
    "no_effect": {
        **{f"AdamW, seed {s.seed}, rate {s.lr:g}": _looped(plain, s) for s in (A, B, C, D)},
        "AdamW, clipped": _looped(plain, clip=0.1),
        "AdamW, clipped, the probe is not told": _looped(clipped),
        "AdamW, accumulation 4": _looped(plain, accumulation=4),
        "AdamW, weight decay": _looped(partial(plain, weight_decay=0.1)),
        "AdamW, schedule": _looped(plain, schedule=_decay),
        "AdamW, bf16 weights": _looped(plain, dtype=torch.bfloat16),
        "AdamW, bf16 weights, fused": _looped(partial(plain, fused=True), dtype=torch.bfloat16),
        "AdamW, checkpointing": _looped(plain, checkpointing=True),
        "AdamW, other betas": _looped(partial(plain, betas=(0.8, 0.95), eps=1e-6)),
        "AdamW, DoRA": _looped(plain, use_dora=True),
        "AdamW, by accelerate": _looped(lambda model, setting: Setup(accelerated(adamw(model, setting)))),
        "AdamW, the Trainer's own": _trained(lambda model, setting: Setup(None)),
        "AdamW, in a Trainer, accumulation 4": _trained(plain, B, accumulation=4, clip=0.1),
        "AdamW, in a Trainer, cosine": _trained(plain, lr_scheduler_type="cosine", warmup_steps=5),
    },
}
CLEAN = [Clean(name, run, expected) for expected, runs in _CLEAN.items() for name, run in runs.items()]
