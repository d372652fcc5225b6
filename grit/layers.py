"""The LoRA layers of a model: pairs A [r, d_in], B [d_out, r], and groups of pairs that have one shape."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class GritLayerError(ValueError):
    """A model that GRIT cannot work on; names the layers."""


@dataclass(eq=False)
class LoraPair:
    """One adapter on one layer.

    Attributes:
        name: Module name, with the adapter's name where the model has several.
        adapter: The adapter's name.
        layer: PEFT's LoRA layer.
    """

    name: str
    adapter: str
    layer: Any

    @property
    def module_a(self) -> nn.Module:
        """The module A; its output is h [tokens, r]."""
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
        """The rank r."""
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        """The scale s in ΔW = s·B·A."""
        return float(self.layer.scaling[self.adapter])

    @property
    def shape_key(self) -> tuple[Any, ...]:
        """What pairs of one group have in common."""
        return (tuple(self.a.shape), tuple(self.b.shape), self.a.device, self.a.dtype)


class LayerGroup:
    """n pairs of one shape, whose tensors are worked on as one stack."""

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
        places, sources = [], []
        for parameter, value in zip(parameters, values.unbind(0), strict=True):
            if parameter.grad is not None:
                places.append(parameter.grad)
                sources.append(value)
        if places:
            torch._foreach_copy_(places, sources)

    def has_gradients(self) -> Tensor:
        """Which layers have both gradients: [n] bool on the CPU."""
        pairs = zip(self.params_a, self.params_b, strict=True)
        return torch.tensor([a.grad is not None and b.grad is not None for a, b in pairs])


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and hasattr(module, "scaling"):
            yield name, module


def find_pairs(model: nn.Module) -> list[LoraPair]:
    """Every trainable LoRA pair of linear layers, in the model's order.

    Raises:
        GritLayerError: no LoRA at all, only frozen LoRA, or trainable LoRA of a kind that the method does not cover
            (DoRA, embeddings, convolutions, bare parameters, biases in B); names them.
    """
    layers = list(_lora_layers(model))
    if not layers:
        raise GritLayerError(
            f"expected a model with LoRA layers (peft.get_peft_model), got a {type(model).__name__} without any"
        )
    pairs: list[LoraPair] = []
    frozen, unsupported = [], []
    for name, layer in layers:
        for adapter in layer.lora_embedding_A:
            if layer.lora_embedding_A[adapter].requires_grad:
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
        raise GritLayerError(
            f"expected plain LoRA on linear layers, got {len(unsupported)} of another kind: "
            f"{', '.join(unsupported[:8])}{' …' if len(unsupported) > 8 else ''}; "
            "train these without GRIT or leave them out of target_modules"
        )
    if not pairs:
        raise GritLayerError(
            f"expected trainable LoRA weights, got {len(frozen)} frozen ones ({', '.join(frozen[:4])} …); "
            "load the adapter with is_trainable=True, or activate it"
        )
    return pairs


def group_pairs(pairs: list[LoraPair]) -> list[LayerGroup]:
    """The pairs, those of one shape together; order of first appearance."""
    groups: dict[tuple[Any, ...], list[LoraPair]] = {}
    for pair in pairs:
        groups.setdefault(pair.shape_key, []).append(pair)
    return [LayerGroup(members) for members in groups.values()]
