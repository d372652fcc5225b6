"""GRIT: geometry-aware LoRA. K-FAC preconditioning in rank space, Fisher-guided reprojection, dynamic rank.

Notation (the only one used in the code): ΔW = s·B·A with A [r, d_in] and B [d_out, r]; h = A x, the output of lora_A,
and δ = ∂L/∂h, both [tokens, r]; Σ_a = E[h hᵀ] and Σ_g = E[δ δᵀ], both [r, r].

Natural gradient (kfac pairing): ∇A ← (Σ_g + λ_g I)⁻¹ ∇A, ∇B ← ∇B (Σ_a + λ_a I)⁻¹.
"""

from importlib import import_module
from typing import Any

from grit.config import GRITConfig, GRITConfigError

# torch and transformers load when they are needed: settings can be checked in milliseconds.
_HOMES = {
    "CaptureError": "grit.capture",
    "GRITManager": "grit.manager",
    "GritCallback": "grit.trainer",
    "GritLayerError": "grit.layers",
    "GritOptimizer": "grit.optim",
    "GritTrainer": "grit.trainer",
    "NonFiniteGradientsError": "grit.manager",
    "NotAppliedError": "grit.manager",
    "Preserve": "grit.preserve",
    "grit_trainer_class": "grit.trainer",
}


__all__ = ["GRITConfig", "GRITConfigError", *_HOMES]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'grit' has no attribute {name!r}")
