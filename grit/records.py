"""What GRIT says about itself: records for JSON, flat numbers for a Trainer, one honest line about its effect."""

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grit import factors

if TYPE_CHECKING:
    from grit.manager import GRITManager

logger = logging.getLogger("grit")

NO_EFFECT_COSINE = 1e-6
"""1 − cos of raw and preconditioned gradient below which a tensor counts as scaled only (an angle of 0.08°)."""


def append(file: Path | None, records: list[dict[str, Any]], anew: bool = False) -> None:
    """Write records as JSON Lines; NaN and infinities as text, so that every JSON reader takes them."""
    if file is None or not (records or anew):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w" if anew else "a", encoding="utf-8") as out:
        out.writelines(json.dumps(plain(record), allow_nan=False) + "\n" for record in records)


def plain(value: Any) -> Any:
    """The same with NaN and infinities as "nan", "inf", "-inf"."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def to_text(history: list[dict[str, Any]]) -> str:
    """For checkpoints."""
    return json.dumps(plain(history))


def from_text(text: str) -> list[dict[str, Any]]:
    """Back from `to_text`."""
    return list(json.loads(text))


def measure_cosines(cosines: list[Tensor]) -> dict[str, Any]:
    """Over all tensors: median and smallest cosine of raw and preconditioned gradient, largest 1 − cos."""
    values = torch.cat(cosines)
    values = values[torch.isfinite(values) & (values != 0)]  # a zero gradient has no direction
    if not values.numel():
        return {}
    return {
        "cosine_median": float(values.median()),
        "cosine_min": float(values.min()),
        "max_one_minus_cosine": float((1 - values).max()),
    }


def basis_rotation(q: Tensor, ready: Tensor) -> Tensor:
    """How far eigenbases are from a permutation of the axes: 1 − mean_j max_i Q_ij², [n]; 0 where not ready."""
    return torch.where(ready, 1 - q.square().amax(-2).mean(-1), torch.zeros(q.shape[0], dtype=q.dtype, device=q.device))


def _damping_shares(manager: "GRITManager") -> list[float]:
    shares = []
    for state in manager.states:
        if manager.config.mode == "eigen_adamw":  # damping plays no part in an eigenbasis
            continue
        for cov, lam in zip(state.covariances(), (state["lam_a"], state["lam_g"]), strict=True):
            mean = cov.diagonal(dim1=-2, dim2=-1).mean(-1)
            shares += (lam / mean.clamp_min(1e-38))[factors.informative(cov)].tolist()
    return shares


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else float("nan")


def effect(manager: "GRITManager") -> dict[str, Any]:
    """Whether preconditioning changes what the optimizer does, with the evidence; also as one log line."""
    total, ready = len(manager.pairs()), manager.ready_layers()
    record: dict[str, Any] = {"kind": "effect", "ready_layers": ready, "layers": total, **manager.measured}
    for norm in ("gradient_norm_raw", "gradient_norm_natural"):  # before clipping, as last taken
        if f"grit/{norm}" in manager.last_metrics:
            record[norm] = manager.last_metrics[f"grit/{norm}"]
    if not manager.preconditions():
        record |= {
            "effective": False,
            "reason": f"natural-gradient warm-up until step {manager.config.ng_warmup_steps}",
        }
    elif ready == 0:
        samples = max(float(s["samples"].max()) for s in manager.states)
        record |= {
            "effective": False,
            "reason": f"no factor is ready ({samples:.0f} of {manager.config.kfac_min_samples} samples)",
        }
    elif manager.config.mode == "eigen_adamw":
        parts = [basis_rotation(s[q], s[f"ready_{q[-1]}"]) for s in manager.states for q in ("q_a", "q_g")]
        rotation = float(torch.cat(parts).max())
        # Steps weighted along the directions (eigen_power) count as well: they come after Adam has normalised.
        weights = max(float((s[w] - 1).abs().max()) for s in manager.states for w in ("w_a", "w_g"))
        record |= {"max_basis_rotation": rotation, "max_weight_change": weights}
        record["effective"] = max(rotation, weights) > NO_EFFECT_COSINE
        if not record["effective"]:
            record["reason"] = "every eigenbasis is a permutation of the axes, which Adam does not see"
    else:
        spread = manager.measured.get("max_one_minus_cosine")
        share = _median(_damping_shares(manager))
        record |= {"damping_share": share}
        scale_matters = manager.config.mode == "sgd" and not manager.config.grafts
        if spread is None:
            record |= {"effective": False, "reason": "no gradient was preconditioned yet"}
        elif spread <= NO_EFFECT_COSINE and not scale_matters:
            by = "grafting removes" if manager.config.grafts else "AdamW cancels"
            record |= {
                "effective": False,
                "reason": "every preconditioner is a multiple of the identity (damping λ is "
                f"{share:.3g} times the mean eigenvalue), and {by} a constant factor; "
                "lower kfac_damping or use damping_mode 'relative'",
            }
        else:
            record["effective"] = True
    if record["effective"]:
        detail = (
            f"largest basis rotation {record['max_basis_rotation']:.3f}"
            if "max_basis_rotation" in record
            else f"cosine of raw and natural gradient: median {record['cosine_median']:.3f}, "
            f"smallest {record['cosine_min']:.3f}"
        )
        logger.info("GRIT: step %d: preconditioning applied to %d of %d layers; %s", manager.step, ready, total, detail)
    else:
        logger.warning("GRIT: step %d: no effective change: %s", manager.step, record["reason"])
    return record


def spectra(manager: "GRITManager") -> dict[str, Any]:
    """Eigenvalues, effective ranks, condition numbers and damping shares of every layer."""
    layers: dict[str, Any] = {}
    for state in manager.states:
        sides = {}
        for side, cov in zip("ag", state.covariances(), strict=True):
            values, _, _ = factors.eigh(cov)
            condition = values[:, 0] / values[:, -1].clamp_min(1e-38)
            mean = cov.diagonal(dim1=-2, dim2=-1).mean(-1)
            share = state[f"lam_{side}"] / mean.clamp_min(1e-38)
            sides[side] = (values, factors.effective_rank(values), condition, factors.informative(cov), share)
        for i, pair in enumerate(state.group.pairs):
            entry: dict[str, Any] = {"r": pair.rank, "k": int(state["k"][i]), "samples": float(state["samples"][i])}
            for side, (values, effective, condition, informed, share) in sides.items():
                entry[f"ready_{side}"] = bool(state[f"ready_{side}"][i])
                if bool(informed[i]):
                    entry[f"eigenvalues_{side}"] = values[i, : manager.config.log_top_eigs].tolist()
                    entry[f"effective_rank_{side}"] = float(effective[i])
                    entry[f"condition_{side}"] = float(condition[i])
                    if manager.config.mode != "eigen_adamw":
                        entry[f"damping_share_{side}"] = float(share[i])
            layers[pair.name] = entry
    return {"kind": "spectra", "layers": layers}


def totals(manager: "GRITManager") -> dict[str, Any]:
    """Capture and counts of a whole training."""
    return {
        "capture": manager.capture_kinds(),
        "skipped_steps": manager.skipped,
        "inversions": manager.inversions,
        "failed_inversions": manager.failed_inversions,
    }


def final(manager: "GRITManager") -> dict[str, Any]:
    """The last record: final ranks (final_k_a, final_k_b, base_r of the documents), capture, totals, heat maps."""
    from grit.rank_events import can_reproject, plan

    ranks = {}
    for state, i, pair in manager.layers():
        entry: dict[str, Any] = {"base_r": manager.base_rank[pair.name], "r": pair.rank}
        if manager.config.reprojection != "none" and can_reproject(manager.config, state, i):
            said = plan(manager, state, i, shrink=False)[2]
            entry |= {"final_k_a": said["k_a"], "final_k_b": said["k_b"]}
        ranks[pair.name] = entry
    record: dict[str, Any] = {
        "kind": "final",
        "ranks": ranks,
        **totals(manager),
        "effect": effect(manager),
        "spectra": spectra(manager)["layers"],
    }
    if manager.config.log_eig_heatmaps:
        wanted = manager.config.log_eig_heatmaps_modules
        chosen = [
            (state, i, pair)
            for state, i, pair in manager.layers()
            if not wanted or any(pair.name.endswith(w) for w in wanted)
        ]
        record["factors"] = {
            pair.name: {
                "cov_a": state.covariances()[0][i].tolist(),
                "cov_g": state.covariances()[1][i].tolist(),
            }
            for state, i, pair in (chosen if wanted else chosen[:4])
        }
    return record


def summary(manager: "GRITManager") -> dict[str, float]:
    """Means over the layers, for a Trainer's log; only what is known."""
    effective: dict[str, list[float]] = {"a": [], "g": []}
    condition: dict[str, list[float]] = {"a": [], "g": []}
    for state in manager.states:
        for side, cov in zip("ag", state.covariances(), strict=True):
            values, _, good = factors.eigh(cov)
            effective[side] += factors.effective_rank(values)[good].tolist()
            condition[side] += (values[:, 0] / values[:, -1].clamp_min(1e-38))[good].tolist()
    found = {
        "grit/rank_mean": sum(p.rank for p in manager.pairs()) / len(manager.pairs()),
        "grit/ready_layers": float(manager.ready_layers()),
        "grit/skipped_steps": float(manager.skipped),
        "grit/damping_share": _median(_damping_shares(manager)),
    }
    for side in "ag":
        found[f"grit/effective_rank_{side}"] = _median(effective[side])
        found[f"grit/condition_{side}"] = _median(condition[side])
    if "cosine_median" in manager.measured:
        found["grit/cosine_raw_natural"] = manager.measured["cosine_median"]
    return {name: value for name, value in found.items() if math.isfinite(value)}
