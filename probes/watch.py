"""Attaching to optimizers and methods, and coming off again."""

import functools
from collections.abc import Callable
from typing import Any

import torch

_MISSING = object()


def chain_of(optimizer: Any) -> list[Any]:
    """The optimizer and those that it wraps, outermost first.

    accelerate's own wrapper is left out: it only decides whether there is a step at all (accumulation, fp16 overflow).
    """
    chain: list[Any] = []
    while optimizer is not None and callable(getattr(optimizer, "step", None)) and optimizer not in chain:
        chain.append(optimizer)
        optimizer = getattr(optimizer, "optimizer", None)
    inside = [o for o in chain if type(o).__name__ != "AcceleratedOptimizer"]
    return inside or chain


class Attachments:
    """Hooks and replaced methods; `close` undoes them in reverse order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def keep(self, handle: Any) -> None:
        """A handle of torch, removed at the end."""
        self._undo.append(handle.remove)

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Put `make(method)` in the method's place, on this object alone."""
        before = vars(owner).get(name, _MISSING)
        method = getattr(owner, name)
        setattr(owner, name, functools.wraps(method)(make(method)))

        def undo() -> None:
            if before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.append(undo)

    def step_of(self, optimizer: Any, enter: Callable[[Any], None], leave: Callable[[], None]) -> None:
        """Call `enter(optimizer)` and `leave()` round every `step()`: by torch's hooks, else by replacing it."""
        if isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks"):
            self.keep(optimizer.register_step_pre_hook(lambda o, args, kwargs: enter(o)))
            self.keep(optimizer.register_step_post_hook(lambda o, args, kwargs: leave()))
            return

        def watched(step: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                enter(optimizer)
                result = step(*args, **kwargs)
                leave()
                return result

            return call

        self.replace(optimizer, "step", watched)

    def close(self) -> None:
        """Undo everything."""
        while self._undo:
            self._undo.pop()()
