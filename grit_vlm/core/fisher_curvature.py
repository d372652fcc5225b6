"""`FisherCurvature`: the Fisher estimates, natural gradients and projections of all GRIT-LoRA layers of a model.

`grit.manager.Manager` takes it here in place of `grit`'s own rank-space factors. Hooks bring the tokens of every LoRA
layer, the estimates are updated with them, and gradients or Adam's steps change as each layer's settings say.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grit import GRITConfig, factors
from grit.capture import world_size
from grit.config import GRITError
from grit.curvature import NO_EFFECT_COSINE, Curvature
from grit.eigen_adamw import Rotated
from grit.layers import LoraPair, group_pairs
from grit.manager import Manager
from grit_vlm.core.fisher_info import SIDES, FisherInformationMatrix, Gradients, Side, rotate
from grit_vlm.core.grit_lora import GRITLoRALinear, TokenCapture
from grit_vlm.utils.projection import AdaptiveSchedule, MultiModalProjector, ProjectionSchedule, create_scheduler

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
        self.follows = False

    def follow(self, fisher: FisherInformationMatrix) -> None:
        if self.follows and all(self.vectors.get(side) is fisher.eigen(side).vectors for side in SIDES):
            return
        for side in SIDES:
            vectors = fisher.eigen(side).vectors
            if vectors is None:
                continue
            if side not in self.vectors:
                turn = vectors.mT
                self.m[side], self.v[side] = fisher.lay_out(self.m[side]), fisher.lay_out(self.v[side])
            else:
                turn = vectors.mT @ self.vectors[side]
            self.m[side] = rotate(turn, self.m[side])
            self.v[side] = rotate(turn.square(), self.v[side])
            self.vectors[side] = vectors
        self.follows = True

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "m": dict(self.m), "v": dict(self.v), "vectors": dict(self.vectors)}

    def load_state_dict(self, state: dict[str, Any], fisher: FisherInformationMatrix) -> None:
        """The estimate's eigenvectors are taken for the saved ones where they agree."""
        vars(self).update(state)
        for side, saved in self.vectors.items():
            own = fisher.eigen(side).vectors if self.follows else None  # type: ignore[arg-type]
            if own is not None and torch.equal(own, saved):
                self.vectors[side] = own


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
        self.adaptive = False  # whether mode eigen_adamw shortens steps to the trust region too, as mode sgd does
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

    @property
    def wants_losses(self) -> bool:
        return any(isinstance(schedule, AdaptiveSchedule) for schedule in self.schedules.values())

    def observe_loss(self, loss: float) -> None:
        for schedule in self.schedules.values():
            schedule.observe(loss)

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
        """Modality → layer → directions at a step, shared out by `MultiModalProjector`.

        Only layers that are projected and whose estimate is ready. What one modality has no directions for goes to
        others with the same estimate, whose directions are of the same kind; none of it to or from one whose budget is
        fixed.
        """
        members: dict[str, list[str]] = {}
        for name, layer in self.grit_layers.items():
            if layer.modality in self.schedules and layer.config.enable_projection and layer.ready:
                members.setdefault(layer.modality, []).append(name)
        alike: dict[str, list[str]] = {}
        for modality, names in members.items():
            schedule, first = self.schedules[modality], self.grit_layers[names[0]]
            fixed = schedule.start == schedule.end
            alike.setdefault(modality if fixed else f"any {first.config.fisher_approximation}", []).append(modality)
        shares: dict[str, list[int]] = {}
        for among in alike.values():
            values = {
                m: [self.grit_layers[name].fisher_matrix.direction_values() for name in members[m]] for m in among
            }
            wanted = {m: len(members[m]) * self.schedules[m].budget(step) for m in among}
            shares |= MultiModalProjector().share_out(values, wanted)
        return {m: dict(zip(names, shares[m], strict=True)) for m, names in members.items()}

    def precondition(self, measure: bool) -> tuple[float, list[Tensor]]:
        """Natural gradient, then grafting (restoring the raw norm of each tensor, if set), then projection."""
        length = 0.0
        cosines: list[Tensor] = []
        for layer in self.by_pair.values():
            raw = layer.gradients()
            if raw is None or not layer.acts:
                continue
            natural = layer.config.enable_natural_gradient
            new = layer.fisher_matrix.natural_gradient(raw) if natural else raw
            if natural and self.config.grafts:
                new = {side: g * (raw[side].norm() / g.norm().clamp_min(1e-30)) for side, g in new.items()}
            new = layer.project_gradients(new)
            if self.config.mode == "sgd":
                length += layer.fisher_matrix.squared_length(new)
            for side, parameter in (("A", layer.lora_A), ("B", layer.lora_B)):
                if measure:
                    one, other = (g.double().reshape(1, -1) for g in (raw[side], new[side]))
                    cosines.append(nn.functional.cosine_similarity(one, other))
                parameter.grad.copy_(new[side])
        return length, cosines

    def rotated(self, param_groups: list[dict[str, Any]], step: int) -> list[Rotated]:
        """A and B of every layer with gradients, in the coordinates of its moments.

        Adam's own until the warm-up is over and an estimate is ready, then along the estimate's eigenvectors, where the
        step is weighted and, unless `grafting` is False, made as long as Adam's: with a damping of 1e-4 it would be up
        to a hundred times as long along directions without information.
        """
        groups = {id(p): group for group in param_groups for p in group["params"]}
        stacks = []
        self._stepped = []
        for name, layer in self.by_pair.items():
            gradients = layer.gradients()
            if gradients is None:
                continue
            if name not in self.moments:
                self.moments[name] = EigenMoments(layer)
            moments = self.moments[name]
            if self.preconditions(step) and layer.ready and layer.config.enable_natural_gradient:
                moments.follow(layer.fisher_matrix)
            moments.steps += 1
            self._stepped.append(layer)
            for side in SIDES:
                parameter = layer.lora_A if side == "A" else layer.lora_B
                stacks.append(self._rotated(layer, moments, side, parameter, groups[id(parameter)], gradients, step))
        return stacks

    def _rotated(self, layer: GRITLoRALinear, moments: EigenMoments, side: Side, parameter: nn.Parameter,
                group: dict[str, Any], gradients: Gradients, step: int) -> Rotated:  # fmt: skip
        fisher, vectors = layer.fisher_matrix, moments.vectors.get(side)

        def back(direction: Tensor) -> Tensor:
            direction = direction[0]
            if moments.follows and self.preconditions(step):
                weighted = direction * fisher.step_weights(side, self.config.eigen_power)
                if self.config.grafting is not False:
                    weighted = weighted * (direction.norm() / weighted.norm().clamp_min(1e-30))
                direction = weighted
            return fisher.turn_back_along(vectors, side, direction)[None]

        gradient = fisher.turn_along(vectors, side, gradients[side].to(moments.m[side].dtype)).contiguous()[None]
        steps = torch.tensor([moments.steps])
        return Rotated([parameter], group, gradient, moments.m[side][None], moments.v[side][None], steps, back)

    def limit(
        self, stacks: list[Rotated], changes: list[Tensor], step: int
    ) -> tuple[list[Tensor], dict[str, float], float]:
        """Project the changes of each layer; the adaptive types also shorten all of them to the trust region."""
        length = 0.0
        projected = []
        for i, layer in enumerate(self._stepped):
            own: Gradients = {"A": changes[2 * i][0], "B": changes[2 * i + 1][0]}
            if layer.acts and self.preconditions(step):
                own = layer.project_gradients(own)
                if self.adaptive:
                    rates = {"A": float(stacks[2 * i].options["lr"]), "B": float(stacks[2 * i + 1].options["lr"])}
                    length += layer.fisher_matrix.squared_length({side: rates[side] * own[side] for side in SIDES})
            projected += [own["A"][None], own["B"][None]]
        if not self.adaptive:
            return projected, {}, 1.0
        kappa = self.config.kl_clip
        nu = (kappa / length) ** 0.5 if 0 < kappa < length else 1.0
        return projected, {"grit/trust_region_factor": nu}, nu

    def unreported(self) -> list[str]:
        return [name for name, layer in self.by_pair.items() if not layer.fisher_matrix.samples]

    def capture_kinds(self) -> dict[str, str]:
        silent = set(self.unreported())
        return {name: "undecided" if name in silent else "hooks" for name in self.by_pair}

    def ready_layers(self) -> int:
        return sum(layer.ready for layer in self.by_pair.values())

    def effect(self, step: int, measured: Mapping[str, Any]) -> dict[str, Any]:
        """Evidence that the optimizer steps differently, or the reason why it does not."""
        layers = list(self.by_pair.values())
        spread = measured.get("max_one_minus_cosine")
        if not any(layer.config.enable_natural_gradient or layer.config.enable_projection for layer in layers):
            return {"reason": "natural gradient and projection are switched off in every layer"}
        if not self.preconditions(step):
            return {"reason": f"natural-gradient warm-up until step {self.config.ng_warmup_steps}"}
        if not self.ready_layers():
            most = max(layer.fisher_matrix.samples for layer in layers)
            return {"reason": f"no estimate is ready ({most} tokens seen)"}
        if self.config.mode == "eigen_adamw":
            weights = [layer.weights(s, self.config.eigen_power) for layer in layers if layer.ready for s in SIDES]
            change = max(float((w / w.mean() - 1).abs().max()) for w in weights)
            alike = change <= NO_EFFECT_COSINE
            why = {"reason": "the Fisher information is the same along every direction"} if alike else {}
            return {"max_weight_change": change, **why}
        if spread is None:
            return {"reason": "no gradient was preconditioned yet"}
        if spread <= NO_EFFECT_COSINE and self.config.mode != "sgd":
            return {"reason": "every preconditioner is a multiple of the identity, which AdamW cancels"}
        return {}

    def spectra(self) -> dict[str, Any]:
        records: dict[str, Any] = {}
        for name, layer in self.by_pair.items():
            fisher = layer.fisher_matrix
            entry: dict[str, Any] = {"r": layer.lora_A.shape[0], "samples": float(fisher.samples)}
            for side, letter in FACTOR_OF.items():
                if not fisher.weight or fisher.eigen(side).mean <= 0:
                    continue
                eigen = fisher.eigen(side)
                values = eigen.values[eigen.real].sort(descending=True).values
                entry[f"eigenvalues_{letter}"] = values[: self.config.log_top_eigs].tolist()
                entry[f"effective_rank_{letter}"] = float(factors.effective_rank(values))
                entry[f"condition_{letter}"] = float(values[0] / values[-1].clamp_min(1e-38))
            records[name] = entry
        return records

    def readings(self, step: int) -> list[dict[str, Any]]:
        """The state of every layer's preconditioner, for `probes`.

        Matrices are [r, r] of estimate kfac, [n] (a diagonal one) of diagonal, [k, n, n] (on the diagonal) of
        block_diagonal.
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
            reading["factors"][letter] = _matrix(fisher, side, _filled(eigen.values, eigen.real))
            if not ready or eigen.mean <= 0:
                continue
            if self.config.mode == "eigen_adamw":
                if eigen.vectors is not None and config.enable_natural_gradient:
                    vectors = eigen.vectors
                    reading["bases"][letter] = vectors if vectors.dim() == 2 else vectors.flatten(0, 1)
                reading["weights"][letter] = layer.weights(side, self.config.eigen_power)
            else:
                inverse = fisher.inverse(side) if config.enable_natural_gradient else None
                inverse = torch.ones_like(eigen.values) if inverse is None else _filled(inverse, eigen.real)
                if layer.projection_budget is not None:
                    inverse = inverse * fisher.keeps(layer.projection_budget)[side]
                reading["preconditioners"][letter] = _matrix(fisher, side, inverse)
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
            "schedules": {name: schedule.state_dict() for name, schedule in self.schedules.items()},
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
                self.moments[name].load_state_dict(saved["moments"], layer.fisher_matrix)
        for name, schedule in self.schedules.items():
            schedule.load_state_dict(state["schedules"].get(name, {}))
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


def _filled(values: Tensor, real: Tensor) -> Tensor:
    """Fill the padding of a run with the mean value: there is no direction there, and none may appear to be."""
    return torch.where(real, values, values[real].mean())


def _matrix(fisher: FisherInformationMatrix, side: Side, values: Tensor) -> Tensor:
    """V diag(values) Vᵀ in the form that `FisherCurvature.readings` says."""
    vectors = fisher.eigen(side).vectors
    if vectors is None:
        return values.reshape(-1)
    if vectors.dim() == 2:
        return (vectors * values.reshape(1, -1)) @ vectors.mT
    return ((vectors * values[..., None, :]) @ vectors.mT).flatten(0, 1)


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _on(inner, device) for key, inner in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value
