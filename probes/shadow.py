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
        gradients: list[Tensor | None],
        options: dict[str, Any],
        max_grad_norm: float,
        weights: Sequence[Tensor] = (),
        total: float | None = None,
    ) -> list[Tensor]:
        """Take one step's gradients (None where there is none) into the moments; a step that is not finite is left out.

        `weights` are those before the step; without them the change is not asked for. `total` is the gradients' norm,
        if it is known. Returns Δθ of each parameter in float32; zeros where there is no gradient or no weight.
        """
        changes = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
        known = [i for i, g in enumerate(gradients) if g is not None]
        used = [g for g in gradients if g is not None]
        if not used:
            return changes
        total = float(torch.nn.utils.get_total_norm(used)) if total is None else total
        if not math.isfinite(total):
            return changes
        exact = all(g.dtype in (torch.float32, torch.float64) for g in used)
        if exact and 0 < max_grad_norm < total + 1e-6:  # as torch.nn.utils.clip_grad_norm_
            used = [g * (max_grad_norm / (total + 1e-6)) for g in used]
        elif not exact and max_grad_norm > 0:  # in 16 bit with the very roundings of torch
            factor = torch.clamp(max_grad_norm / (torch.nn.utils.get_total_norm(used) + 1e-6), max=1.0)
            used = [g * factor.to(g.device) for g in used]
        if exact and not weights and all(own[3] is True for own in options["each"]):
            self._moments_only(known, used, options["each"])
            return changes
        after = [weights[i].clone() if weights else torch.zeros_like(self.m[i]) for i in known]
        alike: dict[tuple[Any, ...], list[int]] = {}
        for place, i in enumerate(known):
            alike.setdefault(options["each"][i], []).append(place)
        for (betas, eps, weight_decay, fused, foreach), places in alike.items():
            chosen = [known[place] for place in places]
            adamw(
                [after[place] for place in places],
                [used[place] for place in places],
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
        for i, moved in zip(known, after, strict=True):
            self.steps[i] += 1
            if weights:
                changes[i] = moved.float() - weights[i].float()
        return changes

    def _moments_only(self, known: list[int], gradients: list[Tensor], each: list[tuple[Any, ...]]) -> None:
        """Between samples: nobody asks for the step."""
        for betas in {each[i][0] for i in known}:
            places = [place for place, i in enumerate(known) if each[i][0] == betas]
            m, v = [self.m[known[p]] for p in places], [self.v[known[p]] for p in places]
            g = [gradients[p].to(self.m[known[p]].dtype) for p in places]
            torch._foreach_lerp_(m, g, 1 - betas[0])
            torch._foreach_mul_(v, betas[1])
            torch._foreach_addcmul_(v, g, g, 1 - betas[1])
        for i in known:
            self.steps[i] += 1

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


def shadow_options(optimizer: Any, parameters: list[nn.Parameter]) -> dict[str, Any]:
    """What plain AdamW would step with here; torch's defaults where the optimizer has none.

    `lr`, the lowest that is not zero, for all tensors; `each`: (betas, eps, weight_decay, fused, foreach) of every
    parameter, from its own group; `eps` and `adam`: the largest ε, and whether a group has betas of its own.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    groups = [group_of.get(id(p), optimizer.param_groups[0]) for p in parameters]
    rates = [float(group["lr"]) for group in groups]
    return {
        "lr": min((rate for rate in rates if rate > 0), default=0.0),
        "each": [_own(group, p.dtype) for group, p in zip(groups, parameters, strict=True)],
        "eps": max(float(group.get("eps", 1e-8)) for group in groups),
        "adam": any("betas" in group for group in groups),
    }


def _own(group: dict[str, Any], dtype: torch.dtype) -> tuple[Any, ...]:
    betas = group.get("betas", (0.9, 0.999))
    # The fused kernel is many times faster; in float32 its roundings turn an update by 1e-5°, in 16 bit by degrees.
    exact = dtype in (torch.float32, torch.float64)
    return (
        (float(betas[0]), float(betas[1])),
        float(group.get("eps", 1e-8)),
        float(group.get("weight_decay", 0.0)),
        True if exact else group.get("fused"),
        False if exact else group.get("foreach"),
    )
