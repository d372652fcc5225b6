"""What rank space reports: evidence of an effect, spectra, ranks, and the readings of the probe. Nothing here steps."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from grit import factors
from grit.curvature import NO_EFFECT, Curvature
from grit.layers import LoraPair
from grit.state import KINDS, GroupState


class RankSpaceReports(Curvature):
    """The reporting half of `grit.rank_space.RankSpace`."""

    states: list[GroupState]

    def layers(self) -> Iterator[tuple[GroupState, int, LoraPair]]:
        for state in self.states:
            for i, pair in enumerate(state.group.pairs):
                yield state, i, pair

    @abstractmethod
    def kept_directions(self, state: GroupState, i: int, step: int) -> tuple[int, int] | None:
        """k_a and k_b that a reprojection would keep of layer i; None where it has no statistics or none is wanted."""

    def unreported(self) -> list[str]:
        return [pair.name for state, i, pair in self.layers() if not bool(state["samples"][i] > 0)]

    def capture_kinds(self) -> dict[str, str]:
        return {pair.name: KINDS[int(state["kind"][i])] for state, i, pair in self.layers()}

    def ready_layers(self) -> int:
        return sum(int((s["ready_a"] | s["ready_g"]).sum()) for s in self.states)

    def effect(self, step: int) -> dict[str, Any]:
        config = self.config
        if not self.preconditions(step):
            return {"reason": f"natural-gradient warm-up until step {config.ng_warmup_steps}"}
        if not self.ready_layers():
            samples = max(float(s["samples"].max()) for s in self.states)
            return {"reason": f"no factor is ready ({samples:.0f} of {config.kfac_min_samples} samples)"}
        evidence: dict[str, Any]
        if config.mode == "eigen_adamw":
            rotation = max(float(basis_rotation(s[f"q_{x}"], s[f"ready_{x}"]).max()) for s in self.states for x in "ag")
            # Weights along the directions (eigen_power) count too: they come after Adam has normalized.
            weights = max(float((s[w] - 1).abs().max()) for s in self.states for w in ("w_a", "w_g"))
            evidence = {"max_basis_rotation": rotation, "max_weight_change": weights}
            if max(rotation, weights) <= NO_EFFECT**2:
                evidence["reason"] = "every eigenbasis is a permutation of the axes, which Adam does not see"
            return evidence
        share = _median_of(self.spectra(), "damping_share_a", "damping_share_g")
        anisotropy = max(float(anisotropy_of(s[f"inv_{x}"]).max()) for s in self.states for x in "ag")
        evidence = {"damping_share": share, "max_anisotropy": anisotropy}
        if anisotropy <= NO_EFFECT and (config.mode != "sgd" or config.grafts):
            evidence["reason"] = (
                f"every preconditioner is a multiple of the identity (damping λ is {share:.3g} times the mean "
                f"eigenvalue), and {'grafting removes' if config.grafts else 'AdamW cancels'} a constant factor; "
                "lower kfac_damping or use damping_mode 'relative'"
            )
        return evidence

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
        numbers = {f"grit/{name}": _median_of(layers, name) for name in names}
        numbers["grit/damping_share"] = _median_of(layers, "damping_share_a", "damping_share_g")
        return {**numbers, "grit/rank_mean": sum(entry["r"] for entry in layers.values()) / len(layers)}

    def final(self, step: int) -> dict[str, Any]:
        record = super().final(step)
        for state, i, pair in self.layers():
            if directions := self.kept_directions(state, i, step):
                record["ranks"][pair.name] |= {"final_k_a": directions[0], "final_k_b": directions[1]}
        if self.config.log_eig_heatmaps:
            endings = tuple(self.config.log_eig_heatmaps_modules)
            layers = [layer for layer in self.layers() if not endings or layer[2].name.endswith(endings)]
            record["factors"] = {
                pair.name: {f"cov_{s}": c[i].tolist() for s, c in zip("ag", state.covariances(), strict=True)}
                for state, i, pair in (layers if endings else layers[:4])
            }
        return record

    def readings(self, step: int) -> list[dict[str, Any]]:
        config, kinds = self.config, self.capture_kinds()
        refresh_every = max(config.kfac_update_freq, config.grit_cov_update_freq)
        readings = []
        for state in self.states:
            covariances = dict(zip("ag", state.covariances(), strict=True))
            samples, *lam = torch.stack([state[name].float() for name in ("samples", "lam_a", "lam_g")]).tolist()
            for i, pair in enumerate(state.group.pairs):
                sides = [s for s in "ag" if bool(state[f"ready_{s}"][i])]  # the other side is not touched yet
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
                readings.append(reading)
        return readings


def basis_rotation(q: Tensor, ready: Tensor) -> Tensor:
    """How far eigenbases are from a permutation of the axes: 1 − mean_j max_i Q_ij², [n]; 0 where not ready."""
    return torch.where(ready, 1 - q.square().amax(-2).mean(-1), torch.zeros(q.shape[0], dtype=q.dtype, device=q.device))


def anisotropy_of(matrices: Tensor) -> Tensor:
    """‖M − mean(diag M)·I‖ / ‖M‖: [n, r, r] → [n]; 0 for a multiple of the identity."""
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    share: Tensor = torch.linalg.matrix_norm(matrices - mean * eye) / torch.linalg.matrix_norm(matrices)
    return share.nan_to_num(0.0)


def _median_of(layers: dict[str, dict[str, Any]], *names: str) -> float:
    values = sorted(entry[name] for entry in layers.values() for name in names if name in entry)
    return values[len(values) // 2] if values else float("nan")
