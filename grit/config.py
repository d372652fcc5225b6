"""Every setting of GRIT with its unit, range and symbol; needs neither torch nor any other package."""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

# A number's range: lower end, upper end, and whether they are part of it.
Count = Annotated[int, (1, math.inf, "[)")]
Steps = Annotated[int, (0, math.inf, "[)")]
NotNegative = Annotated[float, (0, math.inf, "[)")]
Positive = Annotated[float, (0, math.inf, "()")]
BelowOne = Annotated[float, (0, 1, "[)")]


class GRITError(RuntimeError):
    """GRIT cannot work on this model, or was not applied, or its input broke down; the message names the layers."""


class GRITConfigError(ValueError):
    """Settings that contradict each other or the method, or have no effect; the message lists all of them."""


@dataclass
class GRITConfig:
    """The settings of GRIT, and the section `grit:` of params.yaml. Names are the authors' where they have one.

    The defaults are ours: they won a validation sweep on the tiny profile (docs/log). `GRITConfig.paper()` has the
    authors' values. Steps are optimizer steps. Fields can be set one by one; `validate`, which GRIT calls before it
    uses them, reports every mistake at once. A field that does not exist cannot be set.
    """

    # The run, for scripts that keep all settings in one place, as the source documents' do; GRIT uses none of them.
    # `training_arguments()` hands on what a Trainer needs.
    model_id: str | None = None  # path or hub id
    dataset_name: str | None = None
    max_seq_length: Count | None = None  # tokens
    batch_size: Count | None = None  # sequences per device and forward pass
    gradient_accumulation_steps: Count | None = None  # forward passes per optimizer step
    num_epochs: Positive | None = None
    max_steps: Count | None = None  # optimizer steps
    learning_rate: Positive | None = None
    precision: Literal["fp32", "fp16", "bf16"] | None = None

    # LoRA, for `lora_config()`; a model that has adapters already keeps their shape.
    lora_rank: Count = 16  # r ≥ 1
    lora_alpha: Positive = 32.0  # α > 0; the update is s·B·A with s = α/r
    lora_dropout: BelowOne = 0.0  # [0, 1)
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )

    # Statistics
    capture: Literal["auto", "hooks", "gradients"] = "auto"  # auto: hooks, or gradients where hooks stay silent
    grit_cov_update_freq: Count = 5  # steps ≥ 1 between two updates of the statistics
    cov_decay: BelowOne = 0.8  # β in [0, 1): weight of the past in an update
    normalize_delta: bool = True  # multiply δ by the loss tokens (else Σ_g is about 1e-9 under a mean loss)

    # Factors and inverses
    kfac_update_freq: Count = 10  # steps ≥ 1 between two inversions
    kfac_min_samples: Count = 64  # tokens before a factor is trusted; identity until then
    # λ ≥ 0. Mode eigen_adamw inverts nothing: there λ is added to the relative eigenvalues that weight the steps, see
    # eigen_power. In the other modes it damps the inverse: times tr(Σ)/r if relative, as it is if absolute
    kfac_damping: NotNegative = 1e-2
    damping_mode: Literal["relative", "absolute"] = "relative"
    kfac_inversion_device: str = "auto"  # auto (where the factors are) | cpu | cuda | …

    # Stepping
    mode: Literal["eigen_adamw", "adamw", "sgd"] = "eigen_adamw"
    pairing: Literal["kfac", "paper"] = "kfac"  # which factor meets which gradient
    grafting: bool | None = None  # raw norm of each tensor restored; None: in mode adamw only
    max_grad_norm: NotNegative | None = None  # clip after preconditioning; 0: never; None: the Trainer's, in sgd never
    ng_warmup_steps: Steps = 0  # steps without preconditioning
    lr_ratio_b: Positive = 1.0  # learning rate of B over that of A (LoRA+), > 0
    # p in [0, 1], mode eigen_adamw: the step along direction i is ∝ (λ_i/mean λ + kfac_damping)^(−p/2)
    eigen_power: Annotated[float, (0, 1, "[]")] = 1.0
    # Mode eigen_adamw (None: on there): the step looks one gradient ahead (Dozat 2016), has no entries that oppose the
    # gradient's sign (Liang et al. 2024), and is equally long in each of its r directions (Jordan et al. 2024)
    nesterov: bool | None = None
    cautious: bool | None = None
    orthogonal: bool | None = None
    kl_clip: NotNegative = 1e-3  # κ, mode sgd: trust region, (step)ᵀ F (step) ≤ κ; 0 = none
    sgd_momentum: BelowOne = 0.9  # [0, 1), of the SGD that GritTrainer creates in mode sgd

    # Reprojection and rank
    reprojection: Literal["balanced", "paper", "none"] = "balanced"
    use_two_sided_reprojection: bool = True  # "paper": B by the eigenvectors of Σ_g (else of Σ_a)
    reprojection_freq: Steps = 0  # steps between two reprojections; 0 = none before the end of training
    reprojection_k: Count = 8  # directions kept where the rank is not adapted
    reprojection_warmup_steps: Steps = 0  # none before
    enable_rank_adaptation: bool = True  # k = smallest rank whose eigenvalues reach τ
    rank_adaptation_threshold: Annotated[float, (0, 1, "(]")] = 0.999  # τ in (0, 1]
    rank_adaptation_start_step: Steps = 0  # fixed k before
    min_lora_rank: Count = 4  # 1 ≤ k ≤ r
    rank_shrink: Literal["end", "never"] = "end"  # when tensors really shrink to k

    # Regularizers: off at 0, raised linearly from 0 over the warm-up
    lambda_kfac: NotNegative = 0.0  # ≥ 0, of tr(AᵀΣ_gA) + tr(BΣ_aBᵀ)
    lambda_reproj: NotNegative = 0.0  # ≥ 0, of ‖(I−P)A‖² + ‖B(I−P)‖²
    regularizer_warmup_steps: Steps = 0

    # Safety
    max_nonfinite_steps: Count = 10  # steps in a row with NaN or infinite gradients before training stops

    # Logging
    log_freq: Count = 50  # steps ≥ 1 between two records of spectra and ranks
    log_fisher_spectrum: bool = True
    log_top_eigs: Count = 8  # eigenvalues per factor in a record
    log_eigs_bar: bool = False  # a bar chart of the eigenvalues to the Trainer's trackers, with each record of spectra
    log_eig_heatmaps: bool = False  # whole factors in the last record, and as heat maps to the trackers
    log_eig_heatmaps_modules: list[str] = field(default_factory=list)  # name endings; empty: the first four layers

    @classmethod
    def paper(cls, **changes: Any) -> "GRITConfig":
        """The authors' defaults and pairing, for reproduction; `changes` override single fields."""
        values: dict[str, Any] = {"capture": "hooks", "grit_cov_update_freq": 15, "cov_decay": 0.95}
        values |= {"normalize_delta": False, "kfac_update_freq": 50, "kfac_damping": 1e-3, "damping_mode": "absolute"}
        values |= {"kfac_inversion_device": "cpu", "mode": "adamw", "pairing": "paper", "grafting": False}
        values |= {"reprojection": "paper", "reprojection_freq": 50, "reprojection_k": 8, "rank_shrink": "never"}
        values |= {"enable_rank_adaptation": True, "rank_adaptation_threshold": 0.99}
        values |= {"lambda_kfac": 1e-5, "lambda_reproj": 1e-4}
        return cls.from_dict({**values, **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GRITConfig":
        names = [f.name for f in fields(cls)]
        unknown = "unknown setting {!r}{} Available: " + ", ".join(names)
        problems = [unknown.format(key, did_you_mean(key, names)) for key in values if key not in names]
        config = cls(**{k: v for k, v in values.items() if k in names})
        _raise(problems + config.problems())
        return config

    def validate(self) -> None:
        _raise(self.problems())

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dataclass_fields__:
            raise AttributeError(f"GRITConfig has no setting {name!r}{did_you_mean(name, self.__dataclass_fields__)}")
        super().__setattr__(name, value)

    def problems(self) -> list[str]:
        wrong = complaints(type(self), vars(self))
        others = []
        if "lora_target_modules" not in wrong and not self.lora_target_modules:
            others.append("lora_target_modules: expected at least one name, got none")
        if self.pairing == "paper" and self.capture == "gradients":
            others.append("pairing: 'paper' needs Σ_a and Σ_g, so capture 'hooks' or 'auto'; got capture 'gradients'")
        if self.pairing == "paper" and self.mode == "eigen_adamw":
            others.append("pairing: 'paper' has no eigenbasis form; expected mode 'adamw' or 'sgd', got 'eigen_adamw'")
        if self.mode == "sgd" and self.grafting is True:
            others.append("grafting: mode 'sgd' measures its trust region in natural lengths; expected false, got true")
        for name, where, has_effect in self._effects():
            value = getattr(self, name)
            if name not in wrong and not has_effect and value not in (self.__dataclass_fields__[name].default, False):
                others.append(f"{name}: has no effect {where}; got {value!r}. Leave it out")
        if not {*wrong} & {"min_lora_rank", "lora_rank"} and self.min_lora_rank > self.lora_rank:
            others.append(f"min_lora_rank: expected at most lora_rank = {self.lora_rank}, got {self.min_lora_rank}")
        return [*wrong.values(), *others]

    def _effects(self) -> list[tuple[str, str, bool]]:
        """(setting, where it has no effect, whether it has one here)."""
        in_eigenbasis = self.mode == "eigen_adamw"
        elsewhere = f"in mode {self.mode!r}"
        return [
            ("kfac_damping", "in mode 'eigen_adamw' with eigen_power 0", not in_eigenbasis or self.eigen_power != 0),
            ("damping_mode", "in mode 'eigen_adamw', which inverts no factor", not in_eigenbasis),
            ("nesterov", elsewhere, in_eigenbasis),
            ("cautious", elsewhere, in_eigenbasis),
            ("orthogonal", elsewhere, in_eigenbasis),
            ("regularizer_warmup_steps", "without lambda_kfac and lambda_reproj",
             bool(self.lambda_kfac or self.lambda_reproj)),
        ]  # fmt: skip

    @property
    def grafts(self) -> bool:
        """Whether the raw gradient's norm is restored after preconditioning."""
        return self.mode == "adamw" if self.grafting is None else self.grafting

    def training_arguments(self, **kwargs: Any) -> dict[str, Any]:
        """Arguments for transformers' TrainingArguments: those of the run's fields that are set, and `kwargs`."""
        values = {
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "num_train_epochs": self.num_epochs,
            "max_steps": self.max_steps,
            "learning_rate": self.learning_rate,
            "fp16": True if self.precision == "fp16" else None,
            "bf16": True if self.precision == "bf16" else None,
        }
        return {**{name: value for name, value in values.items() if value is not None}, **kwargs}

    def lora_config(self, **kwargs: Any) -> Any:
        from peft import LoraConfig

        values: dict[str, Any] = {"r": self.lora_rank, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}
        values |= {"target_modules": sorted(self.lora_target_modules), "bias": "none", "task_type": "CAUSAL_LM"}
        return LoraConfig(**{**values, **kwargs})


RUN_FIELDS = (
    "model_id", "dataset_name", "max_seq_length", "batch_size", "gradient_accumulation_steps", "num_epochs",
    "max_steps", "learning_rate", "precision",
)  # fmt: skip
"""Fields that describe a run, not GRIT."""

_TYPES: dict[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    str: (str, "text"),
}


def complaints(owner: Any, values: Mapping[str, Any]) -> dict[str, str]:
    """Name → what is wrong with its value, by the annotations of a class or function."""
    hints = get_type_hints(owner, include_extras=True)
    texts = {name: _complaint(hints[name], value) for name, value in values.items() if name in hints}
    return {name: f"{name}: {text}" for name, text in texts.items() if text}


def _complaint(hint: Any, value: Any, or_null: str = "") -> str | None:
    args = get_args(hint)
    if NoneType in args:
        return None if value is None else _complaint(args[0], value, " or null")
    if get_origin(hint) is Literal:
        expected = f"expected one of {', '.join(args)}, got {value!r}"
        return None if value in args else expected + did_you_mean(value, args)
    if hint == list[str]:
        good = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
        return None if good else f"expected a list of names, got {value!r}"
    kind = args[0] if get_origin(hint) is Annotated else hint
    types, words = _TYPES.get(kind) or (kind, f"a {kind.__name__}")
    if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
        return f"expected {words}{or_null}, got {value!r}"
    if kind is hint:
        return None
    low, high, ends = args[1]
    above = value >= low if ends[0] == "[" else value > low
    below = value <= high if ends[1] == "]" else value < high
    if above and below:
        return None
    if high == math.inf:
        return f"expected a finite number {'of at least' if ends[0] == '[' else 'above'} {low}, got {value}"
    return f"expected a number in {ends[0]}{low}, {high}{ends[1]}, got {value}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``; did you mean 'kfac'?`` if one of the known names is close, else nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _raise(problems: list[str]) -> None:
    if problems:
        raise GRITConfigError("\n".join(problems))
