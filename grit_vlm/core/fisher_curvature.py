"""`FisherCurvature`: the Fisher estimates, natural gradients and projections of all GRIT-LoRA layers of a model.

`grit.manager.Manager` takes it here in place of `grit`'s own rank-space factors. Hooks bring the tokens of every LoRA
layer, the estimates are updated with them, and gradients or Adam's steps change as each layer's settings say.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grit import GRITConfig, factors
from grit.capture import world_size
from grit.config import GRITError
from grit.curvature import NO_EFFECT, Curvature
from grit.eigen_adamw import Rotated
from grit.layers import LoraPair, group_pairs
from grit.manager import Manager
from grit_vlm.core.fisher_info import SIDES, Eigen, FisherInformationMatrix, Side, turn, turn_back
from grit_vlm.core.grit_lora import GRITLoRALinear, TokenCapture
from grit_vlm.utils.projection import ProjectionSchedule, create_scheduler, share_out

FACTOR_OF: dict[Side, str] = {"A": "g", "B": "a"}
"""Side → the factor of GRIT that works on it, whose name its eigenvalues have in logs and readings."""


class EigenMoments:
    """Adam's m and v of one layer, in the weights' coordinates until there is an estimate, then in its eigenbasis.

    As in `grit`: when eigenvectors change, the first moment turns exactly, the second as that of uncorrelated
    coordinates, v'_i = Σ_j R_ij² v_j. Component first, as in `grit_vlm.core.fisher_info`.
    """

    def __init__(self, layer: GRITLoRALinear):
        starts = {"A": layer.lora_A.data, "B": layer.lora_B.data.mT}
        like = {side: t.to(torch.promote_types(t.dtype, torch.float32)).contiguous() for side, t in starts.items()}
        self.m = {side: torch.zeros_like(t) for side, t in like.items()}
        self.v = {side: torch.zeros_like(t) for side, t in like.items()}
        self.steps = 0
        self.vectors: dict[str, Tensor] = {}
        self.samples = 0  # that the estimate had seen when these moments followed it last

    def follow(self, fisher: FisherInformationMatrix) -> None:
        if self.samples == fisher.samples:
            return
        self.samples = fisher.samples
        for side in SIDES:
            vectors = fisher.eigen(side).vectors
            if vectors is None:
                continue
            rotation = vectors.mT @ self.vectors[side] if side in self.vectors else vectors.mT
            self.m[side], self.v[side] = rotation @ self.m[side], rotation.square() @ self.v[side]
            self.vectors[side] = vectors

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "m": dict(self.m), "v": dict(self.v), "vectors": dict(self.vectors)}


class FisherCurvature(Curvature):
    """Raises GRITError for trainable LoRA that is not among the layers, or several fisher_update_freq."""

    def __init__(self, model: nn.Module, grit_layers: Mapping[str, GRITLoRALinear]):
        config = GRITConfig(
            capture="hooks", reprojection="none", min_lora_rank=1, enable_rank_adaptation=False,
            nesterov=False, cautious=False, orthogonal=False,  # not tried here
        )  # fmt: skip
        super().__init__(model, config)
        self._grouped = [pair for group in group_pairs(super().pairs()) for pair in group.pairs]
        self.grit_layers = dict(grit_layers)
        views = {(id(layer.lora), layer.adapter_name): layer for layer in self.grit_layers.values()}
        if foreign := [pair.name for pair in self._grouped if (id(pair.layer), pair.adapter) not in views]:
            raise GRITError(f"expected every trainable LoRA layer among grit_layers, got others: {foreign[:6]}")
        # By the names that the probe and the log have.
        self.by_pair = {pair.name: views[id(pair.layer), pair.adapter] for pair in self._grouped}
        frequencies = {layer.config.fisher_update_freq for layer in self.grit_layers.values()}
        if len(frequencies) > 1:
            raise GRITError(f"fisher_update_freq: expected one for all layers, got {sorted(frequencies)}")
        self.moments: dict[str, EigenMoments] = {}
        self.schedules: dict[str, ProjectionSchedule] = {}
        self.plan(1000)

    def plan(self, total_steps: int) -> None:
        """Let projection budgets go from start to end over this many steps."""
        self.total_steps = total_steps
        self.schedules = {}
        for layer in self.grit_layers.values():
            c = layer.config
            if c.enable_projection and layer.modality not in self.schedules:
                ends = (c.projection_budget_start, c.projection_budget_end)
                self.schedules[layer.modality] = create_scheduler(c.projection_schedule, *ends, total_steps)

    def reconfigure(self, **changed: Any) -> None:
        for layer in self.grit_layers.values():
            layer.config = dataclasses.replace(layer.config, **changed)
            layer.fisher_matrix.update_freq = layer.config.fisher_update_freq
            if not layer.config.enable_projection:
                layer.projection_budget = None

    def pairs(self) -> list[LoraPair]:
        return self._grouped

    def open(self) -> None:
        if (ranks := world_size()) > 1:
            raise RuntimeError(
                f"expected one process, got {ranks}: estimates are not averaged over ranks, whose weights would drift "
                "apart; train on one device, or with grit.GritTrainer"
            )
        no_text = [pair for pair, layer in self.by_pair.items() if layer.modality in ("vision", "cross_modal")]
        self.capture = TokenCapture(self.model, self.by_pair, self.pairs(), no_text)

    def forget(self) -> None:
        super().forget()
        for layer in self.by_pair.values():
            layer.activation_buffer.clear()

    def captures_at(self, step: int) -> bool:
        every = next(iter(self.grit_layers.values())).config.fisher_update_freq  # all have one interval
        return step % every == 0 or step < every

    def gather(self, step: int) -> list[dict[str, Any]]:
        """Add what was captured to the estimates, and share the budgets out again."""
        silent = [
            name
            for name, layer in self.by_pair.items()
            if layer.gradients() is not None and not layer.activation_buffer and not layer.fisher_matrix.samples
        ]
        if silent:
            raise GRITError(
                f"{len(silent)} layers have gradients but their hooks reported nothing (fused kernels read the weights "
                f"without calling the modules): {', '.join(silent[:6])}; switch the fused kernels off"
            )
        self.inversions += any([layer.update_fisher_and_projection() for layer in self.by_pair.values()])
        for layer in (layer for layer in self.by_pair.values() if layer.ready and layer.config.enable_natural_gradient):
            fisher = layer.fisher_matrix
            self.failed_inversions += sum(fisher.eigen(s).mean > 0 and fisher.inverse(s) is None for s in SIDES)
        if self.capture is not None:
            self.capture.clear()
        for budgets in self.projections(step).values():
            for name, budget in budgets.items():
                self.grit_layers[name].update_projection(budget)
        return []

    def projections(self, step: int) -> dict[str, dict[str, int]]:
        """Modality → layer → directions at a step, shared out by `share_out`.

        Only layers that are projected and whose estimate is ready.
        """
        members: dict[str, list[str]] = {}
        for name, layer in self.grit_layers.items():
            if layer.modality in self.schedules and layer.config.enable_projection and layer.ready:
                members.setdefault(layer.modality, []).append(name)
        shares: dict[str, dict[str, int]] = {}
        for modality, names in members.items():
            values = [self.grit_layers[name].fisher_matrix.direction_values() for name in names]
            budget = len(names) * self.schedules[modality].budget(step)
            shares[modality] = dict(zip(names, share_out(values, budget), strict=True))
        return shares

    def precondition(self) -> float:
        """Natural gradient, then grafting (restoring the raw norm of each tensor, if set), then projection."""
        for layer in self.by_pair.values():
            raw = layer.gradients()
            if raw is None or not layer.acts:
                continue
            natural = layer.config.enable_natural_gradient
            new = layer.fisher_matrix.natural_gradient(raw) if natural else raw
            if natural and self.config.grafts:
                new = {side: g * (raw[side].norm() / g.norm().clamp_min(1e-30)) for side, g in new.items()}
            new = layer.project_gradients(new)
            layer.lora_A.grad.copy_(new["A"])
            layer.lora_B.grad.copy_(new["B"])
        return 0.0

    def rotated(self, param_groups: list[dict[str, Any]], step: int) -> list[Rotated]:
        """A and B of every layer with gradients, in the coordinates of its moments.

        Adam's own until the warm-up is over and an estimate is ready, then along the estimate's eigenvectors, where the
        step is weighted and, unless `grafting` is False, made as long as Adam's: with a damping of 1e-4 it would be up
        to a hundred times as long along directions without information.
        """
        groups = {id(p): group for group in param_groups for p in group["params"]}
        stacks = []
        for name, layer in self.by_pair.items():
            gradients = layer.gradients()
            if gradients is None:
                continue
            if name not in self.moments:
                self.moments[name] = EigenMoments(layer)
            moments, keep = self.moments[name], dict[Side, Tensor]()
            if self.preconditions(step) and layer.ready:
                if layer.config.enable_natural_gradient:
                    moments.follow(layer.fisher_matrix)
                if layer.projection_budget is not None:
                    keep = layer.fisher_matrix.keeps(layer.projection_budget)
            moments.steps += 1
            for side in SIDES:
                parameter = layer.lora_A if side == "A" else layer.lora_B
                back = self._back(layer.fisher_matrix, moments, side, keep.get(side), step)
                gradient = turn(moments.vectors.get(side), side, gradients[side].to(moments.m[side].dtype))
                gradient, m, v = gradient.contiguous()[None], moments.m[side][None], moments.v[side][None]
                steps = torch.tensor([moments.steps])
                stacks.append(Rotated([parameter], groups[id(parameter)], gradient, m, v, steps, back))
        return stacks

    def _back(
        self, fisher: FisherInformationMatrix, moments: EigenMoments, side: Side, keep: Tensor | None, step: int
    ) -> Callable[[Tensor], Tensor]:
        """Adam's direction in the coordinates of its moments → the change: weighted, turned back, projected."""

        def back(direction: Tensor) -> Tensor:
            direction = direction[0]
            if moments.samples and self.preconditions(step):
                weighted = direction * fisher.step_weights(side, self.config.eigen_power)
                if self.config.grafting is not False:
                    weighted = weighted * (direction.norm() / weighted.norm().clamp_min(1e-30))
                direction = weighted
            return fisher.scaled(side, turn_back(moments.vectors.get(side), side, direction), keep)[None]

        return back

    def unreported(self) -> list[str]:
        return [name for name, layer in self.by_pair.items() if not layer.fisher_matrix.samples]

    def capture_kinds(self) -> dict[str, str]:
        silent = set(self.unreported())
        return {name: "undecided" if name in silent else "hooks" for name in self.by_pair}

    def ready_layers(self) -> int:
        return sum(layer.ready for layer in self.by_pair.values())

    @property
    def _power(self) -> float | None:
        return self.config.eigen_power if self.config.mode == "eigen_adamw" else None

    def effect(self, step: int) -> dict[str, Any]:
        """Evidence that the optimizer steps differently, or the reason why it does not."""
        layers = list(self.by_pair.values())
        if not any(layer.config.enable_natural_gradient or layer.config.enable_projection for layer in layers):
            return {"reason": "natural gradient and projection are switched off in every layer"}
        if not self.preconditions(step):
            return {"reason": f"natural-gradient warm-up until step {self.config.ng_warmup_steps}"}
        if not self.ready_layers():
            most = max(layer.fisher_matrix.samples for layer in layers)
            return {"reason": f"no estimate is ready ({most} tokens seen)"}
        weights = [layer.weights(side, self._power) for layer in layers if layer.ready for side in SIDES]
        change = max(float((w / w.mean() - 1).abs().max()) for w in weights)
        record: dict[str, Any] = {"max_weight_change": change}
        if change <= NO_EFFECT and self.config.mode != "sgd":
            record["reason"] = "the Fisher information is the same along every direction, and Adam cancels a factor"
        return record

    def spectra(self) -> dict[str, Any]:
        records: dict[str, Any] = {}
        for name, layer in self.by_pair.items():
            fisher = layer.fisher_matrix
            entry: dict[str, Any] = {"r": layer.lora_A.shape[0], "samples": float(fisher.samples)}
            for side, letter in FACTOR_OF.items():
                if not fisher.weight or fisher.eigen(side).mean <= 0:
                    continue
                eigen = fisher.eigen(side)
                values = eigen.values.reshape(-1).sort(descending=True).values
                entry[f"eigenvalues_{letter}"] = values[: self.config.log_top_eigs].tolist()
                entry[f"effective_rank_{letter}"] = float(factors.effective_rank(values))
                entry[f"condition_{letter}"] = float(values[0] / values[-1].clamp_min(1e-38))
            records[name] = entry
        return records

    def readings(self, step: int) -> list[dict[str, Any]]:
        """The state of every layer's preconditioner, for `probes`.

        Matrices are [r, r] of estimate kfac, [n] (a diagonal one) of diagonal.
        """
        return [self._reading(name, layer, step) for name, layer in self.by_pair.items()]

    def _reading(self, name: str, layer: GRITLoRALinear, step: int) -> dict[str, Any]:
        fisher, config = layer.fisher_matrix, layer.config
        used = config.enable_natural_gradient or config.enable_projection
        ready = used and layer.ready and self.preconditions(step)
        reading: dict[str, Any] = {"layer": name, "ready": ready, "samples": float(fisher.samples)}
        reading |= {"refresh_every": config.fisher_update_freq, "source": "hooks"}
        reading |= {part: {} for part in ("factors", "preconditioners", "damping", "bases", "weights")}
        if not fisher.weight:
            return reading
        for side, letter in FACTOR_OF.items():
            eigen = fisher.eigen(side)
            reading["factors"][letter] = _matrix(eigen, eigen.values)
            if not ready or eigen.mean <= 0:
                continue
            if self.config.mode == "eigen_adamw":
                if eigen.vectors is not None and config.enable_natural_gradient:
                    reading["bases"][letter] = eigen.vectors
                reading["weights"][letter] = layer.weights(side, self._power).reshape(-1)
            else:
                reading["preconditioners"][letter] = _matrix(eigen, layer.weights(side, None))
                reading["damping"][letter] = fisher.damping * fisher.scale()
        return reading

    def state_dict(self) -> dict[str, Any]:
        return {
            "layers": {
                name: {
                    "fisher": layer.fisher_matrix.state_dict(),
                    "budget": layer.projection_budget or 0,
                    "moments": self.moments[name].state_dict() if name in self.moments else {},
                }
                for name, layer in self.by_pair.items()
            },
            "inversions": self.inversions,
            "failed_inversions": self.failed_inversions,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError for a state of other layers, GritVlmError for one of other estimates."""
        if odd := sorted(set(self.by_pair) ^ set(state["layers"])):
            raise ValueError(f"expected a checkpoint of the same LoRA layers, got one that differs in: {odd[:6]}")
        for name, layer in self.by_pair.items():
            saved = _on(state["layers"][name], layer.lora_A.device)
            layer.fisher_matrix.load_state_dict(saved["fisher"])
            layer.projection_budget = saved["budget"] or None
            if saved["moments"]:
                self.moments[name] = EigenMoments(layer)
                vars(self.moments[name]).update(saved["moments"])
        self.inversions, self.failed_inversions = state["inversions"], state["failed_inversions"]


class FisherManager(Manager):
    """The manager of a model's GRIT-LoRA layers, which then stop capturing on their own or for another manager."""

    curvature: FisherCurvature

    def __init__(self, model: nn.Module, grit_layers: Mapping[str, GRITLoRALinear]):
        super().__init__(FisherCurvature(model, grit_layers))
        for layer in grit_layers.values():
            if layer.capture is not None:
                layer.capture.close()
                layer.capture = None
            if layer.manager is not None:
                layer.manager.close(check=False)
            layer.manager = self


def _matrix(eigen: Eigen, values: Tensor) -> Tensor:
    """V diag(values) Vᵀ in the form that `FisherCurvature.readings` says."""
    flat = values.reshape(-1)
    return flat if eigen.vectors is None else (eigen.vectors * flat) @ eigen.vectors.mT


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _on(inner, device) for key, inner in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value
