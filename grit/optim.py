"""`GritOptimizer`: any torch optimizer, with GRIT inside its step, where nothing can come between."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grit.eigen import Stack, eigen_adamw_step
from grit.manager import GRITManager


class GritOptimizer(torch.optim.Optimizer):
    """Statistics, preconditioning, clipping, the wrapped optimizer's step, reprojection: one `step()`.

    It shares `param_groups` and `state` with the optimizer it wraps, so learning-rate schedules work on it. In mode
    eigen_adamw the LoRA weights are stepped here, with the wrapped optimizer's learning rate, betas, ε and weight
    decay; other trainable weights are left to the wrapped one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, manager: GRITManager, max_grad_norm: float | None = None):
        """Wrap `optimizer`, before any learning-rate schedule is made from it.

        Args:
            optimizer: Holds all LoRA weights of the manager.
            manager: Opened here if it is not open.
            max_grad_norm: Clip after preconditioning where the config leaves it open.

        Raises:
            ValueError: LoRA weights are missing in the optimizer, mode sgd without torch.optim.SGD, the other modes
                without betas, eigen_adamw with amsgrad or maximize, or lr_ratio_b after a schedule was made.
        """
        self.optimizer, self.manager = optimizer, manager
        config = manager.config
        self.max_grad_norm = self.limit(max_grad_norm)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [pair.name for pair in manager.pairs() if id(pair.a) not in held or id(pair.b) not in held]
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
        for option in ("amsgrad", "maximize"):
            if config.mode == "eigen_adamw" and any(group.get(option) for group in optimizer.param_groups):
                raise ValueError(f"mode 'eigen_adamw': expected an optimizer without {option}, got {option}=True")
        # torch's Adam says so in its groups; weight decay in its gradient would not be the decoupled one of here.
        coupled = any(g.get("decoupled_weight_decay") is False and g["weight_decay"] for g in optimizer.param_groups)
        if config.mode == "eigen_adamw" and coupled:
            raise ValueError("mode 'eigen_adamw': expected decoupled weight decay (torch.optim.AdamW), got Adam's")
        if config.lr_ratio_b != 1.0 and any("initial_lr" in group for group in optimizer.param_groups):
            raise ValueError("lr_ratio_b: wrap the optimizer first, then make its learning-rate schedule; got it made")
        self._split_off_b(config.lr_ratio_b)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self.gradient_norm: float | None = None
        manager.open()

    def limit(self, offered: float | None) -> float:
        """What gradients are clipped to: what the config says, else what is offered; 0 = never."""
        config = self.manager.config
        if config.max_grad_norm is not None:
            return config.max_grad_norm
        if config.mode == "sgd" and config.kl_clip > 0:
            return 0.0  # the trust region limits the step; natural gradients have other lengths than raw
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

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; left out, counted and logged where gradients are not finite.

        Raises:
            NonFiniteGradientsError, CaptureError: see `GRITManager`.
        """
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
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in self._parameters() if p.grad is not None]))
        if not manager.begin_step(norm):
            return
        manager.update_statistics()
        manager.add_regularizers()
        if manager.inversion_due():
            manager.update_and_invert_factors()
        if mode == "eigen_adamw":
            self._clip()  # a rotation leaves norms as they are
            self._eigen_step()
        else:
            length = manager.precondition_gradients()
            if mode == "sgd":  # before clipping, which would shorten a second time what is measured here
                self._trust_region(length)
            natural = self._clip()
            if natural is not None:
                manager.last_metrics["grit/gradient_norm_natural"] = natural
            self.optimizer.step()
        manager.end_step(self.optimizer)

    def _clip(self) -> float | None:
        """Scale all gradients to `max_grad_norm` at most; returns their norm before, if it was taken."""
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        config = self.manager.config
        if self.max_grad_norm > 0:
            known = self.manager.last_metrics["grit/gradient_norm_raw"]
            untouched = config.mode == "eigen_adamw" and not (config.lambda_kfac or config.lambda_reproj)
            if untouched and known <= self.max_grad_norm:
                return known
            return float(torch.nn.utils.clip_grad_norm_(self._parameters(), self.max_grad_norm))
        if self.manager.step % config.log_freq == 0:
            return float(torch.nn.utils.get_total_norm(gradients))
        return None

    def _trust_region(self, length: float) -> None:
        """Shorten natural gradients so that the step's length in the Fisher metric, lr²·⟨∇, F⁻¹∇⟩, is at most κ."""
        kappa = self.manager.config.kl_clip
        rate = max(float(group["lr"]) for group in self.param_groups)
        if kappa > 0 and length > 0 and rate > 0:
            nu = min(1.0, (kappa / (rate * rate * length)) ** 0.5)
            self.manager.last_metrics["grit/trust_region_factor"] = nu
            if nu < 1.0:
                gradients = [p.grad for pair in self.manager.pairs() for p in (pair.a, pair.b) if p.grad is not None]
                torch._foreach_mul_(gradients, nu)

    def _eigen_step(self) -> None:
        place = {id(p): i for i, group in enumerate(self.param_groups) for p in group["params"]}
        options = [_options(group) for group in self.param_groups]
        stacks = []
        for state in self.manager.states:
            group = state.group
            members: dict[tuple[int, int], list[int]] = {}
            for i, (a, b) in enumerate(zip(group.params_a, group.params_b, strict=True)):
                if a.grad is not None and b.grad is not None:
                    members.setdefault((place[id(a)], place[id(b)]), []).append(i)
            for (of_a, of_b), among in members.items():
                chosen = None if len(among) == len(group) else among
                state["steps"][among] += 1
                stacks += [Stack(state, "a", options[of_a], chosen), Stack(state, "b", options[of_b], chosen)]
        eigen_adamw_step(stacks)
        lora = [p for pair in self.manager.pairs() for p in (pair.a, pair.b)]
        if len(lora) < sum(len(group["params"]) for group in self.param_groups):
            gradients = [p.grad for p in lora]
            for p in lora:
                p.grad = None
            self.optimizer.step()
            for p, gradient in zip(lora, gradients, strict=True):
                p.grad = gradient

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, and all of GRIT's under "grit"."""
        return {**self.optimizer.state_dict(), "grit": self.manager.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: no state of GRIT in it, or one of other layers.
        """
        if "grit" not in state_dict:
            raise ValueError("expected an optimizer state with GRIT's part ('grit'), got one of another optimizer")
        self.manager.load_state_dict(state_dict["grit"])  # first: it refuses what does not fit
        self.optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != "grit"})
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state


def _options(group: dict[str, Any]) -> dict[str, float]:
    return {
        "lr": float(group["lr"]),
        "beta1": float(group["betas"][0]),
        "beta2": float(group["betas"][1]),
        "eps": float(group["eps"]),
        "weight_decay": float(group.get("weight_decay", 0.0)),
    }
