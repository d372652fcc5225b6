"""Two GRIT-LoRA layers of their own and a trainable head, for tests of the optimizers."""

import torch
from torch import nn

from grit_vlm import GRITLoRAConfig, GRITLoRALinear, create_grit_optimizer


class Net(nn.Module):
    def __init__(self, **changed):
        super().__init__()
        torch.manual_seed(0)
        told = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "fisher_min_samples": 1, "fisher_update_freq": 3,
                "projection_budget_start": 2, "projection_budget_end": 2}  # fmt: skip
        config = GRITLoRAConfig(**told | changed)
        self.first = GRITLoRALinear(nn.Linear(6, 7).double(), config)
        self.second = GRITLoRALinear(nn.Linear(7, 5).double(), config)
        self.head = nn.Linear(5, 4).double()
        self.double()
        self.layers = {"first": self.first, "second": self.second}
        self.lora = [p for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B)]
        for layer in self.layers.values():
            nn.init.normal_(layer.lora_B, std=0.3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))

    def backward(self, step, scale=1.0):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=generator).double() * torch.linspace(0.2, 2, 6)
        loss = nn.functional.cross_entropy(self(x), torch.randint(4, (16,), generator=generator)) * scale
        loss.backward()
        return loss


def optimizer_of(net, kind="grit_adam", weights=None, **settings):
    return create_grit_optimizer(net.lora if weights is None else weights, kind, net.layers, **settings)


def train(net, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        net.backward(step)
        optimizer.step()


def changes_of(net, optimizer, step):
    """Layer → Δ of A and B in one step."""
    before = [p.detach().clone() for p in net.lora]
    train(net, optimizer, 1, step)
    a, b, c, d = (p.detach() - old for p, old in zip(net.lora, before, strict=True))
    return {"first": {"A": a, "B": b}, "second": {"A": c, "B": d}}
