"""The LoRA layers of a model: pairs A [r, d_in], B [d_out, r], groups of pairs of one shape, and changes of rank."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grit.config import GRITError


@dataclass(eq=False)
class LoraPair:
    """One adapter on one of PEFT's LoRA layers; `name` is the module's, with the adapter's where there are several."""

    name: str
    adapter: str
    layer: Any

    @property
    def module_a(self) -> nn.Module:
        module: nn.Module = self.layer.lora_A[self.adapter]
        return module

    @property
    def a(self) -> nn.Parameter:
        """A [r, d_in]."""
        weight: nn.Parameter = self.layer.lora_A[self.adapter].weight
        return weight

    @property
    def b(self) -> nn.Parameter:
        """B [d_out, r]."""
        weight: nn.Parameter = self.layer.lora_B[self.adapter].weight
        return weight

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return float(self.layer.scaling[self.adapter])


class LayerGroup:
    """n pairs of one shape, whose tensors are processed as one stack."""

    def __init__(self, pairs: list[LoraPair]):
        self.pairs = pairs
        self.params_a = [p.a for p in pairs]
        self.params_b = [p.b for p in pairs]
        self.rank = pairs[0].rank
        self.device = pairs[0].a.device
        # Statistics are kept in float32 at least, whatever the weights are in.
        self.dtype = torch.promote_types(pairs[0].a.dtype, torch.float32)

    def __len__(self) -> int:
        return len(self.pairs)

    def gradients(self, side: str) -> Tensor:
        """∇A [n, r, d_in] or ∇B [n, d_out, r] as a new stack; zeros where a layer has no gradient."""
        parameters = self.params_a if side == "a" else self.params_b
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        return torch.stack([p.to(self.dtype) for p in parts] if self.dtype != parts[0].dtype else parts)

    def put_gradients(self, side: str, values: Tensor) -> None:
        """Write a stack back into `.grad`, in place; layers without a gradient stay without."""
        parameters = self.params_a if side == "a" else self.params_b
        pairs = [(p.grad, value) for p, value in zip(parameters, values.unbind(0), strict=True) if p.grad is not None]
        if pairs:
            torch._foreach_copy_([gradient for gradient, _ in pairs], [value for _, value in pairs])

    def has_gradients(self) -> Tensor:
        """Which layers have both gradients: [n] bool on the CPU."""
        pairs = zip(self.params_a, self.params_b, strict=True)
        return torch.tensor([a.grad is not None and b.grad is not None for a, b in pairs])


def find_pairs(model: nn.Module) -> list[LoraPair]:
    """Every trainable LoRA pair of linear layers, in the model's order; GRITError names unsupported layers."""
    layers: list[tuple[str, Any]] = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and hasattr(module, "scaling")
    ]
    if not layers:
        raise GRITError(
            f"expected a model with LoRA layers (peft.get_peft_model), got a {type(model).__name__} without any"
        )
    pairs: list[LoraPair] = []
    frozen, unsupported = [], []
    for name, layer in layers:
        for table in getattr(layer, "lora_embedding_A", {}).values():
            if table.requires_grad:
                unsupported.append(f"{name} (LoRA on an embedding)")
            else:
                frozen.append(name)
        for adapter, module_a in layer.lora_A.items():
            module_b = layer.lora_B[adapter]
            weights = [module_a.weight, module_b.weight]
            if not any(w.requires_grad for w in weights):
                frozen.append(name)
                continue
            if not all(w.requires_grad for w in weights):
                unsupported.append(f"{name} (only one of A and B is trainable)")
            elif hasattr(layer, "parameter_name"):  # PEFT's ParamWrapper: one A and B hold the factors of all experts
                unsupported.append(f"{name} (target_parameters)")
            elif not isinstance(module_a, nn.Linear) or not isinstance(module_b, nn.Linear):
                unsupported.append(f"{name} ({type(module_a).__name__})")
            elif adapter in getattr(layer, "lora_variant", {}) or getattr(layer, "use_dora", {}).get(adapter):
                kind = type(layer.lora_variant[adapter]).__name__ if adapter in layer.lora_variant else "DoRA"
                unsupported.append(f"{name} ({kind})")
            elif module_b.bias is not None and module_b.bias.requires_grad:
                unsupported.append(f"{name} (lora_bias)")
            else:
                several = len(layer.lora_A) > 1
                pairs.append(LoraPair(f"{name}[{adapter}]" if several else name, adapter, layer))
    if unsupported:
        raise GRITError(
            f"expected plain LoRA on linear layers, got {len(unsupported)} of another kind: "
            f"{', '.join(unsupported[:8])}{' …' if len(unsupported) > 8 else ''}; "
            "train these without GRIT or leave them out of target_modules"
        )
    if not pairs:
        raise GRITError(
            f"expected trainable LoRA weights, got {len(frozen)} frozen ones ({', '.join(frozen[:4])} …); "
            "load the adapter with is_trainable=True, or activate it"
        )
    return pairs


def group_pairs(pairs: list[LoraPair]) -> list[LayerGroup]:
    groups: dict[tuple[Any, ...], list[LoraPair]] = {}
    for pair in pairs:
        groups.setdefault((pair.a.shape, pair.b.shape, pair.a.device, pair.a.dtype), []).append(pair)
    return [LayerGroup(members) for members in groups.values()]


def resize(pair: LoraPair, new_a: Tensor, new_b: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Replace A and B by A [k, d_in] and B [d_out, k]; the scale s stays.

    The parameters are new objects, because a graph that is still alive (of the last loss, which the training loop
    holds) remembers the old ones with their shapes. In the optimizer they take the places and the state of the old
    ones.
    """
    k = new_a.shape[0]
    layer: Any = pair.layer
    places = ((pair.module_a, "out_features", new_a), (layer.lora_B[pair.adapter], "in_features", new_b))
    for module, size, value in places:
        old: Any = module.weight
        new = nn.Parameter(value.to(old.device, old.dtype).contiguous())
        module.weight = new
        setattr(module, size, k)
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            if old in optimizer.state:
                optimizer.state[new] = optimizer.state.pop(old)
    rslora = getattr(layer, "use_rslora", {})
    alpha = pair.scale * (k**0.5 if isinstance(rslora, dict) and rslora.get(pair.adapter) else k)
    layer.lora_alpha[pair.adapter] = int(alpha) if alpha.is_integer() else alpha
    layer.r[pair.adapter] = k


def write_patterns(model: nn.Module, pairs: list[LoraPair]) -> None:
    """Set rank_pattern and alpha_pattern in the model's `peft_config`, so that PEFT reloads what is there.

    PEFT sorts the keys when it saves and takes the first that fits the end of a module's name, so a key of the user's
    ("down_proj") would win over a module's own. So every module of the adapter that differs from the defaults gets a
    whole name (^), and nothing else stays.
    """
    inner: Any = next(m for m in model.modules() if hasattr(m, "peft_config"))
    for adapter in {pair.adapter for pair in pairs}:
        config = inner.peft_config[adapter]
        layers = {
            f"^{_in_peft(name)}": (layer.r[adapter], layer.lora_alpha[adapter])
            for name, layer in inner.named_modules()
            if isinstance(getattr(layer, "lora_alpha", None), dict) and adapter in layer.lora_alpha
        }
        config.rank_pattern = {key: r for key, (r, _) in layers.items() if r != config.r}
        config.alpha_pattern = {key: alpha for key, (_, alpha) in layers.items() if alpha != config.lora_alpha}


def _in_peft(name: str) -> str:
    name = name.split("[", 1)[0]
    return name.partition("base_model.model.")[2] or name
