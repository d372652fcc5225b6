"""Size of an adapter's update: norms and ranks of ΔW = s·B·A, module by module (notation of `grit`'s README).

LoRA's ΔW is never formed. With the reduced QR decompositions Aᵀ = Q_A·R_A and B = Q_B·R_B, ΔW =
Q_B·(s·R_B·R_Aᵀ)·Q_Aᵀ, and since Q_A and Q_B have orthonormal columns, the singular values of ΔW are those of the r×r
matrix in the middle.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_DRIFT = "of the hidden states on the perplexity texts, adapter on versus off, mean over tokens and layers"
_ENTROPY = "exp of the entropy of ΔW's normalised singular values"
METRICS = {
    "update_norm": ("1", "none", "‖ΔW‖_F: Frobenius norm of the update, all target modules together"),
    "update_norm_relative": ("1", "none", "‖ΔW‖_F / ‖W‖_F, all target modules together"),
    "effective_rank": ("directions", "none", f"{_ENTROPY} (Roy & Vetterli 2007), mean over modules"),
    "stable_rank": ("directions", "none", "‖ΔW‖_F² / ‖ΔW‖₂², mean over modules"),
    "rank": ("directions", "none", "Rank of the adapter (for methods other than LoRA, of ΔW), mean over modules"),
    "drift_relative": ("1", "none", f"‖h − h₀‖/‖h₀‖ {_DRIFT}"),
    "drift_cosine": ("1", "none", f"1 − cos(h, h₀) {_DRIFT}"),
}
"""Name → (unit, direction, description)."""


@dataclass(frozen=True)
class Update:
    name: str  # of the module in the base model, without the outer `model.`
    singular_values: Sequence[float]  # of ΔW, descending, at most r of them; all nan if A or B is not finite
    weight_norm: float  # ‖W‖_F of the frozen weight
    rank: int  # r

    @property
    def norm(self) -> float:
        return math.sqrt(math.fsum(value * value for value in self.singular_values))

    @property
    def effective_rank(self) -> float:
        """exp(−Σ p ln p) with p = σ/Σσ; nan if ΔW is zero or not finite."""
        total = math.fsum(self.singular_values)
        if total == 0.0 or not math.isfinite(total):
            return math.nan
        shares = [value / total for value in self.singular_values if value > 0.0]
        return math.exp(-math.fsum(p * math.log(p) for p in shares if p > 0.0))

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖_F²/σ₁²; nan if ΔW is zero or not finite."""
        largest = max(self.singular_values)
        return math.fsum((value / largest) ** 2 for value in self.singular_values) if largest > 0.0 else math.nan

    def figures(self) -> dict[str, float]:
        return {
            "update_norm": self.norm,
            "update_norm_relative": self.norm / self.weight_norm if self.weight_norm > 0.0 else math.nan,
            "effective_rank": self.effective_rank,
            "stable_rank": self.stable_rank,
            "rank": float(self.rank),
        }


def singular_values(a: Any, b: Any, scale: float) -> list[float]:
    """The min(r, d_in, d_out) singular values of scale·b·a, descending, in float64; a [r, d_in], b [d_out, r].

    All are nan if a or b contains NaN or infinity, as in a diverged adapter.
    """
    from torch.linalg import qr

    if not (a.isfinite().all() and b.isfinite().all()):
        return [math.nan] * min(*a.shape, b.shape[0])
    r_a = qr(a.detach().double().T, mode="r").R
    r_b = qr(b.detach().double(), mode="r").R
    return _spectrum(abs(scale) * (r_b @ r_a.T))


def _spectrum(matrix: Any) -> list[float]:
    """Singular values of a matrix; nan if it is not finite, where LAPACK fails, sometimes only after a long time."""
    from torch.linalg import svdvals

    return svdvals(matrix).tolist() if matrix.isfinite().all() else [math.nan] * min(matrix.shape)


def updates(model: Any) -> Iterator[Update]:
    """The update of every adapted matrix of a PEFT model with one adapter, in the model's order, scaled as PEFT does.

    An update that is not just s·B·A (DoRA, methods other than LoRA) is merged into a copy of the layer, and W is
    subtracted; not if W is in 4 bit, where rounding would be most of the difference.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.integrations import dequantize_module_weight

    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        base = module.get_base_layer()
        weight = dequantize_module_weight(base).detach()
        adapter = module.active_adapters[0]
        if isinstance(module, LoraLayer) and adapter in module.lora_A and adapter not in module.lora_variant:
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            values, rank = singular_values(a, b, float(module.scaling[adapter])), int(a.shape[0])
        elif weight.dim() == 2 and weight.shape == base.weight.shape:
            merged: Any = copy.deepcopy(module)
            merged.merge()
            change = (merged.get_base_layer().weight.detach() - weight).double()
            values = _spectrum(change)
            rank = sum(value > 1e-6 * values[0] for value in values)
        else:
            continue
        yield Update(
            name=name.removeprefix("base_model.model.").removeprefix("model."),
            singular_values=values,
            weight_norm=float(weight.double().norm()),
            rank=rank,
        )


def _mean(values: Sequence[float]) -> float:
    """Mean over the modules that have a rank; nan if none has."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def summarize(updates: Sequence[Update]) -> dict[str, float]:
    """The whole adapter's figures: norms over all modules together, ranks as means over modules.

    An update of zero has no rank and is skipped. If any is not finite, everything but `rank` is nan.
    """
    broken = any(math.isnan(update.norm) for update in updates)
    norm = math.sqrt(math.fsum(update.norm**2 for update in updates))
    weight = math.sqrt(math.fsum(update.weight_norm**2 for update in updates))
    return {
        "update_norm": norm,
        "update_norm_relative": norm / weight if weight > 0.0 else math.nan,
        "effective_rank": math.nan if broken else _mean([update.effective_rank for update in updates]),
        "stable_rank": math.nan if broken else _mean([update.stable_rank for update in updates]),
        "rank": _mean([float(update.rank) for update in updates]),
    }
