"""Norms, angles and checksums, for single tensors, for a LoRA pair as one vector, and for the change of ΔW.

A small change (δA, δB) of a pair changes B·A by D(δ) = B·δA + δB·A, which is linear in δ. Norms and angles of such
changes come from r×r products; the d_out×d_in matrix is never formed. Results are small tensors that stay on their
device, so that a whole record needs few transfers.
"""

import functools

import torch
from torch import Tensor

from probes.units import Values


def products(vectors: list[Tensor]) -> Tensor:
    """All inner products of k vectors: k tensors of one shape → [k, k], float64.

    A dozen norms and angles follow from them without another pass over the tensors; in float64 an angle keeps its
    digits down to 1e-6 degrees.
    """
    rows = torch.stack([v.detach().flatten().double() for v in vectors])
    return rows @ rows.mT


def weight_products(one: Values, two: Values, weights: Values) -> Tensor:
    """Inner products of the changes of B·A that two changes of a LoRA pair make: [2, 2], float64.

    ⟨D(x), D(y)⟩ with D(x) = B·xA + xB·A, from r×r matrices.
    """
    a, b = weights["a"].detach().double(), weights["b"].detach().double()
    r = a.shape[0]
    rows = torch.cat([one["a"], two["a"]]).double()
    columns = torch.cat([one["b"], two["b"]], 1).double()
    first = torch.einsum("ij,xiyj->xy", b.mT @ b, (rows @ rows.mT).view(2, r, 2, r))
    cross = torch.einsum("iyj,xij->xy", (b.mT @ columns).view(r, 2, r), (rows @ a.mT).view(2, r, r))
    last = torch.einsum("ij,xiyj->xy", a @ a.mT, (columns.mT @ columns).view(2, r, 2, r))
    return first + cross + cross.mT + last


def zero_share(values: Values, raw: Values) -> Tensor:
    """Share of entries that are exactly zero although `raw` is not (NaN and infinities count as not zero)."""
    lost = torch.stack([((values[s] == 0) & (raw[s] != 0)).sum() for s in values]).sum()
    return lost.float() / sum(v.numel() for v in values.values())


_KEPT = 2**18
"""Entries up to which a tensor's place numbers are kept: LoRA's sides; for more, memory counts for more than time."""


def _places(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, device=device) % 65521 + 1


_kept_places = functools.lru_cache(maxsize=64)(_places)


def checksum(value: Tensor) -> Tensor:
    """A number of 64 bits that changes with any bit or the order of the entries; computed where the tensor is.

    Not cryptographic: it tells whether two gradients are the same to the bit.
    """
    size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    bits = value.detach().contiguous().view(size).flatten().to(torch.int64)
    place = (_kept_places if bits.numel() <= _KEPT else _places)(bits.numel(), bits.device)
    return (bits * place).sum() * 1_000_003 + bits.sum()  # wraps around, as it may
