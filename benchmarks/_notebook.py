"""A preconditioner as people write them in notebooks; it is right as it stands, `benchmarks._faulty_kfac` spoils it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from probes import LayerReading

MIN_TOKENS = 64


@dataclass
class Layer:
    """One LoRA layer: moving averages Σ_a, Σ_g [r, r] and their inverses.

    Attributes:
        a: A [r, d_in].
        b: B [d_out, r].
        samples: Tokens counted.
        sigma: "a": E[h hᵀ], "g": E[δ δᵀ].
        inverse: Of both, damped; empty until there is one.
        damping: λ of both.
    """

    a: nn.Parameter
    b: nn.Parameter
    samples: float = 0.0
    sigma: dict[str, Tensor] = field(default_factory=dict)
    inverse: dict[str, Tensor | None] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Whether gradients are multiplied."""
        return bool(self.inverse)


class NotebookKFAC:
    """K-FAC in rank space: ∇A ← Σ_g⁻¹ ∇A, ∇B ← ∇B Σ_a⁻¹, with hooks on the lora_A modules.

    Attributes:
        layers: Name of the LoRA module → its state.
        accumulation: Micro-batches of a step.
        batch: What the model was last called with.
    """

    refresh_every = 5
    decay = 0.8
    relative_damping = 1e-2

    def __init__(self, model: nn.Module, accumulation: int = 1):
        """Attach the hooks."""
        self.accumulation = accumulation
        self.layers: dict[str, Layer] = {}
        self.calls = 0
        self.batch: dict[str, Tensor] = {}
        model.register_forward_pre_hook(self._see_batch, with_kwargs=True)
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A and self.wanted(name):
                a, b = module.lora_A["default"], module.lora_B["default"]
                self.layers[name] = Layer(a.weight, b.weight)
                a.register_forward_hook(self._hook(name))

    def wanted(self, name: str) -> bool:
        """Whether this layer is preconditioned."""
        return True

    @property
    def weights(self) -> list[nn.Parameter]:
        """A and B of every layer."""
        return [weight for layer in self.layers.values() for weight in (layer.a, layer.b)]

    def _see_batch(self, module: nn.Module, args: Any, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def _hook(self, name: str) -> Callable[..., None]:
        def forward(module: nn.Module, args: Any, h: Tensor) -> None:
            if h.requires_grad:  # counted in the backward pass, once, however often the forward pass runs
                h.register_hook(lambda delta: self.collect(self.layers[name], h.detach(), delta))

        return forward

    def attended(self) -> Tensor:
        """Positions that count [items, tokens]."""
        return self.batch["attention_mask"].bool()

    def scaled(self, delta: Tensor) -> Tensor:
        """δ with the loss's mean undone."""
        labelled = int((self.batch["labels"][:, 1:] != -100).sum())
        return delta * (labelled * self.accumulation)

    def collect(self, layer: Layer, h: Tensor, delta: Tensor) -> None:
        """One micro-batch's statistics."""
        rows = self.attended()
        self.add(layer, "a", h[rows])
        self.add(layer, "g", self.scaled(delta)[rows])
        layer.samples += float(rows.sum())

    def add(self, layer: Layer, side: str, rows: Tensor) -> None:
        """Into the moving average; rows [tokens, r]."""
        new = rows.float().mT @ rows.float() / len(rows)
        old = layer.sigma.get(side)
        layer.sigma[side] = new if old is None else self.decay * old + (1 - self.decay) * new

    def damping(self, sigma: Tensor) -> float:
        """λ."""
        return self.relative_damping * float(sigma.diagonal().mean())

    def inverse(self, sigma: Tensor, damping: float) -> Tensor | None:
        """(Σ + λI)⁻¹."""
        return torch.linalg.inv(sigma + damping * torch.eye(len(sigma)))

    def trusted(self, layer: Layer) -> bool:
        """Whether there is enough to invert: B starts at zero, and δ with it."""
        return layer.samples >= MIN_TOKENS and all(bool(sigma.any()) for sigma in layer.sigma.values())

    def update_inverses(self) -> None:
        """Of every layer that has seen enough."""
        for layer in self.layers.values():
            if self.trusted(layer):
                for side, sigma in layer.sigma.items():
                    layer.damping[side] = self.damping(sigma)
                    layer.inverse[side] = self.inverse(sigma, layer.damping[side])

    @torch.no_grad()
    def precondition(self) -> None:
        """Multiply every gradient, in place."""
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
        """What is done before each step."""
        if self.calls % self.refresh_every == 0:
            self.update_inverses()
        self.calls += 1
        self.precondition()

    def readings(self) -> list[LayerReading]:
        """For the probe."""
        return [
            LayerReading(
                layer=name,
                ready=layer.ready,
                samples=layer.samples,
                factors=dict(layer.sigma),
                preconditioners=dict(layer.inverse),
                damping=dict(layer.damping),
                refresh_every=self.refresh_every,
                source="hooks",
            )
            for name, layer in self.layers.items()
        ]

    def watch(self) -> dict[str, Any]:
        """What the probe is told."""
        return {"preconditioner": (self, "precondition"), "readings": self.readings}


class Wrapper(torch.optim.Optimizer):
    """An optimizer that preconditions inside its step; shares groups and state with the one it wraps."""

    def __init__(self, optimizer: torch.optim.Optimizer, kfac: NotebookKFAC):
        self.optimizer, self.kfac = optimizer, kfac
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups, self.state = optimizer.param_groups, optimizer.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Precondition, then step."""
        self.kfac.apply()
        self.optimizer.step()
