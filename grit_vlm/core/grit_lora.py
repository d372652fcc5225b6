"""One GRIT-LoRA layer: the tokens that hooks capture, its Fisher information, and its natural gradients.

A and B are those of PEFT's layer, which can save and merge them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grit.capture import Capture, TokenMask
from grit.layers import LoraPair
from grit.manager import Manager
from grit_vlm.config.model_configs import GRITLoRAConfig
from grit_vlm.core.fisher_info import FisherInformationMatrix, Gradients, Side, compute_natural_gradient

__all__ = ["GRITLoRAConfig", "GRITLoRALayer", "GRITLoRALinear"]


@dataclass
class Tokens:
    """Tokens of one layer: x [n, d_in], h [n, r], delta [n, r], e [n, d_out]; see `grit_vlm.core.fisher_info`."""

    x: Tensor
    h: Tensor
    delta: Tensor
    e: Tensor

    def __len__(self) -> int:
        return self.x.shape[0]

    def spread(self, count: int) -> Tokens:
        """So many of them at even distances, copied, so that the others can be freed."""
        chosen = torch.linspace(0, len(self) - 1, count).round().long()
        return Tokens(*(t[chosen.to(t.device)] for t in (self.x, self.h, self.delta, self.e)))


@dataclass
class _Pass:
    """A forward pass of one layer, until its backward pass has come."""

    x: Tensor
    h: Tensor
    mask: TokenMask | None
    divisor: float | Tensor
    e: Tensor | None = None


class TokenCapture(Capture):
    """Hands the tokens of each backward pass to the layers, by the names of `pairs`.

    Only text is padded: pairs in `without_mask`, for example of a vision tower, see image patches, and all of those
    count, even if there happen to be as many as the batch has text tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, GRITLoRALinear],
        pairs: Sequence[LoraPair],
        without_mask: Collection[str] = (),
    ):
        super().__init__(model)
        self._layers, self._without_mask = layers, frozenset(without_mask)
        self._open: dict[str, _Pass] = {}
        self._saw = False
        for pair in pairs:
            self.handles.append(pair.module_a.register_forward_hook(self._after_a(pair.name)))
            module_b = pair.layer.lora_B[pair.adapter]
            self.handles.append(module_b.register_forward_hook(self._after_b(pair.name)))

    def _after_a(self, name: str) -> Any:
        def forward_hook(module: nn.Module, args: tuple[Any, ...], h: Tensor) -> None:
            if not (self.active and h.requires_grad):  # evaluation, or the first pass of reentrant checkpointing
                return
            mask = None if name in self._without_mask else self.mask
            current = _Pass(args[0].detach(), h.detach(), mask, self.batch_divisor)
            self._open[name] = current
            h.register_hook(lambda delta: self._complete(name, current, delta))

        return forward_hook

    def _after_b(self, name: str) -> Any:
        def forward_hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            current = self._open.pop(name, None)  # that of the same pass: A has just been called
            if current is not None and out.requires_grad:
                out.register_hook(lambda e: setattr(current, "e", e.detach()))

        return forward_hook

    def _complete(self, name: str, current: _Pass, delta: Tensor) -> None:
        if current.e is None:
            return
        scale = self.scale(current.divisor)
        flat = [t.reshape(-1, t.shape[-1]) for t in (current.x, current.h, delta.detach() * scale, current.e * scale)]
        keep = current.mask.keep.reshape(-1) > 0 if current.mask is not None else None
        if keep is not None and keep.shape[0] == flat[0].shape[0] and not bool(keep.all()):
            flat = [t[keep.to(t.device)] for t in flat]
        current.e = None
        self._saw = True
        self._layers[name].take(Tokens(*flat))

    def saw_tokens(self) -> bool:
        return self._saw

    def clear(self) -> None:
        self._open.clear()


class GRITLoRALinear(nn.Module):
    """A LoRA layer with its Fisher information: ``GRITLoRALinear(nn.Linear(128, 64), GRITLoRAConfig(r=8))``.

    A layer of its own, whose base is frozen and which captures its tokens by itself; or, given PEFT's LoRA layer inside
    a model, the view of it that a `VLMGRITAdapter` works with. The methods are for loops that step by hand.
    """

    def __init__(self, base_layer: nn.Module, config: GRITLoRAConfig | None = None, adapter_name: str = "default"):
        super().__init__()
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear, LoraLayer

        self.config = c = config or GRITLoRAConfig()
        c.validate()
        alone = not isinstance(base_layer, LoraLayer)
        if alone:
            if not isinstance(base_layer, nn.Linear):
                raise TypeError(f"base_layer: expected torch.nn.Linear, got {type(base_layer).__name__}")
            base_layer.requires_grad_(False)
            lora = LoraConfig(r=c.r, lora_alpha=c.lora_alpha, lora_dropout=c.lora_dropout)
            base_layer = Linear(base_layer, adapter_name, lora, r=c.r, lora_alpha=c.lora_alpha)
        self.lora: Any = base_layer
        self.adapter_name = adapter_name
        self.modality = "all"  # whose budget it shares, and whether its tokens are text: of vision, cross_modal not
        self.fisher_matrix = FisherInformationMatrix(
            c.fisher_approximation, c.fisher_damping, c.fisher_ema_decay, c.fisher_update_freq
        )
        self.activation_buffer: list[Tokens] = []
        self.projection_budget = c.projection_budget_start if c.enable_projection else None  # None: all
        self.manager: Manager | None = None  # that steps it
        pairs = [LoraPair("layer", adapter_name, self.lora)]
        self.capture = TokenCapture(self, {"layer": self}, pairs) if alone else None

    lora_A = property(lambda self: self.lora.lora_A[self.adapter_name].weight)  # noqa: N815 - PEFT's name; [r, d_in]
    lora_B = property(lambda self: self.lora.lora_B[self.adapter_name].weight)  # noqa: N815 - [d_out, r]
    base_layer = property(lambda self: self.lora.get_base_layer())
    scaling = property(lambda self: float(self.lora.scaling[self.adapter_name]))
    lora_dropout = property(lambda self: self.lora.lora_dropout[self.adapter_name])

    @property
    def step_count(self) -> int:
        """Optimizer steps so far, 0 without one by `create_grit_optimizer`."""
        return self.manager.step if self.manager is not None else 0

    @property
    def eigenvalues(self) -> Tensor | None:
        """Fisher information along every direction, [directions]; None before the first update."""
        return self.fisher_matrix.direction_values() if self.fisher_matrix.weight else None

    @property
    def ready(self) -> bool:
        return self.fisher_matrix.samples >= self.config.fisher_min_samples

    @property
    def acts(self) -> bool:
        return self.ready and (self.config.enable_natural_gradient or self.projection_budget is not None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.lora(*args, **kwargs)

    def take(self, tokens: Tokens) -> None:
        """Keep captured tokens for the next update, spread evenly over them where there is no room for all."""
        room = self.config.buffer_tokens - sum(map(len, self.activation_buffer))
        if len(tokens) and room > 0:
            self.activation_buffer.append(tokens if len(tokens) <= room else tokens.spread(room))

    def update_fisher_and_projection(self) -> bool:
        """Take what was captured since the last time into the estimate; returns whether there was anything."""
        buffer, self.activation_buffer = self.activation_buffer, []
        if buffer:
            self.fisher_matrix.observe(
                *(torch.cat([getattr(tokens, name) for tokens in buffer]) for name in ("x", "h", "delta", "e"))
            )
        return bool(buffer)

    def gradients(self) -> Gradients | None:
        a, b = self.lora_A.grad, self.lora_B.grad
        return None if a is None or b is None else {"A": a, "B": b}

    def natural_gradients(self, gradients: Gradients) -> Gradients:
        """What the settings make of raw gradients: preconditioned, projected, or as they are."""
        if not self.ready:
            return gradients
        if self.config.enable_natural_gradient:
            gradients = self.fisher_matrix.natural_gradient(gradients)
        return self.project_gradients(gradients)

    def project_gradients(self, gradients: Gradients) -> Gradients:
        if self.projection_budget is None or not self.fisher_matrix.weight:
            return gradients
        return self.fisher_matrix.project(gradients, self.projection_budget)

    def update_projection(self, k_budget: int) -> None:
        """Keep so many directions from now on, as `FisherInformationMatrix.project` counts them; ValueError below 1."""
        if k_budget < 1:
            raise ValueError(f"k_budget: expected a whole number from 1 on, got {k_budget!r}")
        self.projection_budget = int(k_budget)

    def weights(self, side: Side, power: float | None) -> Tensor:
        """What the step along each eigen-direction is multiplied by, projection included, as `Eigen.values`.

        Without a power, what the gradient is multiplied by (modes adamw and sgd).
        """
        fisher, by = self.fisher_matrix, None
        if self.config.enable_natural_gradient:
            by = fisher.inverse(side) if power is None else fisher.step_weights(side, power)
        by = torch.ones_like(fisher.eigen(side).values) if by is None else by
        return by if self.projection_budget is None else by * fisher.keeps(self.projection_budget)[side]

    compute_natural_gradient = staticmethod(compute_natural_gradient)

    def apply_natural_gradient_update(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Replace `.grad` of A and B by what `natural_gradients` makes of them, and let a plain optimizer step."""
        gradients = self.gradients()
        if gradients is not None:
            natural = self.natural_gradients(gradients)
            self.lora_A.grad, self.lora_B.grad = natural["A"], natural["B"]
        if optimizer is not None:
            optimizer.step()


GRITLoRALayer = GRITLoRALinear  # the name that documents 000 and 001 also use
