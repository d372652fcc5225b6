"""`GritOptimizer`: any torch optimizer, with GRIT inside its step, where nothing can come between."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from grit import factors
from grit.curvature import Turned
from grit.manager import Manager


class GritOptimizer(torch.optim.Optimizer):
    """Statistics, preconditioning, clipping, the wrapped optimizer's step, reprojection: one `step()`.

    It shares `param_groups` and `state` with the optimizer it wraps, so learning-rate schedules work on it. In mode
    eigen_adamw the LoRA weights are stepped here, with the wrapped optimizer's learning rate, betas, ε and weight
    decay; other trainable weights are left to the wrapped one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, manager: Manager, max_grad_norm: float | None = None):
        """Wrap `optimizer`, before any learning-rate schedule is made from it; the manager is opened.

        `max_grad_norm` is what gradients are clipped to after preconditioning where the config leaves it open.
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
        # torch's Adam says so in its groups; weight decay in its gradient would not be the decoupled one of here.
        refused: dict[str, Callable[[dict[str, Any]], Any]] = {
            "an optimizer without amsgrad": lambda g: g.get("amsgrad"),
            "an optimizer without maximize": lambda g: g.get("maximize"),
            "decoupled weight decay": lambda g: g.get("decoupled_weight_decay") is False and g["weight_decay"],
        }
        for expected, wrong in refused.items() if config.mode == "eigen_adamw" else ():
            if any(wrong(group) for group in optimizer.param_groups):
                raise ValueError(f"mode 'eigen_adamw': expected {expected}, as torch.optim.AdamW has it by default")
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

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Left out, counted and logged where gradients are not finite."""
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
            if mode == "sgd":  # before clipping, which would shorten a second time what is measured here
                self._trust_region(length)
            natural = self._clip()
            if natural is not None:
                manager.last_metrics["grit/gradient_norm_natural"] = natural
            self.optimizer.step()
        manager.end_step(self.optimizer)

    def _clip(self) -> float | None:
        """Scale all gradients to `max_grad_norm` at most; returns their norm before, if it was taken."""
        config = self.manager.config
        if self.max_grad_norm > 0:
            known = self.manager.last_metrics["grit/gradient_norm_raw"]
            untouched = config.mode == "eigen_adamw" and not (config.lambda_kfac or config.lambda_reproj)
            if untouched and known <= self.max_grad_norm:
                return known
            weights = [p for group in self.param_groups for p in group["params"]]
            return float(torch.nn.utils.clip_grad_norm_(weights, self.max_grad_norm))
        if self.manager.step % config.log_freq == 0:
            return float(torch.nn.utils.get_total_norm(self._gradients()))
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
        curvature, step = self.manager.curvature, self.manager.step
        nesterov, cautious, orthogonal = self.manager.config.ahead
        stacks = curvature.turned(self.param_groups, step)
        changes = _directions(stacks, nesterov)
        for i, t in enumerate(stacks):
            for p in t.parameters:  # so that the probe takes all three for AdamW's, and the axes alone for an effect
                p.ahead = (nesterov, cautious, orthogonal)  # type: ignore[attr-defined]
            if cautious:
                _agree(changes[i], t.gradient)
            changes[i] = t.back(changes[i])  # one by one, so that directions are freed
        if orthogonal:
            changes = factors.orthogonal(changes)
        changes, metrics, factor = curvature.limit(stacks, changes, step)
        self.manager.last_metrics |= metrics
        for t, change in zip(stacks, changes, strict=True):
            tensors, lr = [p.data for p in t.parameters], float(t.options["lr"])
            decay = float(t.options.get("weight_decay", 0.0))
            if decay:
                torch._foreach_mul_(tensors, 1.0 - lr * decay)  # decoupled (Loshchilov & Hutter 2019)
            torch._foreach_add_(tensors, list(change.to(tensors[0].dtype).unbind(0)), alpha=-lr * factor)
        if 2 * len(self.manager.pairs()) < sum(len(group["params"]) for group in self.param_groups):
            lora = [p for pair in self.manager.pairs() for p in (pair.a, pair.b)]
            gradients = [p.grad for p in lora]
            for p in lora:
                p.grad = None
            self.optimizer.step()
            for p, gradient in zip(lora, gradients, strict=True):
                p.grad = gradient

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {**self.optimizer.state_dict(), "grit": self.manager.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "grit" not in state_dict:
            raise ValueError("expected an optimizer state with GRIT's part ('grit'), got one of another optimizer")
        self.manager.load_state_dict(state_dict["grit"])  # first: it refuses what does not fit
        self.optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != "grit"})
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state


def _directions(stacks: list[Turned], nesterov: bool) -> list[Tensor]:
    """Adam's bias-corrected directions m̂/(√v̂ + ε) (Kingma & Ba 2015), in each stack's basis; moments in place.

    Nesterov's m̂ is β₁ m/(1 − β₁ᵗ⁺¹) + (1 − β₁) g/(1 − β₁ᵗ) (Dozat 2016). torch's fused kernel does it, stepping from
    zero with learning rate −1, for all stacks of one β and ε in one go.
    """
    found = [torch.zeros_like(t.gradient) for t in stacks]
    alike: dict[tuple[float, ...], list[int]] = {}
    for i, t in enumerate(stacks):
        alike.setdefault((*map(float, t.options["betas"]), float(t.options["eps"])), []).append(i)
    for (beta1, beta2, eps), places in alike.items():
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor, int]] = []
        picked = []
        for t, direction in ((stacks[i], found[i]) for i in places):
            m, v = (t.m, t.v) if t.rows is None else (t.m[t.rows], t.v[t.rows])
            if t.rows is not None:
                picked.append((t, m, v))
            counts = t.steps.tolist()
            if min(counts) == max(counts):
                parts.append((direction, t.gradient, m, v, counts[0]))
            else:  # layers that have not all had the same number of gradients
                parts += zip(direction, t.gradient, m, v, counts, strict=True)
        directions, gradients, ms, vs, ends = (list(column) for column in zip(*parts, strict=True))
        if nesterov:  # the kernel takes the gradient into the mean a second time, and divides by 1 − β₁ᵗ
            torch._foreach_lerp_(ms, gradients, 1 - beta1)
            ms = list(torch._foreach_mul(ms, [(1 - beta1**end) / (1 - beta1 ** (end + 1)) for end in ends]))
        counters = [torch.tensor(float(end - 1), device=d.device) for end, d in zip(ends, directions, strict=True)]
        options: dict[str, Any] = {"fused": True, "amsgrad": False, "maximize": False, "lr": -1.0, "weight_decay": 0.0}
        options |= {"beta1": beta1, "beta2": beta2, "eps": eps}
        adamw(directions, gradients, ms, vs, [], counters, **options)  # which counts the steps up
        for t, m, v in picked:  # what was picked is a copy
            t.m[t.rows], t.v[t.rows] = m, v
    return found


def _agree(direction: Tensor, gradient: Tensor) -> None:
    """Leave out a direction's entries against the sign of the gradient, and raise the others by the share that is left.

    [n, …], in place: cautious (Liang et al. 2024, arXiv 2411.16085).
    """
    agrees = (direction * gradient).gt_(0)
    share = agrees.flatten(1).mean(1).clamp_min(1e-3).view(-1, *[1] * (direction.dim() - 1))
    direction.mul_(agrees).div_(share)
