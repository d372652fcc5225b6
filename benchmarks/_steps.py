"""Training steps of a random Llama with LoRA, with GRIT, the probe or nothing, for benchmarks of overhead."""

import time
from typing import Any

import torch

from grit import GRITConfig, GRITManager, GritOptimizer
from probes import Probe

# hidden size, MLP size, layers, heads, vocabulary, items a batch, tokens an item, blocks
SHAPES = {128: (384, 4, 4, 640, 16, 48, 6), 1024: (2816, 2, 8, 640, 4, 64, 3)}
BLOCK, WARM_UP = 50, 5


def model_of(hidden: int) -> Any:
    """A random Llama with LoRA r 16 on all linear layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    mlp, layers, heads, vocabulary, *_ = SHAPES[hidden]
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            use_cache=False,
        )
    )
    from peft import get_peft_model

    return get_peft_model(base, GRITConfig().lora_config()).train()


def batch_of(hidden: int, step: int) -> dict[str, torch.Tensor]:
    """Random tokens; a quarter of each item is padding, as in the tiny profile's data."""
    *_, vocabulary, items, tokens, _ = SHAPES[hidden]
    ids = torch.randint(0, vocabulary, (items, tokens), generator=torch.Generator().manual_seed(step))
    mask = torch.ones_like(ids)
    mask[:, tokens - tokens // 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask > 0, ids, -100)}


class Loop:
    """One contender: model, optimizer and the step that is timed."""

    def __init__(self, hidden: int, config: GRITConfig | None, probe_every: int = 0):
        self.hidden, self.count = hidden, 0
        self.model = model_of(hidden)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        inner = torch.optim.AdamW(self.weights, lr=1e-4)
        self.manager = GRITManager(self.model, config) if config else None
        self.optimizer: Any = GritOptimizer(inner, self.manager, max_grad_norm=1.0) if self.manager else inner
        if probe_every:
            readings = self.manager.readings if self.manager else None
            Probe(self.model, self.optimizer, every=probe_every, max_grad_norm=1.0, readings=readings).open()

    def step(self) -> float:
        """Seconds of one step: forward, backward, clipping, optimizer."""
        batch = batch_of(self.hidden, self.count)
        self.count += 1
        started = time.perf_counter()
        self.model(**batch).loss.backward()
        if self.manager is None:
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started
