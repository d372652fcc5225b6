"""GRIT's default step, mode eigen_adamw: AdamW in the eigenbases of both factors of rank space.

For a stack of n LoRA layers of one shape, A [n, r, d_in] and B [n, d_out, r], with the statistics Σ_a and Σ_g
[n, r, r] that `grit.state` averages:

1. Every `kfac_update_freq` steps diagonalize Σ_g = Q_g diag(λ_g) Q_gᵀ and Σ_a = Q_a diag(λ_a) Q_aᵀ, and turn Adam's
   moments into the new bases (`refresh_bases`).
2. Rotate the gradients: Q_gᵀ ∇A and ∇B Q_a (`rotate_gradients`).
3. Take Adam's direction d there, looking one gradient ahead and without entries that oppose the gradient (`StepRule`).
4. Weight the eigen-directions and rotate back: Q_g diag(w_g) d_A and d_B diag(w_a) Q_aᵀ with
   w_i = (λ_i/mean λ + damping)^(−p/2), which for p = 1 is Adam's step in whitened coordinates (`Rotated.back`).
5. Make the change equally long along each of its r singular directions (`StepRule`).
6. θ ← θ − lr · (change + weight_decay · θ) (`step`).

Steps 1 to 3 are the idea of SOAP (Vyas et al. 2024), in rank space, where a basis costs r² numbers. With identity bases
and weights it is AdamW with the step rule alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from grit import factors
from grit.config import GRITConfig
from grit.state import GroupState


@dataclass(frozen=True)
class StepRule:
    """AdamW's direction with up to three refinements, for whoever steps: GRIT, a yardstick, a rival.

    nesterov: m̂ = β₁ m/(1 − β₁ᵗ⁺¹) + (1 − β₁) g/(1 − β₁ᵗ) looks one gradient ahead (Dozat 2016).
    cautious: entries that oppose the gradient's sign are dropped, and the others raised to make up for their share
        (Liang et al. 2024, arXiv 2411.16085).
    orthogonal: all singular values become equal, at the same Frobenius norm (Muon, Jordan et al. 2024).
    """

    nesterov: bool = True
    cautious: bool = True
    orthogonal: bool = True

    def __call__(
        self, gradient: Tensor, m: Tensor, v: Tensor, count: int, betas: tuple[float, float], eps: float
    ) -> Tensor:
        """The direction against which to step n weights of one shape in their own coordinates: [n, rows, columns].

        m and v [n, rows, columns] change in place; `count` is Adam's step count, from 1.
        """
        direction = torch.zeros_like(gradient)
        self.adam([direction], [gradient], [m], [v], [count], betas, eps)
        self.agree(direction, gradient)
        return factors.orthogonal([direction])[0] if self.orthogonal else direction

    def adam(
        self, directions: list[Tensor], gradients: list[Tensor], ms: list[Tensor], vs: list[Tensor],
        counts: Sequence[int], betas: tuple[float, float], eps: float,
    ) -> None:  # fmt: skip
        """Write m̂/(√v̂ + ε) (Kingma & Ba 2015) into `directions`, which hold zeros; moments change in place.

        torch's fused kernel does it for all tensors at once, stepping from zero with learning rate −1.
        """
        beta1, beta2 = betas
        if self.nesterov:  # the kernel averages the gradient in a second time, and divides by 1 − β₁ᵗ
            torch._foreach_lerp_(ms, gradients, 1 - beta1)
            ms = list(torch._foreach_mul(ms, [(1 - beta1**t) / (1 - beta1 ** (t + 1)) for t in counts]))
        counters = [torch.tensor(float(t - 1), device=d.device) for t, d in zip(counts, directions, strict=True)]
        options: dict[str, Any] = {"fused": True, "amsgrad": False, "maximize": False, "lr": -1.0, "weight_decay": 0.0}
        options |= {"beta1": beta1, "beta2": beta2, "eps": eps}
        adamw(directions, gradients, ms, vs, [], counters, **options)  # counts the steps up

    def agree(self, direction: Tensor, gradient: Tensor) -> None:
        """Drop what opposes the gradient, in place: [n, …]."""
        if self.cautious:
            agrees = (direction * gradient).gt_(0)
            share = agrees.flatten(1).mean(1).clamp_min(1e-3).view(-1, *[1] * (direction.dim() - 1))
            direction.mul_(agrees).div_(share)


def step_rule(config: GRITConfig) -> StepRule:
    """The rule of a configuration: in mode eigen_adamw each refinement is on unless it is false, elsewhere none is."""
    default = config.mode == "eigen_adamw"
    switches = (config.nesterov, config.cautious, config.orthogonal)
    return StepRule(*(default if switch is None else switch for switch in switches))


@dataclass
class Rotated:
    """A stack of n weights of one shape, with their gradients in the basis in which Adam's moments are kept."""

    parameters: list[nn.Parameter]
    options: dict[str, Any]  # their parameter group in the optimizer
    gradient: Tensor  # [n, …], in the basis
    m: Tensor  # moments [n, …], changed in place; of more layers than these n where `rows` selects them
    v: Tensor
    counts: Tensor  # Adam's step count of each, from 1: [n], on the CPU
    back: Callable[[Tensor], Tensor]  # directions [n, …] → changes in the weights' own coordinates [n, *shape]
    rows: Tensor | None = None


def refresh_bases(state: GroupState, config: GRITConfig) -> Tensor:
    """Diagonalize both factors of n layers and turn the moments; returns which layers failed: [n] bool."""
    failed = []
    for side, cov, trusted in state.trusted(config):
        values, vectors, good = factors.eigh(cov)
        ready = trusted & good
        weight = factors.step_weights(values, config.kfac_damping, config.eigen_power)
        state.t[f"w_{side}"] = torch.where(ready[:, None], weight, torch.ones_like(weight)).to(state.device)
        basis = torch.where(ready[:, None, None], vectors, state[f"q_{side}"].to(vectors.device)).to(state.device)
        _turn_moments(state, side, basis)
        state.t[f"ready_{side}"] = ready.to(state.device)
        failed.append((trusted & ~ready).to(state.device))
    # Eigenvectors come in column order; products with them would round differently than after a checkpoint.
    state.t = {name: tensor.contiguous() for name, tensor in state.t.items()}
    return failed[0] | failed[1]


def _turn_moments(state: GroupState, side: str, basis: Tensor) -> None:
    """Move to a new eigenbasis [n, r, r] of side a or g, with the moments of the gradient it acts on.

    The first moment turns exactly. The second is treated as that of uncorrelated coordinates, v'_i = Σ_j R_ij² v_j
    (exact for permutations and sign changes). Side g acts on A from the left, side a on B from the right.
    """
    turn = basis.mT @ state[f"q_{side}"]
    if side == "g":
        state.t["m_a"], state.t["v_a"] = turn @ state["m_a"], turn.square() @ state["v_a"]
    else:
        state.t["m_b"], state.t["v_b"] = state["m_b"] @ turn.mT, state["v_b"] @ turn.square().mT
    state.t[f"q_{side}"] = basis


def rotate_gradients(states: Sequence[GroupState], param_groups: list[dict[str, Any]]) -> list[Rotated]:
    """Q_gᵀ ∇A [n, r, d_in] and ∇B Q_a [n, d_out, r] of all layers that have gradients; counts their steps up."""
    place = {id(p): i for i, group in enumerate(param_groups) for p in group["params"]}
    stacks = []
    for state in states:
        group = state.group
        members: dict[tuple[int, int], list[int]] = {}  # by the parameter groups of A and B
        for i, (a, b) in enumerate(zip(group.params_a, group.params_b, strict=True)):
            if a.grad is not None and b.grad is not None:
                members.setdefault((place[id(a)], place[id(b)]), []).append(i)
        for (place_a, place_b), layers in members.items():
            rows = None if len(layers) == len(group) else torch.tensor(layers, device=group.device)
            state["steps"][slice(None) if rows is None else layers] += 1
            stacks.append(_rotate(state, "a", param_groups[place_a], layers, rows))
            stacks.append(_rotate(state, "b", param_groups[place_b], layers, rows))
    return stacks


def _rotate(state: GroupState, side: str, options: dict[str, Any], layers: list[int], rows: Tensor | None) -> Rotated:
    def pick(tensor: Tensor) -> Tensor:
        return tensor if rows is None else tensor[rows]

    is_a = side == "a"
    gradient, basis = pick(state.group.gradients(side)), pick(state["q_g" if is_a else "q_a"])
    weighted = basis * pick(state["w_g" if is_a else "w_a"])[:, None, :]
    parameters = state.group.params_a if is_a else state.group.params_b
    return Rotated(
        parameters=[parameters[i] for i in layers],
        options=options,
        gradient=basis.mT @ gradient if is_a else gradient @ basis,
        m=state[f"m_{side}"],
        v=state[f"v_{side}"],
        counts=state["steps"] if rows is None else state["steps"][layers],
        back=lambda direction: weighted @ direction if is_a else direction @ weighted.mT,
        rows=rows,
    )


def step(stacks: list[Rotated], rule: StepRule) -> None:
    """Change the weights of all stacks by one step."""
    changes = _directions(stacks, rule)
    for i, stack in enumerate(stacks):
        rule.agree(changes[i], stack.gradient)
        changes[i] = stack.back(changes[i])  # one by one, so that directions are freed
    if rule.orthogonal:
        changes = factors.orthogonal(changes)
    for stack, change in zip(stacks, changes, strict=True):
        weights, lr = [p.data for p in stack.parameters], float(stack.options["lr"])
        decay = float(stack.options.get("weight_decay", 0.0))
        if decay:
            torch._foreach_mul_(weights, 1.0 - lr * decay)  # decoupled (Loshchilov & Hutter 2019)
        torch._foreach_add_(weights, list(change.to(weights[0].dtype).unbind(0)), alpha=-lr)


def _directions(stacks: list[Rotated], rule: StepRule) -> list[Tensor]:
    """Adam's directions [n, …] in each stack's basis; one kernel call for all stacks with the same betas and ε."""
    directions = [torch.zeros_like(stack.gradient) for stack in stacks]
    alike: dict[tuple[float, float, float], list[int]] = {}
    for i, stack in enumerate(stacks):
        beta1, beta2 = map(float, stack.options["betas"])
        alike.setdefault((beta1, beta2, float(stack.options["eps"])), []).append(i)
    for (beta1, beta2, eps), places in alike.items():
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor, int]] = []
        copies = []
        for i in places:
            stack = stacks[i]
            m, v = (stack.m, stack.v) if stack.rows is None else (stack.m[stack.rows], stack.v[stack.rows])
            if stack.rows is not None:
                copies.append((stack, m, v))
            counts = stack.counts.tolist()
            if min(counts) == max(counts):
                parts.append((directions[i], stack.gradient, m, v, counts[0]))
            else:  # some layers have had fewer gradients than others
                parts += zip(directions[i], stack.gradient, m, v, counts, strict=True)
        outs, gradients, ms, vs, ends = (list(column) for column in zip(*parts, strict=True))
        rule.adam(outs, gradients, ms, vs, ends, (beta1, beta2), eps)
        for stack, m, v in copies:
            stack.m[stack.rows], stack.v[stack.rows] = m, v
    return directions
