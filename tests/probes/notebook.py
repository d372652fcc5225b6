"""A preconditioner as people write them in notebooks, right as it stands, and everything that can be wrong in it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from probes import LayerReading
from tests.probes.worlds import fuse

MIN_TOKENS = 64


@dataclass
class Layer:
    """One LoRA layer: moving averages Σ_a, Σ_g [r, r] and their inverses."""

    a: nn.Parameter  # [r, d_in]
    b: nn.Parameter  # [d_out, r]
    samples: float = 0.0  # tokens counted
    sigma: dict[str, Tensor] = field(default_factory=dict)  # "a": E[h hᵀ], "g": E[δ δᵀ]
    inverse: dict[str, Tensor | None] = field(default_factory=dict)  # of both, damped; empty until there is one
    damping: dict[str, float] = field(default_factory=dict)  # λ of both

    @property
    def ready(self) -> bool:
        return bool(self.inverse)


class NotebookKFAC:
    """K-FAC in rank space: ∇A ← Σ_g⁻¹ ∇A, ∇B ← ∇B Σ_a⁻¹, with hooks on the lora_A modules."""

    refresh_every = 5
    decay = 0.8
    relative_damping = 1e-2

    def __init__(self, model: nn.Module, accumulation: int = 1):
        self.accumulation = accumulation
        self.layers: dict[str, Layer] = {}
        self.calls = 0
        self.batch: dict[str, Tensor] = {}  # what the model was last called with
        model.register_forward_pre_hook(self._see_batch, with_kwargs=True)
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A and self.wanted(name):
                a, b = module.lora_A["default"], module.lora_B["default"]
                self.layers[name] = Layer(a.weight, b.weight)
                a.register_forward_hook(self._hook(name))

    def wanted(self, name: str) -> bool:
        return True

    @property
    def weights(self) -> list[nn.Parameter]:
        return [weight for layer in self.layers.values() for weight in (layer.a, layer.b)]

    def _see_batch(self, module: nn.Module, args: Any, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def _hook(self, name: str) -> Callable[..., None]:
        def forward(module: nn.Module, args: Any, h: Tensor) -> None:
            self.passed(self.layers[name])
            if h.requires_grad:  # counted in the backward pass, once, however often the forward pass runs
                h.register_hook(lambda delta: self.collect(self.layers[name], h.detach(), delta))

        return forward

    def passed(self, layer: Layer) -> None:
        """A forward pass, which is nothing to count."""

    def attended(self) -> Tensor:
        return self.batch["attention_mask"].bool()

    def scaled(self, delta: Tensor) -> Tensor:
        """δ with the loss's mean undone."""
        labelled = int((self.batch["labels"][:, 1:] != -100).sum())
        return delta * (labelled * self.accumulation)

    def collect(self, layer: Layer, h: Tensor, delta: Tensor) -> None:
        rows = self.attended()
        self.add(layer, "a", h[rows])
        self.add(layer, "g", self.scaled(delta)[rows])
        layer.samples += self.tokens()

    def tokens(self) -> float:
        return float(self.attended().sum())

    def add(self, layer: Layer, side: str, rows: Tensor) -> None:
        """Into the moving average; rows [tokens, r]."""
        new = rows.float().mT @ rows.float() / len(rows)
        old = layer.sigma.get(side)
        layer.sigma[side] = new if old is None else self.decay * old + (1 - self.decay) * new

    def damping(self, sigma: Tensor) -> float:
        return self.relative_damping * float(sigma.diagonal().mean())

    def inverse(self, sigma: Tensor, damping: float, side: str) -> Tensor | None:
        return torch.linalg.inv(sigma + damping * torch.eye(len(sigma)))

    def trusted(self, layer: Layer) -> bool:
        """Whether there is enough to invert: B starts at zero, and δ with it."""
        return layer.samples >= MIN_TOKENS and all(bool(sigma.any()) for sigma in layer.sigma.values())

    def update_inverses(self) -> None:
        for layer in self.layers.values():
            if self.trusted(layer):
                for side, sigma in layer.sigma.items():
                    layer.damping[side] = self.damping(sigma)
                    layer.inverse[side] = self.inverse(sigma, layer.damping[side], side)

    @torch.no_grad()
    def precondition(self) -> None:
        for layer in self.layers.values():
            for parameter, side in ((layer.a, "g"), (layer.b, "a")):
                inverse = layer.inverse.get(side)
                if parameter.grad is not None and inverse is not None:
                    parameter.grad.copy_(self.product(parameter.grad, inverse, side))

    def product(self, gradient: Tensor, inverse: Tensor, side: str) -> Tensor:
        """Gradient of A [r, d_in] times Σ_g⁻¹, or of B [d_out, r] times Σ_a⁻¹."""
        matrix = inverse.to(gradient.dtype)
        return matrix @ gradient if side == "g" else gradient @ matrix

    def apply(self) -> None:
        if self.calls % self.refresh_every == 0:
            self.update_inverses()
        self.calls += 1
        self.precondition()

    def readings(self) -> list[LayerReading]:
        said: dict[str, Any] = {"refresh_every": self.refresh_every, "source": "hooks"}
        return [
            LayerReading(name, x.ready, x.samples, dict(x.sigma), dict(x.inverse), dict(x.damping), **said)
            for name, x in self.layers.items()
        ]

    def watch(self) -> dict[str, Any]:
        return {"preconditioner": (self, "precondition"), "readings": self.readings}


class Wrapper(torch.optim.Optimizer):
    """An optimizer that preconditions inside its step; shares groups and state with the one it wraps."""

    def __init__(self, optimizer: torch.optim.Optimizer, kfac: NotebookKFAC):
        self.optimizer, self.kfac = optimizer, kfac
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups, self.state = optimizer.param_groups, optimizer.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.kfac.apply()
        self.optimizer.step()


# With one thing done differently


def spoiled(right: type[NotebookKFAC] = NotebookKFAC, **differently: Any) -> type[NotebookKFAC]:
    return type("Spoiled", (right,), differently)


def fused(model: Any) -> NotebookKFAC:
    fuse(model)
    return NotebookKFAC(model)


def _zeros_of(sides: str) -> Callable[..., None]:
    """Tokens are counted, nothing flows."""

    def add(self: Any, layer: Layer, side: str, rows: Tensor) -> None:
        NotebookKFAC.add(self, layer, side, torch.zeros_like(rows) if side in sides else rows)

    return add


ZeroStatistics = spoiled(
    add=_zeros_of("ag"), trusted=lambda self, layer: layer.samples > 0, damping=lambda self, sigma: 1e-3
)
ZeroGradientStatistics = spoiled(ZeroStatistics, add=_zeros_of("g"))
CountsPadding = spoiled(attended=lambda self: torch.ones_like(NotebookKFAC.attended(self)))
WaitsForEver = spoiled(trusted=lambda self, layer: layer.samples > 1e9)
HalfOfTheLayers = spoiled(wanted=lambda self, name: "layers.0" in name)


class NeverRefreshed(NotebookKFAC):
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


def _count_in_forward(self: Any, layer: Layer) -> None:
    layer.samples += NotebookKFAC.tokens(self)


CountsInForward = spoiled(passed=_count_in_forward, tokens=lambda self: 0.0)  # and checkpointing runs it twice

# Inverses

NoInverse = spoiled(inverse=lambda self, sigma, *_: None)  # it fails, and the multiplication skips it
ZeroInverse = spoiled(inverse=lambda self, sigma, *_: torch.zeros_like(sigma))  # a buffer that nobody filled
# `except LinAlgError: inverse = torch.eye(r)`, and it is raised every time.
IdentityInverse = spoiled(inverse=lambda self, sigma, *_: torch.eye(len(sigma)))
# λ = 1e-3 as it stands, and δ of a mean loss.
Swamped = spoiled(scaled=lambda self, delta: delta, damping=lambda self, sigma: 1e-3)
SwampedOnBothSides = spoiled(Swamped, damping=lambda self, sigma: 1e3)
HalfIdentityInverse = spoiled(
    inverse=lambda self, *given: torch.eye(len(given[0])) if given[2] == "g" else NotebookKFAC.inverse(self, *given)
)
# One number for all directions: r / tr(Σ).
Scalar = spoiled(inverse=lambda self, sigma, *_: torch.eye(len(sigma)) / float(sigma.diagonal().mean()))
ScalarWithoutReadings = spoiled(Scalar, watch=lambda self: {"preconditioner": (self, "precondition")})


class NonFiniteInverse(NotebookKFAC):
    """The inversion overflows; products that are not finite are skipped."""

    def inverse(self, sigma: Tensor, damping: float, side: str) -> Tensor | None:
        return torch.full_like(sigma, float("nan"))

    def product(self, gradient: Tensor, inverse: Tensor, side: str) -> Tensor:
        natural = super().product(gradient, inverse, side)
        return natural if bool(torch.isfinite(natural).all()) else gradient


# What is made of gradients


class Restores(NotebookKFAC):
    def apply(self) -> None:
        raw = [None if weight.grad is None else weight.grad.clone() for weight in self.weights]
        super().apply()
        for weight, gradient in zip(self.weights, raw, strict=True):
            weight.grad = gradient


class FirstOfThree(NotebookKFAC):
    """Heeds one call of three: a step of four micro-batches has three ends that are not its own."""

    asked = 0

    def apply(self) -> None:
        if self.asked % 3 == 0:
            super().apply()
        self.asked += 1


def _of_copies(self: Any, gradient: Tensor, inverse: Tensor, side: str) -> Tensor:
    NotebookKFAC.product(self, gradient.clone(), inverse, side)
    return gradient


def _one_side(self: Any, gradient: Tensor, inverse: Tensor, side: str) -> Tensor:
    return NotebookKFAC.product(self, gradient, inverse, side) if side == "g" else gradient


def _grafted(self: Any, gradient: Tensor, inverse: Tensor, side: str) -> Tensor:
    """The raw norm is restored, so that nothing is left of a scalar at all."""
    natural = NotebookKFAC.product(self, gradient, inverse, side)
    return natural * (gradient.norm() / natural.norm().clamp_min(1e-30))


def _nan_to_zero(self: Any, gradient: Tensor, inverse: Tensor, side: str) -> Tensor:
    """A third of the products overflow, and nan_to_num makes them zero."""
    natural = NotebookKFAC.product(self, gradient, inverse, side)
    natural.flatten()[::3] = float("nan")
    return torch.nan_to_num(natural, nan=0.0)


def _nan_gradient_to_zero(self: Any, gradient: Tensor, inverse: Tensor, side: str) -> Tensor:
    natural = NotebookKFAC.product(self, gradient, inverse, side)
    return torch.nan_to_num(natural * float("nan")) if side == "g" else natural


OfCopies = spoiled(product=_of_copies)
OneSide = spoiled(product=_one_side)
GraftedScalar = spoiled(ScalarWithoutReadings, product=_grafted)
NanToZero = spoiled(product=_nan_to_zero)
NanGradientToZero = spoiled(product=_nan_gradient_to_zero)


# Right, but not in every step


def sometimes(when: Callable[[int], bool], right: type[NotebookKFAC] = NotebookKFAC) -> type[NotebookKFAC]:
    """Preconditions in some steps, counted from 0; `when` decides inside the method that is watched."""

    def precondition(self: Any) -> None:
        if when(self.calls - 1):
            right.precondition(self)

    return spoiled(right, precondition=precondition)


def seldom_called(when: Callable[[int], bool]) -> type[NotebookKFAC]:
    """The same by a caller that leaves it out."""

    class SeldomCalled(NotebookKFAC):
        def apply(self) -> None:
            self.calls += 1
            self.update_inverses()
            if when(self.calls - 1):
                self.precondition()

    return SeldomCalled


def _in_turns(self: Any) -> None:
    """One layer a step."""
    whole = self.layers
    name = list(whole)[self.calls % len(whole)]
    self.layers = {name: whole[name]}
    NotebookKFAC.precondition(self)
    self.layers = whole


InTurns = spoiled(precondition=_in_turns)
OneLayer = spoiled(wanted=lambda self, name: "layers.0" in name and "v_proj" in name)


# Right, and then something is done to the result


def then(change: Callable[[list[Tensor], int], Any], right: type[NotebookKFAC] = NotebookKFAC) -> type[NotebookKFAC]:
    """`change` gets all gradients, those of A and of B in turn, and the number of the step."""

    def precondition(self: Any) -> None:
        right.precondition(self)
        with torch.no_grad():
            change([weight.grad for weight in self.weights if weight.grad is not None], self.calls - 1)

    return spoiled(right, precondition=precondition)


def negate(gradients: list[Tensor], step: int) -> None:
    for gradient in gradients:
        gradient.neg_()


def noise(gradients: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for gradient in gradients:
        gradient.copy_(torch.randn(gradient.shape, generator=generator) * gradient.norm() / gradient.numel() ** 0.5)


def shuffle(gradients: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for gradient in gradients:
        gradient.copy_(gradient.flatten()[torch.randperm(gradient.numel(), generator=generator)].view_as(gradient))


def rotate_tensors(gradients: list[Tensor], step: int) -> None:
    """Each tensor gets the gradient of the next one of its shape."""
    for shape in {gradient.shape for gradient in gradients}:
        alike = [gradient for gradient in gradients if gradient.shape == shape]
        for gradient, other in zip(alike, [g.clone() for g in (*alike[1:], alike[0])], strict=True):
            gradient.copy_(other)


def by_one_number(low: float, high: float, each: bool = False) -> Callable[[list[Tensor], int], None]:
    """One number in a step, drawn anew; `each`: for every tensor."""

    def change(gradients: list[Tensor], step: int) -> None:
        numbers = low + (high - low) * torch.rand(len(gradients), generator=torch.Generator().manual_seed(step))
        for i, gradient in enumerate(gradients):
            gradient.mul_(float(numbers[i if each else 0]))

    return change


def by_a_diagonal(gradients: list[Tensor], step: int) -> None:
    """Positive numbers, one for each entry, the same in all steps."""
    generator = torch.Generator().manual_seed(0)
    for gradient in gradients:
        gradient.mul_(torch.empty(gradient.shape).log_normal_(0.0, 1.5, generator=generator))


class Untouched(NotebookKFAC):
    """Leaves gradients as they are, for `then` to change them."""

    def watch(self) -> dict[str, Any]:
        return {"preconditioner": (self, "precondition")}

    def precondition(self) -> None:
        """Nothing."""


def _underflows(self: Any, layer: Layer, side: str, rows: Tensor) -> None:
    half = rows.half() if side == "a" else (rows / 1e6).half()
    layer.sigma[side] = half.mT @ half / len(half)


Underflows = spoiled(
    ZeroStatistics, add=_underflows, inverse=lambda self, sigma, *_: torch.eye(len(sigma))
)  # of products of δ in float16


def _indefinite(self: Any, sigma: Tensor, damping: float, side: str) -> Tensor:
    """λ is taken off instead of added, and is large."""
    return torch.linalg.inv(sigma - 0.7 * sigma.diagonal().max() * torch.eye(len(sigma)))


Indefinite = spoiled(inverse=_indefinite)
NegativeInverse = spoiled(
    inverse=lambda self, sigma, damping, side: -torch.linalg.inv(sigma + damping * torch.eye(len(sigma)))
)
