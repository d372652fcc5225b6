"""What a preconditioner says about itself, layer by layer; from GRIT, or from a function of your own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grit.factors import anisotropy
from probes.geometry import checksum

if TYPE_CHECKING:
    from grit.manager import GRITManager

_TINY = 1e-38


@dataclass
class LayerReading:
    """The state of one layer's preconditioner; leave out what there is not.

    Attributes:
        layer: Name as the ledger has it: of the LoRA module, or of the parameter.
        ready: Whether gradients are multiplied by it.
        samples: Tokens its statistics have seen so far; None where it does not count tokens.
        factors: Side → statistic, symmetric [n, n] (e.g. "a": Σ_a, "g": Σ_g); [n]: a diagonal one, [k, n, n]: the
            blocks of a block-diagonal one.
        preconditioners: Side → what the gradient is multiplied by, in the same forms; None where there should be one.
        damping: Side → λ that was added to the factor.
        bases: Side → eigenvectors as columns, [n, n] or [k, n, n], of a method that keeps Adam's moments in an
            eigenbasis and so has no matrix that gradients are multiplied by.
        weights: Side → what the step along each of these directions is multiplied by, [n].
        refresh_every: Steps between two refreshes, as it was told; None: not known.
        source: Where the statistics come from ("hooks", "gradients", …).
    """

    layer: str
    ready: bool
    samples: float | None = None
    factors: dict[str, Tensor] = field(default_factory=dict)
    preconditioners: dict[str, Tensor | None] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)
    bases: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    refresh_every: int | None = None
    source: str = ""


Provider = Callable[[], list[LayerReading]]
"""Called at sampled steps, after the optimizer's step."""


def numbers(reading: LayerReading) -> dict[str, Any]:
    """One reading as plain numbers, for the ledger.

    Returns:
        `ready`, `samples`, `source`, `refresh_every` as they are; `hash` of all matrices in use, which shows whether
        they are refreshed; for each side `factor_norm`, `damping_share` (λ over the mean eigenvalue), `anisotropy`
        (distance of the preconditioner from a multiple of the identity, 0 = a mere scalar) and `empty` (no matrix, or
        one that is zero, not finite, or the identity although the factor is not); of bases `basis_rotation`
        (1 − mean_j max_i Q_ij², 0 = a permutation of the axes, which Adam does not see) and of weights `weight_spread`
        (largest |w_i / mean w − 1|), both of the side where it is largest.
    """
    said: dict[str, Any] = {"ready": reading.ready, "samples": reading.samples, "source": reading.source}
    said["refresh_every"] = reading.refresh_every
    for side, factor in reading.factors.items():
        mean = float(_diagonal(factor).mean()) if factor.numel() else 0.0
        said[f"factor_norm_{side}"] = float(torch.linalg.vector_norm(factor.double())) if factor.numel() else 0.0
        if side in reading.damping:
            said[f"damping_share_{side}"] = float(reading.damping[side]) / max(abs(mean), _TINY)
    for side, matrix in reading.preconditioners.items():
        said[f"empty_{side}"] = reading.ready and _is_empty(matrix, reading.factors.get(side))
        if matrix is not None and matrix.numel() and bool(torch.isfinite(matrix).all()):
            said[f"anisotropy_{side}"] = _anisotropy(matrix)
    if reading.bases:
        said["basis_rotation"] = max(float(1 - q.square().amax(-2).mean()) for q in reading.bases.values())
    if reading.weights:
        said["weight_spread"] = max(float((w / w.mean() - 1).abs().max()) for w in reading.weights.values())
    used = [m for m in (*reading.preconditioners.values(), *reading.bases.values()) if m is not None and m.numel()]
    total = sum(int(checksum(m)) * (i + 1) for i, m in enumerate(used or list(reading.factors.values())))
    said["hash"] = f"{total & (2**64 - 1):016x}"
    return said


def add_readings(record: dict[str, Any], readings: list[LayerReading], samples: dict[str, float | None]) -> None:
    """Put `numbers` of each reading beside the layer's own.

    Args:
        record: Of a sampled step.
        readings: As they are after it.
        samples: Layer → tokens seen before it; what was gained is `samples_gained`.
    """
    for reading in readings:
        said = numbers(reading)
        before = samples.get(reading.layer)
        if reading.samples is not None and before is not None:
            said["samples_gained"] = reading.samples - before
        record["units"].setdefault(reading.layer, {})["reading"] = said


def _is_empty(matrix: Tensor | None, factor: Tensor | None) -> bool:
    if matrix is None or matrix.numel() == 0 or not bool(torch.isfinite(matrix).all()) or not bool(matrix.any()):
        return True
    eye = torch.ones_like(matrix) if matrix.dim() == 1 else torch.eye(matrix.shape[-1]).to(matrix).expand_as(matrix)
    if not torch.equal(matrix, eye) or factor is None or factor.numel() == 0:
        return False
    # An identity is right only for a factor that is the identity (up to its scale).
    return bool(factor.any()) and _anisotropy(factor.to(matrix.device)) > 1e-6


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix if matrix.dim() == 1 else matrix.diagonal(dim1=-2, dim2=-1)


def _anisotropy(matrix: Tensor) -> float:
    """`grit.factors.anisotropy`, of diagonal and block-diagonal matrices too."""
    if matrix.dim() == 2:
        return float(anisotropy(matrix[None])[0])
    excess = matrix.clone()
    _diagonal(excess).sub_(_diagonal(matrix).mean())
    return float(torch.linalg.vector_norm(excess) / torch.linalg.vector_norm(matrix).clamp_min(_TINY))


def grit_readings(manager: "GRITManager") -> Provider:
    """Readings of every layer of a GRITManager, or of another manager with a method `readings` of its own."""
    own: Provider | None = getattr(manager, "readings", None)
    if own is not None:
        return own

    def read() -> list[LayerReading]:
        config = manager.config
        kinds = manager.capture_kinds()
        found = []
        for state in manager.states:
            cov_a, cov_g = state.covariances()
            plain = torch.stack([state["samples"].float(), state["lam_a"].float(), state["lam_g"].float()]).tolist()
            for i, pair in enumerate(state.group.pairs):
                sides = [s for s in "ag" if bool(state[f"ready_{s}"][i])]  # the other side is left alone as yet
                source = kinds[pair.name]
                reading = LayerReading(
                    layer=pair.name,
                    ready=bool(sides) and manager.preconditions(),
                    samples=None if source == "gradients" else plain[0][i],  # those count columns, not tokens
                    factors={"a": cov_a[i], "g": cov_g[i]},
                    # An adaptive schedule stretches the interval to four times as much at most.
                    refresh_every=max(config.kfac_update_freq, config.grit_cov_update_freq)
                    * (4 if config.adaptive_schedule else 1),
                    source=source,
                )
                if config.mode == "eigen_adamw":
                    reading.bases = {s: state[f"q_{s}"][i] for s in sides}
                    reading.weights = {s: state[f"w_{s}"][i] for s in sides}
                else:
                    reading.preconditioners = {s: state[f"inv_{s}"][i] for s in sides}
                    reading.damping = {"a": plain[1][i], "g": plain[2][i]}
                found.append(reading)
        return found

    return read
