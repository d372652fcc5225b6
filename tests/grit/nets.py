"""Small models with adapters, and settings, that several tests of grit/ share."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import LlamaConfig, LlamaForCausalLM

from grit import GRITConfig, GRITManager, GritOptimizer

MODES = ["eigen_adamw", "adamw", "sgd"]
PREFIX = "base_model.model."


class Net(nn.Module):
    """x [n, 8] → [n, outputs]; `first` and `second` are of one shape."""

    def __init__(self, outputs=5):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, outputs)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def lora(base=None, *, r=4, outputs=5, dtype=torch.float32, targets=("first", "second", "head"), warm=True, **kwargs):
    """A small model with adapters; B away from zero if `warm`."""
    torch.manual_seed(0)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(targets) or None, **kwargs)
    model = get_peft_model(base if base is not None else Net(outputs), config)
    if warm:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def factors_of(model, name):
    """A and B of one layer."""
    layer = model.get_submodule(PREFIX + name)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def quick(**changes):
    """Everything at every step, no reprojection; independent of tuned defaults."""
    values = {"grit_cov_update_freq": 1, "kfac_update_freq": 1, "kfac_min_samples": 1, "min_lora_rank": 1}
    values |= {"reprojection": "none", "log_freq": 1, "cov_decay": 0.8, "eigen_power": 0.0}
    values |= dict.fromkeys(("nesterov", "cautious", "orthogonal"), False)
    values |= {"kfac_damping": 1e-3, **changes}
    if values.get("mode", "eigen_adamw") == "eigen_adamw" and not values["eigen_power"]:
        del values["kfac_damping"]  # refused where it has no effect
    return GRITConfig.from_dict(values)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def inner_for(mode, weights, lr=0.01, **kwargs):
    return torch.optim.SGD(weights, lr, momentum=0.9) if mode == "sgd" else torch.optim.AdamW(weights, lr, **kwargs)


def wrapped(model, config, **kwargs):
    return GritOptimizer(inner_for(config.mode, trainable(model), **kwargs), GRITManager(model, config))


def backward(model, i=0, n=32, scale=1.0):
    """Gradients of a mean squared error on batch i; returns the loss."""
    generator = torch.Generator().manual_seed(100 + i)
    dtype, outputs = trainable(model)[0].dtype, model.base_model.model.head.out_features
    x, y = torch.randn(n, 8, generator=generator), torch.randn(n, outputs, generator=generator)
    loss = scale * F.mse_loss(model(x.to(dtype)), y.to(dtype))
    loss.backward()
    return float(loss.detach())


def train(model, optimizer, steps, start=0, **kwargs):
    """Steps on batches start, start + 1, …; returns copies of the weights."""
    for i in range(start, start + steps):
        backward(model, i, **kwargs)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in trainable(model)]


def same(one, other):
    """Equal to the bit, through lists and dicts."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other or (one != one and other != other)  # NaN is the same as NaN here


def of_kind(records, kind):
    return [r for r in records if r["kind"] == kind]


def hooks_on(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def covariances(manager):
    """Layer → Σ_a, Σ_g, tokens counted."""
    return {
        pair.name: (*(c[i].clone() for c in state.covariances()), float(state["samples"][i]))
        for state, i, pair in manager.curvature.layers()
    }


def lora_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def randomize(model, seed=5, std=0.3):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(std * torch.randn(p.shape))
    return model


VOCABULARY = 40
TARGETS = ("q_proj", "v_proj", "down_proj")


def llama(vocabulary=VOCABULARY, **changes):
    """A Llama of two layers, small enough for float64; the same weights at every call."""
    torch.manual_seed(0)
    values = {"vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    values |= {"initializer_range": 0.3, "use_cache": False, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**{**values, **changes}))


def lora_on(base, r=3, seed=None, autocast_adapter_dtype=True, **changes):
    """LoRA on a Llama, six layers by default; A and B at random where there is a seed."""
    values = {"r": r, "lora_alpha": 2 * r, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(base, LoraConfig(**values), autocast_adapter_dtype=autocast_adapter_dtype)
    return model if seed is None else randomize(model, seed)


def small_llama(dtype=torch.float64, **changes):
    """With LoRA of rank 3 on six layers, both factors at random."""
    return lora_on(llama().to(dtype), seed=5, **changes).train()


def make_items(lengths, seed=0):
    """Token ids of every item; the first two carry no loss, like a prompt."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths]


PARTS = ("input_ids", "attention_mask", "labels", "position_ids")


def collate(items, length=None, side="right"):
    length = length or max(len(item) for item in items)
    batch = {name: torch.zeros(len(items), length, dtype=torch.long) for name in PARTS}
    batch["labels"] -= 100
    for row, item in enumerate(items):
        place = slice(0, len(item)) if side == "right" else slice(length - len(item), length)
        labels = item.clone()
        labels[:2] = -100
        batch["input_ids"][row, place], batch["labels"][row, place] = item, labels
        batch["attention_mask"][row, place], batch["position_ids"][row, place] = 1, torch.arange(len(item))
    return batch
