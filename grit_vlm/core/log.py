"""What Fisher estimates say about themselves: records of `grit_log.jsonl`, numbers for a Trainer, readings for probes.

The records are those of `grit.records`, so that the same plots and tables read them; the eigenvalues of A's estimate
stand where GRIT has those of Σ_g, B's where it has those of Σ_a.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grit import factors
from grit.records import NO_EFFECT_COSINE, totals
from grit_vlm.core.fisher_info import FisherInformationMatrix, Side
from probes.readings import LayerReading

if TYPE_CHECKING:
    from grit_vlm.core.grit_lora import GRITLoRALinear
    from grit_vlm.core.manager import FisherManager

logger = logging.getLogger("grit")

FACTOR_OF: dict[Side, str] = {"A": "g", "B": "a"}
"""Side → the factor of GRIT that works on it."""


def _spectrum(fisher: FisherInformationMatrix, side: Side) -> Tensor:
    """Eigenvalues, largest first: [n]."""
    eigen = fisher.eigen(side)
    values = eigen.values.reshape(-1) if eigen.real is None else eigen.values[eigen.real > 0]
    return values.sort(descending=True).values


def spectra(manager: FisherManager) -> dict[str, Any]:
    """Largest eigenvalues, effective ranks, condition numbers, tokens and budget of every layer."""
    return {"kind": "spectra", "layers": {name: _layer(manager, layer) for name, layer in manager.by_pair.items()}}


def _layer(manager: FisherManager, layer: GRITLoRALinear) -> dict[str, Any]:
    fisher = layer.fisher_matrix
    entry: dict[str, Any] = {"r": layer.lora_A.shape[0], "samples": float(fisher.samples), "ready": layer.ready}
    entry |= {"estimate": fisher.approximation_type, "budget": layer.projection_budget}
    for side, letter in FACTOR_OF.items():
        if not fisher.weight or fisher.eigen(side).mean <= 0:
            continue
        values = _spectrum(fisher, side)
        entry[f"eigenvalues_{letter}"] = values[: manager.config.log_top_eigs].tolist()
        entry[f"effective_rank_{letter}"] = float(factors.effective_rank(values))
        entry[f"condition_{letter}"] = float(values[0] / values[-1].clamp_min(1e-38))
    return entry


def weight_change(manager: FisherManager) -> float:
    """How far steps along directions of one layer differ from each other: largest |w/mean w − 1|; mode eigen_adamw."""
    found = 0.0
    for layer in manager.by_pair.values():
        if layer.ready:
            for side in FACTOR_OF:
                w = _weights(manager, layer, side)
                found = max(found, float((w / w.mean() - 1).abs().max()))
    return found


def _weights(manager: FisherManager, layer: GRITLoRALinear, side: Side) -> Tensor:
    fisher = layer.fisher_matrix
    natural = layer.config.enable_natural_gradient
    values = fisher.eigen(side).values
    weights = fisher.step_weights(side, manager.config.eigen_power) if natural else torch.ones_like(values)
    if layer.projection_budget is not None:
        weights = weights * fisher.keeps(layer.projection_budget)[side]
    real = fisher.eigen(side).real
    return weights.reshape(-1) if real is None else weights[real > 0]


def effect(manager: FisherManager) -> dict[str, Any]:
    """Whether anything is changed for the optimizer, with the evidence; also as one log line."""
    total, ready = len(manager.by_pair), manager.ready_layers()
    record: dict[str, Any] = {"kind": "effect", "ready_layers": ready, "layers": total, **manager.measured}
    for norm in ("gradient_norm_raw", "gradient_norm_natural"):
        if f"grit/{norm}" in manager.last_metrics:
            record[norm] = manager.last_metrics[f"grit/{norm}"]
    switched = any(
        layer.config.enable_natural_gradient or layer.config.enable_projection for layer in manager.by_pair.values()
    )
    if not switched:
        why = "natural gradient and projection are switched off in every layer"
    elif not manager.preconditions():
        why = f"natural-gradient warm-up until step {manager.config.ng_warmup_steps}"
    elif not ready:
        most = max(layer.fisher_matrix.samples for layer in manager.by_pair.values())
        why = f"no estimate is ready ({most} tokens seen)"
    elif manager.config.mode == "eigen_adamw":
        record["max_weight_change"] = weight_change(manager)
        alike = record["max_weight_change"] <= NO_EFFECT_COSINE
        why = "the Fisher information is the same along every direction" if alike else ""
    else:
        spread = manager.measured.get("max_one_minus_cosine")
        alike = spread is not None and spread <= NO_EFFECT_COSINE and manager.config.mode != "sgd"
        why = "every preconditioner is a multiple of the identity, which AdamW cancels" if alike else ""
        why = "no gradient was preconditioned yet" if spread is None else why
    record["effective"] = not why
    if why:
        record["reason"] = why
        logger.warning("GRIT: step %d: no effective change: %s", manager.step, why)
    else:
        logger.info("GRIT: step %d: applied to %d of %d layers", manager.step, ready, total)
    return record


def summary(manager: FisherManager) -> dict[str, float]:
    """Numbers over all layers, for a Trainer's log; only what is known."""
    found: dict[str, float] = {
        "grit/ready_layers": float(manager.ready_layers()),
        "grit/skipped_steps": float(manager.skipped),
    }
    kept = [layer.projection_budget for layer in manager.by_pair.values() if layer.projection_budget is not None]
    if kept:
        found["grit/projection_budget_mean"] = sum(kept) / len(kept)
    if "cosine_median" in manager.measured:
        found["grit/cosine_raw_natural"] = manager.measured["cosine_median"]
    return {name: value for name, value in found.items() if math.isfinite(value)}


def final(manager: FisherManager) -> dict[str, Any]:
    """The last record: ranks, capture, totals."""
    return {
        "kind": "final",
        "ranks": {pair.name: {"base_r": manager.base_rank[pair.name], "r": pair.rank} for pair in manager.pairs()},
        **totals(manager),
        "effect": effect(manager),
        "spectra": spectra(manager)["layers"],
    }


def reading(manager: FisherManager, name: str, layer: GRITLoRALinear) -> LayerReading:
    """One layer for the probe.

    Matrices are [r, r] of estimate kfac, [n] (a diagonal one) of diagonal, [k, n, n] (on the diagonal) of
    block_diagonal.
    """
    fisher, config = layer.fisher_matrix, layer.config
    used = config.enable_natural_gradient or config.enable_projection
    ready = used and layer.ready and manager.preconditions()
    said = LayerReading(name, ready, float(fisher.samples), refresh_every=config.fisher_update_freq, source="hooks")
    if not fisher.weight:
        return said
    for side, letter in FACTOR_OF.items():
        values, real = fisher.eigen(side).values, fisher.eigen(side).real
        said.factors[letter] = _matrix(fisher, side, _filled(values, real))
        if not ready or fisher.eigen(side).mean <= 0:
            continue
        if manager.config.mode == "eigen_adamw":
            vectors = fisher.eigen(side).vectors
            if vectors is not None and config.enable_natural_gradient:
                said.bases[letter] = vectors if vectors.dim() == 2 else vectors.flatten(0, 1)
            said.weights[letter] = _weights(manager, layer, side)
        else:
            inverse = fisher.inverse(side) if config.enable_natural_gradient else None
            inverse = torch.ones_like(values) if inverse is None else _filled(inverse, real)
            if layer.projection_budget is not None:
                inverse = inverse * fisher.keeps(layer.projection_budget)[side]
            said.preconditioners[letter] = _matrix(fisher, side, inverse)
            said.damping[letter] = fisher.damping * fisher.scale()
    return said


def _filled(values: Tensor, real: Tensor | None) -> Tensor:
    """Values whose mean stands where a run is filled up: there is no direction, and none must seem to be there."""
    return values if real is None else torch.where(real > 0, values, values[real > 0].mean())


def _matrix(fisher: FisherInformationMatrix, side: Side, values: Tensor) -> Tensor:
    """V diag(values) Vᵀ in the form that `reading` says."""
    vectors = fisher.eigen(side).vectors
    if vectors is None:
        return values.reshape(-1)
    if vectors.dim() == 2:
        return (vectors * values.reshape(1, -1)) @ vectors.mT
    return ((vectors * values[..., None, :]) @ vectors.mT).flatten(0, 1)
