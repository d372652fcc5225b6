"""`Manager`: the life cycle and the order of a step; `GRITManager`: the one with GRIT's rank-space factors."""

import dataclasses
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from grit.capture import Capture
from grit.config import GRITConfig, GRITError
from grit.curvature import Curvature
from grit.layers import LoraPair
from grit.rank_space import RankSpace

logger = logging.getLogger("grit")


class NonFiniteGradientsError(GRITError):
    """Too many steps in a row had NaN or infinite gradients."""


class Manager:
    """What `GritOptimizer` calls, step by step, of a `Curvature`; writes the log."""

    def __init__(self, curvature: Curvature, log_file: str | Path | None = None):
        """Hooks are attached by `open` (a `with` block, or the GritOptimizer); `log_file` is JSON Lines."""
        self.curvature = curvature
        self.log_file = Path(log_file) if log_file is not None else None
        if self.log_file is not None and self.log_file.exists():
            self._write([], anew=True)  # left by a run that was killed before its first checkpoint
        self.history: list[dict[str, Any]] = []  # records of spectra, ranks, effects and events, ready for JSON
        # `step` = `applied_steps` + `skipped`, those with NaN or infinite gradients.
        self.step = self.skipped = self.applied_steps = self._skipped_in_a_row = 0
        self.last_metrics: dict[str, float] = {}  # for a Trainer's log

    @property
    def config(self) -> GRITConfig:
        return self.curvature.config

    @property
    def capture(self) -> Capture | None:
        return self.curvature.capture

    def pairs(self) -> list[LoraPair]:
        return self.curvature.pairs()

    # Life cycle

    def open(self) -> Self:
        if self.capture is None:
            self.curvature.open()
            self._switch_capture()
        return self

    def close(self, check: bool = True) -> None:
        """Remove the hooks, and name the layers that never reported.

        GRITError if the hooks saw backward passes but no step went through a GritOptimizer. `check` is False if another
        error is already on its way, which must not be hidden.
        """
        saw_something = self.capture is not None and self.capture.saw_tokens()
        self.curvature.close()
        if not check:
            return
        if saw_something and not self.applied_steps:
            raise GRITError(
                "GRIT saw backward passes, but no optimizer step went through GRIT, so nothing was preconditioned; "
                "wrap the optimizer: GritOptimizer(optimizer, manager), or train with GritTrainer"
            )
        if self.applied_steps and (silent := self.curvature.unreported()):
            logger.warning("GRIT: %d layers never reported statistics: %s", len(silent), ", ".join(silent))
            self.add_record({"kind": "unreported", "layers": silent})

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.close(check=error is None)

    # One step, in the order in which GritOptimizer calls

    def begin_step(self, gradient_norm: float) -> bool:
        """Whether to go on with the step: not if `gradient_norm`, over all raw gradients, is not finite."""
        if math.isfinite(gradient_norm):
            self._skipped_in_a_row = 0
            self.last_metrics["grit/gradient_norm_raw"] = gradient_norm
            return True
        self.skipped += 1
        self._skipped_in_a_row += 1
        self.curvature.forget()
        logger.warning("GRIT: step %d skipped: gradients are not finite (norm %s)", self.step, gradient_norm)
        self.add_record({"kind": "skipped", "gradient_norm": gradient_norm})
        self._advance()
        if self._skipped_in_a_row >= self.config.max_nonfinite_steps:
            raise NonFiniteGradientsError(
                f"{self._skipped_in_a_row} steps in a row had NaN or infinite gradients (up to step {self.step}); "
                "lower the learning rate or look at the data; max_nonfinite_steps sets how many are tolerated"
            )
        return False

    def update_statistics(self) -> None:
        if self.curvature.captures_at(self.step):
            self.add_record(*self.curvature.gather(self.step))

    def add_regularizers(self) -> None:
        penalty = self.curvature.add_regularizers(self.step)
        if penalty is not None:
            self.last_metrics["grit/regularizer"] = penalty

    def update_and_invert_factors(self) -> None:
        self.add_record(*self.curvature.refresh(self.step))

    def precondition_gradients(self) -> float:
        """Modes adamw and sgd, in place; returns Σ ⟨∇, natural ∇⟩, which the trust region limits (0 in adamw)."""
        return self.curvature.precondition() if self.curvature.preconditions(self.step) else 0.0

    def end_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """After the weights have changed: write records, prepare the next step, reproject if due."""
        self.applied_steps += 1
        if self.step % self.config.log_freq == 0:
            self.add_record(self._effect())
            self.last_metrics |= self._summary()
            if self.config.log_fisher_spectrum:
                self.add_record({"kind": "spectra", "layers": self.curvature.spectra()})
        self._advance()
        if self.curvature.reprojection_due(self.step):
            self.neural_reprojection(optimizer)

    def neural_reprojection(self, optimizer: torch.optim.Optimizer | None = None, shrink: bool = False) -> None:
        """Project every layer and its moments onto its leading Fisher directions; with `shrink` tensors get smaller."""
        self.add_record(*self.curvature.reproject(self.step, optimizer, shrink))

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        spectra = self.curvature.spectra()  # before the shrink, which rescales A and B
        if self.curvature.final_shrink_due(self.step):
            self.neural_reprojection(optimizer, shrink=True)
        self.add_record(
            {
                "kind": "final",
                **self.curvature.final(self.step),
                "capture": self.curvature.capture_kinds(),
                "skipped_steps": self.skipped,
                "inversions": self.curvature.inversions,
                "failed_inversions": self.curvature.failed_inversions,
                "effect": self._effect(),
                "spectra": spectra,
            }
        )

    def _advance(self) -> None:
        self.step += 1
        self._switch_capture()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward and backward passes in here do not count in the statistics."""
        capture, active = self.capture, self.capture is not None and self.capture.active
        if capture is not None:
            capture.active = False
        try:
            yield
        finally:
            if capture is not None:
                capture.active = active

    def _switch_capture(self) -> None:
        if self.capture is not None:
            self.capture.active = self.curvature.captures_at(self.step)

    # The log, readings and checkpoints

    def add_record(self, *records: dict[str, Any]) -> None:
        plain = [_plain({"step": self.step, **record}) for record in records]
        self.history += plain
        self._write(plain)

    def _write(self, records: list[dict[str, Any]], anew: bool = False) -> None:
        if self.log_file is not None and (records or anew):
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            with self.log_file.open("w" if anew else "a", encoding="utf-8") as out:
                out.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)

    def _effect(self) -> dict[str, Any]:
        counts = {"ready_layers": self.curvature.ready_layers(), "layers": len(self.pairs())}
        metrics = self.last_metrics.items()  # norms before clipping, as of the last step that took them
        norms = {name.removeprefix("grit/"): value for name, value in metrics if "gradient_norm" in name}
        record: dict[str, Any] = {"kind": "effect", **counts, **norms, **self.curvature.effect(self.step)}
        record["effective"] = "reason" not in record
        if not record["effective"]:
            logger.warning("GRIT: step %d: no effective change: %s", self.step, record["reason"])
            return record
        applied = "GRIT: step %d: preconditioning applied to %d of %d layers"
        logger.info(applied, self.step, record["ready_layers"], record["layers"])
        return record

    def _summary(self) -> dict[str, float]:
        numbers = {
            **self.curvature.summary(),
            "grit/ready_layers": float(self.curvature.ready_layers()),
            "grit/skipped_steps": float(self.skipped),
        }
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    def metrics(self) -> dict[str, float]:
        return dict(self.last_metrics)

    def readings(self) -> list[dict[str, Any]]:
        return self.curvature.readings(self.step)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text only (loads with weights_only=True)."""
        return {
            "curvature": self.curvature.state_dict(),
            "history": json.dumps(self.history),
            "numbers": {name: getattr(self, name) for name in _NUMBERS},
            "last_metrics": dict(self.last_metrics),
        }

    def load_state_dict(self, state: dict[str, Any], keep_history: bool = False) -> None:
        """Rewrite the log file to end where this state was saved; with `keep_history` leave it as it is."""
        self.curvature.load_state_dict(state["curvature"])
        for name in _NUMBERS:
            setattr(self, name, state["numbers"][name])
        self.last_metrics = dict(state["last_metrics"])
        if not keep_history:
            self.history = json.loads(state["history"])
            self._write(self.history, anew=True)
        self._switch_capture()


_NUMBERS = ("step", "skipped", "applied_steps", "_skipped_in_a_row")


def _plain(value: Any) -> Any:
    """NaN and infinities as "nan", "inf", "-inf", so that every JSON reader accepts the value."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class GRITManager(Manager):
    """Estimates the r×r factors of every trainable LoRA pair of a model and applies them.

    A plain loop::

        with GRITManager(model, GRITConfig()) as manager:
            optimizer = GritOptimizer(torch.optim.AdamW(weights, lr=3e-3), manager)
            for batch in loader:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    """

    curvature: RankSpace

    def __init__(
        self,
        model: nn.Module,
        config: GRITConfig | None = None,
        device: torch.device | str | None = None,
        log_file: str | Path | None = None,
    ):
        """`device` is where factors are inverted. GRITConfigError and GRITError name every mistake."""
        config = config or GRITConfig()
        if device is not None and config.kfac_inversion_device == "auto":
            config = dataclasses.replace(config, kfac_inversion_device=str(device))
        super().__init__(RankSpace(model, config), log_file)
