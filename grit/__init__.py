"""GRIT: geometry-aware LoRA. K-FAC preconditioning in rank space, Fisher-guided reprojection, dynamic rank.

Notation (the only one used in the code): ΔW = s·B·A with A [r, d_in] and B [d_out, r]; h = A x, the output of lora_A,
and δ = ∂L/∂h, both [tokens, r]; Σ_a = E[h hᵀ] and Σ_g = E[δ δᵀ], both [r, r].

Natural gradient (kfac pairing): ∇A ← (Σ_g + λ_g I)⁻¹ ∇A, ∇B ← ∇B (Σ_a + λ_a I)⁻¹.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from grit.config import GRITConfig, GRITConfigError

if TYPE_CHECKING:
    from grit.errors import CaptureError, NonFiniteGradientsError, NotAppliedError
    from grit.layers import GritLayerError
    from grit.manager import GRITManager
    from grit.optim import GritOptimizer
    from grit.trainer import GritCallback, GritTrainer, grit_trainer_class

__all__ = [
    "CaptureError",
    "GRITConfig",
    "GRITConfigError",
    "GRITManager",
    "GritCallback",
    "GritLayerError",
    "GritOptimizer",
    "GritTrainer",
    "NonFiniteGradientsError",
    "NotAppliedError",
    "grit_trainer_class",
]

# torch and transformers load when they are needed: settings can be checked in milliseconds.
_HOMES = {
    "CaptureError": "grit.errors",
    "GRITManager": "grit.manager",
    "GritCallback": "grit.trainer",
    "GritLayerError": "grit.layers",
    "GritOptimizer": "grit.optim",
    "GritTrainer": "grit.trainer",
    "NonFiniteGradientsError": "grit.errors",
    "NotAppliedError": "grit.errors",
    "grit_trainer_class": "grit.trainer",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'grit' has no attribute {name!r}")
