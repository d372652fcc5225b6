"""`NotebookKFAC` with one thing done differently: what is wrong in the preconditioner itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._notebook import Layer, NotebookKFAC
from benchmarks._tiny_llama import fuse

# Statistics


def fused(model: Any) -> NotebookKFAC:
    """Hooks that never fire."""
    fuse(model)
    return NotebookKFAC(model)


class ZeroStatistics(NotebookKFAC):
    """Adds up the wrong tensors: tokens are counted, nothing flows."""

    def add(self, layer: Layer, side: str, rows: Tensor) -> None:
        super().add(layer, side, torch.zeros_like(rows))

    def trusted(self, layer: Layer) -> bool:
        return layer.samples > 0

    def damping(self, sigma: Tensor) -> float:
        return 1e-3


class ZeroGradientStatistics(ZeroStatistics):
    """The same of δ alone (a gradient that was zeroed before it was read)."""

    def add(self, layer: Layer, side: str, rows: Tensor) -> None:
        NotebookKFAC.add(self, layer, side, rows if side == "a" else torch.zeros_like(rows))


class CountsPadding(NotebookKFAC):
    """Every position counts."""

    def attended(self) -> Tensor:
        return torch.ones_like(super().attended())


class NeverRefreshed(NotebookKFAC):
    """Inverted once."""

    def update_inverses(self) -> None:
        if not any(layer.ready for layer in self.layers.values()):
            super().update_inverses()


class NeverRefreshedUntold(NeverRefreshed):
    """The same by one that does not say how often it should be."""

    refresh_every = None  # type: ignore[assignment]

    def apply(self) -> None:
        self.update_inverses()
        self.precondition()


class Overcounts(NotebookKFAC):
    """Each micro-batch is added once for each micro-batch of the step."""

    def collect(self, layer: Layer, h: Tensor, delta: Tensor) -> None:
        for _ in range(self.accumulation):
            super().collect(layer, h, delta)


class CountsInForward(NotebookKFAC):
    """Counts in the forward pass, which checkpointing runs twice."""

    def _hook(self, name: str) -> Callable[..., None]:
        counted = super()._hook(name)

        def forward(module: nn.Module, args: Any, h: Tensor) -> None:
            layer = self.layers[name]
            before = layer.samples
            counted(module, args, h)
            layer.samples = before + float(self.attended().sum())

        return forward

    def collect(self, layer: Layer, h: Tensor, delta: Tensor) -> None:
        before = layer.samples
        super().collect(layer, h, delta)
        layer.samples = before


# Inverses


class NoInverse(NotebookKFAC):
    """The inversion gives nothing, and the multiplication skips it."""

    def inverse(self, sigma: Tensor, damping: float) -> Tensor | None:
        return None


class ZeroInverse(NotebookKFAC):
    """A buffer that nobody filled."""

    def inverse(self, sigma: Tensor, damping: float) -> Tensor | None:
        return torch.zeros_like(sigma)


class NonFiniteInverse(NotebookKFAC):
    """The inversion overflows; products that are not finite are skipped."""

    def inverse(self, sigma: Tensor, damping: float) -> Tensor | None:
        return torch.full_like(sigma, float("nan"))

    def product(self, gradient: Tensor, inverse: Tensor, side: str) -> Tensor:
        natural = super().product(gradient, inverse, side)
        return natural if bool(torch.isfinite(natural).all()) else gradient


class IdentityInverse(NotebookKFAC):
    """``except LinAlgError: inverse = torch.eye(r)``, and it is raised every time."""

    def inverse(self, sigma: Tensor, damping: float) -> Tensor | None:
        return torch.eye(len(sigma))


class HalfIdentityInverse(NotebookKFAC):
    """The same for δ's side alone."""

    def inverse(self, sigma: Tensor, damping: float) -> Tensor | None:
        ours = any(sigma is layer.sigma["g"] for layer in self.layers.values())
        return torch.eye(len(sigma)) if ours else super().inverse(sigma, damping)


class Swamped(NotebookKFAC):
    """λ = 1e-3 as it stands, and δ of a mean loss."""

    def scaled(self, delta: Tensor) -> Tensor:
        return delta

    def damping(self, sigma: Tensor) -> float:
        return 1e-3


class SwampedOnBothSides(Swamped):
    """λ = 1000."""

    def damping(self, sigma: Tensor) -> float:
        return 1e3


class Scalar(NotebookKFAC):
    """One number for all directions: r / tr(Σ)."""

    def inverse(self, sigma: Tensor, damping: float) -> Tensor | None:
        return torch.eye(len(sigma)) / float(sigma.diagonal().mean())


class ScalarWithoutReadings(Scalar):
    """The same, seen from outside only."""

    def watch(self) -> dict[str, Any]:
        return {"preconditioner": (self, "precondition")}


# What is made of gradients


def _copies(weights: list[nn.Parameter]) -> list[Tensor | None]:
    return [None if weight.grad is None else weight.grad.clone() for weight in weights]


def _put(weights: list[nn.Parameter], gradients: list[Tensor | None]) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient


class Restores(NotebookKFAC):
    """A copy of the raw gradients is put back."""

    def apply(self) -> None:
        raw = _copies(self.weights)
        super().apply()
        _put(self.weights, raw)


class FirstOfThree(NotebookKFAC):
    """Heeds one call of three: a step of four micro-batches has three ends that are not its own."""

    asked = 0

    def apply(self) -> None:
        if self.asked % 3 == 0:
            super().apply()
        self.asked += 1


class OfCopies(NotebookKFAC):
    """Copies of the gradients are preconditioned."""

    def precondition(self) -> None:
        raw = [weight.grad for weight in self.weights]
        _put(self.weights, _copies(self.weights))
        super().precondition()
        _put(self.weights, raw)


class WaitsForEver(NotebookKFAC):
    """Trusts nothing below a number of tokens that does not come."""

    def trusted(self, layer: Layer) -> bool:
        return layer.samples > 1e9


class GraftedScalar(ScalarWithoutReadings):
    """The raw norm is restored, so that nothing is left of it at all."""

    def product(self, gradient: Tensor, inverse: Tensor, side: str) -> Tensor:
        natural = super().product(gradient, inverse, side)
        return natural * (gradient.norm() / natural.norm().clamp_min(1e-30))


class HalfOfTheLayers(NotebookKFAC):
    """Only the layers whose name was thought of."""

    def wanted(self, name: str) -> bool:
        return "layers.0" in name


class OneSide(NotebookKFAC):
    """B is forgotten."""

    @torch.no_grad()
    def precondition(self) -> None:
        for layer in self.layers.values():
            inverse = layer.inverse.get("g")
            if layer.a.grad is not None and inverse is not None:
                layer.a.grad.copy_(self.product(layer.a.grad, inverse, "g"))


class NanToZero(NotebookKFAC):
    """Every fourth product overflows, and nan_to_num makes it zero."""

    def product(self, gradient: Tensor, inverse: Tensor, side: str) -> Tensor:
        natural = super().product(gradient, inverse, side)
        natural.flatten()[::3] = float("nan")
        return torch.nan_to_num(natural, nan=0.0)


class NanGradientToZero(NotebookKFAC):
    """A's gradient is NaN as a whole."""

    def product(self, gradient: Tensor, inverse: Tensor, side: str) -> Tensor:
        natural = super().product(gradient, inverse, side)
        return torch.nan_to_num(natural * float("nan")) if side == "g" else natural
