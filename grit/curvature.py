"""`Curvature`: the interface between a `Manager` and an estimate of the curvature.

`grit.rank_space` implements it with GRIT's r×r factors, `grit_vlm` with its own estimates. A curvature never writes to
the log: it returns records as plain dictionaries.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from grit.capture import Capture
from grit.config import GRITConfig
from grit.eigen_adamw import Rotated
from grit.layers import LoraPair, find_pairs

Event = dict[str, Any]

NO_EFFECT = 1e-3
"""Deviation from a multiple of the identity below which a preconditioner only scales (a turn of less than 0.06°)."""


class Curvature(ABC):
    """An estimate of the curvature of a model's LoRA layers, and how it changes gradients or steps."""

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
        """Attach the hooks, as `capture`; only called while there are none."""

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
        """The step is skipped, so what was captured for it does not count."""
        if self.capture is not None:
            self.capture.clear()

    @abstractmethod
    def gather(self, step: int) -> list[Event]:
        """Add what was captured since the last step to the statistics; GRITError where hooks stay silent."""

    def add_regularizers(self, step: int) -> float | None:
        """Add the gradients of penalties to `.grad`; returns the penalty, None where there is none."""
        return None

    def refresh_due(self, step: int) -> bool:
        return False

    def refresh(self, step: int) -> list[Event]:
        return []

    @abstractmethod
    def precondition(self) -> float:
        """Replace every `.grad` by its natural gradient (modes adamw and sgd); returns Σ ⟨∇, natural ∇⟩ (of sgd)."""

    @abstractmethod
    def rotated(self, param_groups: list[dict[str, Any]], step: int) -> list[Rotated]:
        """The stacks that Adam steps in their own bases (mode eigen_adamw); counts the steps of these layers up."""

    # Ranks

    def reprojection_due(self, step: int) -> bool:
        return False

    def final_shrink_due(self, step: int) -> bool:
        return False

    def reproject(self, step: int, optimizer: torch.optim.Optimizer | None, shrink: bool) -> list[Event]:
        """Project every layer onto its leading directions; with `shrink` the tensors get smaller."""
        return []

    # Reports and checkpoints

    @abstractmethod
    def unreported(self) -> list[str]: ...

    @abstractmethod
    def capture_kinds(self) -> dict[str, str]:
        """Layer → the source of its statistics: hooks, gradients or undecided."""

    @abstractmethod
    def ready_layers(self) -> int: ...

    @abstractmethod
    def effect(self, step: int) -> dict[str, Any]:
        """Evidence that the optimizer steps differently, or a "reason" why it does not."""

    @abstractmethod
    def spectra(self) -> dict[str, dict[str, Any]]: ...

    def summary(self) -> dict[str, float]:
        """Numbers over all layers for a Trainer's log, NaN where unknown."""
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
