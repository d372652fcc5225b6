"""Every setting of GRIT with unit, range and symbol; needs neither torch nor any other package."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints


class GRITConfigError(ValueError):
    """Settings that contradict themselves or the method; the message lists all of them."""


@dataclass
class GRITConfig:
    """What GRIT is told. Names are those of the method's authors where they have one.

    The defaults are ours: they won a validation sweep on this project's tiny profile (figures in LOG.md). The authors'
    values are `GRITConfig.paper()`. Steps are optimizer steps. Fields may be set one by one; `validate` is called by
    whoever uses them and reports every mistake at once.
    """

    # LoRA, for `lora_config()`; on a model that has adapters already, the adapters count.
    lora_rank: int = 16  # r ≥ 1
    lora_alpha: float = 32.0  # α > 0; the update is s·B·A with s = α/r
    lora_dropout: float = 0.0  # [0, 1)
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )

    # Statistics
    capture: Literal["auto", "hooks", "gradients"] = "auto"  # auto: hooks, and gradients where hooks stay silent
    grit_cov_update_freq: int = 5  # steps ≥ 1 between two updates of the statistics
    cov_decay: float = 0.8  # β in [0, 1): weight that an update leaves to the past
    normalize_delta: bool = True  # multiply δ by the loss tokens (else Σ_g is about 1e-9 under a mean loss)

    # Factors and inverses
    kfac_update_freq: int = 10  # steps ≥ 1 between two inversions
    kfac_min_samples: int = 64  # tokens before a factor is trusted; identity until then
    kfac_damping: float = 1e-2  # λ ≥ 0: times tr(Σ)/r if relative, as it is if absolute
    damping_mode: Literal["relative", "absolute"] = "relative"
    pi_correction: bool = False  # λ is that of Σ_a ⊗ Σ_g and is split between the two (Martens & Grosse 2015, 6.3)
    kfac_inversion_device: str = "auto"  # auto (where the factors are) | cpu | cuda | …

    # Stepping
    mode: Literal["eigen_adamw", "adamw", "sgd"] = "eigen_adamw"
    pairing: Literal["kfac", "paper"] = "kfac"  # which factor meets which gradient
    grafting: bool | None = None  # raw norm of each tensor restored; None: in mode adamw only
    max_grad_norm: float | None = None  # clip after preconditioning; 0 = never; None: the Trainer's (not in mode sgd)
    ng_warmup_steps: int = 0  # steps without preconditioning
    lr_ratio_b: float = 1.0  # learning rate of B over that of A (LoRA+), > 0
    eigen_power: float = 1.0  # p in [0, 1] of mode eigen_adamw: step ∝ (λ_i/mean λ + damping)^(−p/2) along direction i
    kl_clip: float = 1e-3  # κ of mode sgd: trust region, (step)ᵀ F (step) ≤ κ; 0 = none
    sgd_momentum: float = 0.9  # [0, 1), of the SGD that GritTrainer makes in mode sgd

    # Reprojection and rank
    reprojection: Literal["balanced", "paper", "none"] = "balanced"
    use_two_sided_reprojection: bool = True  # of "paper": B by the eigenvectors of Σ_g (else of Σ_a)
    reprojection_freq: int = 0  # steps between two reprojections; 0 = none before the end of training
    reprojection_k: int = 8  # directions kept where the rank is not adapted
    reprojection_warmup_steps: int = 0  # none before
    enable_rank_adaptation: bool = True  # k = smallest rank whose eigenvalues reach τ
    rank_adaptation_threshold: float = 0.999  # τ in (0, 1]
    rank_adaptation_start_step: int = 0  # fixed k before
    min_lora_rank: int = 4  # 1 ≤ k ≤ r
    rank_shrink: Literal["end", "events", "never"] = "end"  # when tensors really shrink to k

    # Regularisers: off at 0, raised linearly from 0 over the warm-up
    lambda_kfac: float = 0.0  # ≥ 0, of tr(AᵀΣ_gA) + tr(BΣ_aBᵀ)
    lambda_reproj: float = 0.0  # ≥ 0, of ‖(I−P)A‖² + ‖B(I−P)‖²
    regularizer_warmup_steps: int = 0

    # Frequencies that follow the loss
    adaptive_schedule: bool = False  # halve intervals while the loss moves fast, double them while it stands
    adaptive_window: int = 50  # steps ≥ 2 over which the trend is taken

    # Safety
    max_nonfinite_steps: int = 10  # steps in a row with NaN or infinite gradients before training stops

    # Logging
    log_freq: int = 50  # steps ≥ 1 between two records of spectra and ranks
    log_fisher_spectrum: bool = True
    log_top_eigs: int = 8  # eigenvalues a factor in a record
    log_eig_heatmaps: bool = False  # whole factors in the last record, for heat maps
    log_eig_heatmaps_modules: list[str] = field(default_factory=list)  # name endings; empty: the first four layers

    @classmethod
    def paper(cls, **changes: Any) -> "GRITConfig":
        """The authors' defaults and pairing, for reproduction; `changes` override single fields."""
        values: dict[str, Any] = {
            "capture": "hooks",
            "grit_cov_update_freq": 15,
            "cov_decay": 0.95,
            "normalize_delta": False,
            "kfac_update_freq": 50,
            "kfac_damping": 1e-3,
            "damping_mode": "absolute",
            "kfac_inversion_device": "cpu",
            "mode": "adamw",
            "pairing": "paper",
            "grafting": False,
            "reprojection": "paper",
            "enable_rank_adaptation": True,
            "rank_adaptation_threshold": 0.99,
            "reprojection_k": 8,
            "reprojection_freq": 50,
            "rank_shrink": "never",
            "lambda_kfac": 1e-5,
            "lambda_reproj": 1e-4,
            "adaptive_schedule": True,
        }
        return cls.from_dict({**values, **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GRITConfig":
        """From a mapping, e.g. a section of a YAML file.

        Raises:
            GRITConfigError: unknown keys (with the nearest known one) and every other mistake, all at once.
        """
        known = [f.name for f in fields(cls)]
        problems = []
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                problems.append(
                    f"unknown setting {key!r}" + (f"; did you mean {close[0]!r}?" if close else "") + " Available: "
                    f"{', '.join(known)}"
                )
        config = cls(**{k: v for k, v in values.items() if k in known})
        problems += config.problems()
        if problems:
            raise GRITConfigError("\n".join(problems))
        return config

    def validate(self) -> None:
        """Raise GRITConfigError with every mistake, if there is one."""
        problems = self.problems()
        if problems:
            raise GRITConfigError("\n".join(problems))

    def problems(self) -> list[str]:
        """Every mistake, as a sentence with what was expected and what came."""
        found = self._wrong_types()
        wrong = {text.split(":", 1)[0] for text in found}  # their ranges cannot be compared
        at_least = {
            "lora_rank": 1,
            "grit_cov_update_freq": 1,
            "kfac_update_freq": 1,
            "kfac_min_samples": 1,
            "reprojection_k": 1,
            "min_lora_rank": 1,
            "adaptive_window": 2,
            "max_nonfinite_steps": 1,
            "log_freq": 1,
            "log_top_eigs": 1,
            "kfac_damping": 0,
            "kl_clip": 0,
            "lambda_kfac": 0,
            "lambda_reproj": 0,
            "reprojection_freq": 0,
            "ng_warmup_steps": 0,
            "reprojection_warmup_steps": 0,
            "rank_adaptation_start_step": 0,
            "regularizer_warmup_steps": 0,
            "max_grad_norm": 0,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if name not in wrong and value is not None and not (value >= least and math.isfinite(value)):
                found.append(f"{name}: expected a finite number of at least {least}, got {value}")
        for name in ("lora_alpha", "lr_ratio_b"):
            if name not in wrong and not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                found.append(f"{name}: expected a finite number above 0, got {getattr(self, name)}")
        for name in ("cov_decay", "sgd_momentum", "lora_dropout"):
            if name not in wrong and not 0 <= getattr(self, name) < 1:
                found.append(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        if "eigen_power" not in wrong and not 0 <= self.eigen_power <= 1:
            found.append(f"eigen_power: expected a number in [0, 1], got {self.eigen_power}")
        if "rank_adaptation_threshold" not in wrong and not 0 < self.rank_adaptation_threshold <= 1:
            got = self.rank_adaptation_threshold
            found.append(f"rank_adaptation_threshold: expected a number in (0, 1], got {got}")
        if "lora_target_modules" not in wrong and not self.lora_target_modules:
            found.append("lora_target_modules: expected at least one name, got none")
        if self.pairing == "paper" and self.capture == "gradients":
            found.append("pairing: 'paper' needs Σ_a and Σ_g, so capture 'hooks' or 'auto'; got capture 'gradients'")
        if self.pairing == "paper" and self.mode == "eigen_adamw":
            found.append("pairing: 'paper' has no eigenbasis form; expected mode 'adamw' or 'sgd', got 'eigen_adamw'")
        if self.mode == "sgd" and self.grafting is True:
            found.append("grafting: mode 'sgd' measures its trust region in natural lengths; expected false, got true")
        if not wrong & {"min_lora_rank", "lora_rank"} and self.min_lora_rank > self.lora_rank:
            found.append(f"min_lora_rank: expected at most lora_rank = {self.lora_rank}, got {self.min_lora_rank}")
        return found

    def _wrong_types(self) -> list[str]:
        found = []
        hints = get_type_hints(type(self))
        for name, hint in hints.items():
            value = getattr(self, name)
            choices = [c for c in get_args(hint) if isinstance(c, str)]
            if choices:
                if value not in choices:
                    close = difflib.get_close_matches(str(value), choices, n=1)
                    hint_text = f"; did you mean {close[0]!r}?" if close else ""
                    found.append(f"{name}: expected one of {', '.join(choices)}, got {value!r}{hint_text}")
            elif hint is bool and not isinstance(value, bool):
                found.append(f"{name}: expected true or false, got {value!r}")
            elif hint is int and (not isinstance(value, int) or isinstance(value, bool)):
                found.append(f"{name}: expected a whole number, got {value!r}")
            elif hint is float and (not isinstance(value, int | float) or isinstance(value, bool)):
                found.append(f"{name}: expected a number, got {value!r}")
            elif hint == (bool | None) and not (value is None or isinstance(value, bool)):
                found.append(f"{name}: expected true, false or null, got {value!r}")
            elif hint == (float | None) and not (
                value is None or (isinstance(value, int | float) and not isinstance(value, bool))
            ):
                found.append(f"{name}: expected a number or null, got {value!r}")
            elif hint is str and not isinstance(value, str):
                found.append(f"{name}: expected text, got {value!r}")
            elif hint == list[str] and not (isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)):
                found.append(f"{name}: expected a list of names, got {value!r}")
        return found

    @property
    def grafts(self) -> bool:
        """Whether the raw gradient's norm is restored after preconditioning."""
        return self.mode == "adamw" if self.grafting is None else self.grafting

    def lora_config(self, **kwargs: Any) -> Any:
        """Peft's LoraConfig with this rank, α, dropout and these modules; `kwargs` are passed on."""
        from peft import LoraConfig

        values: dict[str, Any] = {
            "r": self.lora_rank,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": sorted(self.lora_target_modules),
            "bias": "none",
            "task_type": "CAUSAL_LM",
        }
        return LoraConfig(**{**values, **kwargs})
