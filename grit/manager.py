"""`GRITManager`: statistics, preconditioning and reprojection of all LoRA layers of a model."""

import dataclasses
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grit import checkpoint, records, regularizers, schedule, statistics
from grit.capture import HookCapture
from grit.checks import check, check_applied
from grit.config import GRITConfig
from grit.errors import NonFiniteGradientsError
from grit.layers import LayerGroup, LoraPair, find_pairs, group_pairs
from grit.preconditioning import precondition
from grit.schedule import LossTrend, captures_at
from grit.state import KINDS, GroupState

logger = logging.getLogger("grit")


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
        log: Module that makes the records.
    """

    log: Any = records

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
            self.config = dataclasses.replace(self.config, kfac_inversion_device=str(device))
        self.config.validate()
        pairs = find_pairs(model)
        check(self.config, pairs)
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
        self._skipped_in_a_row, self._last_inversion = 0, -1
        self.failed_in_a_row: dict[str, int] = {}
        self.keeps_ranks = False  # at the end, whatever the config says: of a best adapter from before they shrank
        self.measured: dict[str, Any] = {}

    # Life cycle

    def open(self) -> "GRITManager":
        """Attach the hooks, once."""
        if self.capture is None and self.config.capture != "gradients":
            self.capture = HookCapture(self.model, self.groups, self.config.normalize_delta)
            self._switch_capture()
        return self

    def close(self, check: bool = True) -> None:
        """Take the hooks off, and name layers that never reported.

        Args:
            check: False where an error is on its way already, which must not be covered up.

        Raises:
            NotAppliedError: see `check_applied`.
        """
        saw_something = self.capture is not None and self.capture.saw_tokens()
        if self.capture is not None:
            self.capture.close()
            self.capture = None
        if not check:
            return
        check_applied(self.applied_steps, saw_something)
        if self.applied_steps and (silent := self.unreported()):
            logger.warning("GRIT: %d layers never reported statistics: %s", len(silent), ", ".join(silent))
            self.add_record({"kind": "unreported", "layers": silent})

    def __enter__(self) -> "GRITManager":
        return self.open()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
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
        """Take what was captured since the last step into the moving averages; averaged over all ranks.

        Raises:
            CaptureError: capture is "hooks" and layers with gradients reported nothing.
        """
        if captures_at(self.config, self.step):
            statistics.gather(self)

    def inversion_due(self) -> bool:
        """Whether factors are to be inverted at this step: at the interval, and as soon as a waiting one can be."""
        since = self.step - self._last_inversion if self._last_inversion >= 0 else None
        if schedule.inversion_due(self.config, self.step, since, self.trend):
            return True
        return captures_at(self.config, self.step) and statistics.waiting(self)

    def update_and_invert_factors(self) -> None:
        """Invert (or diagonalise) every factor that has seen enough tokens; others leave gradients as they are."""
        if self.config.mode == "eigen_adamw" and not self.preconditions():
            return  # not counted, so that the bases are due as soon as the warm-up is over
        self._last_inversion = self.step
        statistics.invert(self)

    def preconditions(self) -> bool:
        """Whether the natural-gradient warm-up is over."""
        return self.step >= self.config.ng_warmup_steps

    def precondition_gradients(self) -> float:
        """Multiply every `.grad` by the inverse of its factor, in place (modes adamw and sgd).

        kfac pairing: ∇A ← Σ_g⁻¹ ∇A, ∇B ← ∇B Σ_a⁻¹; paper pairing: ∇A ← Σ_a⁻¹ ∇A, ∇B ← ∇B Σ_g⁻¹.

        Returns:
            Σ ⟨∇, natural ∇⟩ over all layers, the squared length that the trust region limits (0 in mode adamw).
        """
        if not self.preconditions():
            return 0.0
        measure = self._last_inversion == self.step or self.step % self.config.log_freq == 0
        length, cosines = precondition(self.states, self.config, measure)
        if measure:
            self.measured = records.measure_cosines(cosines)
        return length

    def add_regularizers(self) -> None:
        """Add the gradients of the regularisers to `.grad`."""
        if self.config.lambda_kfac or self.config.lambda_reproj:
            self.last_metrics["grit/regularizer"] = regularizers.add_gradients(self.states, self.config, self.step)

    def end_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """After the weights have moved: reproject if it is time, write records, prepare the next step."""
        self.applied_steps += 1
        if self.step % self.config.log_freq == 0:
            self.add_record(self.log.effect(self))
            self.last_metrics |= self.log.summary(self)
            if self.config.log_fisher_spectrum:
                self.add_record(self.log.spectra(self))
        self._advance()
        if schedule.reprojection_due(self.config, self.step, self.trend):
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
        if not self.keeps_ranks and schedule.final_shrink_due(self.config, self.step):
            self.neural_reprojection(optimizer, shrink=True)
        self.add_record(self.log.final(self))

    def observe_loss(self, loss: float) -> None:
        """The mean loss of a step, for the adaptive schedule."""
        self.trend.see(loss)

    def _advance(self) -> None:
        self.step += 1
        self._switch_capture()

    def _switch_capture(self) -> None:
        if self.capture is not None:
            self.capture.active = captures_at(self.config, self.step)

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
        return checkpoint.save(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; the log file is rewritten to hold what led there.

        Raises:
            ValueError: the checkpoint has other layers, other ranks, or is of another mode.
        """
        checkpoint.load(self, state)
        self._switch_capture()
