"""From what hooks and gradients say to moving averages, and from those to inverses: one step of all layers."""

import logging
from typing import TYPE_CHECKING

from torch import Tensor

from grit.distributed import all_reduce_sum
from grit.errors import CaptureError
from grit.state import GRADIENTS, HOOKS, UNDECIDED, GroupState

if TYPE_CHECKING:
    from grit.manager import GRITManager

logger = logging.getLogger("grit")


def gather(manager: "GRITManager") -> None:
    """Take what was captured since the last step into the moving averages; averaged over all ranks."""
    if manager.capture is not None:
        all_reduce_sum([t for sums in manager.capture.sums for t in (sums.hh, sums.dd, sums.tokens)])
        _decide(manager, [sums.tokens.cpu() > 0 for sums in manager.capture.sums])
    for g, state in enumerate(manager.states):
        if manager.capture is not None:
            sums = manager.capture.sums[g]
            tokens = sums.tokens.clamp_min(1.0).to(sums.hh.dtype)[:, None, None]
            state.update(HOOKS, sums.hh / tokens, sums.dd / tokens, sums.tokens, manager.config.cov_decay)
        if bool((state["kind"] == GRADIENTS).any()):
            _update_from_gradients(state, manager.config.cov_decay)
    if manager.capture is not None:
        manager.capture.clear()


def _update_from_gradients(state: GroupState, decay: float) -> None:
    gradient_a, gradient_b = state.group.gradients("a"), state.group.gradients("b")
    has = state.group.has_gradients().to(gradient_a.device)
    samples = has.double() * min(gradient_a.shape[2], gradient_b.shape[1])
    state.update(GRADIENTS, gradient_b.mT @ gradient_b, gradient_a @ gradient_a.mT, samples, decay)


def _decide(manager: "GRITManager", reported: list[Tensor]) -> None:
    silent = []
    for state, seen in zip(manager.states, reported, strict=True):
        kind = state["kind"]
        kind[seen & (kind == UNDECIDED)] = HOOKS
        silent.append(state.group.has_gradients() & ~seen & (kind != GRADIENTS))
    names = [
        pair.name
        for s, lost in zip(manager.states, silent, strict=True)
        for pair, is_lost in zip(s.group.pairs, lost.tolist(), strict=True)
        if is_lost
    ]
    if not names:
        return
    text = (
        f"{len(names)} layers have gradients but their hooks reported nothing (fused kernels read the weights "
        f"without calling the modules): {', '.join(names)}"
    )
    if manager.config.capture == "hooks":
        raise CaptureError(f"{text}; set capture to 'auto' or 'gradients', or switch the fused kernels off")
    logger.warning("GRIT: %s; using gradient statistics for them", text)
    for state, lost in zip(manager.states, silent, strict=True):
        state["kind"][lost] = GRADIENTS
        where = lost.to(state["weight"].device)
        for name in ("ema_a", "ema_g", "weight", "samples"):
            state[name][where] = 0
    manager.add_record({"kind": "capture", "gradients": names})


def waiting(manager: "GRITManager") -> bool:
    """Whether a layer has seen enough tokens to be inverted for the first time."""
    enough = manager.config.kfac_min_samples
    return any(bool((~(s["ready_a"] & s["ready_g"]) & (s["samples"] >= enough)).any()) for s in manager.states)


def invert(manager: "GRITManager") -> None:
    """Invert (or diagonalise) every factor that has seen enough tokens; others leave gradients as they are."""
    manager.inversions += 1
    for state in manager.states:
        failed = state.invert(manager.config)
        for i, pair in enumerate(state.group.pairs):
            if not bool(failed[i]):
                manager.failed_in_a_row.pop(pair.name, None)
                continue
            manager.failed_inversions += 1
            manager.failed_in_a_row[pair.name] = manager.failed_in_a_row.get(pair.name, 0) + 1
            if manager.failed_in_a_row[pair.name] in (1, 10, 100):
                logger.warning(
                    "GRIT: the covariance of %s cannot be inverted (%d in a row); its gradients stay as they are. "
                    "Raise kfac_damping",
                    pair.name,
                    manager.failed_in_a_row[pair.name],
                )
                manager.add_record(
                    {"kind": "singular", "layer": pair.name, "times": manager.failed_in_a_row[pair.name]}
                )
