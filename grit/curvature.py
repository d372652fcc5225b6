"""What a `Manager` steps with: `Curvature`, the interface, and `RankSpace`, the r×r factors that make GRIT.

Other estimates of curvature (`grit_vlm`) implement the same interface. A curvature never writes to the log: what it has
to tell, it returns as plain dictionaries.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grit import factors, schedule
from grit.capture import Capture, CaptureError, HookCapture
from grit.config import GRITConfig, GRITConfigError
from grit.layers import LayerGroup, LoraPair, find_pairs, fit_to_checkpoint, group_pairs, resize, write_patterns
from grit.state import GRADIENTS, HOOKS, KINDS, UNDECIDED, GroupState, transformed

logger = logging.getLogger("grit")

Event = dict[str, Any]

NO_EFFECT_COSINE = 1e-6
"""1 − cos of raw and preconditioned gradient below which a tensor counts as scaled only (an angle of 0.08°)."""

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "state2")
"""Names in torch's optimizers and in bitsandbytes', which keeps small tensors in float32."""


@dataclass
class Turned:
    """A stack of n weights of one shape, with their gradient in the basis in which Adam's moments are kept."""

    parameters: list[nn.Parameter]
    options: dict[str, Any]  # their parameter group in the optimizer
    gradient: Tensor  # [n, …], in the basis
    m: Tensor  # moments [n, …], changed in place; stacks of more layers where `rows` says which are meant
    v: Tensor
    steps: Tensor  # Adam's step count [n], from 1, on the CPU
    back: Callable[[Tensor], Tensor]  # Adam's directions [n, …] → changes in the weights' own coordinates, [n, *shape]
    rows: Tensor | None = None


class Curvature(ABC):
    """An estimate of the curvature of a model's LoRA layers, and what is done to gradients with it."""

    def __init__(self, model: nn.Module, config: GRITConfig):
        config.validate()
        self.model, self.config = model, config
        self._pairs = find_pairs(model)
        self.base_rank = {p.name: p.rank for p in self._pairs}  # at the start
        self.capture: Capture | None = None  # None while closed, or where there are no hooks
        self.last_refresh, self.inversions, self.failed_inversions = -1, 0, 0

    # Life cycle

    def pairs(self) -> list[LoraPair]:
        return self._pairs

    def open(self) -> None:
        """Attach the hooks, as `capture`; called while there are none."""

    def close(self) -> None:
        if self.capture is not None:
            self.capture.close()
            self.capture = None

    # One step, in this order

    @abstractmethod
    def captures_at(self, step: int) -> bool: ...

    def preconditions(self, step: int) -> bool:
        return step >= self.config.ng_warmup_steps

    def forget(self) -> None:
        """The step is left out: what was captured for it does not count."""
        if self.capture is not None:
            self.capture.clear()

    @abstractmethod
    def gather(self, step: int) -> list[Event]:
        """Take what was captured since the last step into the statistics; CaptureError where hooks are silent."""

    def add_regularizers(self, step: int) -> float | None:
        """Add penalties' gradients to `.grad`; returns their value, None where there are none."""
        return None

    def refresh_due(self, step: int) -> bool:
        return False

    def refresh(self, step: int) -> list[Event]:
        return []

    @abstractmethod
    def precondition(self, measure: bool) -> tuple[float, list[Tensor]]:
        """Replace every `.grad` by its natural gradient (modes adamw and sgd).

        Returns Σ ⟨∇, natural ∇⟩ (mode sgd; else 0), and if measured the cosines of raw and natural gradients, [n] each.
        """

    @abstractmethod
    def turned(self, param_groups: list[dict[str, Any]], step: int) -> list[Turned]:
        """What Adam steps in a basis of its own (mode eigen_adamw); counts up the steps of these layers."""

    def limit(
        self, turned: list[Turned], changes: list[Tensor], step: int
    ) -> tuple[list[Tensor], dict[str, float], float]:
        """Changes of the weights as they are to be made, numbers for the log, and a factor on the learning rate."""
        return changes, {}, 1.0

    @property
    def wants_losses(self) -> bool:
        return False

    def observe_loss(self, loss: float) -> None:
        """The mean loss of a step."""

    # Ranks

    def reprojection_due(self, step: int) -> bool:
        return False

    def final_shrink_due(self, step: int) -> bool:
        return False

    def reproject(self, step: int, optimizer: torch.optim.Optimizer | None, shrink: bool) -> list[Event]:
        """Project every layer onto its leading directions; tensors keep their size, or get smaller (`shrink`)."""
        return []

    def fit_to_checkpoint(self, folder: Path, optimizer: torch.optim.Optimizer | None) -> None:
        """Before an adapter is loaded: give the layers the ranks that it has."""

    def restart(self) -> None:
        """Start anew: the weights have come from somewhere else, without statistics."""

    # What is told, and checkpoints

    @abstractmethod
    def unreported(self) -> list[str]: ...

    @abstractmethod
    def capture_kinds(self) -> dict[str, str]:
        """Layer → where its statistics come from: hooks, gradients, undecided."""

    @abstractmethod
    def ready_layers(self) -> int: ...

    @abstractmethod
    def effect(self, step: int, measured: dict[str, Any]) -> dict[str, Any]:
        """Evidence that the optimizer steps differently; with a "reason" where it does not."""

    @abstractmethod
    def spectra(self) -> dict[str, dict[str, Any]]: ...

    def summary(self) -> dict[str, float]:
        """Numbers over all layers for a Trainer's log, NaN where not known."""
        return {}

    def final(self, step: int) -> dict[str, Any]:
        """For the last record: "ranks" of each layer, and more."""
        return {"ranks": {pair.name: {"base_r": self.base_rank[pair.name], "r": pair.rank} for pair in self.pairs()}}

    @abstractmethod
    def readings(self, step: int) -> list[dict[str, Any]]:
        """The state of every layer's preconditioner, with the fields of `probes.LayerReading`."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text only (loads with weights_only=True)."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RankSpace(Curvature):
    """Σ_a and Σ_g [r, r] of every LoRA pair, layers of one shape stacked in groups.

    kfac pairing: ∇A ← Σ_g⁻¹ ∇A, ∇B ← ∇B Σ_a⁻¹; paper pairing: ∇A ← Σ_a⁻¹ ∇A, ∇B ← ∇B Σ_g⁻¹.
    """

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
        self.trend = schedule.LossTrend(config)
        self.failed_in_a_row: dict[str, int] = {}
        self.kept: dict[str, tuple[int, int]] = {}  # layer → k_a, k_b of the last reprojection
        self.kept_at = -1  # the step after which that was

    def pairs(self) -> list[LoraPair]:
        return [pair for group in self.groups for pair in group.pairs]

    def layers(self) -> Iterator[tuple[GroupState, int, LoraPair]]:
        for state in self.states:
            for i, pair in enumerate(state.group.pairs):
                yield state, i, pair

    def open(self) -> None:
        if self.config.capture != "gradients":
            self.capture = HookCapture(self.model, self.groups, self.config.normalize_delta)

    # Statistics

    def captures_at(self, step: int) -> bool:
        return step % self.config.grit_cov_update_freq == 0 or self._starts(step)

    def _starts(self, step: int) -> bool:
        """Whether everything is refreshed at every step: mode sgd, in the first steps.

        B starts at 0 and Σ_g grows with its square. A factor ten steps old is too small by orders of magnitude then,
        and a natural gradient without Adam's normalisation as much too long; the trust region, measured with the same
        factor, does not see it.
        """
        return self.config.mode == "sgd" and step < 4 * self.config.grit_cov_update_freq

    def gather(self, step: int) -> list[Event]:
        events: list[Event] = []
        if self.capture is not None:
            schedule.all_reduce_sum([t for sums in self.capture.sums for t in (sums.hh, sums.dd, sums.tokens)])
            events = self._decide([sums.tokens.cpu() > 0 for sums in self.capture.sums])
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

    def _decide(self, reported: list[Tensor]) -> list[Event]:
        silent = []
        for state, seen in zip(self.states, reported, strict=True):
            kind = state["kind"]
            kind[seen & (kind == UNDECIDED)] = HOOKS
            silent.append(state.group.has_gradients() & ~seen & (kind != GRADIENTS))
        all_silent = torch.cat(silent).tolist()
        names = [pair.name for pair, is_silent in zip(self.pairs(), all_silent, strict=True) if is_silent]
        if not names:
            return []
        text = (
            f"{len(names)} layers have gradients but their hooks reported nothing (fused kernels read the weights "
            f"without calling the modules): {', '.join(names)}"
        )
        if self.config.pairing == "paper":
            raise CaptureError(f"{text}; pairing 'paper' needs what hooks see: switch the fused kernels off")
        if self.config.capture == "hooks":
            raise CaptureError(f"{text}; set capture to 'auto' or 'gradients', or switch the fused kernels off")
        logger.warning("GRIT: %s; using gradient statistics for them", text)
        for state, lost in zip(self.states, silent, strict=True):
            state["kind"][lost] = GRADIENTS
            where = lost.to(state["weight"].device)
            for name in ("ema_a", "ema_g", "weight", "samples"):
                state[name][where] = 0
        return [{"kind": "capture", "gradients": names}]

    def add_regularizers(self, step: int) -> float | None:
        """Add ∂/∂A and ∂/∂B of λ_kfac·[tr(AᵀΣ_gA) + tr(BΣ_aBᵀ)] + λ_reproj·[‖(I−P_a)A‖² + ‖B(I−P_g)‖²] to `.grad`.

        P_a and P_g project onto the leading `reprojection_k` eigenvectors of Σ_a and Σ_g, the directions that the
        paper's reprojection keeps. Gradients instead of a term of the loss work under any trainer and any loss. Layers
        without statistics or gradients are left out.
        """
        config = self.config
        if not (config.lambda_kfac or config.lambda_reproj):
            return None
        weight = schedule.ramp(step, config.regularizer_warmup_steps)
        curvature, reprojection = weight * config.lambda_kfac, weight * config.lambda_reproj
        total = 0.0
        for state in self.states:
            group = state.group
            cov_a, cov_g = state.covariances()
            eye = torch.eye(group.rank, dtype=group.dtype, device=group.device)
            rest = {}
            for side, cov in (("a", cov_a), ("g", cov_g)):
                _, vectors, good = factors.eigh(cov)
                top = vectors[:, :, : config.reprojection_k]
                rest[side] = torch.where(good[:, None, None], eye - top @ top.mT, torch.zeros_like(eye))
            a = torch.stack([p.detach().to(group.dtype) for p in group.params_a])
            b = torch.stack([p.detach().to(group.dtype) for p in group.params_b])
            push_a = curvature * (cov_g @ a) + reprojection * (rest["a"] @ a)
            push_b = curvature * (b @ cov_a) + reprojection * (b @ rest["g"])
            has = group.has_gradients().to(group.device)[:, None, None]
            # Both penalties are quadratic forms: ⟨W, ½·gradient⟩ is their value.
            total += float(((a * push_a) * has).sum() + ((b * push_b) * has).sum())
            group.put_gradients("a", group.gradients("a") + 2 * push_a * has)
            group.put_gradients("b", group.gradients("b") + 2 * push_b * has)
        return total

    def refresh_due(self, step: int) -> bool:
        if self.last_refresh < 0 or self._starts(step):
            return True
        if step - self.last_refresh >= self.trend.interval(self.config.kfac_update_freq):
            return True
        enough = self.config.kfac_min_samples
        return self.captures_at(step) and any(
            bool((~(s["ready_a"] & s["ready_g"]) & (s["samples"] >= enough)).any()) for s in self.states
        )

    def refresh(self, step: int) -> list[Event]:
        if self.config.mode == "eigen_adamw" and not self.preconditions(step):
            return []  # not counted, so that the bases are due as soon as the warm-up is over
        self.last_refresh = step
        self.inversions += 1
        text = "GRIT: the covariance of %s cannot be inverted (%d in a row); its gradients stay raw. Raise kfac_damping"
        events: list[Event] = []
        for state in self.states:
            for pair, failed in zip(state.group.pairs, state.invert(self.config).tolist(), strict=True):
                if not failed:
                    self.failed_in_a_row.pop(pair.name, None)
                    continue
                self.failed_inversions += 1
                times = self.failed_in_a_row[pair.name] = self.failed_in_a_row.get(pair.name, 0) + 1
                if times in (1, 10, 100):
                    logger.warning(text, pair.name, times)
                    events.append({"kind": "singular", "layer": pair.name, "times": times})
        return events

    # Steps

    def precondition(self, measure: bool) -> tuple[float, list[Tensor]]:
        length = 0.0
        cosines: list[Tensor] = []
        left, right = ("inv_g", "inv_a") if self.config.pairing == "kfac" else ("inv_a", "inv_g")
        for state in self.states:
            for side in ("a", "b"):
                raw = state.group.gradients(side)
                new = state[left] @ raw if side == "a" else raw @ state[right]
                if self.config.grafts:
                    norm, now = torch.linalg.matrix_norm(raw), torch.linalg.matrix_norm(new)
                    new = new * (norm / now.clamp_min(1e-30))[:, None, None]
                if measure:
                    pair = raw.double().flatten(1), new.double().flatten(1)
                    cosines.append(nn.functional.cosine_similarity(*pair, eps=1e-30))
                if self.config.mode == "sgd":
                    length += float((raw * new).sum())
                state.group.put_gradients(side, new)
        return length, cosines

    def turned(self, param_groups: list[dict[str, Any]], step: int) -> list[Turned]:
        """Q_gᵀ ∇A and ∇B Q_a, for layers that have gradients (the idea of SOAP, Vyas et al. 2024, in rank space)."""
        place = {id(p): i for i, group in enumerate(param_groups) for p in group["params"]}
        found = []
        for state in self.states:
            group = state.group
            members: dict[tuple[int, int], list[int]] = {}
            for i, (a, b) in enumerate(zip(group.params_a, group.params_b, strict=True)):
                if a.grad is not None and b.grad is not None:
                    members.setdefault((place[id(a)], place[id(b)]), []).append(i)
            for of, among in members.items():
                rows = None if len(among) == len(group) else torch.tensor(among, device=group.device)
                state["steps"][slice(None) if rows is None else among] += 1
                for side, of_side in zip("ab", of, strict=True):
                    found.append(self._turn(state, side, param_groups[of_side], among, rows))
        return found

    def _turn(
        self, state: GroupState, side: str, options: dict[str, Any], among: list[int], rows: Tensor | None
    ) -> Turned:
        def pick(tensor: Tensor) -> Tensor:
            return tensor if rows is None else tensor[rows]

        group, is_a = state.group, side == "a"
        gradient, basis = pick(group.gradients(side)), pick(state["q_g" if is_a else "q_a"])
        weighted = basis * pick(state["w_g" if is_a else "w_a"])[:, None, :]
        parameters = group.params_a if is_a else group.params_b
        return Turned(
            parameters=[parameters[i] for i in among],
            options=options,
            gradient=basis.mT @ gradient if is_a else gradient @ basis,
            m=state[f"m_{side}"],
            v=state[f"v_{side}"],
            steps=state["steps"] if rows is None else state["steps"][among],
            back=lambda direction: weighted @ direction if is_a else direction @ weighted.mT,
            rows=rows,
        )

    @property
    def wants_losses(self) -> bool:
        return self.config.adaptive_schedule

    def observe_loss(self, loss: float) -> None:
        self.trend.see(loss)

    # Ranks

    def reprojection_due(self, step: int) -> bool:
        config = self.config
        if config.reprojection == "none" or config.reprojection_freq <= 0:
            return False
        warm = step >= max(1, config.reprojection_warmup_steps)
        return warm and step % self.trend.interval(config.reprojection_freq) == 0

    def final_shrink_due(self, step: int) -> bool:
        config = self.config
        if config.reprojection == "none" or not config.enable_rank_adaptation or config.rank_shrink == "never":
            return False
        return step >= max(config.rank_adaptation_start_step, config.reprojection_warmup_steps)

    def reproject(self, step: int, optimizer: torch.optim.Optimizer | None, shrink: bool) -> list[Event]:
        """Layers whose statistics are ready. The event has k_a, k_b, r and the relative change of ΔW of each."""
        told: dict[str, dict[str, Any]] = {}
        changed: dict[str, dict[str, Tensor]] = {}
        resized: list[LoraPair] = []
        for state, i, pair in self.layers():
            if not self._can_reproject(state, i):
                continue
            left, right, k_a, k_b = self.plan(state, i, step, shrink)
            said: dict[str, Any] = {"r": pair.rank, "k_a": k_a, "k_b": k_b, "relative_change": 0.0}
            kept = min(k_a, k_b)
            if kept < pair.rank or self.config.reprojection == "paper":
                a, b = pair.a.detach(), pair.b.detach()
                new_a, new_b = left.to(a.device) @ a.double(), b.double() @ right.to(b.device)
                said["relative_change"] = factors.relative_change(a, b, new_a, new_b)
                # What the optimizer has added up (modes adamw and sgd) are natural gradients: like steps, they go the
                # way of the weights. Grafted ones have the length of raw gradients, which go the other way.
                if self.config.grafts:
                    move_moments(optimizer, pair, right.mT, left.mT)
                else:
                    move_moments(optimizer, pair, left, right)
                changed[pair.name] = transformed(state.layer(i), left, right)
                changed[pair.name]["k"] = torch.tensor(kept, dtype=torch.int64)
                if left.shape[0] < pair.rank:
                    resize(pair, new_a, new_b, optimizer)
                    resized.append(pair)
                else:
                    pair.a.data.copy_(new_a)
                    pair.b.data.copy_(new_b)
            else:
                state["k"][i] = kept
            told[pair.name] = said
        if changed:
            self._regroup(changed)
        if resized:
            write_patterns(self.model, resized)
        events = self.refresh(step) if changed else []
        if not told:
            return events
        self.kept_at, self.kept = step, {name: (said["k_a"], said["k_b"]) for name, said in told.items()}
        return [*events, {"kind": "reprojection", "mode": self.config.reprojection, "shrink": shrink, "layers": told}]

    def _can_reproject(self, state: GroupState, i: int) -> bool:
        """Whether layer i has the statistics: of both sides; for "paper", whose gate is in `plan`, Σ_a is enough."""
        return bool(state["ready_a"][i]) and (self.config.reprojection == "paper" or bool(state["ready_g"][i]))

    def plan(self, state: GroupState, i: int, step: int, shrink: bool) -> tuple[Tensor, Tensor, int, int]:
        """(L, R) of one layer, k_a, k_b; with `shrink` k rows and columns, else r×r projections of rank k."""
        config, pair, r = self.config, state.group.pairs[i], state.group.rank
        if step == self.kept_at and pair.name in self.kept:  # asked again, what was truncated would lose some more
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

        if config.reprojection == "balanced":
            left, right, spectrum = factors.balance(cov_a, cov_g)
            k = rank_of(spectrum)
            if left.shape[0] < k:  # fewer directions have any weight than are to be kept: nothing says which others
                k = r
            left, right = left[:k], right[:, :k]
            if k == r:
                left = right = torch.eye(r, dtype=torch.float64, device=left.device)
            elif not shrink:
                left = right = right @ left
            return left, right, k, k
        k_a = rank_of(factors.top_projector(cov_a, r)[1])
        projector_a, _ = factors.top_projector(cov_a, k_a)
        # The authors' gate: without enough samples on the gradient side, A's basis serves both.
        k_b, projector_b = k_a, projector_a
        if config.use_two_sided_reprojection and bool(state["ready_g"][i]):
            k_b = rank_of(factors.top_projector(cov_g, r)[1])
            projector_b, _ = factors.top_projector(cov_g, k_b)
        if not shrink:
            return projector_a, projector_b, k_a, k_b
        # B P_b P_a A has rank min(k_a, k_b): split it where it is narrowest.
        basis = torch.linalg.eigh(projector_a if k_a <= k_b else projector_b)[1][:, r - min(k_a, k_b) :]
        if k_a <= k_b:
            return basis.mT, projector_b @ basis, k_a, k_b
        return basis.mT @ projector_a, basis, k_a, k_b

    def _regroup(self, changed: dict[str, dict[str, Tensor]]) -> None:
        """Sort the layers into groups anew after shapes changed; `changed` has the new state of those layers."""
        layers = {pair.name: state.layer(i) for state, i, pair in self.layers()} | changed
        self._group()
        self.states = [GroupState.of_layers(g, [layers[p.name] for p in g.pairs]) for g in self.groups]

    def _group(self) -> None:
        """Groups by today's shapes, in the model's order: a resumed run stacks its layers as an undisturbed one."""
        place = {name: i for i, name in enumerate(self.base_rank)}
        self.groups = group_pairs(sorted(self.pairs(), key=lambda pair: place[pair.name]))
        if self.capture is not None:
            self.capture.close()
            self.capture = HookCapture(self.model, self.groups, self.config.normalize_delta, like=self.capture)

    def fit_to_checkpoint(self, folder: Path, optimizer: torch.optim.Optimizer | None) -> None:
        if fit_to_checkpoint(self.model, self.pairs(), folder, self.base_rank, optimizer):
            self.restart()

    def restart(self) -> None:
        seen = {pair.name: state["samples"][i].clone() for state, i, pair in self.layers()}
        self._group()
        self.states = [GroupState.fresh(group, self.config) for group in self.groups]
        for state, i, pair in self.layers():
            state["samples"][i] = seen[pair.name]  # who has reported has reported, whatever became of it
        self.kept, self.kept_at = {}, -1

    # What is told

    def unreported(self) -> list[str]:
        return [pair.name for state, i, pair in self.layers() if not bool(state["samples"][i] > 0)]

    def capture_kinds(self) -> dict[str, str]:
        return {pair.name: KINDS[int(state["kind"][i])] for state, i, pair in self.layers()}

    def ready_layers(self) -> int:
        return sum(int((s["ready_a"] | s["ready_g"]).sum()) for s in self.states)

    def effect(self, step: int, measured: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        said: dict[str, Any]
        if not self.preconditions(step):
            return {"reason": f"natural-gradient warm-up until step {config.ng_warmup_steps}"}
        if not self.ready_layers():
            samples = max(float(s["samples"].max()) for s in self.states)
            return {"reason": f"no factor is ready ({samples:.0f} of {config.kfac_min_samples} samples)"}
        if config.mode == "eigen_adamw":
            rotation = max(float(basis_rotation(s[f"q_{x}"], s[f"ready_{x}"]).max()) for s in self.states for x in "ag")
            # Steps weighted along the directions (eigen_power) count as well: they come after Adam has normalised.
            weights = max(float((s[w] - 1).abs().max()) for s in self.states for w in ("w_a", "w_g"))
            said = {"max_basis_rotation": rotation, "max_weight_change": weights}
            if max(rotation, weights) <= NO_EFFECT_COSINE:
                said["reason"] = "every eigenbasis is a permutation of the axes, which Adam does not see"
            return said
        spread = measured.get("max_one_minus_cosine")
        share = _median_of(self.spectra(), "damping_share_a", "damping_share_g")
        said = {"damping_share": share}
        if spread is None:
            said["reason"] = "no gradient was preconditioned yet"
        elif spread <= NO_EFFECT_COSINE and (config.mode != "sgd" or config.grafts):
            said["reason"] = (
                f"every preconditioner is a multiple of the identity (damping λ is {share:.3g} times the mean "
                f"eigenvalue), and {'grafting removes' if config.grafts else 'AdamW cancels'} a constant factor; "
                "lower kfac_damping or use damping_mode 'relative'"
            )
        return said

    def spectra(self) -> dict[str, dict[str, Any]]:
        layers: dict[str, dict[str, Any]] = {}
        for state in self.states:
            sides = []
            for side, cov in zip("ag", state.covariances(), strict=True):
                values, _, informed = factors.eigh(cov)
                share = state[f"lam_{side}"] / cov.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-38)
                condition = values[:, 0] / values[:, -1].clamp_min(1e-38)
                sides.append((side, values, factors.effective_rank(values), condition, share, informed))
            for i, pair in enumerate(state.group.pairs):
                entry: dict[str, Any] = {"r": pair.rank, "k": int(state["k"][i]), "samples": float(state["samples"][i])}
                for side, values, effective, condition, share, informed in sides:
                    entry[f"ready_{side}"] = bool(state[f"ready_{side}"][i])
                    if bool(informed[i]):
                        entry[f"eigenvalues_{side}"] = values[i, : self.config.log_top_eigs].tolist()
                        entry[f"effective_rank_{side}"] = float(effective[i])
                        entry[f"condition_{side}"] = float(condition[i])
                        if self.config.mode != "eigen_adamw":
                            entry[f"damping_share_{side}"] = float(share[i])
                layers[pair.name] = entry
        return layers

    def summary(self) -> dict[str, float]:
        layers = self.spectra()
        names = ("effective_rank_a", "condition_a", "effective_rank_g", "condition_g")
        found = {f"grit/{name}": _median_of(layers, name) for name in names}
        found["grit/damping_share"] = _median_of(layers, "damping_share_a", "damping_share_g")
        return {**found, "grit/rank_mean": sum(entry["r"] for entry in layers.values()) / len(layers)}

    def final(self, step: int) -> dict[str, Any]:
        record = super().final(step)
        for state, i, pair in self.layers():
            if self.config.reprojection != "none" and self._can_reproject(state, i):
                _, _, k_a, k_b = self.plan(state, i, step, shrink=False)
                record["ranks"][pair.name] |= {"final_k_a": k_a, "final_k_b": k_b}
        if self.config.log_eig_heatmaps:
            wanted = self.config.log_eig_heatmaps_modules
            chosen = [layer for layer in self.layers() if not wanted or any(layer[2].name.endswith(w) for w in wanted)]
            record["factors"] = {
                pair.name: {f"cov_{s}": c[i].tolist() for s, c in zip("ag", state.covariances(), strict=True)}
                for state, i, pair in (chosen if wanted else chosen[:4])
            }
        return record

    def readings(self, step: int) -> list[dict[str, Any]]:
        config, kinds = self.config, self.capture_kinds()
        stretch = 4 if config.adaptive_schedule else 1  # at most
        refresh_every = max(config.kfac_update_freq, config.grit_cov_update_freq) * stretch
        found = []
        for state in self.states:
            covariances = dict(zip("ag", state.covariances(), strict=True))
            samples, *lam = torch.stack([state[name].float() for name in ("samples", "lam_a", "lam_g")]).tolist()
            for i, pair in enumerate(state.group.pairs):
                sides = [s for s in "ag" if bool(state[f"ready_{s}"][i])]  # the other side is left alone as yet
                reading: dict[str, Any] = {
                    "layer": pair.name,
                    "ready": bool(sides) and self.preconditions(step),
                    # Gradient statistics count columns, not tokens.
                    "samples": None if kinds[pair.name] == "gradients" else samples[i],
                    "factors": {side: cov[i] for side, cov in covariances.items()},
                    "refresh_every": refresh_every,
                    "source": kinds[pair.name],
                }
                if config.mode == "eigen_adamw":
                    reading["bases"] = {s: state[f"q_{s}"][i] for s in sides}
                    reading["weights"] = {s: state[f"w_{s}"][i] for s in sides}
                else:
                    reading["preconditioners"] = {s: state[f"inv_{s}"][i] for s in sides}
                    reading["damping"] = {s: values[i] for s, values in zip("ag", lam, strict=True)}
                found.append(reading)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "layers": {pair.name: state.layer(i) for state, i, pair in self.layers()},
            "trend": {name: value for name, value in vars(self.trend).items() if name != "config"},
            "failed_in_a_row": dict(self.failed_in_a_row),
            "kept": dict(self.kept),
            "numbers": {name: getattr(self, name) for name in _NUMBERS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError where the state has other layers, other ranks, or is of another mode."""
        names, saved = [p.name for p in self.pairs()], state["layers"]
        if set(names) != set(saved):
            odd = sorted(set(names) ^ set(saved))
            raise ValueError(f"expected a checkpoint of the same LoRA layers, got one that differs in: {odd[:6]}")
        odd = sorted({name for layer in saved.values() for name in layer} ^ set(self.states[0].t))
        if odd:
            raise ValueError(f"expected a checkpoint of mode {self.config.mode!r}, got one that differs in: {odd}")
        self.states = [GroupState.of_layers(g, [saved[p.name] for p in g.pairs]) for g in self.groups]
        vars(self.trend).update(state["trend"])
        self.failed_in_a_row, self.kept = dict(state["failed_in_a_row"]), dict(state["kept"])
        for name in _NUMBERS:
            setattr(self, name, state["numbers"][name])


_NUMBERS = ("last_refresh", "inversions", "failed_inversions", "kept_at")


def basis_rotation(q: Tensor, ready: Tensor) -> Tensor:
    """How far eigenbases are from a permutation of the axes: 1 − mean_j max_i Q_ij², [n]; 0 where not ready."""
    return torch.where(ready, 1 - q.square().amax(-2).mean(-1), torch.zeros(q.shape[0], dtype=q.dtype, device=q.device))


def _median_of(layers: dict[str, dict[str, Any]], *names: str) -> float:
    values = sorted(entry[name] for entry in layers.values() for name in names if name in entry)
    return values[len(values) // 2] if values else float("nan")


def move_moments(optimizer: torch.optim.Optimizer | None, pair: LoraPair, left: Tensor, right: Tensor) -> None:
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
