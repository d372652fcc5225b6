"""`RankSpace`: the r×r factors Σ_a and Σ_g of every LoRA pair, and how its rank follows them.

Layers of one shape are stacked in groups. The step itself is in `grit.eigen_adamw`, or for the paper's modes in
`grit.paper`; what is reported in `grit.telemetry`.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from grit import eigen_adamw, factors, paper
from grit.capture import HookCapture, all_reduce_sum
from grit.config import GRITConfig, GRITConfigError, GRITError
from grit.curvature import Event
from grit.eigen_adamw import Rotated
from grit.layers import LayerGroup, LoraPair, group_pairs, resize, write_patterns
from grit.state import GRADIENTS, HOOKS, UNDECIDED, GroupState, transformed
from grit.telemetry import RankSpaceReports

logger = logging.getLogger("grit")

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "state2")
"""Names in torch's optimizers and in bitsandbytes', which keeps small tensors in float32."""


class RankSpace(RankSpaceReports):
    """Factors, bases and ranks of all LoRA layers of a model."""

    capture: HookCapture | None

    def __init__(self, model: nn.Module, config: GRITConfig):
        super().__init__(model, config)
        if config.mode == "eigen_adamw" and config.grafting:  # other curvatures may graft there
            text = "grafting: has no effect in mode 'eigen_adamw', whose steps have the length of Adam's; "
            raise GRITConfigError(f"{text}expected false or null, got true")
        if config.kfac_inversion_device != "auto":
            try:
                torch.empty(0, device=config.kfac_inversion_device)
            except (RuntimeError, AssertionError) as error:
                raise ValueError(
                    f"kfac_inversion_device: expected 'auto' or a device of this machine, got "
                    f"{config.kfac_inversion_device!r}: {str(error).splitlines()[0]}"
                ) from error
        smallest = min(self._pairs, key=lambda p: p.rank)
        if config.min_lora_rank > smallest.rank:
            raise ValueError(
                f"min_lora_rank: expected at most the smallest rank, {smallest.rank} ({smallest.name}), "
                f"got {config.min_lora_rank}"
            )
        self.groups: list[LayerGroup] = group_pairs(self._pairs)
        self.states = [GroupState.fresh(group, config) for group in self.groups]
        self.failed_in_a_row: dict[str, int] = {}
        self.kept: dict[str, tuple[int, int]] = {}  # layer → k_a, k_b of the last reprojection
        self.kept_at = -1  # the step after which that was

    def pairs(self) -> list[LoraPair]:
        return [pair for group in self.groups for pair in group.pairs]

    def open(self) -> None:
        if self.config.capture != "gradients":
            self.capture = HookCapture(self.model, self.groups, self.config.normalize_delta)

    # Statistics

    def captures_at(self, step: int) -> bool:
        return step % self.config.grit_cov_update_freq == 0 or self._refreshes_every_step(step)

    def _refreshes_every_step(self, step: int) -> bool:
        """In the first steps of mode sgd, statistics and inverses are refreshed at every step.

        B starts at 0 and Σ_g grows with its square. A factor ten steps old is too small by orders of magnitude then,
        and a natural gradient that Adam does not normalize is as much too long; the trust region, measured with the
        same factor, does not notice.
        """
        return self.config.mode == "sgd" and step < 4 * self.config.grit_cov_update_freq

    def gather(self, step: int) -> list[Event]:
        events: list[Event] = []
        if self.capture is not None:
            all_reduce_sum([t for sums in self.capture.sums for t in (sums.hh, sums.dd, sums.tokens)])
            events = self._choose_sources([sums.tokens.cpu() > 0 for sums in self.capture.sums])
        for g, state in enumerate(self.states):
            if self.capture is not None:
                sums = self.capture.sums[g]
                tokens = sums.tokens.clamp_min(1.0).to(sums.hh.dtype)[:, None, None]
                state.update(HOOKS, sums.hh / tokens, sums.dd / tokens, sums.tokens, self.config.cov_decay)
            if bool((state["kind"] == GRADIENTS).any()):
                a, b = state.group.gradients("a"), state.group.gradients("b")
                samples = state.group.has_gradients().to(a.device).double() * min(a.shape[2], b.shape[1])
                state.update(GRADIENTS, b.mT @ b, a @ a.mT, samples, self.config.cov_decay)
        if self.capture is not None:
            self.capture.clear()
        return events

    def _choose_sources(self, reported: list[Tensor]) -> list[Event]:
        """Hooks for the layers whose hooks reported, gradients for those that have gradients all the same."""
        silent = []
        for state, reports in zip(self.states, reported, strict=True):
            kind = state["kind"]
            kind[reports & (kind == UNDECIDED)] = HOOKS
            silent.append(state.group.has_gradients() & ~reports & (kind != GRADIENTS))
        all_silent = torch.cat(silent).tolist()
        names = [pair.name for pair, is_silent in zip(self.pairs(), all_silent, strict=True) if is_silent]
        if not names:
            return []
        text = (
            f"{len(names)} layers have gradients but their hooks reported nothing (fused kernels read the weights "
            f"without calling the modules): {', '.join(names)}"
        )
        if self.config.pairing == "paper":
            raise GRITError(f"{text}; pairing 'paper' needs what hooks see: switch the fused kernels off")
        if self.config.capture == "hooks":
            raise GRITError(f"{text}; set capture to 'auto' or 'gradients', or switch the fused kernels off")
        logger.warning("GRIT: %s; using gradient statistics for them", text)
        for state, lost in zip(self.states, silent, strict=True):
            state["kind"][lost] = GRADIENTS
            where = lost.to(state["weight"].device)
            for name in ("ema_a", "ema_g", "weight", "samples"):
                state[name][where] = 0
        return [{"kind": "capture", "gradients": names}]

    def add_regularizers(self, step: int) -> float | None:
        return paper.add_regularizers(self.states, self.config, step)

    # Bases and inverses

    def refresh_due(self, step: int) -> bool:
        if self.last_refresh < 0 or self._refreshes_every_step(step):
            return True
        if step - self.last_refresh >= self.config.kfac_update_freq:
            return True
        enough = self.config.kfac_min_samples
        return self.captures_at(step) and any(
            bool((~(s["ready_a"] & s["ready_g"]) & (s["samples"] >= enough)).any()) for s in self.states
        )

    def refresh(self, step: int) -> list[Event]:
        in_eigenbasis = self.config.mode == "eigen_adamw"
        if in_eigenbasis and not self.preconditions(step):
            return []  # not counted, so that the bases are due as soon as the warm-up is over
        self.last_refresh = step
        self.inversions += 1
        refresh_group = eigen_adamw.refresh_bases if in_eigenbasis else paper.refresh_inverses
        text = "GRIT: the covariance of %s cannot be inverted (%d in a row); its gradients stay raw. Raise kfac_damping"
        events: list[Event] = []
        for state in self.states:
            for pair, failed in zip(state.group.pairs, refresh_group(state, self.config).tolist(), strict=True):
                if not failed:
                    self.failed_in_a_row.pop(pair.name, None)
                    continue
                self.failed_inversions += 1
                times = self.failed_in_a_row[pair.name] = self.failed_in_a_row.get(pair.name, 0) + 1
                if times in (1, 10, 100):
                    logger.warning(text, pair.name, times)
                    events.append({"kind": "singular", "layer": pair.name, "times": times})
        return events

    def precondition(self) -> float:
        return paper.natural_gradients(self.states, self.config)

    def rotated(self, param_groups: list[dict[str, Any]], step: int) -> list[Rotated]:
        return eigen_adamw.rotate_gradients(self.states, param_groups)

    # Ranks

    def reprojection_due(self, step: int) -> bool:
        config = self.config
        if config.reprojection == "none" or config.reprojection_freq <= 0:
            return False
        warm = step >= max(1, config.reprojection_warmup_steps)
        return warm and step % config.reprojection_freq == 0

    def final_shrink_due(self, step: int) -> bool:
        config = self.config
        if config.reprojection == "none" or not config.enable_rank_adaptation or config.rank_shrink == "never":
            return False
        return step >= max(config.rank_adaptation_start_step, config.reprojection_warmup_steps)

    def reproject(self, step: int, optimizer: torch.optim.Optimizer | None, shrink: bool) -> list[Event]:
        """Project the layers whose statistics are ready; the event has k_a, k_b, r and the relative change of ΔW."""
        entries: dict[str, dict[str, Any]] = {}
        changed: dict[str, dict[str, Tensor]] = {}
        resized: list[LoraPair] = []
        for state, i, pair in self.layers():
            if not self._can_reproject(state, i):
                continue
            left, right, k_a, k_b = self.plan(state, i, step, shrink)
            entry = entries[pair.name] = {"r": pair.rank, "k_a": k_a, "k_b": k_b, "relative_change": 0.0}
            k = min(k_a, k_b)
            if k == pair.rank and self.config.reprojection != "paper":
                state["k"][i] = k
                continue
            a, b = pair.a.detach(), pair.b.detach()
            new_a, new_b = left.to(a.device) @ a.double(), b.double() @ right.to(b.device)
            entry["relative_change"] = factors.relative_change(a, b, new_a, new_b)
            # The optimizer's averages (modes adamw and sgd) are natural gradients: like steps, they transform as the
            # weights do. Grafted ones have the length of raw gradients, which transform the other way.
            if self.config.grafts:
                move_moments(optimizer, pair, right.mT, left.mT)
            else:
                move_moments(optimizer, pair, left, right)
            changed[pair.name] = transformed(state.layer(i), left, right)
            changed[pair.name]["k"] = torch.tensor(k, dtype=torch.int64)
            if left.shape[0] < pair.rank:
                resize(pair, new_a, new_b, optimizer)
                resized.append(pair)
            else:
                pair.a.data.copy_(new_a)
                pair.b.data.copy_(new_b)
        if changed:
            self._regroup(changed)
        if resized:
            write_patterns(self.model, resized)
        events = self.refresh(step) if changed else []
        if not entries:
            return events
        self.kept_at, self.kept = step, {name: (entry["k_a"], entry["k_b"]) for name, entry in entries.items()}
        return [*events, {"kind": "reprojection", "mode": self.config.reprojection, "shrink": shrink,
                          "layers": entries}]  # fmt: skip

    def _can_reproject(self, state: GroupState, i: int) -> bool:
        """Whether layer i has the statistics: of both sides, but for "paper", which has its own gate, Σ_a suffices."""
        return bool(state["ready_a"][i]) and (self.config.reprojection == "paper" or bool(state["ready_g"][i]))

    def kept_directions(self, state: GroupState, i: int, step: int) -> tuple[int, int] | None:
        if self.config.reprojection == "none" or not self._can_reproject(state, i):
            return None
        _, _, k_a, k_b = self.plan(state, i, step, shrink=False)
        return k_a, k_b

    def plan(self, state: GroupState, i: int, step: int, shrink: bool) -> tuple[Tensor, Tensor, int, int]:
        """(L, R) of one layer, k_a, k_b; with `shrink` k rows and columns, else r×r projections of rank k."""
        config, pair, r = self.config, state.group.pairs[i], state.group.rank
        if step == self.kept_at and pair.name in self.kept:  # asked again: truncating twice would lose more
            k_a, k_b = self.kept[pair.name]
            k = min(k_a, k_b)
            if not shrink or k >= r:
                eye = torch.eye(r, dtype=torch.float64, device=pair.a.device)
                return eye, eye, k_a, k_b
            narrow = (pair.a if k_a <= k_b else pair.b.mT).detach().double()  # one factor has rank k already
            basis = torch.linalg.eigh(narrow @ narrow.mT)[1][:, r - k :]
            return basis.mT, basis, k_a, k_b
        cov_a, cov_g = (c[i] for c in state.covariances())
        adaptive = config.enable_rank_adaptation and step >= config.rank_adaptation_start_step
        least, tau = min(config.min_lora_rank, r), config.rank_adaptation_threshold

        def rank_of(values: Tensor) -> int:
            return factors.choose_rank(values, tau, least) if adaptive else max(least, min(config.reprojection_k, r))

        if config.reprojection == "paper":
            two_sided = config.use_two_sided_reprojection and bool(state["ready_g"][i])
            return paper.projections(cov_a, cov_g if two_sided else None, rank_of, shrink)
        left, right, spectrum = factors.balance(cov_a, cov_g)
        k = rank_of(spectrum)
        if left.shape[0] < k:  # fewer directions carry weight than are to be kept, and nothing says which others to add
            k = r
        left, right = left[:k], right[:, :k]
        if k == r:
            left = right = torch.eye(r, dtype=torch.float64, device=left.device)
        elif not shrink:
            left = right = right @ left
        return left, right, k, k

    def _regroup(self, changed: dict[str, dict[str, Tensor]]) -> None:
        """Sort the layers into groups again after shapes changed; `changed` has the new state of those layers."""
        layers = {pair.name: state.layer(i) for state, i, pair in self.layers()} | changed
        self._group()
        self.states = [GroupState.of_layers(g, [layers[p.name] for p in g.pairs]) for g in self.groups]

    def _group(self) -> None:
        """Group by the present shapes, in the model's order, so that a resumed run stacks its layers the same way."""
        place = {name: i for i, name in enumerate(self.base_rank)}
        self.groups = group_pairs(sorted(self.pairs(), key=lambda pair: place[pair.name]))
        if self.capture is not None:
            self.capture.close()
            self.capture = HookCapture(self.model, self.groups, self.config.normalize_delta, like=self.capture)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {
            "layers": {pair.name: state.layer(i) for state, i, pair in self.layers()},
            "failed_in_a_row": dict(self.failed_in_a_row),
            "kept": dict(self.kept),
            "numbers": {name: getattr(self, name) for name in _NUMBERS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError if the state has other layers or ranks, or comes from another mode."""
        names, saved = [p.name for p in self.pairs()], state["layers"]
        if set(names) != set(saved):
            odd = sorted(set(names) ^ set(saved))
            raise ValueError(f"expected a checkpoint of the same LoRA layers, got one that differs in: {odd[:6]}")
        odd = sorted({name for layer in saved.values() for name in layer} ^ set(self.states[0].t))
        if odd:
            raise ValueError(f"expected a checkpoint of mode {self.config.mode!r}, got one that differs in: {odd}")
        self.states = [GroupState.of_layers(g, [saved[p.name] for p in g.pairs]) for g in self.groups]
        self.failed_in_a_row, self.kept = dict(state["failed_in_a_row"]), dict(state["kept"])
        for name in _NUMBERS:
            setattr(self, name, state["numbers"][name])


_NUMBERS = ("last_refresh", "inversions", "failed_inversions", "kept_at")


def move_moments(optimizer: torch.optim.Optimizer | None, pair: LoraPair, left: Tensor, right: Tensor) -> None:
    """Transform A's moments from the left and B's from the right: first moments exactly, second ones as uncorrelated.

    Quantized moments (8 bit) are dropped.
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
