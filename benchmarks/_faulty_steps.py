"""Faults around the step: a right preconditioner whose work is undone, repeated or never asked for."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks._arrangements import adamw, wrapped
from benchmarks._notebook import NotebookKFAC, Wrapper
from benchmarks._runners import Setting, Setup


def recomputed(model: Any, setting: Setting) -> Setup:
    """A second backward pass overwrites what was preconditioned."""
    kfac = NotebookKFAC(model)

    def before() -> None:
        kfac.apply()
        model.zero_grad()
        model(**kfac.batch).loss.backward()

    return Setup(adamw(model, setting), kfac.watch(), before_step=before)


def recomputed_in_closure(model: Any, setting: Setting) -> Setup:
    """The optimizer's own closure computes gradients again."""
    kfac, optimizer = NotebookKFAC(model), adamw(model, setting)
    step = optimizer.step

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(**kfac.batch).loss
        loss.backward()
        return loss

    optimizer.step = lambda: step(closure)  # type: ignore[method-assign, assignment, misc]
    return Setup(optimizer, kfac.watch(), before_step=kfac.apply)


def twice(model: Any, setting: Setting) -> Setup:
    """Called by the loop, and once more by the wrapped optimizer."""
    setup = wrapped(model, setting)
    setup.before_step = setup.optimizer.kfac.apply
    return setup


def bypassed(model: Any, setting: Setting, prepare: Callable[[Any], Any] = lambda optimizer: optimizer) -> Setup:
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
    """The probe is given an optimizer that is not the one that steps."""
    return Setup(adamw(model, setting), watched=adamw(model, setting))
