"""Runs in which nothing is wrong: what preconditions is effective, and plain AdamW equals its shadow."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks._arrangements import IN_TRAINER, accelerated, adamw, grit_with, of_four, placed, plain, sgd, wrapped
from benchmarks._runners import Arrange, Setting, Setup, hf_trainer, plain_loop
from benchmarks._tiny_llama import fuse, weights_of
from grit import GRITConfig, GRITManager, GritTrainer
from probes import Verdict, grit_readings


@dataclass(frozen=True)
class Clean:
    """One run without a fault.

    Attributes:
        name: Unique.
        run: Trains and judges.
        expected: `effective` (diagnosis none), or `no_effect` (diagnosis equals_shadow).
    """

    name: str
    run: Callable[[], Verdict]
    expected: str = "effective"


def grit_trainer(model: Any, setting: Setting, **settings: Any) -> Setup:
    """GritTrainer."""
    manager = GRITManager(model, GRITConfig(**settings))
    return Setup(None, {"readings": grit_readings(manager)}, trainer=partial(GritTrainer, grit_manager=manager))


def riemannian(model: Any, setting: Setting) -> Setup:
    """PEFT's Riemannian preconditioner."""
    from peft.optimizers import create_riemannian_optimizer

    return Setup(create_riemannian_optimizer(model, torch.optim.AdamW, lr=setting.lr))


def riemannian_claiming(model: Any, setting: Setting) -> Setup:
    """The same, said to precondition."""
    return Setup(riemannian(model, setting).optimizer, {"claims": True})


def loraplus(model: Any, setting: Setting) -> Setup:
    """LoRA+: another learning rate for B."""
    from peft.optimizers import create_loraplus_optimizer

    return Setup(create_loraplus_optimizer(model, torch.optim.AdamW, lr=setting.lr, loraplus_lr_ratio=8.0))


def with_momentum(model: Any, setting: Setting) -> Setup:
    """SGD with momentum."""
    return Setup(sgd(model, setting, momentum=0.9))


class Shampoo(torch.optim.Optimizer):
    """L^(−1/4) G R^(−1/4) with running sums L = Σ G Gᵀ, R = Σ Gᵀ G (Gupta et al. 2018), the raw norm restored."""

    def __init__(self, parameters: list[nn.Parameter], lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or not bool(p.grad.any()):
                    continue
                state, g = self.state[p], p.grad
                state["left"] = state.get("left", 0) + g @ g.mT
                state["right"] = state.get("right", 0) + g.mT @ g
                natural = self._root(state["left"]) @ g @ self._root(state["right"])
                p.sub_(natural * (group["lr"] * math.sqrt(p.numel()) / natural.norm()))

    @staticmethod
    def _root(matrix: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        damped = values.clamp_min(0) + 1e-4 * values.mean()
        return vectors @ torch.diag(damped**-0.25) @ vectors.mT


def shampoo(model: Any, setting: Setting, claims: bool = False) -> Setup:
    """Shampoo."""
    return Setup(Shampoo(weights_of(model), setting.lr), {"claims": claims})


def _decay(step: int) -> float:
    return min(1.0, (step + 1) / 5) * (1 - step / 60)


A, B, C, D = Setting(), Setting(seed=1), Setting(seed=2, lr=3e-3), Setting(seed=3, lr=2e-2)


def _loop(arrange: Arrange, setting: Setting = A, **loop: Any) -> Callable[[], Verdict]:
    return partial(plain_loop, arrange, setting, **loop)


def _trainer(arrange: Arrange, setting: Setting = A, **training: Any) -> Callable[[], Verdict]:
    return partial(hf_trainer, arrange, setting, **training)


def _grit(setting: Setting = A, accumulation: int = 1, **config: Any) -> Callable[[], Verdict]:
    return _loop(grit_with(GRITConfig(**config)), setting, accumulation=accumulation)


notebook, notebook_in_trainer = placed(), placed(places=IN_TRAINER)

SHRINKING: dict[str, Any] = {
    "reprojection_freq": 10,
    "rank_shrink": "events",
    "min_lora_rank": 2,
    "rank_adaptation_threshold": 0.9,
}
CHECKPOINTING: dict[str, Any] = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}

CLEAN = [
    *(
        Clean(f"NotebookKFAC, seed {s.seed}, rate {s.lr:g}", _loop(notebook, s))
        for s in (A, B, C, D, Setting(4, 1e-3), Setting(5, 5e-3))
    ),
    Clean("NotebookKFAC, accumulation 4", _loop(placed(of_four()), accumulation=4)),
    Clean("NotebookKFAC, checkpointing", _loop(notebook, checkpointing=True)),
    Clean("NotebookKFAC, clipped before", _loop(notebook, B, clip=0.5)),
    Clean("NotebookKFAC, clipped after", _loop(placed(clip=1.0), C)),
    Clean("NotebookKFAC, schedule", _loop(notebook, schedule=_decay)),
    Clean("NotebookKFAC, wrapper", _loop(wrapped)),
    Clean("NotebookKFAC, wrapper, in a Trainer", _trainer(wrapped, B)),
    Clean("NotebookKFAC, SGD, clipped", _loop(placed(optimizer=partial(sgd, factor=1.0, momentum=0.9), clip=1.0))),
    Clean("NotebookKFAC, bf16 weights", _loop(notebook, dtype=torch.bfloat16)),
    Clean("NotebookKFAC, in a Trainer", _trainer(notebook_in_trainer)),
    Clean("NotebookKFAC, in a Trainer, other seed and rate", _trainer(notebook_in_trainer, C)),
    Clean("NotebookKFAC, in a Trainer, accumulation 4", _trainer(placed(of_four(), IN_TRAINER), accumulation=4)),
    Clean("NotebookKFAC, in a Trainer, checkpointing", _trainer(notebook_in_trainer, **CHECKPOINTING)),
    Clean("NotebookKFAC, in a Trainer, no clipping", _trainer(notebook_in_trainer, B, clip=0.0)),
    Clean("GRIT eigen_adamw, power 0", _grit(eigen_power=0.0)),
    Clean("GRIT eigen_adamw, power 1", _grit(eigen_power=1.0)),
    Clean("GRIT eigen_adamw, power 1, seed 1", _grit(B)),
    Clean("GRIT eigen_adamw, capture gradients", _grit(C, capture="gradients")),
    Clean("GRIT adamw", _grit(mode="adamw")),
    Clean("GRIT adamw, capture hooks", _grit(D, mode="adamw", capture="hooks")),
    Clean("GRIT adamw, capture gradients", _grit(B, mode="adamw", capture="gradients")),
    Clean(
        "GRIT adamw, fused layers, capture auto",
        _loop(grit_with(GRITConfig(mode="adamw", capture="auto"), prepare=fuse)),
    ),
    Clean("GRIT sgd", _grit(mode="sgd")),
    Clean("GRIT sgd, capture gradients", _grit(B, mode="sgd", capture="gradients")),
    Clean("GRIT adamw, paper pairing", _grit(mode="adamw", pairing="paper")),
    Clean("GRIT, lr_ratio_b 8", _grit(C, lr_ratio_b=8.0)),
    Clean("GRIT, ranks shrink during training", _grit(**SHRINKING)),
    Clean("GRIT adamw, ranks shrink during training", _grit(mode="adamw", **SHRINKING)),
    Clean("GRIT, reprojection", _grit(reprojection_freq=10, reprojection_k=3, min_lora_rank=2)),
    Clean("GRIT, warm-up of 12 steps", _grit(ng_warmup_steps=12)),
    Clean("GRIT adamw, warm-up of 12 steps", _grit(mode="adamw", ng_warmup_steps=12)),
    Clean("GRIT, accumulation 4", _grit(accumulation=4, mode="adamw")),
    Clean("GRIT, clipped", _grit(max_grad_norm=0.5)),
    Clean("GRIT, regularisers", _grit(mode="adamw", lambda_kfac=1e-4, lambda_reproj=1e-4)),
    Clean("GritTrainer, eigen_adamw", _trainer(grit_trainer)),
    Clean("GritTrainer, adaptive schedule", _trainer(partial(grit_trainer, adaptive_schedule=True, adaptive_window=5))),
    Clean("GritTrainer, adamw, accumulation 4", _trainer(partial(grit_trainer, mode="adamw"), B, accumulation=4)),
    Clean("GritTrainer, checkpointing", _trainer(grit_trainer, **CHECKPOINTING)),
    Clean("PEFT's Riemannian optimizer", _loop(riemannian, C)),
    Clean("PEFT's Riemannian optimizer, claiming", _loop(riemannian_claiming, Setting(1, 1e-3))),
    Clean("PEFT's LoRA+", _loop(loraplus, C)),
    Clean("SGD with momentum", _loop(with_momentum)),
    Clean("SGD with momentum, in a Trainer", _trainer(with_momentum, B)),
    Clean("Shampoo", _loop(shampoo)),
    Clean("Shampoo, claiming", _loop(partial(shampoo, claims=True), B)),
    Clean("Adagrad", _loop(lambda model, setting: Setup(torch.optim.Adagrad(weights_of(model), lr=setting.lr)))),
    *(Clean(f"AdamW, seed {s.seed}, rate {s.lr:g}", _loop(plain, s), "no_effect") for s in (A, B, C, D)),
    Clean("AdamW, clipped", _loop(plain, clip=0.1), "no_effect"),
    Clean("AdamW, accumulation 4", _loop(plain, accumulation=4), "no_effect"),
    Clean("AdamW, weight decay", _loop(partial(plain, weight_decay=0.1)), "no_effect"),
    Clean("AdamW, schedule", _loop(plain, schedule=_decay), "no_effect"),
    Clean("AdamW, bf16 weights", _loop(plain, dtype=torch.bfloat16), "no_effect"),
    Clean("AdamW, bf16 weights, fused", _loop(partial(plain, fused=True), dtype=torch.bfloat16), "no_effect"),
    Clean("AdamW, checkpointing", _loop(plain, checkpointing=True), "no_effect"),
    Clean("AdamW, other betas", _loop(partial(plain, betas=(0.8, 0.95), eps=1e-6)), "no_effect"),
    Clean("AdamW, DoRA", _loop(plain, use_dora=True), "no_effect"),
    Clean("AdamW, by accelerate", _loop(lambda model, setting: Setup(accelerated(adamw(model, setting)))), "no_effect"),
    Clean("AdamW, the Trainer's own", _trainer(lambda model, setting: Setup(None)), "no_effect"),
    Clean("AdamW, in a Trainer, accumulation 4", _trainer(plain, B, accumulation=4, clip=0.1), "no_effect"),
    Clean("AdamW, in a Trainer, cosine", _trainer(plain, lr_scheduler_type="cosine", warmup_steps=5), "no_effect"),
]
