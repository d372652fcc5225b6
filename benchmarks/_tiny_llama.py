"""A tiny Llama with LoRA layers and its batches, as transformers has it or with fused layers that no hook sees."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

TARGETS = ["q_proj", "v_proj", "up_proj"]
BATCH, LENGTH, VOCABULARY = 4, 12, 32


def tiny_llama(seed: int, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """A random Llama of two layers, hidden size 32, with LoRA of rank 4 on three of its projections.

    Args:
        seed: Of all weights.
        dtype: Of all weights.
        lora: Further settings of PEFT's LoraConfig.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        use_cache=False,
    )
    lora_config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **lora})
    base = LlamaForCausalLM(config)
    torch.nn.init.normal_(base.lm_head.weight, std=0.3)  # else logits are too small to learn, or to diverge
    model = get_peft_model(base, lora_config).to(dtype)
    model.train()
    return model


def example(generator: torch.Generator, padded: bool) -> dict[str, Tensor]:
    """Counting in steps of one or two over eight tokens; `padded`: the last third is padding."""
    start, stride = (int(torch.randint(1, high, (), generator=generator)) for high in (9, 3))
    ids = (start + stride * torch.arange(LENGTH)) % 8 + 1
    mask = torch.ones_like(ids)
    if padded:
        mask[LENGTH * 2 // 3 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def batches(seed: int) -> Iterator[dict[str, Tensor]]:
    """Endless batches [BATCH, LENGTH]; half of the items are padded."""
    generator = torch.Generator().manual_seed(1000 + seed)
    while True:
        items = [example(generator, padded=i % 2 == 0) for i in range(BATCH)]
        yield {key: torch.stack([item[key] for item in items]) for key in items[0]}


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """What is trained."""
    return [p for p in model.parameters() if p.requires_grad]


class FusedLora(torch.autograd.Function):
    """y = W x + s·B A x, reading the weights themselves, as fused kernels do: no module's hook fires."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """X [items, tokens, d_in] → [items, tokens, d_out]."""
        ctx.save_for_backward(x, w, a, b)
        ctx.scale = scale
        return x @ w.mT + (x @ a.mT) @ b.mT * scale

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Gradients of x, A and B."""
        x, w, a, b = ctx.saved_tensors
        rows, out = x.flatten(0, 1), g.flatten(0, 1) * ctx.scale
        return g @ w + (g @ b) @ a * ctx.scale, None, (out @ b).mT @ rows, out.mT @ (rows @ a.mT), None


def fuse(model: Any) -> None:
    """Let every LoRA layer compute by `FusedLora`."""
    for module in model.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            module.forward = partial(_fused, module)


def _fused(module: Any, x: Tensor) -> Any:
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    return FusedLora.apply(x, module.base_layer.weight, a, b, module.scaling["default"])
