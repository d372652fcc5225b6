"""Methods of LoRA that no package has, as arms of benchmarks/frontier.py."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from grit.layers import find_pairs
from trainers.arms import baseline_lora


def spectral_start(model: Any, batch: Mapping[str, Any], gamma: float = 128.0) -> None:
    """LoRA-One (Zhang, Liu, Chen: ICML 2025, arXiv 2502.01235): B·A starts along −∇W of one batch, nothing off W.

    B₀ = k U √(S/S₁), A₀ = k √(S/S₁) Vᵀ of the SVD of −∇W, k² = √d_out/γ: the authors' scale and γ.
    """
    import torch

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
