"""GRIT: geometry-aware LoRA. K-FAC preconditioning in rank space, Fisher-guided reprojection, dynamic rank.

Notation (the only one used in the code): ΔW = s·B·A with A [r, d_in] and B [d_out, r]; h = A x, the output of lora_A,
and δ = ∂L/∂h, both [tokens, r]; Σ_a = E[h hᵀ] and Σ_g = E[δ δᵀ], both [r, r].

Natural gradient (kfac pairing): ∇A ← (Σ_g + λ_g I)⁻¹ ∇A, ∇B ← ∇B (Σ_a + λ_a I)⁻¹.
"""

from importlib import import_module
from typing import Any

from grit.config import GRITConfig, GRITConfigError, GRITError

# torch and transformers load when they are needed: settings can be checked in milliseconds.
_HOMES = {
    "GRITManager": "grit.manager",
    "GritCallback": "grit.trainer",
    "GritFactory": "grit.optim",
    "GritOptimizer": "grit.optim",
    "GritTrainer": "grit.trainer",
    "NonFiniteGradientsError": "grit.manager",
    "Preserve": "grit.preserve",
    "StepRule": "grit.eigen_adamw",
    "create_grit_optimizer": "grit.optim",
    "grit_trainer_class": "grit.trainer",
}
# The same classes by the names that documents 002 and 004 use.
_ALIASES = {"GRITCallback": "GritCallback", "GRITOptimizer": "GritOptimizer", "GRITTrainer": "GritTrainer"}

__all__ = ["GRITConfig", "GRITConfigError", "GRITError", *_HOMES, *_ALIASES]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    home = _HOMES.get(_ALIASES.get(name, name))
    if home is None:
        raise AttributeError(f"module 'grit' has no attribute {name!r}")
    return getattr(import_module(home), _ALIASES.get(name, name))
