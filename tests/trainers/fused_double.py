"""A stand-in for what Unsloth does to a model on a GPU: methods replaced by kernels that call no LoRA module."""

import types

import torch

KERNELS = "unsloth.kernels.fast_lora"


def _mlp(x, *weights):
    """SwiGLU with LoRA on all three projections; weights: (base, A, B, scale) of gate, up, down."""
    gate, up, down = (
        lambda x, w=w: x @ w[0].T + w[3] * (x @ w[1].T @ w[2].T) for w in (weights[:4], weights[4:8], weights[8:])
    )
    return down(torch.nn.functional.silu(gate(x)) * up(x))


class FusedMLP(torch.autograd.Function):
    """Reads the weights and fills their .grad itself, as unsloth.kernels.fast_lora.LoRA_MLP does."""

    @staticmethod
    def forward(ctx, x, *weights):
        ctx.kept = (x, weights)
        return _mlp(x, *weights)

    @staticmethod
    def backward(ctx, delta):
        kept = [v.detach() if isinstance(v, torch.Tensor) else v for v in (ctx.kept[0], *ctx.kept[1])]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad():
            for i in wanted:
                kept[i].requires_grad_()
            out = _mlp(*kept)
            grads = torch.autograd.grad(out, [kept[i] for i in wanted], delta)
        found = dict(zip(wanted, grads, strict=True))
        return tuple(found.get(i) for i in range(len(kept)))


def parts(projection):
    """What Unsloth's get_lora_parameters returns."""
    name = projection.active_adapters[0]
    a, b = projection.lora_A[name], projection.lora_B[name]
    return projection.base_layer.weight, a.weight, b.weight, projection.scaling[name]


def apply_lora_mlp(self, x):
    return FusedMLP.apply(x, *parts(self.gate_proj), *parts(self.up_proj), *parts(self.down_proj))


def apply_lora_qkv(self, x, inplace=True):
    raise AssertionError("the fused path was taken")


def apply_lora_o(self, x):
    raise AssertionError("the fused path was taken")


for kernel in (apply_lora_mlp, apply_lora_qkv, apply_lora_o):
    kernel.__module__ = KERNELS


def fuse_mlps(model):
    """As patch_peft_model: a bound method in the instance's own dictionary."""
    for module in model.modules():
        if hasattr(module, "gate_proj") and hasattr(module.gate_proj, "lora_A"):
            module.forward = types.MethodType(apply_lora_mlp, module)
    return model
