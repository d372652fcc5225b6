"""LoRA methods without a package, as arms of benchmarks/frontier.py."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from grit import StepRule
from grit.layers import find_pairs
from trainers.arms import baseline_lora


def spectral_start(model: Any, batch: Mapping[str, Any], gamma: float = 128.0) -> None:
    """LoRA-One (Zhang, Liu, Chen: ICML 2025, arXiv 2502.01235): B·A starts along −∇W of one batch, nothing off W.

    B₀ = k U √(S/S₁), A₀ = k √(S/S₁) Vᵀ of the SVD of −∇W, k² = √d_out/γ: the authors' scale and γ.
    """
    pairs = find_pairs(model)
    weights = [pair.layer.get_base_layer().weight.requires_grad_() for pair in pairs]
    gradients = torch.autograd.grad(model(**batch).loss, weights)
    for pair, weight, gradient in zip(pairs, weights, gradients, strict=True):
        weight.requires_grad_(False)
        u, s, vh = torch.linalg.svd(-gradient, full_matrices=False)
        root = (s[: pair.rank] / s[0] * len(gradient) ** 0.5 / gamma).sqrt()
        pair.a.data.copy_(root[:, None] * vh[: pair.rank])
        pair.b.data.copy_(u[:, : pair.rank] * root)


def _trainer(settings: Any, **kwargs: Any) -> Any:
    trainer = baseline_lora.ARM.make_trainer(settings, **kwargs)
    items = [trainer.train_dataset[i] for i in range(settings.batch_size)]
    spectral_start(trainer.model, trainer.data_collator(items))
    return trainer


LORA_ONE = replace(baseline_lora.ARM, name="lora_one", title="LoRA-One", make_trainer=_trainer)


class AheadAdamW(torch.optim.Optimizer):
    """GRIT without its axes: AdamW with the step rule of mode eigen_adamw, in the weights' own coordinates."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, nesterov: bool = True, cautious: bool = True, orthogonal: bool = False,
    ):  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.rule = StepRule(nesterov, cautious, orthogonal)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                state["step"] += 1
                stacks = (x[None] for x in (p.grad, state["m"], state["v"]))
                direction = self.rule(*stacks, state["step"], group["betas"], group["eps"])[0]
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
