"""`GritOptimizer`: any torch optimizer with GRIT inside its step, where nothing can come between the two."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grit import eigen_adamw, paper
from grit.config import GRITConfig, GRITError
from grit.eigen_adamw import StepRule, step_rule
from grit.manager import GRITManager, Manager


class GritOptimizer(torch.optim.Optimizer):
    """One `step()`: statistics, preconditioning, clipping, the wrapped optimizer's step, reprojection.

    It shares `param_groups` and `state` with the optimizer it wraps, so learning-rate schedules work on it. In mode
    eigen_adamw it steps the LoRA weights itself, with the wrapped optimizer's learning rate, betas, ε and weight
    decay; the wrapped optimizer steps all other trainable weights.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, manager: Manager, max_grad_norm: float | None = None):
        """Wrap `optimizer` before a learning-rate schedule is made from it; opens the manager.

        Gradients are clipped to `max_grad_norm` after preconditioning unless the config sets its own.
        """
        if isinstance(optimizer, GritOptimizer):
            raise ValueError("expected an optimizer without GRIT, got a GritOptimizer. Use it as it is")
        self.optimizer, self.manager = optimizer, manager
        config = manager.config
        self.max_grad_norm = self.limit(max_grad_norm)
        parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [pair.name for pair in manager.pairs() if not {id(pair.a), id(pair.b)} <= parameters]
        if missing:
            raise ValueError(
                f"expected an optimizer over all LoRA weights, got one without those of {missing[:4]}"
                f"{' …' if len(missing) > 4 else ''}"
            )
        if config.mode == "sgd" and not isinstance(optimizer, torch.optim.SGD):
            raise ValueError(f"mode 'sgd': expected torch.optim.SGD, got {type(optimizer).__name__}")
        needed = {"betas", "eps"} if config.mode == "eigen_adamw" else {"betas"}
        if config.mode != "sgd" and any(not needed <= group.keys() for group in optimizer.param_groups):
            raise ValueError(
                f"mode {config.mode!r}: expected an optimizer of the Adam family (with betas), got "
                f"{type(optimizer).__name__}; for SGD set mode to 'sgd'"
            )
        # torch's Adam marks these in its groups; it adds weight decay to the gradient, GRIT decouples it.
        refused: dict[str, Callable[[dict[str, Any]], Any]] = {
            "an optimizer without amsgrad": lambda g: g.get("amsgrad"),
            "an optimizer without maximize": lambda g: g.get("maximize"),
            "decoupled weight decay": lambda g: g.get("decoupled_weight_decay") is False and g["weight_decay"],
        }
        for expected, wrong in refused.items() if config.mode == "eigen_adamw" else ():
            if any(wrong(group) for group in optimizer.param_groups):
                raise ValueError(f"mode 'eigen_adamw': expected {expected}, as torch.optim.AdamW has it by default")
        if config.lr_ratio_b != 1.0 and any("initial_lr" in group for group in optimizer.param_groups):
            raise ValueError(
                "lr_ratio_b: expected an optimizer without a learning-rate schedule, got one with it. Wrap the "
                "optimizer first, then make its schedule"
            )
        self._split_off_b(config.lr_ratio_b)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self.gradient_norm: float | None = None
        manager.open()

    def limit(self, offered: float | None) -> float:
        """The norm to clip gradients to: the config's, else the one offered; 0 = never."""
        config = self.manager.config
        if config.max_grad_norm is not None:
            return config.max_grad_norm
        if config.mode == "sgd" and config.kl_clip > 0:
            return 0.0  # the trust region limits the step; natural gradients have other lengths than raw ones
        return offered or 0.0

    def _split_off_b(self, ratio: float) -> None:
        """Give B a parameter group of its own with `ratio` times the learning rate (LoRA+, Hayou et al. 2024)."""
        if ratio == 1.0:
            return
        ids = {id(pair.b) for pair in self.manager.pairs()}
        for group in list(self.optimizer.param_groups):
            members = [p for p in group["params"] if id(p) in ids]
            if members:
                group["params"] = [p for p in group["params"] if id(p) not in ids]
                options = {name: value for name, value in group.items() if name != "params"}
                self.optimizer.add_param_group({**options, "params": members, "lr": group["lr"] * ratio})

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; skipped, counted and logged if gradients are not finite."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        manager, mode = self.manager, self.manager.config.mode
        norm, self.gradient_norm = self.gradient_norm, None
        if norm is None:
            norm = float(torch.nn.utils.get_total_norm(self._gradients()))
        if not manager.begin_step(norm):
            return
        manager.update_statistics()
        manager.add_regularizers()
        if manager.curvature.refresh_due(manager.step):
            manager.update_and_invert_factors()
        if mode == "eigen_adamw":
            self._clip()  # a rotation leaves norms as they are
            self._eigen_step()
        else:
            length = manager.precondition_gradients()
            if mode == "sgd":  # before clipping, which would shorten the gradients a second time
                self._trust_region(length)
            natural = self._clip()
            if natural is not None:
                manager.last_metrics["grit/gradient_norm_natural"] = natural
            self.optimizer.step()
        manager.end_step(self.optimizer)

    def _clip(self) -> float | None:
        """Scale all gradients down to `max_grad_norm`; returns their norm before, if it was computed."""
        config = self.manager.config
        if self.max_grad_norm > 0:
            raw_norm = self.manager.last_metrics["grit/gradient_norm_raw"]
            untouched = config.mode == "eigen_adamw" and not (config.lambda_kfac or config.lambda_reproj)
            if untouched and raw_norm <= self.max_grad_norm:
                return raw_norm
            weights = [p for group in self.param_groups for p in group["params"]]
            return float(torch.nn.utils.clip_grad_norm_(weights, self.max_grad_norm))
        if self.manager.step % config.log_freq == 0:
            return float(torch.nn.utils.get_total_norm(self._gradients()))
        return None

    def _trust_region(self, length: float) -> None:
        rate = max(float(group["lr"]) for group in self.param_groups)
        nu = paper.trust_region_factor(length, rate, self.manager.config.kl_clip)
        if nu is None:
            return
        self.manager.last_metrics["grit/trust_region_factor"] = nu
        if nu < 1.0:
            gradients = [p.grad for pair in self.manager.pairs() for p in (pair.a, pair.b) if p.grad is not None]
            torch._foreach_mul_(gradients, nu)

    def _eigen_step(self) -> None:
        stacks = self.manager.curvature.rotated(self.param_groups, self.manager.step)
        eigen_adamw.step(stacks, step_rule(self.manager.config))
        lora = [p for pair in self.manager.pairs() for p in (pair.a, pair.b)]
        if len(lora) < sum(len(group["params"]) for group in self.param_groups):  # the wrapped one steps the others
            gradients = [p.grad for p in lora]
            for p in lora:
                p.grad = None
            self.optimizer.step()
            for p, gradient in zip(lora, gradients, strict=True):
                p.grad = gradient

    def step_rules(self, parameters: Sequence[torch.nn.Parameter]) -> list[StepRule | None]:
        """How each weight is stepped besides AdamW's moments; None: in no other way.

        Any optimizer can have this method. `probes.Probe` asks it for its yardstick, so that only preconditioning
        counts as an effect.
        """
        rule = step_rule(self.manager.config)
        if self.manager.config.mode != "eigen_adamw" or not (rule.nesterov or rule.cautious or rule.orthogonal):
            return [None] * len(parameters)
        lora = {id(p) for pair in self.manager.pairs() for p in (pair.a, pair.b)}
        return [rule if id(p) in lora else None for p in parameters]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {**self.optimizer.state_dict(), "grit": self.manager.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "grit" not in state_dict:
            raise ValueError("expected an optimizer state with key 'grit', got that of another optimizer")
        self.manager.load_state_dict(state_dict["grit"])  # first: it refuses what does not fit
        self.optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != "grit"})
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state


def create_grit_optimizer(
    model: nn.Module, optimizer_cls: type[torch.optim.Optimizer], *, lr: float, config: GRITConfig | None = None,
    **kwargs: Any,
) -> GritOptimizer:  # fmt: skip
    """GRIT over a model's trainable weights, in the form of PEFT's `create_loraplus_optimizer`.

    The optimizer owns its manager, `optimizer.manager`, whose `close()` takes the hooks off the model. In a plain
    Trainer its steps are a GritTrainer's, with these differences: the Trainer clips before preconditioning, not after
    (the same in mode eigen_adamw without regularizers); nothing is reprojected at the end, unless a `GritCallback()` is
    among the callbacks; trackers do not get GRIT's numbers; and mixed precision's loss scale is not known here.

    Args:
        model: With LoRA.
        optimizer_cls: torch.optim.AdamW, or another that the config's mode takes.
        lr: The learning rate.
        config: Default: `GRITConfig()`. Its `max_grad_norm` clips after preconditioning.
        kwargs: For `optimizer_cls`. As in transformers' Trainer, vectors get no weight decay.

    Raises:
        GRITError: There is nothing to precondition.
        ValueError: The optimizer is none that the mode takes.
    """
    config = config or GRITConfig()
    if config.mode == "sgd":
        kwargs.setdefault("momentum", config.sgd_momentum)
    weights = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for p in weights if p.dim() > 1]}]
    if vectors := [p for p in weights if p.dim() < 2]:
        groups.append({"params": vectors, "weight_decay": 0.0})
    manager = GRITManager(model, config)
    return GritOptimizer(optimizer_cls(groups, **{"lr": lr, **kwargs}), manager)


class GritFactory:
    """`Trainer(optimizer_cls_and_kwargs=(GritFactory, {"lr": 3e-3}))` of transformers, and TRL's Trainers."""

    def __call__(
        self, model: nn.Module, optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW, **kwargs: Any
    ) -> GritOptimizer:
        """See `create_grit_optimizer`; GRITError where weights are moved away from the optimizer."""
        for library in ("DEEPSPEED", "FSDP"):
            if os.environ.get(f"ACCELERATE_USE_{library}", "").lower() in ("1", "true"):
                raise GRITError(f"expected training without {library}, which splits weights, got it. Use DDP instead")
        return create_grit_optimizer(model, optimizer_cls, **kwargs)
