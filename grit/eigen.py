"""AdamW whose moments live in the eigenbases of the factors (the idea of SOAP, Vyas et al. 2024, in rank space)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from grit.state import GroupState


def adamw_directions(
    moments: list[tuple[Tensor, Tensor]],
    gradients: list[Tensor],
    steps: list[Tensor],
    betas: tuple[float, float],
    eps: float,
) -> list[Tensor]:
    """Adam's bias-corrected directions m̂/(√v̂ + ε) (Kingma & Ba 2015); the moments are updated in place.

    torch's fused kernel does it, for all stacks at once, stepping from zero with learning rate −1.

    Args:
        moments: m and v of each stack, [n, …] each.
        gradients: [n, …] of each stack.
        steps: Of each stack, [n], counted from 1, on the CPU.
        betas: β₁, β₂.
        eps: ε.
    """
    directions = [torch.zeros_like(gradient) for gradient in gradients]
    parts = []
    for direction, gradient, (m, v), count in zip(directions, gradients, moments, steps, strict=True):
        numbers = count.tolist()
        if min(numbers) == max(numbers):
            parts.append((direction, gradient, m, v, numbers[0]))
        else:  # layers that have not all had the same number of gradients
            parts += [(direction[i], gradient[i], m[i], v[i], t) for i, t in enumerate(numbers)]
    adamw(
        [p[0] for p in parts],
        [p[1] for p in parts],
        [p[2] for p in parts],
        [p[3] for p in parts],
        [],
        [torch.tensor(float(p[4] - 1), device=p[0].device) for p in parts],  # counted up inside
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=-1.0,
        weight_decay=0.0,
        eps=eps,
        maximize=False,
    )
    return directions


@dataclass
class Stack:
    """The weights A or B of the layers of a group that are stepped with the same options.

    Attributes:
        state: Of the group.
        side: "a" or "b".
        options: lr, beta1, beta2, eps, weight_decay.
        among: Places of the layers in the group; None: all of them.
    """

    state: GroupState
    side: str
    options: dict[str, float]
    among: list[int] | None = None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The weights."""
        every = self.state.group.params_a if self.side == "a" else self.state.group.params_b
        return every if self.among is None else [every[i] for i in self.among]

    def pick(self, tensor: Tensor) -> Tensor:
        """The rows of the layers that are meant."""
        return tensor if self.among is None else tensor[torch.tensor(self.among, device=tensor.device)]


def eigen_adamw_step(stacks: list[Stack]) -> None:
    """Rotate ∇A by Q_gᵀ and ∇B by Q_a, let Adam step there, rotate back, apply.

    The caller has counted up the layers' `steps`; layers without a gradient are not among the stacks.
    """
    by_moments: dict[tuple[float, float, float], list[Stack]] = {}
    for stack in stacks:
        o = stack.options
        by_moments.setdefault((o["beta1"], o["beta2"], o["eps"]), []).append(stack)
    for (beta1, beta2, eps), members in by_moments.items():
        bases, rotated, moments, steps = [], [], [], []
        for stack in members:
            state, is_a = stack.state, stack.side == "a"
            gradient = stack.pick(state.group.gradients(stack.side))
            basis = stack.pick(state["q_g" if is_a else "q_a"])
            weight = stack.pick(state["w_g" if is_a else "w_a"])
            rotated.append(basis.mT @ gradient if is_a else gradient @ basis)
            bases.append(basis * weight[:, None, :])
            moments.append((stack.pick(state[f"m_{stack.side}"]), stack.pick(state[f"v_{stack.side}"])))
            steps.append(state["steps"] if stack.among is None else state["steps"][stack.among])
        directions = adamw_directions(moments, rotated, steps, (beta1, beta2), eps)
        for stack, back, direction, (m, v) in zip(members, bases, directions, moments, strict=True):
            if stack.among is not None:  # what was picked is a copy
                where = torch.tensor(stack.among, device=m.device)
                stack.state[f"m_{stack.side}"][where] = m
                stack.state[f"v_{stack.side}"][where] = v
            change = back @ direction if stack.side == "a" else direction @ back.mT
            _apply(stack.parameters, change, stack.options["lr"], stack.options["weight_decay"])


def _apply(parameters: list[torch.nn.Parameter], change: Tensor, lr: float, weight_decay: float) -> None:
    tensors = [p.data for p in parameters]
    if weight_decay:
        torch._foreach_mul_(tensors, 1.0 - lr * weight_decay)  # decoupled (Loshchilov & Hutter 2019)
    parts = list(change.to(tensors[0].dtype).unbind(0))
    torch._foreach_add_(tensors, parts, alpha=-lr)
