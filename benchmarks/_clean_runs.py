"""Runs in which nothing is wrong: what preconditions is effective, and plain AdamW equals its shadow."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks._notebook import NotebookKFAC, Setting, Setup, Wrapper, at, fuse, hf_trainer, plain_loop, weights_of
from grit import GRITConfig, GRITManager, GritOptimizer, GritTrainer
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


def adamw(model: Any, setting: Setting, **options: Any) -> torch.optim.AdamW:
    """The rival."""
    return torch.optim.AdamW(weights_of(model), lr=setting.lr, **{"weight_decay": 0.0, **options})


def plain(model: Any, setting: Setting, **options: Any) -> Setup:
    """AdamW alone."""
    return Setup(adamw(model, setting, **options))


def notebook(model: Any, setting: Setting, accumulation: int = 1) -> Setup:
    """NotebookKFAC where it belongs in a loop."""
    kfac = NotebookKFAC(model, accumulation)
    return Setup(adamw(model, setting), kfac.watch(), before_step=lambda batch: kfac.apply())


def notebook_clipped_after(model: Any, setting: Setting) -> Setup:
    """Clipped after preconditioning."""
    kfac = NotebookKFAC(model)

    def before(batch: Any) -> None:
        kfac.apply()
        torch.nn.utils.clip_grad_norm_(weights_of(model), 1.0)

    return Setup(adamw(model, setting), kfac.watch(), before_step=before)


def notebook_wrapper(model: Any, setting: Setting) -> Setup:
    """NotebookKFAC inside the optimizer's step."""
    kfac = NotebookKFAC(model)
    return Setup(Wrapper(adamw(model, setting), kfac), kfac.watch())


def notebook_sgd(model: Any, setting: Setting) -> Setup:
    """NotebookKFAC before SGD."""
    kfac = NotebookKFAC(model)
    optimizer = torch.optim.SGD(weights_of(model), lr=setting.lr / 10, momentum=0.9)
    return Setup(optimizer, kfac.watch(), before_step=lambda batch: kfac.apply())


def notebook_callback(model: Any, setting: Setting, accumulation: int = 1) -> Setup:
    """NotebookKFAC where it belongs in a Trainer."""
    kfac = NotebookKFAC(model, accumulation)
    return Setup(adamw(model, setting), kfac.watch(), callbacks=[at("on_pre_optimizer_step", kfac.apply)])


def grit(model: Any, setting: Setting, max_grad_norm: float = 0.0, **settings: Any) -> Setup:
    """GritOptimizer in a loop."""
    config = GRITConfig(**settings)
    manager = GRITManager(model, config)
    if config.mode == "sgd":
        inner: torch.optim.Optimizer = torch.optim.SGD(weights_of(model), lr=10 * setting.lr, momentum=0.9)
    else:
        inner = adamw(model, setting)
    optimizer = GritOptimizer(inner, manager, max_grad_norm=max_grad_norm)
    return Setup(optimizer, {"readings": grit_readings(manager)}, close=lambda: manager.close(False))


def grit_on_fused_layers(model: Any, setting: Setting) -> Setup:
    """Hooks stay silent, so that GRIT takes statistics of gradients."""
    fuse(model)
    return grit(model, setting, mode="adamw", capture="auto")


def grit_trainer(model: Any, setting: Setting, **settings: Any) -> Setup:
    """GritTrainer."""
    manager = GRITManager(model, GRITConfig(**settings))
    return Setup(
        None,
        {"readings": grit_readings(manager)},
        trainer=partial(GritTrainer, grit_manager=manager),
    )


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


def sgd(model: Any, setting: Setting) -> Setup:
    """SGD with momentum."""
    return Setup(torch.optim.SGD(weights_of(model), lr=10 * setting.lr, momentum=0.9))


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


def accelerated(model: Any, setting: Setting) -> Setup:
    """AdamW as accelerate hands it back."""
    from accelerate import Accelerator

    return Setup(Accelerator(cpu=True).prepare(adamw(model, setting)))


def _decay(step: int) -> float:
    return min(1.0, (step + 1) / 5) * (1 - step / 60)


A, B, C, D = Setting(), Setting(seed=1), Setting(seed=2, lr=3e-3), Setting(seed=3, lr=2e-2)


def _loop(arrange: Any, setting: Setting = A, **loop: Any) -> Callable[[], Verdict]:
    return partial(plain_loop, arrange, setting, **loop)


def _trainer(arrange: Any, setting: Setting = A, **training: Any) -> Callable[[], Verdict]:
    return partial(hf_trainer, arrange, setting, **training)


CHECKPOINTING: dict[str, Any] = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}

CLEAN = [
    *(
        Clean(f"NotebookKFAC, seed {s.seed}, rate {s.lr:g}", _loop(notebook, s))
        for s in (A, B, C, D, Setting(4, 1e-3), Setting(5, 5e-3))
    ),
    Clean("NotebookKFAC, accumulation 4", _loop(partial(notebook, accumulation=4), accumulation=4)),
    Clean("NotebookKFAC, checkpointing", _loop(notebook, checkpointing=True)),
    Clean("NotebookKFAC, clipped before", _loop(notebook, B, clip=0.5)),
    Clean("NotebookKFAC, clipped after", _loop(notebook_clipped_after, C)),
    Clean("NotebookKFAC, schedule", _loop(notebook, schedule=_decay)),
    Clean("NotebookKFAC, wrapper", _loop(notebook_wrapper)),
    Clean("NotebookKFAC, wrapper, in a Trainer", _trainer(notebook_wrapper, B)),
    Clean("NotebookKFAC, SGD", _loop(notebook_sgd)),
    Clean("NotebookKFAC, bf16 weights", _loop(notebook, dtype=torch.bfloat16)),
    Clean("NotebookKFAC, in a Trainer", _trainer(notebook_callback)),
    Clean("NotebookKFAC, in a Trainer, other seed and rate", _trainer(notebook_callback, C)),
    Clean(
        "NotebookKFAC, in a Trainer, accumulation 4",
        _trainer(partial(notebook_callback, accumulation=4), accumulation=4),
    ),
    Clean("NotebookKFAC, in a Trainer, checkpointing", _trainer(notebook_callback, **CHECKPOINTING)),
    Clean("NotebookKFAC, in a Trainer, no clipping", _trainer(notebook_callback, B, clip=0.0)),
    Clean("GRIT eigen_adamw, power 0", _loop(partial(grit, eigen_power=0.0))),
    Clean("GRIT eigen_adamw, power 1", _loop(partial(grit, eigen_power=1.0))),
    Clean("GRIT eigen_adamw, power 1, seed 1", _loop(grit, B)),
    Clean("GRIT eigen_adamw, capture gradients", _loop(partial(grit, capture="gradients"), C)),
    Clean("GRIT adamw", _loop(partial(grit, mode="adamw"))),
    Clean("GRIT adamw, capture hooks", _loop(partial(grit, mode="adamw", capture="hooks"), D)),
    Clean("GRIT adamw, capture gradients", _loop(partial(grit, mode="adamw", capture="gradients"), B)),
    Clean("GRIT adamw, fused layers, capture auto", _loop(grit_on_fused_layers)),
    Clean("GRIT sgd", _loop(partial(grit, mode="sgd"))),
    Clean("GRIT sgd, capture gradients", _loop(partial(grit, mode="sgd", capture="gradients"), B)),
    Clean("GRIT adamw, paper pairing", _loop(partial(grit, mode="adamw", pairing="paper"))),
    Clean("GRIT, lr_ratio_b 8", _loop(partial(grit, lr_ratio_b=8.0), C)),
    Clean(
        "GRIT, ranks shrink during training",
        _loop(
            partial(grit, reprojection_freq=10, rank_shrink="events", min_lora_rank=2, rank_adaptation_threshold=0.9)
        ),
    ),
    Clean(
        "GRIT adamw, ranks shrink during training",
        _loop(
            partial(
                grit,
                mode="adamw",
                reprojection_freq=10,
                rank_shrink="events",
                min_lora_rank=2,
                rank_adaptation_threshold=0.9,
            )
        ),
    ),
    Clean("GRIT, reprojection", _loop(partial(grit, reprojection_freq=10, reprojection_k=3, min_lora_rank=2))),
    Clean("GRIT, warm-up of 12 steps", _loop(partial(grit, ng_warmup_steps=12))),
    Clean("GRIT adamw, warm-up of 12 steps", _loop(partial(grit, mode="adamw", ng_warmup_steps=12))),
    Clean("GRIT, accumulation 4", _loop(partial(grit, mode="adamw"), accumulation=4)),
    Clean("GRIT, clipped", _loop(partial(grit, max_grad_norm=0.5))),
    Clean("GRIT, regularisers", _loop(partial(grit, mode="adamw", lambda_kfac=1e-4, lambda_reproj=1e-4))),
    Clean("GritTrainer, eigen_adamw", _trainer(grit_trainer)),
    Clean("GritTrainer, adaptive schedule", _trainer(partial(grit_trainer, adaptive_schedule=True, adaptive_window=5))),
    Clean("GritTrainer, adamw, accumulation 4", _trainer(partial(grit_trainer, mode="adamw"), B, accumulation=4)),
    Clean("GritTrainer, checkpointing", _trainer(grit_trainer, **CHECKPOINTING)),
    Clean("PEFT's Riemannian optimizer", _loop(riemannian, C)),
    Clean("PEFT's Riemannian optimizer, claiming", _loop(riemannian_claiming, Setting(1, 1e-3))),
    Clean("PEFT's LoRA+", _loop(loraplus, C)),
    Clean("SGD with momentum", _loop(sgd)),
    Clean("SGD with momentum, in a Trainer", _trainer(sgd, B)),
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
    Clean("AdamW, by accelerate", _loop(accelerated), "no_effect"),
    Clean("AdamW, the Trainer's own", _trainer(lambda model, setting: Setup(None)), "no_effect"),
    Clean("AdamW, in a Trainer, accumulation 4", _trainer(plain, B, accumulation=4, clip=0.1), "no_effect"),
    Clean("AdamW, in a Trainer, cosine", _trainer(plain, lr_scheduler_type="cosine", warmup_steps=5), "no_effect"),
]
