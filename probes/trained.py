"""The tensors that a probe watches: each with the gradient that backward left and its shadow."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from probes.shadow import Shadow
from probes.units import find_units, in_place, tensors
from probes.watch import Attachments


class TrainedTensors:
    """A model's trainable parameters; where they are replaced (ranks shrank), `follow` finds the new ones.

    Attributes:
        units: What is judged together.
        all: (unit, side, parameter) of every tensor.
        parameters: The tensors.
        raw: Their gradients as backward left them; the shadow's own copies.
        shadow: What plain AdamW would do with them.
    """

    def __init__(self, model: nn.Module):
        """Find them.

        Raises:
            ValueError: nothing is trainable.
        """
        self._model = model
        self._hooks = Attachments()
        self._on_gradient: Callable[[int, Tensor], None] | None = None
        self._look()

    def _look(self) -> None:
        self.units = find_units(self._model)
        self.all = tensors(self.units)
        self.parameters = [p for _, _, p in self.all]
        self.raw: list[Tensor] = [torch.zeros_like(p) for p in self.parameters]
        self.shadow = Shadow(self.parameters)
        self._in_place = in_place(self._model, self.parameters)

    def open(self, on_gradient: Callable[[int, Tensor], None]) -> None:
        """Call `on_gradient(place, parameter)` whenever a backward pass has left a gradient."""
        self._on_gradient = on_gradient
        for i, parameter in enumerate(self.parameters):
            hook = functools.partial(on_gradient, i)
            self._hooks.keep(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Take the hooks off."""
        self._hooks.close()
        self._on_gradient = None

    def follow(self) -> bool:
        """If parameters were replaced, look at the new ones; equal shapes keep their shadow.

        Returns:
            Whether there were any.
        """
        if self._in_place():
            return False
        old = {(unit.name, side): (i, p.shape) for i, (unit, side, p) in enumerate(self.all)}
        shadow, on_gradient = self.shadow, self._on_gradient
        self.close()
        self._look()
        for i, (unit, side, parameter) in enumerate(self.all):
            j, shape = old.get((unit.name, side), (-1, None))
            if shape == parameter.shape:
                self.shadow.take(i, shadow, j)
        if on_gradient is not None:
            self.open(on_gradient)
        return True

    def gradients(self) -> list[Tensor | None]:
        """Copies of the gradients as they stand."""
        return [None if p.grad is None else p.grad.detach().clone() for p in self.parameters]
