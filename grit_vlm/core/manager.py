"""`FisherManager`: what `grit.GRITManager` is to GRIT, for layers with estimates of their own.

`grit.optim.GritOptimizer`, `grit.trainer` and the probe work on it as they do on a GRITManager: it has the same life
cycle, the same steps in the same order, the same treatment of steps that are not finite, and writes the same log.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grit import GRITConfig, GRITManager, records
from grit.distributed import world_size
from grit.errors import CaptureError
from grit.layers import GritLayerError, LoraPair
from grit.state import GroupState
from grit_vlm.core import budgets, checkpoint, log
from grit_vlm.core.capture import TokenCapture, first_tokens
from grit_vlm.core.fisher_info import SIDES
from grit_vlm.core.moments import Moments
from grit_vlm.core.preconditioning import precondition
from grit_vlm.utils.projection import AdaptiveSchedule, ProjectionSchedule

if TYPE_CHECKING:
    from grit_vlm.core.grit_lora import GRITLoRALinear
    from probes.readings import LayerReading

logger = logging.getLogger("grit")

RANK_TOKENS = 1024
"""Tokens that the rank of vision activations is estimated from."""
ALL = "all"
"""The modality of layers that were not told one."""


class FisherManager(GRITManager):
    """Fisher estimates, natural gradients and projections of all GRIT-LoRA layers of a model.

    Attributes:
        grit_layers: Name → layer, as they were given.
        by_pair: Name that the probe and the log have → layer.
        modality: Name in `grit_layers` → modality.
        schedules: Modality → budget over the steps, of modalities that are projected.
        total_steps: Over which they go from start to end.
        adaptive: Whether mode eigen_adamw shortens steps to the trust region `kl_clip` too, as mode sgd does.
    """

    log = log

    def __init__(
        self,
        model: nn.Module,
        grit_layers: Mapping[str, GRITLoRALinear],
        config: GRITConfig | None = None,
        *,
        modality: Mapping[str, str] | None = None,
        total_steps: int = 1000,
        log_file: str | Path | None = None,
    ):
        """Take charge of the layers; hooks are attached by `open`.

        Args:
            model: That holds them; its forward pass is called with a batch's keyword arguments.
            grit_layers: Every trainable LoRA layer of the model.
            config: How steps are made (mode, grafting, kl_clip, eigen_power, ng_warmup_steps, log_freq, …); what it
                says of factors, ranks and reprojection has no meaning here.
            modality: Name → vision, text, cross_modal or fusion.
            total_steps: Over which projection budgets go from start to end.
            log_file: JSON Lines.

        Raises:
            GritLayerError: trainable LoRA that is not among the layers, or layers with several fisher_update_freq;
                GRITConfigError.
        """
        wanted = dataclasses.replace(config or GRITConfig(), capture="hooks", reprojection="none", min_lora_rank=1)
        wanted.enable_rank_adaptation = False
        super().__init__(model, wanted, log_file=log_file)
        self.states = []  # of GRIT's own factors
        self.grit_layers = dict(grit_layers)
        self.modality = {name: (modality or {}).get(name, ALL) for name in self.grit_layers}
        views = {(id(layer.lora), layer.adapter_name): name for name, layer in self.grit_layers.items()}
        found = [(pair, views.get((id(pair.layer), pair.adapter))) for pair in super().pairs()]
        if foreign := [pair.name for pair, name in found if name is None]:
            raise GritLayerError(f"expected every trainable LoRA layer among grit_layers, got others: {foreign[:6]}")
        self.names = {pair.name: name for pair, name in found if name is not None}
        self.by_pair = {pair.name: self.grit_layers[name] for pair, name in found if name is not None}
        self.moments = Moments({pair.name: pair for pair, _ in found})
        self.schedules: dict[str, ProjectionSchedule] = {}
        self.adaptive = False
        frequencies = {layer.config.fisher_update_freq for layer in self.grit_layers.values()}
        if len(frequencies) > 1:
            raise GritLayerError(f"fisher_update_freq: expected one for all layers, got {sorted(frequencies)}")
        self.vision_inputs: Tensor | None = None
        for layer in self.grit_layers.values():
            if layer.manager is not None:
                layer.manager.close(check=False)
            layer.manager = self
        self.plan(total_steps)

    def plan(self, total_steps: int) -> None:
        """Let projection budgets go from start to end over so many steps."""
        self.total_steps = total_steps
        self.schedules = budgets.schedules(self)
        # GritTrainer tells the losses of steps where this is set.
        self.config.adaptive_schedule |= any(isinstance(s, AdaptiveSchedule) for s in self.schedules.values())

    def set_update_freq(self, steps: int | None) -> None:
        """Let estimates be updated at this interval from now on; None: as they were."""
        if steps is not None:
            for layer in self.grit_layers.values():
                layer.config = dataclasses.replace(layer.config, fisher_update_freq=steps)
                layer.fisher_matrix.update_freq = steps

    def stop_projecting(self) -> None:
        """Switch projection off in every layer."""
        for layer in self.grit_layers.values():
            layer.config = dataclasses.replace(layer.config, enable_projection=False)
            layer.projection_budget = None

    # Life cycle

    def open(self) -> FisherManager:
        """Attach the hooks, once.

        Raises:
            RuntimeError: in a distributed run.
        """
        if (ranks := world_size()) > 1:
            raise RuntimeError(
                f"expected one process, got {ranks}: estimates are not averaged over ranks, whose weights would drift "
                "apart; train on one device, or with grit.GritTrainer"
            )
        if self.capture is None:
            pairs = self.pairs()
            takers = [self.by_pair[pair.name].take for pair in pairs]
            no_text = [pair.name for pair in pairs if self.modality[self.names[pair.name]] in ("vision", "cross_modal")]
            self.capture = TokenCapture(self.model, pairs, takers, no_text)
            self._switch_capture()
        return self

    def layers(self) -> Iterator[tuple[GroupState, int, LoraPair]]:
        """None: what is stepped through here are factors of GRIT's own."""
        return iter(())

    def unreported(self) -> list[str]:
        """Layers of which no tokens have come yet."""
        return [name for name, layer in self.by_pair.items() if not layer.fisher_matrix.samples]

    def capture_kinds(self) -> dict[str, str]:
        """Layer → hooks, or undecided where nothing has come."""
        silent = set(self.unreported())
        return {name: "undecided" if name in silent else "hooks" for name in self.by_pair}

    def ready_layers(self) -> int:
        """Layers whose estimate is used."""
        return sum(layer.ready for layer in self.by_pair.values())

    # One step, in the order in which GritOptimizer calls

    def begin_step(self, gradient_norm: float) -> bool:
        """Whether the step may go on, see `grit.GRITManager`; tokens of a step that is left out are forgotten."""
        goes_on = super().begin_step(gradient_norm)
        if not goes_on:
            for layer in self.by_pair.values():
                layer.activation_buffer.clear()
        return goes_on

    def update_statistics(self) -> None:
        """Take what was captured into the estimates, turn moments along, and share the budgets out anew.

        Raises:
            CaptureError: layers have gradients but their hooks reported nothing.
        """
        due = self.capture is not None and self.capture.active
        if due:
            self._take_captured()
        self._follow()
        if due:
            self.apply_projections(self.projections())

    def _take_captured(self) -> None:
        silent = [
            name
            for name, layer in self.by_pair.items()
            if layer.gradients() is not None and not layer.activation_buffer and not layer.fisher_matrix.samples
        ]
        if silent:
            raise CaptureError(
                f"{len(silent)} layers have gradients but their hooks reported nothing (fused kernels read the weights "
                f"without calling the modules): {', '.join(silent[:6])}; switch the fused kernels off"
            )
        self.keep_vision_inputs()
        changed = [layer.update_fisher_and_projection() for layer in self.by_pair.values()]
        self.inversions += any(changed)
        for layer in (layer for layer in self.by_pair.values() if layer.ready and layer.config.enable_natural_gradient):
            fisher = layer.fisher_matrix
            self.failed_inversions += sum(fisher.eigen(s).mean > 0 and fisher.inverse(s) is None for s in SIDES)
        if self.capture is not None:
            self.capture.clear()

    def keep_vision_inputs(self) -> None:
        """Keep inputs of the first vision layer, [tokens, d], for `VLMGRITAdapter.estimate_vision_rank`."""
        first = next((layer for name, layer in self.grit_layers.items() if self.modality[name] == "vision"), None)
        if first is not None and first.activation_buffer:
            tokens = first_tokens(first.activation_buffer, first.config.buffer_tokens)
            self.vision_inputs = tokens.spread(min(len(tokens), RANK_TOKENS)).x

    def _follow(self) -> None:
        """Turn moments to the eigenvectors, once the warm-up is over: before, Adam's own coordinates are used."""
        if self.config.mode != "eigen_adamw" or not self.preconditions():
            return
        for name, layer in self.by_pair.items():
            moments = self.moments[name]
            if layer.ready and layer.config.enable_natural_gradient and not moments.has_followed(layer.fisher_matrix):
                moments.follow(layer.fisher_matrix)

    def projections(self) -> dict[str, dict[str, int]]:
        """Modality → layer → directions at this step; see `grit_vlm.core.budgets`."""
        return budgets.projections(self)

    def apply_projections(self, projections: Mapping[str, Mapping[str, int]]) -> None:
        """Let layers keep so many directions from now on."""
        for layers in projections.values():
            for name, budget in layers.items():
                self.grit_layers[name].update_projection(budget)

    def inversion_due(self) -> bool:
        """Never: estimates are solved for where they change."""
        return False

    def precondition_gradients(self) -> float:
        """Replace every `.grad` by what its layer's settings make of it, in place (modes adamw and sgd).

        Natural gradient first, then grafting (the raw norm of each tensor restored, where set), then projection.

        Returns:
            Σ Δᵀ(F + λI)Δ of what they are replaced by, which the trust region of mode sgd limits (0 in mode adamw).
        """
        if not self.preconditions():
            return 0.0
        length, cosines = precondition(self.by_pair.values(), self.config)
        if cosines and self.step % self.config.log_freq == 0:
            self.measured = records.measure_cosines([torch.stack(cosines)])
        return length

    def add_regularizers(self) -> None:
        """None here."""

    def observe_loss(self, loss: float) -> None:
        """The mean loss of a step, for adaptive projection schedules."""
        for schedule in self.schedules.values():
            schedule.observe(loss)

    def _advance(self) -> None:
        super()._advance()
        for schedule in self.schedules.values():
            schedule.current_step = self.step

    def _switch_capture(self) -> None:
        if self.capture is not None:
            fisher = next(iter(self.grit_layers.values())).fisher_matrix  # all have one interval
            self.capture.active = fisher.due(self.step) or self.step < fisher.update_freq

    # For the probe, and checkpoints

    def readings(self) -> list[LayerReading]:
        """The state of every layer's preconditioner, for `probes`."""
        return [log.reading(self, name, layer) for name, layer in self.by_pair.items()]

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on: tensors, numbers and text only (loads with weights_only=True)."""
        return checkpoint.save(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; the log file is rewritten to hold what led there.

        Raises:
            ValueError: the checkpoint has other layers; FisherError: it is of other estimates.
        """
        checkpoint.load(self, state)
        self._switch_capture()
