"""What GRIT costs: the same loop with AdamW alone and with GRIT, steps in turn; peak memory; where the time goes.

A block is 50 steps of each, so that every periodic piece of work (statistics, inversion, reprojection, records) falls
into it; the ratio is that of the block's total times. Memory is the peak of all tensors that torch holds, from an empty
process to the end of 12 steps. Run as `python -m benchmarks.grit_overhead`, on an idle machine.
"""

import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._harness import write
from grit import GRITConfig, GRITManager, GritOptimizer

# hidden size, MLP size, layers, heads, vocabulary, items a batch, tokens an item, blocks
SHAPES = {128: (384, 4, 4, 640, 16, 48, 6), 1024: (2816, 2, 8, 640, 4, 64, 3)}
BLOCK, WARM_UP, MEMORY_STEPS = 50, 5, 12


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

    def __init__(self, hidden: int, config: GRITConfig | None):
        self.hidden, self.count = hidden, 0
        self.model = model_of(hidden)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        inner = torch.optim.AdamW(self.weights, lr=1e-4)
        self.manager = GRITManager(self.model, config) if config else None
        self.optimizer: Any = GritOptimizer(inner, self.manager, max_grad_norm=1.0) if self.manager else inner

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


def time_ratios(hidden: int, config: GRITConfig) -> tuple[list[float], float]:
    """Ratio of each block, and the plain loop's mean seconds a step."""
    plain, grit = Loop(hidden, None), Loop(hidden, config)
    for _ in range(WARM_UP):
        plain.step(), grit.step()
    ratios, seconds = [], []
    for _ in range(SHAPES[hidden][-1]):
        total = [0.0, 0.0]
        for number in range(BLOCK):
            order = ((0, plain), (1, grit)) if number % 2 else ((1, grit), (0, plain))
            for place, loop in order:
                total[place] += loop.step()
        ratios.append(total[1] / total[0])
        seconds.append(total[0] / BLOCK)
    return ratios, statistics.mean(seconds)


def peak_bytes(hidden: int, config: GRITConfig | None) -> int:
    """Most bytes in tensors at any moment, model and optimizer included."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loop = Loop(hidden, config)
        for _ in range(MEMORY_STEPS):
            loop.step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return int(peak)


def where_time_goes(hidden: int, config: GRITConfig) -> dict[str, float]:
    """Milliseconds a step in each part of GRIT's work, over one block."""
    loop = Loop(hidden, config)
    manager, optimizer = loop.manager, loop.optimizer
    spent: dict[str, float] = defaultdict(float)
    if manager is None:
        raise ValueError("expected a configuration of GRIT")

    def timed(owner: Any, name: str, label: str) -> None:
        inner = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                spent[label] += time.perf_counter() - started

        setattr(owner, name, wrapper)

    timed(manager, "update_statistics", "statistics")
    timed(manager, "update_and_invert_factors", "inversion")
    timed(manager, "precondition_gradients", "preconditioning")
    timed(optimizer, "_eigen_step", "step in the eigenbasis (replaces AdamW's)")
    timed(manager, "end_step", "reprojection and records")
    timed(optimizer, "_step", "whole optimizer step")
    if manager.capture is not None:
        timed(manager.capture, "_add", "hooks in the backward pass")
    for _ in range(BLOCK):
        loop.step()
    return {label: 1000 * seconds / BLOCK for label, seconds in spent.items()}


def main() -> None:
    """Measure and write the result."""
    console, rows = Console(), []
    table = Table(
        "hidden", "kfac_update_freq", "step time / plain [min, max]", "plain ms", "memory / plain", title="GRIT"
    )
    for hidden in SHAPES:
        plain_bytes = peak_bytes(hidden, None)
        for freq in (GRITConfig().kfac_update_freq, 5):
            config = GRITConfig(kfac_update_freq=freq)
            ratios, plain = time_ratios(hidden, config)
            memory = peak_bytes(hidden, config) / plain_bytes
            parts = where_time_goes(hidden, config)
            rows.append(
                {
                    "hidden_size": hidden,
                    "kfac_update_freq": freq,
                    "step_time_ratio": statistics.median(ratios),
                    "step_time_ratio_low": min(ratios),
                    "step_time_ratio_high": max(ratios),
                    "blocks": ratios,
                    "plain_ms_per_step": 1000 * plain,
                    "memory_ratio": memory,
                    "ms_per_step": parts,
                }
            )
            spread = f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
            table.add_row(str(hidden), str(freq), spread, f"{1000 * plain:.1f}", f"{memory:.4f}")
            console.print(
                f"hidden {hidden}, kfac_update_freq {freq}, ms a step: ", {k: round(v, 3) for k, v in parts.items()}
            )
    console.print(table)
    write(
        "grit_overhead", "Step time and memory with GRIT over AdamW alone", rows=rows, threads=torch.get_num_threads()
    )


if __name__ == "__main__":
    main()
