"""What plain AdamW would have done with the same raw gradients: own moments, the real weights and learning rate."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw


class Shadow:
    """AdamW (Loshchilov & Hutter 2019) that never touches a weight.

    Its gradients are the raw ones, clipped as plain training would clip them. It has one learning rate for all
    tensors, the lowest of the optimizer's groups: a rate of its own for B (LoRA+) is part of what is examined. It
    rounds as torch's AdamW does, with moments in the weights' own dtype: in bfloat16 another order of roundings
    alone turns an update by degrees.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.m = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self.v = [torch.zeros_like(m) for m in self.m]
        self.steps = [0] * len(parameters)

    def update(
        self,
        gradients: Sequence[Tensor | None],
        options: dict[str, Any],
        weights: Sequence[Tensor],
        factor: float = 1.0,
    ) -> list[Tensor]:
        """Take one step's gradients, times `factor`, into the moments; none of them: a step that is left out.

        `weights` are those before the step. Returns Δθ of each parameter in float32; zeros where there is no gradient.
        """
        changes = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
        used = {i: g.to(self.m[i].dtype) for i, g in enumerate(gradients) if g is not None}
        if factor != 1.0:
            used = {i: g * factor for i, g in used.items()}
        after = {i: weights[i].clone() for i in used}
        alike: dict[tuple[Any, ...], list[int]] = {}
        for i in used:
            alike.setdefault(options["each"][i], []).append(i)
        for (betas, eps, weight_decay, fused, foreach), chosen in alike.items():
            adamw(
                [after[i] for i in chosen],
                [used[i] for i in chosen],
                [self.m[i] for i in chosen],
                [self.v[i] for i in chosen],
                [],
                # Counted up inside; fused kernels want it beside the weights.
                [torch.tensor(float(self.steps[i]), device=self.m[i].device if fused else None) for i in chosen],
                fused=fused,
                foreach=foreach,
                amsgrad=False,
                beta1=betas[0],
                beta2=betas[1],
                lr=options["lr"],
                weight_decay=weight_decay,
                eps=eps,
                maximize=False,
            )
        for i, moved in after.items():
            self.steps[i] += 1
            changes[i] = moved.float() - weights[i].float()
        return changes

    def take(self, i: int, other: "Shadow", j: int) -> None:
        self.m[i], self.v[i], self.steps[i] = other.m[j], other.v[j], other.steps[j]

    def state_dict(self) -> dict[str, Tensor]:
        moments = {f"{name}.{i}": t for name in ("m", "v") for i, t in enumerate(getattr(self, name))}
        return {**moments, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        steps = state["steps"].tolist()
        fits = len(steps) == len(self.m) and all(state[f"m.{i}"].shape == m.shape for i, m in enumerate(self.m))
        if not fits:
            raise ValueError(f"expected the shadow's moments of the same {len(self.m)} tensors, got others")
        for name in ("m", "v"):
            for i, mine in enumerate(getattr(self, name)):
                mine.copy_(state[f"{name}.{i}"])
        self.steps = steps


def clipping(gradients: Sequence[Tensor | None], max_norm: float) -> float:
    """What `torch.nn.utils.clip_grad_norm_` would multiply the gradients by, with its roundings; `max_norm` 0: 1."""
    known = [g for g in gradients if g is not None]
    if max_norm <= 0 or not known:
        return 1.0
    factor = float(torch.clamp(max_norm / (torch.nn.utils.get_total_norm(known) + 1e-6), max=1.0))
    return factor if math.isfinite(factor) else 1.0


def shadow_options(optimizer: Any, parameters: list[nn.Parameter]) -> dict[str, Any]:
    """What plain AdamW would step with here; torch's defaults where the optimizer has none, or none that are numbers.

    `rates` of the parameters, None where no group has one; `lr`, the lowest that is not zero, for all tensors; `each`:
    (betas, eps, weight_decay, fused, foreach) of every parameter, from its own group; `eps` and `adam`: the largest ε,
    and whether a group has betas of its own.
    """
    every = list(getattr(optimizer, "param_groups", ()))
    group_of = {id(p): group for group in every for p in group["params"]}
    groups = [group_of.get(id(p), every[0] if every else {}) for p in parameters]
    # A rate that is no number is the optimizer's own business (Adafactor's); the direction does not hang on it.
    rates = [_number(group.get("lr"), 1e-3) for group in groups]
    return {
        "rates": [rate if not every or id(p) in group_of else None for rate, p in zip(rates, parameters, strict=True)],
        "lr": min((rate for rate in rates if rate > 0), default=0.0),
        "each": [_own(group, p.dtype) for group, p in zip(groups, parameters, strict=True)],
        "eps": max((_number(group.get("eps"), 1e-8) for group in groups), default=1e-8),
        "adam": any("betas" in group or "beta1" in group for group in groups),
    }


def _number(value: Any, default: float) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else default


def _own(group: dict[str, Any], dtype: torch.dtype) -> tuple[Any, ...]:
    betas = group.get("betas") or (group.get("beta1"), group.get("beta2"))
    betas = tuple(betas[:2]) if isinstance(betas, tuple | list) and len(betas) >= 2 else ()
    first, second = (_number(b, d) for b, d in zip(betas or (None, None), (0.9, 0.999), strict=True))
    # The fused kernel is many times faster; in float32 its roundings turn an update by 1e-5°, in 16 bit by degrees.
    exact = dtype in (torch.float32, torch.float64)
    return (
        (first if 0 <= first < 1 else 0.9, second if 0 <= second < 1 else 0.999),
        _number(group.get("eps"), 1e-8),
        _number(group.get("weight_decay"), 0.0),
        True if exact else group.get("fused"),
        False if exact else group.get("foreach"),
    )
