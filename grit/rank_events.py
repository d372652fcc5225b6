"""Reprojection of a whole model: which (L, R) each layer gets, weights, statistics and moments moved along."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grit import rank
from grit.config import GRITConfig
from grit.layers import LoraPair
from grit.regrouping import regroup
from grit.reprojection import balance, choose_rank, relative_change, top_projector
from grit.state import GroupState, transformed

if TYPE_CHECKING:
    from grit.manager import GRITManager

logger = logging.getLogger("grit")

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "state2")
"""Names in torch's optimizers and in bitsandbytes', which keeps small tensors in float32."""


def can_reproject(config: GRITConfig, state: GroupState, i: int) -> bool:
    """Whether layer i has the statistics: of both sides; in mode "paper", whose gate is in `plan`, Σ_a is enough."""
    return bool(state["ready_a"][i]) and (config.reprojection == "paper" or bool(state["ready_g"][i]))


def plan(manager: "GRITManager", state: GroupState, i: int, shrink: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The (L, R) of one layer and what is to be said about it.

    Args:
        manager: For settings and the step.
        state: Of the layer's group.
        i: The layer's place.
        shrink: L and R get k rows and columns; else they are r×r projections of rank k.
    """
    config, r = manager.config, state.group.rank
    done = _kept_just_now(manager, state.group.pairs[i].name)
    if done is not None:  # asked again, what was truncated would lose some more
        return *_as_it_is(state.group.pairs[i], done, shrink), {"k_a": done["k_a"], "k_b": done["k_b"]}
    cov_a, cov_g = (c[i] for c in state.covariances())
    adaptive = config.enable_rank_adaptation and manager.step >= config.rank_adaptation_start_step
    least, tau = min(config.min_lora_rank, r), config.rank_adaptation_threshold

    def rank_of(values: Tensor) -> int:
        return choose_rank(values, tau, least) if adaptive else max(least, min(config.reprojection_k, r))

    if config.reprojection == "balanced":
        left, right, spectrum = balance(cov_a, cov_g)
        k = rank_of(spectrum)
        if left.shape[0] < k:  # fewer directions have any weight than are to be kept: nothing says which others
            k = r
        left, right = left[:k], right[:, :k]
        if k == r:
            left = right = torch.eye(r, dtype=torch.float64, device=left.device)
        elif not shrink:
            left = right = right @ left
        return left, right, {"k_a": k, "k_b": k}
    projector_a, values_a = top_projector(cov_a, r)
    k_a = rank_of(values_a)
    projector_a, _ = top_projector(cov_a, k_a)
    # The authors' gate: without enough samples on the gradient side, A's basis serves both.
    two_sided = config.use_two_sided_reprojection and bool(state["ready_g"][i])
    k_b, projector_b = k_a, projector_a
    if two_sided:
        k_b = rank_of(top_projector(cov_g, r)[1])
        projector_b, _ = top_projector(cov_g, k_b)
    if not shrink:
        return projector_a, projector_b, {"k_a": k_a, "k_b": k_b}
    # B P_b P_a A has rank min(k_a, k_b): split it where it is narrowest.
    basis = torch.linalg.eigh(projector_a if k_a <= k_b else projector_b)[1][:, r - min(k_a, k_b) :]
    if k_a <= k_b:
        return basis.mT, projector_b @ basis, {"k_a": k_a, "k_b": k_b}
    return basis.mT @ projector_a, basis, {"k_a": k_a, "k_b": k_b}


def _kept_just_now(manager: "GRITManager", name: str) -> dict[str, Any] | None:
    """What a reprojection at this very step, since which no weight has moved, kept of a layer."""
    for record in reversed(manager.history):
        if record["step"] < manager.step:
            break
        if record["kind"] == "reprojection" and record["step"] == manager.step:  # not after: gone back to the best one
            found: dict[str, Any] | None = record["layers"].get(name)
            return found
    return None


def _as_it_is(pair: LoraPair, done: dict[str, Any], shrink: bool) -> tuple[Tensor, Tensor]:
    """(L, R) that leave B A alone, of which one factor has rank k already."""
    r, k = pair.rank, min(done["k_a"], done["k_b"])
    if not shrink or k >= r:
        eye = torch.eye(r, dtype=torch.float64, device=pair.a.device)
        return eye, eye
    narrow = (pair.a if done["k_a"] <= done["k_b"] else pair.b.mT).detach().double()
    basis = torch.linalg.eigh(narrow @ narrow.mT)[1][:, r - k :]
    return basis.mT, basis


def reproject(manager: "GRITManager", optimizer: torch.optim.Optimizer | None, shrink: bool) -> dict[str, Any]:
    """Reproject every layer whose statistics are ready (`can_reproject`).

    Returns:
        The event for the log: per layer k_a, k_b, r and the relative change of ΔW = s·B·A.
    """
    layers: dict[str, dict[str, Any]] = {}
    changed: dict[str, dict[str, Tensor]] = {}
    resized: list[LoraPair] = []
    for state, i, pair in manager.layers():
        if not can_reproject(manager.config, state, i):
            continue
        left, right, said = plan(manager, state, i, shrink)
        kept = min(said["k_a"], said["k_b"])
        if kept < pair.rank or manager.config.reprojection == "paper":
            a, b = pair.a.detach(), pair.b.detach()
            new_a, new_b = left.to(a.device) @ a.double(), b.double() @ right.to(b.device)
            said["relative_change"] = relative_change(a, b, new_a, new_b)
            # What the optimizer has added up (modes adamw and sgd) are natural gradients: like steps, they go the way
            # of the weights. Grafted ones have the length of raw gradients, which go the other way.
            if manager.config.grafts:
                _move_moments(optimizer, pair, right.mT, left.mT)
            else:
                _move_moments(optimizer, pair, left, right)
            changed[pair.name] = transformed(state.layer(i), left, right)
            if left.shape[0] < pair.rank:
                said["r"] = pair.rank
                rank.resize(pair, new_a, new_b, optimizer)
                resized.append(pair)
            else:
                pair.a.data.copy_(new_a)
                pair.b.data.copy_(new_b)
        else:
            said["relative_change"] = 0.0
        if pair.name in changed:
            changed[pair.name]["k"] = torch.tensor(kept, dtype=torch.int64)
        else:
            state["k"][i] = kept
        layers[pair.name] = {"r": pair.rank, **said}
    if changed:
        regroup(manager, changed)
    if resized:
        rank.write_patterns(manager.model, resized)
    if changed:
        manager.update_and_invert_factors()
    if layers:
        worst = max(layers.items(), key=lambda item: item[1]["relative_change"])
        logger.info(
            "GRIT: step %d: reprojection (%s%s), mean k %.1f, largest relative change of ΔW %.2e (%s)",
            manager.step,
            manager.config.reprojection,
            ", tensors shrink" if shrink else "",
            sum(min(v["k_a"], v["k_b"]) for v in layers.values()) / len(layers),
            worst[1]["relative_change"],
            worst[0],
        )
    return {"kind": "reprojection", "mode": manager.config.reprojection, "shrink": shrink, "layers": layers}


def _move_moments(optimizer: torch.optim.Optimizer | None, pair: LoraPair, left: Tensor, right: Tensor) -> None:
    """A's from the left, B's from the right: first moments exactly, second ones as of uncorrelated coordinates.

    Quantized ones (8 bit) are dropped.
    """
    if optimizer is None:
        return
    for parameter, is_a in ((pair.a, True), (pair.b, False)):
        state = optimizer.state.get(parameter)
        if not state:
            continue
        dtype = torch.promote_types(parameter.dtype, torch.float32)  # not in 16 bit
        matrix = (left if is_a else right).to(parameter.device, dtype)
        for name, value in list(state.items()):
            if not isinstance(value, Tensor) or value.dim() == 0 or value.numel() == 1:
                continue
            if value.shape != parameter.shape or not value.is_floating_point():
                logger.warning("GRIT: %s: optimizer state %r cannot be transformed; reset", pair.name, name)
                state.clear()
                break
            turn = matrix.square() if name in SECOND_MOMENTS else matrix
            moved = turn @ value.to(turn.dtype) if is_a else value.to(turn.dtype) @ turn
            state[name] = moved.to(value.dtype)
