"""Optimizers and preconditioners put round the tiny model, in the right place or in another one."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from benchmarks._notebook import NotebookKFAC, Wrapper
from benchmarks._runners import Arrange, Setting, Setup, at
from benchmarks._tiny_llama import weights_of
from grit import GRITConfig, GRITManager, GritOptimizer
from probes import grit_readings

Make = Callable[[Any], NotebookKFAC]
"""From a model to its preconditioner."""

IN_LOOP, IN_TRAINER = ("before_step",), ("on_pre_optimizer_step",)
"""Where preconditioning belongs."""


def adamw(model: Any, setting: Setting, **options: Any) -> torch.optim.AdamW:
    """The optimizer of the Adam family, without weight decay."""
    return torch.optim.AdamW(weights_of(model), lr=setting.lr, **{"weight_decay": 0.0, **options})


def sgd(model: Any, setting: Setting, factor: float = 10.0, **options: Any) -> torch.optim.SGD:
    """SGD, with the learning rate times a factor."""
    return torch.optim.SGD(weights_of(model), lr=factor * setting.lr, **options)


def accelerated(optimizer: Optimizer) -> Any:
    """What accelerate makes of an optimizer."""
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(optimizer)


def plain(model: Any, setting: Setting, **options: Any) -> Setup:
    """AdamW alone."""
    return Setup(adamw(model, setting, **options))


def of_four(make: type[NotebookKFAC] = NotebookKFAC) -> Make:
    """A preconditioner that knows of four micro-batches in a step."""
    return partial(make, accumulation=4)


def called(do: Callable[[], Any], places: Sequence[str]) -> dict[str, Any]:
    """The arguments of `Setup` that have it called.

    Args:
        do: What is called.
        places: Fields of `Setup` in a plain loop, events (`on_…`) in a Trainer; none = it is never called.
    """
    events = [place for place in places if place.startswith("on_")]
    return {"callbacks": [at(event, do) for event in events]} | {place: do for place in places if place not in events}


def placed(
    make: Make = NotebookKFAC,
    places: Sequence[str] = IN_LOOP,
    optimizer: Callable[[Any, Setting], Optimizer] = adamw,
    clip: float = 0.0,
) -> Arrange:
    """A preconditioner that is called beside the optimizer.

    Args:
        make: Makes it.
        places: See `called`.
        optimizer: Makes the optimizer.
        clip: Total norm to which its gradients are clipped; 0 = not.
    """

    def arrange(model: Any, setting: Setting) -> Setup:
        kfac = make(model)

        def apply() -> None:
            kfac.apply()
            if clip:
                torch.nn.utils.clip_grad_norm_(weights_of(model), clip)

        return Setup(optimizer(model, setting), kfac.watch(), **called(apply, places))

    return arrange


def wrapped(model: Any, setting: Setting) -> Setup:
    """NotebookKFAC inside the optimizer's step."""
    kfac = NotebookKFAC(model)
    return Setup(Wrapper(adamw(model, setting), kfac), kfac.watch())


def grit_setup(manager: GRITManager, optimizer: Any, *, by_hand: bool = False, **around: Any) -> Setup:
    """GRIT in a loop, its manager closed at the end without a check whether it was applied.

    Args:
        manager: Read by the probe.
        optimizer: Steps.
        by_hand: Whether the manager's own method is called to precondition, and watched.
        around: Further arguments of `Setup`.
    """
    told: dict[str, Any] = {"readings": grit_readings(manager)}
    if by_hand:
        told["preconditioner"] = (manager, "precondition_gradients")
    return Setup(optimizer, told, close=lambda: manager.close(False), **around)


def grit_optimizer(model: Any, setting: Setting, config: GRITConfig) -> GritOptimizer:
    """GRIT round AdamW, or round SGD in mode sgd."""
    manager = GRITManager(model, config)
    inner = sgd(model, setting, momentum=0.9) if config.mode == "sgd" else adamw(model, setting)
    return GritOptimizer(inner, manager)


def grit_with(config: GRITConfig, prepare: Callable[[Any], None] = lambda model: None) -> Arrange:
    """GRIT as it is meant to be used.

    Args:
        config: Its settings, some of which undo it.
        prepare: Called with the model before.
    """

    def arrange(model: Any, setting: Setting) -> Setup:
        prepare(model)
        optimizer = grit_optimizer(model, setting, config)
        return grit_setup(optimizer.manager, optimizer)

    return arrange
