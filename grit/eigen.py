"""AdamW whose moments live in the eigenbases of the factors (the idea of SOAP, Vyas et al. 2024, in rank space)."""

import torch
from torch import Tensor

from grit.state import GroupState


def adamw_direction(
    m: Tensor, v: Tensor, gradient: Tensor, steps: Tensor, betas: tuple[float, float], eps: float
) -> Tensor:
    """Adam's bias-corrected direction m̂/(√v̂ + ε) (Kingma & Ba 2015); m and v are updated in place.

    Computed as (√(1−β₂ᵗ)/(1−β₁ᵗ)) · m/(√v + ε·√(1−β₂ᵗ)), which is the same with fewer passes over memory.

    Args:
        m: First moments [n, …].
        v: Second moments [n, …].
        gradient: [n, …].
        steps: [n], counted from 1, on the CPU.
        betas: β₁, β₂.
        eps: ε.
    """
    m.lerp_(gradient, 1.0 - betas[0])
    v.mul_(betas[1]).addcmul_(gradient, gradient, value=1.0 - betas[1])
    if bool((steps == steps[0]).all()):  # the common case needs no tensor for the corrections
        t = int(steps[0])
        root = (1.0 - betas[1] ** t) ** 0.5
        return v.sqrt().add_(eps * root).reciprocal_().mul_(m).mul_(root / (1.0 - betas[0] ** t))
    shape = (-1, *[1] * (m.dim() - 1))
    count = steps.to(m.device, m.dtype).view(shape)
    return (m / (1.0 - betas[0] ** count)).div_(v.sqrt().div_((1.0 - betas[1] ** count).sqrt()).add_(eps))


def eigen_adamw_step(
    state: GroupState, options_a: dict[str, float], options_b: dict[str, float], among: Tensor | None = None
) -> None:
    """One step of a group: rotate ∇A by Q_gᵀ and ∇B by Q_a, let Adam step there, rotate back, apply.

    Layers without a gradient are left alone, moments included.

    Args:
        state: Of the group.
        options_a: lr, beta1, beta2, eps, weight_decay for A.
        options_b: The same for B.
        among: The layers that these options are for, [n] bool on the CPU; None: all.
    """
    group = state.group
    has = group.has_gradients() if among is None else group.has_gradients() & among
    everyone = bool(has.all())
    index = torch.arange(len(group)) if everyone else has.nonzero().flatten()
    if not index.numel():
        return
    state.t["steps"][index] += 1
    steps = state["steps"][index]
    for side, options in (("a", options_a), ("b", options_b)):
        gradient = group.gradients(side)
        basis = state["q_g"] if side == "a" else state["q_a"]
        m, v = state[f"m_{side}"], state[f"v_{side}"]
        if not everyone:
            picked = index.to(gradient.device)
            gradient, basis, m, v = gradient[picked], basis[picked], m[picked], v[picked]
        rotated = basis.mT @ gradient if side == "a" else gradient @ basis
        betas = (options["beta1"], options["beta2"])
        direction = adamw_direction(m, v, rotated, steps, betas, options["eps"])
        weight = state["w_g"] if side == "a" else state["w_a"]
        back = basis * (weight if everyone else weight[picked])[:, None, :]
        change = back @ direction if side == "a" else direction @ back.mT
        if not everyone:
            state.t[f"m_{side}"][picked], state.t[f"v_{side}"][picked] = m, v
        parameters = group.params_a if side == "a" else group.params_b
        chosen = parameters if everyone else [parameters[int(i)] for i in index]
        _apply(chosen, change, options["lr"], options["weight_decay"])


def _apply(parameters: list[torch.nn.Parameter], change: Tensor, lr: float, weight_decay: float) -> None:
    tensors = [p.data for p in parameters]
    if weight_decay:
        torch._foreach_mul_(tensors, 1.0 - lr * weight_decay)  # decoupled (Loshchilov & Hutter 2019)
    parts = list(change.to(tensors[0].dtype).unbind(0))
    torch._foreach_add_(tensors, parts, alpha=-lr)
