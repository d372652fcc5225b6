"""The state of the layers in one group, as stacks, and layer by layer for checkpoints and shrinking ranks."""

from typing import Any

import torch
from torch import Tensor

from grit import factors
from grit.config import GRITConfig
from grit.layers import LayerGroup

UNDECIDED, HOOKS, GRADIENTS = 0, 1, 2
KINDS = ("undecided", "hooks", "gradients")


class GroupState:
    """Statistics, inverses, eigenbases and moments of n layers.

    Attributes (first dimension n):
        ema_a, ema_g: weighted sums of Σ_a and Σ_g [r, r]; divided by `weight` they are the averages. Where `kind` is
            GRADIENTS they hold ∇Bᵀ∇B and ∇A∇Aᵀ instead, which change basis in the same way.
        weight: Σ of the EMA's weights (bias correction).
        samples: tokens seen (of gradient statistics: gradient columns seen).
        inv_a, inv_g: what gradients are multiplied by [r, r]; identity until ready.
        ready_a, ready_g: whether they, or the eigenbases, may be used.
        lam_a, lam_g: damping λ of the last inversion (modes adamw and sgd).
        q_a, q_g: eigenvectors as columns [r, r]; identity until ready.
        m_a, v_a [r, d_in], m_b, v_b [d_out, r]: Adam's moments in the eigenbases (mode eigen_adamw only).
        steps: Adam's step count. kind: where the statistics come from. k: directions that the last reprojection kept.
    """

    ON_CPU = ("steps", "kind", "k")

    def __init__(self, group: LayerGroup, tensors: dict[str, Tensor]):
        self.group = group
        self.t = tensors

    @classmethod
    def fresh(cls, group: LayerGroup, config: GRITConfig) -> "GroupState":
        n, r = len(group), group.rank
        options: dict[str, Any] = {"dtype": group.dtype, "device": group.device}
        eye = torch.eye(r, **options).repeat(n, 1, 1)
        kind = {"hooks": HOOKS, "gradients": GRADIENTS, "auto": UNDECIDED}[config.capture]
        tensors = {
            "weight": torch.zeros(n, **options),
            "samples": torch.zeros(n, dtype=torch.float64, device=group.device),
            "steps": torch.zeros(n, dtype=torch.int64),
            "kind": torch.full((n,), kind, dtype=torch.int64),
            "k": torch.full((n,), r, dtype=torch.int64),
        }
        for side in "ag":
            tensors[f"ema_{side}"] = torch.zeros(n, r, r, **options)
            tensors[f"inv_{side}"], tensors[f"q_{side}"] = eye.clone(), eye.clone()
            tensors[f"w_{side}"] = torch.ones(n, r, **options)
            tensors[f"lam_{side}"] = torch.zeros(n, **options)
            tensors[f"ready_{side}"] = torch.zeros(n, dtype=torch.bool, device=group.device)
        if config.mode == "eigen_adamw":
            for side, parameter in (("a", group.params_a[0]), ("b", group.params_b[0])):
                tensors[f"m_{side}"] = torch.zeros(n, *parameter.shape, **options)
                tensors[f"v_{side}"] = torch.zeros(n, *parameter.shape, **options)
        return cls(group, tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self.t[name]

    def layer(self, i: int) -> dict[str, Tensor]:
        return {name: stack[i].clone() for name, stack in self.t.items()}

    @classmethod
    def of_layers(cls, group: LayerGroup, layers: list[dict[str, Tensor]]) -> "GroupState":
        """Rebuild from single layers, on the group's device; ValueError if their rank differs."""
        for pair, layer in zip(group.pairs, layers, strict=True):
            if tuple(layer["ema_a"].shape) != (group.rank, group.rank):
                raise ValueError(f"{pair.name}: expected state of rank {group.rank}, got {tuple(layer['ema_a'].shape)}")
        stacks = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        return cls(group, {n: t.to("cpu" if n in cls.ON_CPU else group.device) for n, t in stacks.items()})

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Bias-corrected Σ_a and Σ_g, [n, r, r] each; zeros where nothing was seen."""
        weight = self.t["weight"].clamp_min(1e-30)[:, None, None]
        return self.t["ema_a"] / weight, self.t["ema_g"] / weight

    def update(self, kind: int, cov_a: Tensor, cov_g: Tensor, samples: Tensor, decay: float) -> None:
        """Average: new = β·old + (1−β)·now [n, r, r], for layers of that `kind` that have `samples` [n]."""
        use = (samples > 0) & (self.t["kind"] == kind).to(samples.device)
        use &= torch.isfinite(cov_a).flatten(1).all(-1) & torch.isfinite(cov_g).flatten(1).all(-1)
        share = use.to(cov_a.dtype) * (1.0 - decay)  # torch.where of two numbers would round them to float32
        for name, now in (("ema_a", cov_a), ("ema_g", cov_g)):
            now = torch.where(use[:, None, None], now, torch.zeros_like(now))
            self.t[name] = self.t[name] + share[:, None, None] * (now - self.t[name])
        self.t["weight"] = self.t["weight"] + share * (1.0 - self.t["weight"])
        self.t["samples"] = self.t["samples"] + torch.where(use, samples, torch.zeros_like(samples))

    @property
    def device(self) -> torch.device:
        return self.group.device

    def trusted(self, config: GRITConfig) -> list[tuple[str, Tensor, Tensor]]:
        """(side, Σ [n, r, r], which layers' Σ has seen enough tokens and holds information: [n] bool), a then g.

        They are on the device where factors are inverted.
        """
        automatic = config.kfac_inversion_device == "auto"
        where = self.device if automatic else torch.device(config.kfac_inversion_device)
        enough = (self.t["samples"] >= config.kfac_min_samples).to(where)
        sides = zip("ag", (cov.to(where) for cov in self.covariances()), strict=True)
        return [(side, cov, enough & factors.informative(cov)) for side, cov in sides]


def transformed(layer: dict[str, Tensor], left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """State of one layer, as `GroupState.layer` gives it, after A ← L A, B ← B R (see `grit.factors`)."""
    dtype, device = layer["ema_a"].dtype, layer["ema_a"].device
    left, right = left.to(device, dtype), right.to(device, dtype)
    new = dict(layer)
    new["ema_a"] = left @ layer["ema_a"] @ left.mT
    new["ema_g"] = right.mT @ layer["ema_g"] @ right
    eye = torch.eye(left.shape[0], dtype=dtype, device=device)
    q_a = q_g = eye
    if "m_a" in layer:
        # To the plain basis, through the change, and into the eigenbasis of the new factors.
        q_a = factors.eigh(new["ema_a"][None])[1][0] if bool(layer["ready_a"]) else eye
        q_g = factors.eigh(new["ema_g"][None])[1][0] if bool(layer["ready_g"]) else eye
        turn_a = q_g.mT @ right.mT @ layer["q_g"]
        turn_b = layer["q_a"].mT @ left.mT @ q_a
        new["m_a"], new["m_b"] = turn_a @ layer["m_a"], layer["m_b"] @ turn_b
        if left.shape[0] == left.shape[1]:
            # A projection leaves second moments as they are, turned only: at zero, Adam would blow the rounding of
            # gradients in dropped directions up to steps of full size.
            turn_a, turn_b = q_g.mT @ layer["q_g"], layer["q_a"].mT @ q_a
        new["v_a"], new["v_b"] = turn_a.square() @ layer["v_a"], layer["v_b"] @ turn_b.square()
    new["q_a"], new["q_g"] = q_a, q_g
    new["w_a"] = new["w_g"] = torch.ones(left.shape[0], dtype=dtype, device=device)
    new["inv_a"], new["inv_g"] = eye, eye.clone()  # until the next inversion, which follows at once
    return new
