"""LoRA initialized with the part of W that the base's own texts need least; the rest of W stays frozen.

    corda      the last r of the SVD of W C, C = E[x xᵀ] (CorDA, knowledge-preserved mode: Yang et al. 2024, arXiv
               2406.05223; PEFT's init_lora_weights="corda")
    lora_null  W on the r directions in which C is smallest (LoRA-Null: Tang et al. 2025, arXiv 2503.02659; the form
               that trains both A and B)

W stays as it is, and a hook subtracts the start s·B₀·A₀ from the layer's output: with the adapter off this is the base.
At the end of training the start becomes part of the adapter, [B, −B₀] [A; A₀] of rank 2r, which fits the untouched
base.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

from pydantic import model_validator

from trainers import TrainingError
from trainers.adapters import fold_in_start
from trainers.run import Arm
from trainers.settings import TrainSettings


class ResidualSettings(TrainSettings):
    """Section train, and the part of W that is trained."""

    plain_lora, text_only = "this arm has its own start", True

    start: Literal["corda", "lora_null"] = "corda"

    @model_validator(mode="after")
    def _plain(self) -> Self:
        problems = []
        if "init_lora_weights" in self.peft:
            problems.append("peft.init_lora_weights: expected none, since `start` takes its place")
        if self.preserve.method not in ("none", "distill"):
            problems.append(
                f"preserve.method: expected none or distill, got {self.preserve.method}, which pulls B·A to zero; this "
                "arm starts elsewhere"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


def corda(w: Any, c: Any, r: int) -> tuple[Any, Any]:
    """B [d_out, r], A [r, d_in] from W [d_out, d_in] and C [d_in, d_in]."""
    import torch

    c = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)  # as PEFT
    u, s, vh = torch.linalg.svd(w @ c, full_matrices=False)
    a = torch.linalg.solve(c, vh[-r:].mT).mT
    return u[:, -r:] * s[-r:].sqrt(), s[-r:, None].sqrt() * a


def lora_null(w: Any, c: Any, r: int) -> tuple[Any, Any]:
    """B [d_out, r], A [r, d_in] from W [d_out, d_in] and C [d_in, d_in]."""
    import torch

    null = torch.linalg.eigh(c).eigenvectors[:, :r]  # of the smallest eigenvalues
    u, s, vh = torch.linalg.svd(w @ null, full_matrices=False)
    return u * s.sqrt(), s[:, None].sqrt() * (vh @ null.mT)


def start(trainer: Any, settings: Any, texts: Iterable[Mapping[str, Any]]) -> None:
    """Initialize A and B, and subtract that start again in each layer until the end of training."""
    from peft.utils.integrations import dequantize_module_weight

    from grit.preserve import input_moments

    part, moments = {"corda": corda, "lora_null": lora_null}[settings.start], input_moments(trainer.model, texts)
    for pair, c in moments:
        w = dequantize_module_weight(pair.layer.get_base_layer()).detach().double()
        if min(w.shape) < pair.rank:
            raise TrainingError(f"train.rank: expected at most {min(w.shape)}, as wide as {pair.name}, got {pair.rank}")
        b, a = part(w, c.double(), pair.rank)
        pair.a.data.copy_(a / pair.scale**0.5)
        pair.b.data.copy_(b / pair.scale**0.5)
    fold_in_start(trainer, [pair for pair, _ in moments])


ARM = Arm(name="residual_lora", title="Residual LoRA", settings=ResidualSettings, start=start)
