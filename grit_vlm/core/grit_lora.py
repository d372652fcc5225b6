"""GRIT on one LoRA layer: PEFT's layer, an estimate of its Fisher information, and what follows from it.

Mended from document 000: its layer has A and B of its own, which PEFT could neither save nor merge; here they are
those of PEFT's layer. Its backward hook did nothing; here it brings ∂ℓ/∂h and ∂ℓ/∂(B h), which every estimate but the
(wrong) square of the batch gradient needs. Its buffers grew without end; here they have a limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grit_vlm.core.capture import Tokens, first_tokens
from grit_vlm.core.eigen import compute_natural_gradient
from grit_vlm.core.fisher_info import SIDES, Gradients
from grit_vlm.core.lora_config import GRITLoRAConfig, GRITLoRAConfigError

if TYPE_CHECKING:
    from grit_vlm.core.manager import FisherManager

__all__ = ["GRITLoRAConfig", "GRITLoRAConfigError", "GRITLoRALayer", "GRITLoRALinear"]


class GRITLoRALinear(nn.Module):
    """A LoRA layer with its Fisher information: ``GRITLoRALinear(nn.Linear(128, 64), GRITLoRAConfig(r=8))``.

    It stands round PEFT's own layer. Alone it captures what it needs by itself; inside a model a `VLMGRITAdapter` does
    it for all layers. An optimizer by `create_grit_optimizer` does everything below at its step; the methods are for
    loops that do it by hand.

    Attributes:
        lora: PEFT's layer.
        config: Settings.
        fisher_matrix: The estimate.
        activation_buffer: Tokens captured since the last update.
        projection_budget: Directions that updates keep now; None: all.
        manager: What captures for it.
    """

    def __init__(self, base_layer: nn.Module, config: GRITLoRAConfig | None = None, adapter_name: str = "default"):
        """A layer of its own, whose base is frozen; or the view of a layer that PEFT has put into a model.

        Args:
            base_layer: A linear layer, or PEFT's LoRA layer round one.
            config: Default: the documents'. Of a layer of PEFT's r, lora_alpha and lora_dropout are what it has.
            adapter_name: PEFT's.

        Raises:
            GRITLoRAConfigError: every mistake in the settings.
            TypeError: no linear layer.
        """
        super().__init__()
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear, LoraLayer

        self.config = config or GRITLoRAConfig()
        self.config.validate()
        self.adapter_name = adapter_name
        self.manager: FisherManager | None = None
        alone = not isinstance(base_layer, LoraLayer)
        if alone:
            if not isinstance(base_layer, nn.Linear):
                raise TypeError(f"base_layer: expected torch.nn.Linear, got {type(base_layer).__name__}")
            base_layer.requires_grad_(False)
            own = LoraConfig(r=self.config.r, lora_alpha=self.config.lora_alpha, lora_dropout=self.config.lora_dropout)
            base_layer = Linear(base_layer, adapter_name, own, r=self.config.r, lora_alpha=self.config.lora_alpha)
        self.lora: Any = base_layer
        self.fisher_matrix = self.config.estimate()
        self.activation_buffer: list[Tokens] = []
        self.projection_budget = self.config.projection_budget_start if self.config.enable_projection else None
        if alone:
            from grit_vlm.core.manager import FisherManager

            FisherManager(self, {"layer": self}).open()

    @property
    def lora_A(self) -> nn.Parameter:  # noqa: N802 - PEFT's name
        """A [r, d_in]."""
        weight: nn.Parameter = self.lora.lora_A[self.adapter_name].weight
        return weight

    @property
    def lora_B(self) -> nn.Parameter:  # noqa: N802 - PEFT's name
        """B [d_out, r]."""
        weight: nn.Parameter = self.lora.lora_B[self.adapter_name].weight
        return weight

    @property
    def base_layer(self) -> nn.Module:
        """The frozen layer."""
        base: nn.Module = self.lora.get_base_layer()
        return base

    @property
    def scaling(self) -> float:
        """The scale s = lora_alpha / r of ΔW = s·B·A."""
        return float(self.lora.scaling[self.adapter_name])

    @property
    def lora_dropout(self) -> nn.Module:
        """What x goes through before A."""
        dropout: nn.Module = self.lora.lora_dropout[self.adapter_name]
        return dropout

    @property
    def step_count(self) -> int:
        """Optimizer steps so far, 0 without one by `create_grit_optimizer`."""
        return self.manager.step if self.manager is not None else 0

    @property
    def eigenvalues(self) -> Tensor | None:
        """Fisher information along every direction, [directions]; None before the first update."""
        return self.fisher_matrix.direction_values() if self.fisher_matrix.weight else None

    @property
    def projection_matrix(self) -> dict[str, Tensor] | None:
        """The kept directions as orthonormal columns, see `FisherInformationMatrix.directions`; None: all are kept."""
        if self.projection_budget is None or not self.fisher_matrix.weight:
            return None
        return self.fisher_matrix.directions(self.projection_budget)

    @property
    def ready(self) -> bool:
        """Whether the estimate has seen enough tokens to be used."""
        return self.fisher_matrix.samples >= self.config.fisher_min_samples

    @property
    def acts(self) -> bool:
        """Whether gradients or updates are changed by it now."""
        return self.ready and (self.config.enable_natural_gradient or self.projection_budget is not None)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's: base(x) + s·B·A·x, [..., d_in] → [..., d_out]."""
        result: Tensor = self.lora(*args, **kwargs)
        return result

    def take(self, tokens: Tokens) -> None:
        """Keep captured tokens for the next update, spread evenly over them where there is no room for all."""
        room = self.config.buffer_tokens - sum(map(len, self.activation_buffer))
        if len(tokens) and room > 0:
            self.activation_buffer.append(tokens if len(tokens) <= room else tokens.spread(room))

    def update_fisher_and_projection(self) -> bool:
        """Take what was captured since the last time into the estimate; returns whether there was anything."""
        if not self.activation_buffer:
            return False
        tokens = first_tokens(self.activation_buffer, self.config.buffer_tokens)
        self.activation_buffer.clear()
        self.fisher_matrix.observe(tokens.x, tokens.h, tokens.delta, tokens.e)
        return True

    def gradients(self) -> Gradients | None:
        """∇A and ∇B; None where there is none."""
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
        """The part along the directions that `projection_budget` keeps; everything where it is None."""
        if self.projection_budget is None or not self.fisher_matrix.weight:
            return gradients
        return self.fisher_matrix.project(gradients, self.projection_budget)

    def update_projection(self, k_budget: int) -> None:
        """Keep so many directions from now on; see `FisherInformationMatrix.project`.

        Raises:
            ValueError: below 1.
        """
        if k_budget < 1:
            raise ValueError(f"k_budget: expected a whole number from 1 on, got {k_budget!r}")
        self.projection_budget = int(k_budget)

    def get_fisher_for_param(self, name: str) -> Tensor:
        """The dense estimate of "lora_A" or "lora_B" (any name that holds one of them): [n, n]; for small layers.

        Raises:
            ValueError: another name. FisherError: nothing was observed.
        """
        for side in SIDES:
            if f"lora_{side}" in name:
                return self.fisher_matrix.dense(side)
        raise ValueError(f"expected a name with lora_A or lora_B, got {name!r}")

    compute_natural_gradient = staticmethod(compute_natural_gradient)

    def apply_natural_gradient_update(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Replace `.grad` of A and B by what `natural_gradients` makes of them, and step.

        Args:
            optimizer: A plain one, whose step follows; None: no step. Not one by `create_grit_optimizer`, which does
                all of this itself.
        """
        gradients = self.gradients()
        if gradients is not None:
            for side, new in self.natural_gradients(gradients).items():
                (self.lora_A if side == "A" else self.lora_B).grad = new
        if optimizer is not None:
            optimizer.step()


GRITLoRALayer = GRITLoRALinear
"""The name that documents 000 and 001 also use."""
