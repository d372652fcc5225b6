"""What plain AdamW would have done with the same raw gradients, with its own moments and the real learning rate."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from probes.geometry import Layout, Matrices, difference

StepRule = Callable[[Tensor, Tensor, Tensor, int, tuple[float, float], float], Tensor]
"""(gradient, m, v [n, rows, columns], step count from 1, betas, ε) → the direction to step against, [n, rows, columns].

A rule is hashable, and changes both moments in place.
"""


class Shadow:
    """AdamW (Loshchilov & Hutter 2019) that never touches a weight.

    Its gradients are the raw ones, clipped as plain training would clip them. It has one learning rate for all
    tensors, the lowest of the optimizer's groups: a separate rate for B (LoRA+) is part of what is examined. It
    rounds as torch's AdamW does, with moments in the weights' own dtype: in bfloat16 a different order of roundings
    alone turns an update by degrees. If the optimizer declares a step rule for a weight (`step_rules_of`), the shadow
    follows it, so that only what happens to the gradient before the rule counts as preconditioning.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.layout = Layout(parameters)
        self._m, self._v = self.layout.zeros(), self.layout.zeros()
        self.m, self.v = self.layout.views(self._m), self.layout.views(self._v)
        self.steps = [0] * len(parameters)

    def update(
        self,
        gradients: Matrices,
        has_gradient: Sequence[bool],
        options: dict[str, Any],
        weights: Matrices,
        factor: float = 1.0,
    ) -> Matrices:
        """Add one step's gradients, times `factor`, to the moments of the tensors that have one.

        `weights` are those before the step. Returns Δθ in float32, zero where there is no gradient.
        """
        after = [w.clone() for w in weights]
        for place, rows in enumerate(self.layout.places):
            gradient = gradients[place] if factor == 1.0 else gradients[place] * factor
            alike: dict[tuple[Any, ...], list[int]] = {}
            for row, i in enumerate(rows):
                if has_gradient[i]:
                    alike.setdefault((*options["each"][i], self.steps[i]), []).append(row)
                    self.steps[i] += 1
            for (betas, eps, weight_decay, fused, foreach, rule, shape, steps), chosen in alike.items():
                matrices = after[place], gradient, self._m[place], self._v[place]
                if rule is not None:
                    exact = torch.promote_types(gradient.dtype, torch.float32)
                    theta, g, *moments = (x[chosen].to(exact).view(-1, *shape) for x in matrices)
                    # Where gradients are not finite there is no direction, and none must come out.
                    direction = rule(g.nan_to_num(0.0, 0.0, 0.0), moments[0], moments[1], steps + 1, betas, eps)
                    theta.mul_(1 - options["lr"] * weight_decay).sub_(direction, alpha=options["lr"])
                    for x, new in zip((after[place], *matrices[2:]), (theta, *moments), strict=True):
                        x[chosen] = new.flatten(1).to(x.dtype)
                    continue
                whole = len(chosen) == len(rows)
                weight, grad, m, v = ([x] if whole else [x[row] for row in chosen] for x in matrices)
                # Counted up inside; fused kernels need it on the device of the weights.
                counts = [torch.tensor(float(steps), device=gradient.device if fused else None) for _ in weight]
                adamw(
                    weight,
                    grad,
                    m,
                    v,
                    [],
                    counts,
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
        return difference(after, weights)

    def adopt(self, i: int, state: dict[str, Any]) -> bool:
        """Continue from an optimizer's state of a tensor; False if it is not Adam's."""
        for mine, theirs in ((self.m[i], state.get("exp_avg")), (self.v[i], state.get("exp_avg_sq"))):
            if not isinstance(theirs, Tensor) or theirs.shape != mine.shape:
                return False
            mine.copy_(theirs)
        self.steps[i] = int(state["step"])
        return True

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


def clipping(gradients: Sequence[Tensor], total: float, max_norm: float) -> float:
    """The factor by which `torch.nn.utils.clip_grad_norm_` scales such gradients; 1 if `max_norm` is 0."""
    if max_norm <= 0 or not gradients or not math.isfinite(total):
        return 1.0
    if any(g.element_size() < 4 for g in gradients):  # with the same roundings
        factor = float(torch.clamp(max_norm / (torch.nn.utils.get_total_norm(gradients) + 1e-6), max=1.0))
        return factor if math.isfinite(factor) else 1.0
    return min(1.0, max_norm / (total + 1e-6))


def shadow_options(optimizer: Any, parameters: list[nn.Parameter]) -> dict[str, Any]:
    """What plain AdamW would step with here; torch's defaults where the optimizer has none, or none that are numbers.

    `rates` of the parameters, None where no group has one; `lr`, the lowest that is not zero, for all tensors; `each`:
    (betas, eps, weight_decay, fused, foreach, step rule, shape) of every parameter; `eps` and `adam`: the largest ε,
    and whether a group has its own betas.
    """
    every = list(getattr(optimizer, "param_groups", ()))
    group_of = {id(p): place for place, group in enumerate(every) for p in group["params"]}
    places = [group_of.get(id(p), 0) for p in parameters]
    groups = every or [{}]
    # A rate that is not a number (Adafactor's) does not matter here: the direction does not depend on it.
    rates = [_number(group.get("lr"), 1e-3) for group in groups]
    rules = step_rules_of(optimizer, parameters)
    kinds = [(place, p.dtype, rule, p.shape) for place, p, rule in zip(places, parameters, rules, strict=True)]
    settings = {kind: (*_adam_settings(groups[kind[0]], kind[1]), *kind[2:]) for kind in {*kinds}}
    used = [groups[place] for place in {*places}]
    return {
        "rates": [
            rates[place] if not every or id(p) in group_of else None
            for place, p in zip(places, parameters, strict=True)
        ],
        "lr": min((rates[place] for place in {*places} if rates[place] > 0), default=0.0),
        "each": [settings[kind] for kind in kinds],
        "eps": max((_number(group.get("eps"), 1e-8) for group in used), default=1e-8),
        "adam": any("betas" in group or "beta1" in group for group in used),
    }


def step_rules_of(optimizer: Any, parameters: Sequence[nn.Parameter]) -> list[StepRule | None]:
    """What `optimizer.step_rules(parameters)` declares, through wrappers; None for each weight without a rule."""
    while optimizer is not None:
        if declare := getattr(optimizer, "step_rules", None):
            return list(declare(parameters))
        optimizer = getattr(optimizer, "optimizer", None)
    return [None] * len(parameters)


def _number(value: Any, default: float) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else default


def _adam_settings(group: dict[str, Any], dtype: torch.dtype) -> tuple[Any, ...]:
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
