"""Small models with adapters, and settings, that several tests of grit/ share."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig

from grit import GRITConfig


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


def quick(**changes):
    """Everything at every step, no reprojection; nothing here hangs on defaults that are tuned."""
    values = {
        "grit_cov_update_freq": 1,
        "kfac_update_freq": 1,
        "kfac_min_samples": 1,
        "min_lora_rank": 1,
        "reprojection": "none",
        "log_freq": 1,
        "cov_decay": 0.8,
        "kfac_damping": 1e-3,
        "eigen_power": 0.0,
    }
    return GRITConfig.from_dict({**values, **changes})


def trainable(model):
    """The weights that an optimizer gets."""
    return [p for p in model.parameters() if p.requires_grad]


def llama_config(vocabulary, **changes):
    """A Llama of two layers, small enough for float64."""
    values = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "use_cache": False,
    }
    return LlamaConfig(**{**values, **changes})
