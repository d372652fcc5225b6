"""What is measured, and how: tensors in units, their norms and angles, and a preconditioner's own state.

A unit is what is judged together: a LoRA pair A [r, d_in], B [d_out, r] where names show one, else a single tensor.
A small change (δA, δB) of a pair changes B·A by D(δ) = B·δA + δB·A, which is linear in δ: norms and angles of such
changes come from r×r products, and the d_out×d_in matrix is never formed. Results stay on their device as small
tensors, so that a whole record needs few transfers.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Record = dict[str, Any]
Values = dict[str, Tensor]
"""Side → tensor of the parameter's shape: a gradient or a change of one unit."""
Snapshot = Sequence[Tensor | None]
"""A gradient of every tensor, in the order of `tensors`."""

LORA_A, LORA_B = ".lora_A.", ".lora_B."
_TINY = 1e-38

# Units


@dataclass(eq=False)
class Unit:
    """Tensors that are judged together: sides "a" and "b" of a LoRA pair, "w" of anything else."""

    name: str
    sides: dict[str, nn.Parameter]

    @property
    def is_pair(self) -> bool:
        return self.sides.keys() == {"a", "b"}


def find_units(model: nn.Module) -> list[Unit]:
    """Every trainable parameter, LoRA's in pairs, in the model's order; ValueError if nothing is trainable."""
    model = getattr(model, "_orig_mod", model)  # compiled
    adapters: dict[str, set[str]] = {}
    for name, _ in model.named_parameters():
        if LORA_A in name:
            layer, rest = name.split(LORA_A, 1)
            adapters.setdefault(layer, set()).add(rest.removesuffix(".weight"))
    units: dict[str, Unit] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key, side = name, "w"
        for marker, letter in ((LORA_A, "a"), (LORA_B, "b")):
            if marker in name and parameter.dim() == 2:
                layer, rest = name.split(marker, 1)
                adapter = rest.removesuffix(".weight")
                # The names that GRIT uses: the adapter is named only where there are several.
                key, side = (layer if len(adapters.get(layer, ())) < 2 else f"{layer}[{adapter}]"), letter
        units.setdefault(key, Unit(key, {})).sides[side] = parameter
    if not units:
        raise ValueError("expected a model with trainable parameters, got one in which all are frozen")
    for unit in units.values():
        if len(unit.sides) == 1 and "w" not in unit.sides:  # half of the pair is frozen (LoRA-FA)
            unit.sides = {"w": next(iter(unit.sides.values()))}
    return list(units.values())


def tensors(units: list[Unit]) -> list[tuple[Unit, str, nn.Parameter]]:
    return [(unit, side, parameter) for unit in units for side, parameter in unit.sides.items()]


# Geometry


Matrices = list[Tensor]
"""A number for every entry of some tensors, in the order of a `Layout`."""


class Layout:
    """Tensors of one size, dtype and device are rows of one matrix: a few operations for all of them."""

    def __init__(self, tensors: Sequence[Tensor]):
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, tensor in enumerate(tensors):
            groups.setdefault((tensor.numel(), tensor.dtype, tensor.device), []).append(i)
        self.places = list(groups.values())
        self._tensors = [(t.shape, t.dtype, t.device) for t in tensors]
        self._back = torch.tensor([i for places in self.places for i in places]).argsort()

    def zeros(self) -> Matrices:
        kinds = [(len(places), *self._tensors[places[0]]) for places in self.places]
        return [torch.zeros(n, shape.numel(), dtype=dtype, device=device) for n, shape, dtype, device in kinds]

    def stack(self, tensors: Sequence[Tensor | None]) -> Matrices:
        """Copies, as a stack; zeros for missing ones."""
        rows = [
            torch.zeros(kind[0], dtype=kind[1], device=kind[2]) if t is None else t.detach()
            for t, kind in zip(tensors, self._tensors, strict=True)
        ]
        return [torch.stack([rows[i].flatten() for i in places]) for places in self.places]

    def views(self, matrices: Matrices) -> list[Tensor]:
        row_of = {
            i: row
            for places, matrix in zip(self.places, matrices, strict=True)
            for i, row in zip(places, matrix, strict=True)
        }
        return [row_of[i].view(shape) for i, (shape, *_) in enumerate(self._tensors)]

    def dots(self, pairs: Sequence[tuple[Matrices, Matrices]]) -> Tensor:
        """Inner products in float32, [pairs, tensors], on the first tensor's device."""
        device = pairs[0][0][0].device
        sums = [
            torch.cat([(a.float() * b.float()).sum(1).to(device) for a, b in zip(x, y, strict=True)]) for x, y in pairs
        ]
        return torch.stack(sums)[:, self._back.to(device)]


def difference(one: Matrices, other: Matrices) -> Matrices:
    return [a.float() - b.float() for a, b in zip(one, other, strict=True)]


def products(vectors: list[Tensor]) -> Tensor:
    """All inner products of k tensors of one shape: [k, k], float64.

    A dozen norms and angles follow from them without another pass over the tensors; in float64 an angle keeps its
    digits down to 1e-6 degrees.
    """
    rows = torch.stack([v.detach().flatten().double() for v in vectors])
    return rows @ rows.mT


def weight_products(one: Values, two: Values, weights: Values) -> Tensor:
    """⟨D(x), D(y)⟩ of the changes of B·A that two changes of a pair make, D(x) = B·xA + xB·A: [2, 2], float64."""
    a, b = weights["a"].detach().double(), weights["b"].detach().double()
    r = a.shape[0]
    rows = torch.cat([one["a"], two["a"]]).double()
    columns = torch.cat([one["b"], two["b"]], 1).double()
    first = torch.einsum("ij,xiyj->xy", b.mT @ b, (rows @ rows.mT).view(2, r, 2, r))
    cross = torch.einsum("iyj,xij->xy", (b.mT @ columns).view(r, 2, r), (rows @ a.mT).view(2, r, r))
    last = torch.einsum("ij,xiyj->xy", a @ a.mT, (columns.mT @ columns).view(2, r, 2, r))
    return first + cross + cross.mT + last


def sign_kept(values: Values, raw: Values) -> Tensor:
    """Share of the entries of `raw` that are not zero whose sign is the same in `values`."""
    same = torch.stack([((values[s] > 0) == (raw[s] > 0))[raw[s] != 0].sum() for s in values]).sum()
    return same.float() / torch.stack([(r != 0).sum() for r in raw.values()]).sum().clamp_min(1)


def zero_share(values: Values, raw: Values) -> Tensor:
    """Share of entries that are exactly zero although `raw` is not (NaN and infinities count as not zero)."""
    lost = torch.stack([((values[s] == 0) & (raw[s] != 0)).sum() for s in values]).sum()
    return lost.float() / sum(v.numel() for v in values.values())


# One sampled step


def measure(
    units: list[Unit], points: dict[str, Snapshot], weights: Sequence[Tensor], shadow: Sequence[Tensor]
) -> dict[str, dict[str, Any]]:
    """Numbers of each unit that has gradients; angles in degrees, None where one of two vectors is zero.

    `units` hold the parameters after the step, `weights` are those before it; `shadow` is Δθ of plain AdamW. `points`:
    gradients "raw" and "inner" (what the optimizer reads) always, "before" and "after" of a preconditioner's call.

    Unit → `size` (entries), `sizes` of its sides, `norm_<point>`, `norm_weights` (of the tensors), `norm_delta`,
    `norm_shadow`; `angle_raw_inner`, `angle_call` (before and after the call); `angle` of Δθ and shadow and
    `angle_weights` of the changes of ΔW; `lr_ratio` ‖Δθ‖/‖shadow‖; `cos_raw_inner`, `cos_raw_step` of raw gradient and
    −Δθ; `zero_share`, `zero_share_call` of entries zeroed on the way; `sign_kept`, of entries whose sign the optimizer
    reads as it was; `bits` of a weight.
    """
    numbers: dict[tuple[str, str], Tensor] = {}
    grams: dict[tuple[str, str], Tensor] = {}
    measured: dict[str, dict[str, Any]] = {}
    names = [*points, "weights", "delta", "shadow"]
    place = 0
    for unit in units:
        at = dict(zip(unit.sides, range(place, place + len(unit.sides)), strict=True))
        place += len(unit.sides)
        if any(points["raw"][i] is None for i in at.values()):
            continue
        vectors: dict[str, Values] = {
            name: {s: torch.zeros_like(weights[i]) if (g := snapshot[i]) is None else g for s, i in at.items()}
            for name, snapshot in points.items()
        }
        before = {s: weights[i] for s, i in at.items()}
        delta = {s: unit.sides[s].detach().float() - before[s].float() for s in at}
        adamw_step = {s: shadow[i] for s, i in at.items()}
        every = {**vectors, "weights": before, "delta": delta, "shadow": adamw_step}
        numbers[unit.name, "zero_share"] = zero_share(vectors["inner"], vectors["raw"])
        numbers[unit.name, "sign_kept"] = sign_kept(vectors["inner"], vectors["raw"])
        if "after" in vectors:
            numbers[unit.name, "zero_share_call"] = zero_share(vectors["after"], vectors["before"])
        grams[unit.name, "sides"] = torch.stack([products([every[n][s] for n in names]) for s in at]).sum(0)
        if unit.is_pair:
            grams[unit.name, "ΔW"] = weight_products(delta, adamw_step, before)
        sizes = {s: w.numel() for s, w in before.items()}
        bits = min(8 * p.element_size() for p in unit.sides.values())
        measured[unit.name] = {"size": sum(sizes.values()), "sizes": sizes, "bits": bits}
    matrices = as_lists(grams)
    for (name, key), number in as_lists(numbers).items():
        measured[name][key] = number if math.isfinite(number) else None
    return {n: entry | derived(matrices[n, "sides"], names, matrices.get((n, "ΔW"))) for n, entry in measured.items()}


def as_lists(tensors: Mapping[tuple[str, str], Tensor]) -> dict[tuple[str, str], Any]:
    """Numbers, or nested lists of numbers, in one transfer for each device, dtype and shape."""
    alike: dict[tuple[Any, ...], list[tuple[str, str]]] = {}
    for key, tensor in tensors.items():
        alike.setdefault((tensor.device, tensor.dtype, tensor.shape), []).append(key)
    lists: dict[tuple[str, str], Any] = {}
    for keys in alike.values():
        lists.update(zip(keys, torch.stack([tensors[key] for key in keys]).tolist(), strict=True))
    return lists


def derived(
    products: list[list[float]], names: list[str], of_weights: list[list[float]] | None = None
) -> dict[str, Any]:
    """Norms, angles, cosines and ratios of a unit from the inner products of its vectors, and of changes of ΔW."""

    def dot(one: str, two: str) -> float:
        return products[names.index(one)][names.index(two)]

    def cosine(one: str, two: str) -> float | None:
        scale = norms[one] * norms[two]
        return dot(one, two) / scale if math.isfinite(scale) and scale > 0 else None

    norms = {n: math.sqrt(max(0.0, s)) if math.isfinite(s := dot(n, n)) else math.nan for n in names}
    step, delta, shadow = cosine("raw", "delta"), norms["delta"], norms["shadow"]
    entry = {f"norm_{name}": norm if math.isfinite(norm) else None for name, norm in norms.items()}
    entry |= {"angle_raw_inner": _degrees(cosine("raw", "inner")), "angle": _degrees(cosine("delta", "shadow"))}
    if "after" in names:
        entry["angle_call"] = _degrees(cosine("before", "after"))
    entry["cos_raw_inner"] = cosine("raw", "inner")
    entry["cos_raw_step"] = None if step is None else -step
    entry["lr_ratio"] = delta / shadow if math.isfinite(delta) and shadow > 0 else None
    if of_weights is not None:
        (square, mixed), (_, other) = of_weights
        scale = math.sqrt(max(0.0, square) * max(0.0, other)) if math.isfinite(square * other) else 0.0
        entry["angle_weights"] = _degrees(mixed / scale if scale > 0 else None)
    return entry


def _degrees(cosine: float | None) -> float | None:
    if cosine is None:
        return None
    return math.degrees(2 * math.asin(math.sqrt(min(1.0, max(0.0, (1 - cosine) / 2)))))


# What a preconditioner says about itself


@dataclass
class LayerReading:
    """The state of one layer's preconditioner, by side; leave out what does not exist."""

    layer: str  # its name in the ledger: of the LoRA module, or of the parameter
    ready: bool  # whether gradients are multiplied by it
    samples: float | None = None  # tokens seen so far; None where it does not count tokens
    # Symmetric [n, n] (e.g. "a": Σ_a, "g": Σ_g); [n]: a diagonal one, [k, n, n]: the blocks of a block-diagonal one.
    factors: dict[str, Tensor] = field(default_factory=dict)
    # What the gradient is multiplied by, in the same forms; None where there should be one.
    preconditioners: dict[str, Tensor | None] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)  # λ that was added to the factor
    # Eigenvectors as columns, [n, n] or [k, n, n], of a method that keeps Adam's moments in an eigenbasis and so has
    # no matrix that gradients are multiplied by; and what the step along each of them is multiplied by, [n].
    bases: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    refresh_every: int | None = None  # steps, as configured; None: not known
    source: str = ""  # of the statistics: "hooks", "gradients", …


Provider = Callable[[], Sequence[LayerReading | Mapping[str, Any]]]
"""Called before and after sampled steps: a reading of every layer, or a dictionary with its fields."""


def collect(provider: Provider) -> list[LayerReading]:
    return [r if isinstance(r, LayerReading) else LayerReading(**r) for r in provider()]


def numbers(reading: LayerReading) -> dict[str, Any]:
    """One reading as plain numbers, for the ledger.

    `ready`, `samples`, `source`, `refresh_every` as they are; `hash` of all matrices in use, which shows whether they
    are refreshed; for each side `factor_norm`, `damping_share` (λ over the mean eigenvalue), `anisotropy` (distance of
    the preconditioner from a multiple of the identity, 0 = a mere scalar) and `empty` (no matrix, or one that is zero,
    not finite, or the identity although the factor is not); of bases `basis_rotation` (1 − mean_j max_i Q_ij², 0 = a
    permutation of the axes, which Adam does not see) and of weights `weight_spread` (largest |w_i / mean w − 1|), both
    of the side where it is largest.
    """
    entry: dict[str, Any] = {"ready": reading.ready, "samples": reading.samples, "source": reading.source}
    entry["refresh_every"] = reading.refresh_every
    for side, factor in reading.factors.items():
        mean = float(_diagonal(factor).mean()) if factor.numel() else 0.0
        entry["factor_bits"] = min(8 * factor.element_size(), entry.get("factor_bits", 64))
        entry[f"factor_norm_{side}"] = float(torch.linalg.vector_norm(factor.double())) if factor.numel() else 0.0
        if side in reading.damping:
            entry[f"damping_share_{side}"] = float(reading.damping[side]) / max(abs(mean), _TINY)
    for side, matrix in reading.preconditioners.items():
        entry[f"empty_{side}"] = reading.ready and _is_empty(matrix, reading.factors.get(side))
        if matrix is not None and matrix.numel() and bool(torch.isfinite(matrix).all()):
            entry[f"anisotropy_{side}"] = anisotropy(matrix)
    if reading.bases:
        entry["basis_rotation"] = max(float(1 - q.square().amax(-2).mean()) for q in reading.bases.values())
    if reading.weights:
        entry["weight_spread"] = max(float((w / w.mean() - 1).abs().max()) for w in reading.weights.values())
    used = [m for m in (*reading.preconditioners.values(), *reading.bases.values()) if m is not None and m.numel()]
    digest = 0
    for matrix in used or reading.factors.values():
        digest = zlib.crc32(matrix.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), digest)
    entry["hash"] = digest
    return entry


def _is_empty(matrix: Tensor | None, factor: Tensor | None) -> bool:
    if matrix is None or matrix.numel() == 0 or not bool(torch.isfinite(matrix).all()) or not bool(matrix.any()):
        return True
    eye = torch.ones_like(matrix) if matrix.dim() == 1 else torch.eye(matrix.shape[-1]).to(matrix).expand_as(matrix)
    if not torch.equal(matrix, eye) or factor is None or factor.numel() == 0:
        return False
    # An identity is right only for a factor that is the identity (up to its scale).
    return bool(factor.any()) and anisotropy(factor.to(matrix.device)) > 1e-6


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix if matrix.dim() == 1 else matrix.diagonal(dim1=-2, dim2=-1)


def anisotropy(matrix: Tensor) -> float:
    """‖M − mean(diag M)·I‖ / ‖M‖ of a matrix [n, n], a diagonal [n] or blocks [k, n, n]."""
    excess = matrix.clone()
    _diagonal(excess).sub_(_diagonal(matrix).mean())
    return float(torch.linalg.vector_norm(excess) / torch.linalg.vector_norm(matrix).clamp_min(_TINY))
