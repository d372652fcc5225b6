"""`GRITManager`: statistics, preconditioning and reprojection of all LoRA layers of a model."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from grit import records, regularizers
from grit.capture import HookCapture
from grit.config import GRITConfig
from grit.distributed import all_reduce_sum, world_size
from grit.layers import LayerGroup, LoraPair, find_pairs, group_pairs
from grit.schedule import LossTrend
from grit.state import GRADIENTS, HOOKS, KINDS, UNDECIDED, GroupState

logger = logging.getLogger("grit")


class CaptureError(RuntimeError):
    """Layers that get gradients but whose hooks report nothing."""


class NotAppliedError(RuntimeError):
    """Backward passes were seen, but no step went through a `GritOptimizer`."""


class NonFiniteGradientsError(RuntimeError):
    """Too many steps in a row had NaN or infinite gradients."""


class GRITManager:
    """Keeps the r×r factors of every trainable LoRA pair of a model and applies them.

    A plain loop::

        with GRITManager(model, GRITConfig()) as manager:
            optimizer = GritOptimizer(torch.optim.AdamW(weights, lr=3e-3), manager)
            for batch in loader:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    Attributes:
        step: Optimizer steps so far, skipped ones included.
        skipped: Steps left out because of NaN or infinite gradients.
        history: Records of spectra, ranks, effects and events, ready for JSON.
        capture: The hooks; None while closed or where capture is "gradients".
    """

    def __init__(
        self,
        model: nn.Module,
        config: GRITConfig | None = None,
        device: torch.device | str | None = None,
        log_file: str | Path | None = None,
    ):
        """Find the layers; hooks are attached by `open` (a `with` block, or the GritOptimizer).

        Args:
            model: With LoRA adapters by PEFT.
            config: Default: ours.
            device: Where the documents pass one: device of the inversions.
            log_file: JSON Lines; every record is appended at once.

        Raises:
            GRITConfigError: every mistake in `config`.
            GritLayerError: no LoRA, frozen LoRA, unsupported kinds.
            ValueError: a device that is not there, a min_lora_rank above the model's, or rank_shrink "events" in a
                distributed run, where DDP's buckets fix the shapes.
        """
        self.model, self.config = model, config or GRITConfig()
        if device is not None and self.config.kfac_inversion_device == "auto":
            self.config.kfac_inversion_device = str(device)
        self.config.validate()
        if self.config.kfac_inversion_device != "auto":
            try:
                torch.empty(0, device=self.config.kfac_inversion_device)
            except (RuntimeError, AssertionError) as error:
                raise ValueError(
                    f"kfac_inversion_device: expected 'auto' or a device of this machine, got "
                    f"{self.config.kfac_inversion_device!r}: {str(error).splitlines()[0]}"
                ) from error
        if world_size() > 1 and self.config.rank_shrink == "events":
            raise ValueError("rank_shrink: expected 'end' or 'never' in a distributed run, got 'events'")
        pairs = find_pairs(model)
        smallest = min(pairs, key=lambda p: p.rank)
        if self.config.min_lora_rank > smallest.rank:
            raise ValueError(
                f"min_lora_rank: expected at most the smallest rank, {smallest.rank} ({smallest.name}), "
                f"got {self.config.min_lora_rank}"
            )
        self.base_rank = {p.name: p.rank for p in pairs}
        self.log_file = Path(log_file) if log_file is not None else None
        if self.log_file is not None and self.log_file.exists():
            records.append(self.log_file, [], anew=True)  # of a run that was cut short before its first checkpoint
        self.groups: list[LayerGroup] = group_pairs(pairs)
        self.states = [GroupState.fresh(group, self.config) for group in self.groups]
        self.capture: HookCapture | None = None
        self.trend = LossTrend(self.config)
        self.history: list[dict[str, Any]] = []
        self.step = self.skipped = self.applied_steps = self.inversions = self.failed_inversions = 0
        self.last_metrics: dict[str, float] = {}
        self._skipped_in_a_row = 0
        self._last_inversion = -1
        self._failed_in_a_row: dict[str, int] = {}
        self.measured: dict[str, Any] = {}

    # Life cycle

    def open(self) -> "GRITManager":
        """Attach the hooks, once."""
        if self.capture is None and self.config.capture != "gradients":
            self.capture = HookCapture(self.model, self.groups, self.config.normalize_delta)
            self.capture.active = self._captures_at(self.step)
        return self

    def close(self, check: bool = True) -> None:
        """Take the hooks off and write the last record.

        Raises:
            NotAppliedError: hooks saw backward passes, but no step came through a GritOptimizer.
        """
        saw_something = self.capture is not None and any(bool(s.tokens.any()) for s in self.capture.sums)
        if self.capture is not None:
            self.capture.close()
            self.capture = None
        if not check:
            return
        if self.applied_steps == 0 and saw_something:
            raise NotAppliedError(
                "GRIT saw backward passes, but no optimizer step went through GRIT, so nothing was preconditioned; "
                "wrap the optimizer: GritOptimizer(optimizer, manager), or train with GritTrainer"
            )
        silent = self.unreported()
        if silent and self.applied_steps:
            logger.warning("GRIT: %d layers never reported statistics: %s", len(silent), ", ".join(silent))
            self.add_record({"kind": "unreported", "layers": silent})

    def __enter__(self) -> "GRITManager":
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(check=error is None)

    def pairs(self) -> list[LoraPair]:
        """Every LoRA pair, group by group."""
        return [pair for group in self.groups for pair in group.pairs]

    def layers(self) -> Iterator[tuple[GroupState, int, LoraPair]]:
        """(state of the group, place in it, pair) of every layer."""
        for state in self.states:
            for i, pair in enumerate(state.group.pairs):
                yield state, i, pair

    def unreported(self) -> list[str]:
        """Layers of which no statistics have come yet."""
        return [pair.name for state, i, pair in self.layers() if not bool(state["samples"][i] > 0)]

    def capture_kinds(self) -> dict[str, str]:
        """Layer → where its statistics come from: hooks, gradients, undecided."""
        return {pair.name: KINDS[int(state["kind"][i])] for state, i, pair in self.layers()}

    def ready_layers(self) -> int:
        """Layers with at least one side preconditioned."""
        return sum(int((s["ready_a"] | s["ready_g"]).sum()) for s in self.states)

    # One step, in the order in which GritOptimizer calls

    def begin_step(self, gradient_norm: float) -> bool:
        """Whether the step may go on.

        Args:
            gradient_norm: Of all gradients, before anything was done to them.

        Returns:
            False where the gradients are not finite: the step is to be left out; counted and logged.

        Raises:
            NonFiniteGradientsError: `max_nonfinite_steps` in a row.
        """
        if math.isfinite(gradient_norm):
            self._skipped_in_a_row = 0
            self.last_metrics["grit/gradient_norm_raw"] = gradient_norm
            return True
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self.capture is not None:
            self.capture.clear()
        logger.warning("GRIT: step %d skipped: gradients are not finite (norm %s)", self.step, gradient_norm)
        self.add_record({"kind": "skipped", "gradient_norm": gradient_norm})
        self._advance()
        if self._skipped_in_a_row >= self.config.max_nonfinite_steps:
            raise NonFiniteGradientsError(
                f"{self._skipped_in_a_row} steps in a row had NaN or infinite gradients (up to step {self.step}); "
                "lower the learning rate or look at the data; max_nonfinite_steps sets how many are borne"
            )
        return False

    def update_statistics(self) -> None:
        """Take what was captured since the last step into the moving averages; averaged over all ranks."""
        if not self._captures_at(self.step):
            return
        if self.capture is not None:
            all_reduce_sum([t for sums in self.capture.sums for t in (sums.hh, sums.dd, sums.tokens)])
            self._decide([sums.tokens.cpu() > 0 for sums in self.capture.sums])
        for g, state in enumerate(self.states):
            if self.capture is not None:
                sums = self.capture.sums[g]
                tokens = sums.tokens.clamp_min(1.0).to(sums.hh.dtype)[:, None, None]
                state.update(HOOKS, sums.hh / tokens, sums.dd / tokens, sums.tokens, self.config.cov_decay)
            if bool((state["kind"] == GRADIENTS).any()):
                self._update_from_gradients(state)
        if self.capture is not None:
            self.capture.clear()

    def _update_from_gradients(self, state: GroupState) -> None:
        gradient_a, gradient_b = state.group.gradients("a"), state.group.gradients("b")
        has = state.group.has_gradients().to(gradient_a.device)
        samples = has.double() * min(gradient_a.shape[2], gradient_b.shape[1])
        state.update(GRADIENTS, gradient_b.mT @ gradient_b, gradient_a @ gradient_a.mT, samples, self.config.cov_decay)

    def _decide(self, reported: list[Tensor]) -> None:
        silent = []
        for state, seen in zip(self.states, reported, strict=True):
            kind = state["kind"]
            kind[seen & (kind == UNDECIDED)] = HOOKS
            silent.append(state.group.has_gradients() & ~seen & (kind != GRADIENTS))
        names = [
            pair.name
            for s, lost in zip(self.states, silent, strict=True)
            for pair, is_lost in zip(s.group.pairs, lost.tolist(), strict=True)
            if is_lost
        ]
        if not names:
            return
        text = (
            f"{len(names)} layers have gradients but their hooks reported nothing (fused kernels read the weights "
            f"without calling the modules): {', '.join(names)}"
        )
        if self.config.capture == "hooks":
            raise CaptureError(f"{text}; set capture to 'auto' or 'gradients', or switch the fused kernels off")
        logger.warning("GRIT: %s; using gradient statistics for them", text)
        for state, lost in zip(self.states, silent, strict=True):
            state["kind"][lost] = GRADIENTS
            where = lost.to(state["weight"].device)
            for name in ("ema_a", "ema_g", "weight", "samples"):
                state[name][where] = 0
        self.add_record({"kind": "capture", "gradients": names})

    def inversion_due(self) -> bool:
        """Whether factors are to be inverted at this step: at the interval, and as soon as a waiting one can be."""
        if self._last_inversion < 0:
            return True
        if self._starting(self.step):
            return True
        if self.step - self._last_inversion >= self.trend.interval(self.config.kfac_update_freq):
            return True
        return self._captures_at(self.step) and any(
            bool((~(s["ready_a"] & s["ready_g"]) & (s["samples"] >= self.config.kfac_min_samples)).any())
            for s in self.states
        )

    def update_and_invert_factors(self) -> None:
        """Invert (or diagonalise) every factor that has seen enough tokens; others leave gradients as they are."""
        if self.config.mode == "eigen_adamw" and not self.preconditions():
            return  # not counted, so that the bases are due as soon as the warm-up is over
        self.inversions += 1
        self._last_inversion = self.step
        for state in self.states:
            failed = state.invert(self.config)
            for i, pair in enumerate(state.group.pairs):
                if not bool(failed[i]):
                    self._failed_in_a_row.pop(pair.name, None)
                    continue
                self.failed_inversions += 1
                self._failed_in_a_row[pair.name] = self._failed_in_a_row.get(pair.name, 0) + 1
                if self._failed_in_a_row[pair.name] in (1, 10, 100):
                    logger.warning(
                        "GRIT: the covariance of %s cannot be inverted (%d in a row); its gradients stay as they are. "
                        "Raise kfac_damping",
                        pair.name,
                        self._failed_in_a_row[pair.name],
                    )
                    self.add_record({"kind": "singular", "layer": pair.name, "times": self._failed_in_a_row[pair.name]})

    def preconditions(self) -> bool:
        """Whether the natural-gradient warm-up is over."""
        return self.step >= self.config.ng_warmup_steps

    def precondition_gradients(self) -> float:
        """Multiply every `.grad` by the inverse of its factor, in place (modes adamw and sgd).

        kfac pairing: ∇A ← Σ_g⁻¹ ∇A, ∇B ← ∇B Σ_a⁻¹; paper pairing: ∇A ← Σ_a⁻¹ ∇A, ∇B ← ∇B Σ_g⁻¹.

        Returns:
            Σ ⟨∇, natural ∇⟩ over all layers, the squared length that the trust region limits.
        """
        total = 0.0
        if not self.preconditions():
            return total
        measure = self._last_inversion == self.step or self.step % self.config.log_freq == 0
        cosines: list[Tensor] = []
        for state in self.states:
            group = state.group
            left, right = ("inv_g", "inv_a") if self.config.pairing == "kfac" else ("inv_a", "inv_g")
            for side in ("a", "b"):
                raw = group.gradients(side)
                new = state[left] @ raw if side == "a" else raw @ state[right]
                if self.config.grafts:
                    norm, now = torch.linalg.matrix_norm(raw), torch.linalg.matrix_norm(new)
                    new = new * (norm / now.clamp_min(1e-30))[:, None, None]
                if measure:
                    cosines.append(nn.functional.cosine_similarity(raw.double().flatten(1), new.double().flatten(1)))
                if self.config.mode == "sgd":
                    total += float((raw * new).sum())
                group.put_gradients(side, new)
        if measure:
            self.measured = records.measure_cosines(cosines)
        return total

    def add_regularizers(self) -> None:
        """Add the gradients of the regularisers to `.grad`."""
        if self.config.lambda_kfac or self.config.lambda_reproj:
            self.last_metrics["grit/regularizer"] = regularizers.add_gradients(self.states, self.config, self.step)

    def end_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """After the weights have moved: reproject if it is time, write records, prepare the next step."""
        self.applied_steps += 1
        if self.step % self.config.log_freq == 0:
            self.add_record(records.effect(self))
            self.last_metrics |= records.summary(self)
            if self.config.log_fisher_spectrum:
                self.add_record(records.spectra(self))
        self._advance()
        interval = self.trend.interval(self.config.reprojection_freq)
        if (
            self.config.reprojection != "none"
            and self.config.reprojection_freq > 0
            and self.step >= max(1, self.config.reprojection_warmup_steps)
            and self.step % interval == 0
        ):
            self.neural_reprojection(optimizer)

    def neural_reprojection(self, optimizer: torch.optim.Optimizer | None = None, shrink: bool | None = None) -> None:
        """Project every layer with statistics onto its leading Fisher directions.

        Args:
            optimizer: Whose moments are transformed along (those of mode eigen_adamw always are).
            shrink: Whether tensors get smaller now; default: where `rank_shrink` is "events".
        """
        from grit.rank_events import reproject

        shrink = self.config.rank_shrink == "events" if shrink is None else shrink
        event = reproject(self, optimizer, shrink)
        if event["layers"]:
            self.add_record(event)

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """At the end of training: shrink the tensors if that is asked for, and write the last record.

        Args:
            optimizer: Gets the smaller tensors, for those who train on.
        """
        start = max(self.config.rank_adaptation_start_step, self.config.reprojection_warmup_steps)
        adaptive = self.config.enable_rank_adaptation and self.step >= start
        if self.config.reprojection != "none" and adaptive and self.config.rank_shrink != "never":
            self.neural_reprojection(optimizer, shrink=True)
        self.add_record(records.final(self))

    def regroup(self, changed: dict[str, dict[str, Tensor]]) -> None:
        """Sort the layers into groups anew after shapes changed; `changed` has the new state of those layers."""
        layers = {pair.name: state.layer(i) for state, i, pair in self.layers()} | changed
        self.groups = self._grouped()
        self.states = [GroupState.of_layers(g, [layers[p.name] for p in g.pairs]) for g in self.groups]
        if self.capture is not None:
            self.capture.close()
            self.capture = HookCapture(self.model, self.groups, self.config.normalize_delta, like=self.capture)

    def _grouped(self) -> list[LayerGroup]:
        """Groups by today's shapes, in the model's order: a resumed run stacks its layers as an undisturbed one."""
        place = {name: i for i, name in enumerate(self.base_rank)}
        return group_pairs(sorted(self.pairs(), key=lambda pair: place[pair.name]))

    def rebuild(self) -> None:
        """Start anew on layers whose shapes changed from outside (a checkpoint about to be loaded)."""
        seen = {pair.name: state["samples"][i].clone() for state, i, pair in self.layers()}
        self.groups = self._grouped()
        self.states = [GroupState.fresh(group, self.config) for group in self.groups]
        for state, i, pair in self.layers():
            state["samples"][i] = seen[pair.name]  # who has reported has reported, whatever became of it
        if self.capture is not None:
            self.capture.close()
            self.capture = None
            self.open()

    def observe_loss(self, loss: float) -> None:
        """The mean loss of a step, for the adaptive schedule."""
        self.trend.see(loss)

    def _captures_at(self, step: int) -> bool:
        return step % self.config.grit_cov_update_freq == 0 or self._starting(step)

    def _starting(self, step: int) -> bool:
        """Whether factors are refreshed at every step: mode sgd, in the first steps.

        B starts at 0 and Σ_g grows with its square. A factor ten steps old is too small by orders of magnitude then,
        and a natural gradient without Adam's normalisation as much too long; the trust region, measured with the same
        factor, does not see it.
        """
        return self.config.mode == "sgd" and step < 4 * self.config.grit_cov_update_freq

    def _advance(self) -> None:
        self.step += 1
        if self.capture is not None:
            self.capture.active = self._captures_at(self.step)

    # Records and checkpoints

    def add_record(self, record: dict[str, Any]) -> None:
        """Keep a record, and append it to the log file."""
        record = records.plain({"step": self.step, **record})
        self.history.append(record)
        records.append(self.log_file, [record])

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a Trainer's log, TensorBoard or W&B, their names beginning with grit/."""
        return dict(self.last_metrics)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on: tensors, numbers and text only (loads with weights_only=True)."""
        return {
            "layers": {pair.name: state.layer(i) for state, i, pair in self.layers()},
            "history": records.to_text(self.history),
            "trend": self.trend.state_dict(),
            "failed_in_a_row": dict(self._failed_in_a_row),
            "numbers": {name: getattr(self, name) for name in self._NUMBERS},
            "last_metrics": dict(self.last_metrics),
            "measured": dict(self.measured),
        }

    _NUMBERS = (
        "step",
        "skipped",
        "applied_steps",
        "inversions",
        "failed_inversions",
        "_skipped_in_a_row",
        "_last_inversion",
    )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; the log file is rewritten to hold what led there.

        Raises:
            ValueError: the checkpoint has other layers, other ranks, or is of another mode.
        """
        names, saved = [p.name for p in self.pairs()], state["layers"]
        if set(names) != set(saved):
            odd = sorted(set(names) ^ set(saved))
            raise ValueError(f"expected a checkpoint of the same LoRA layers, got one that differs in: {odd[:6]}")
        odd = sorted({name for layer in saved.values() for name in layer} ^ set(self.states[0].t))
        if odd:
            raise ValueError(f"expected a checkpoint of mode {self.config.mode!r}, got one that differs in: {odd}")
        self.states = [GroupState.of_layers(g, [saved[p.name] for p in g.pairs]) for g in self.groups]
        for name in self._NUMBERS:
            setattr(self, name, state["numbers"][name])
        self.history = records.from_text(state["history"])
        self.trend.load_state_dict(state["trend"])
        self._failed_in_a_row = dict(state["failed_in_a_row"])
        self.last_metrics, self.measured = dict(state["last_metrics"]), dict(state["measured"])
        records.append(self.log_file, self.history, anew=True)
        if self.capture is not None:
            self.capture.active = self._captures_at(self.step)
