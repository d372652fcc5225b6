"""What GRIT and the probe cost: the same loop with AdamW alone, with GRIT and with the probe, in turn; peak memory.

A block is 50 steps of each, so that every periodic piece of work (statistics, inversion, reprojection, records, the
probe's samples) falls into it; the ratio is that of the block's total times. Memory is the peak of all tensors that
torch holds, from an empty process to the end of 12 steps. Run as `python -m benchmarks.overhead`, on an idle machine.
"""

import statistics
import time
from typing import Any

import torch

from benchmarks._harness import blocks_in_turn, command, peak_tensor_bytes, show, step_time, step_time_text, write
from grit import GRITConfig, GRITManager, GritOptimizer
from probes import Probe

# hidden size, MLP size, layers, heads, vocabulary, items a batch, tokens an item, blocks
SHAPES = {128: (384, 4, 4, 640, 16, 48, 6), 1024: (2816, 2, 8, 640, 4, 64, 3)}
BLOCK, WARM_UP, MEMORY_STEPS = 50, 5, 12
EVERY = 50  # train.probe_every of profiles/tiny.yaml


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


def peak_bytes(hidden: int, config: GRITConfig | None) -> int:
    """Most bytes in tensors at any moment, model and optimizer included."""

    def work() -> None:
        loop = Loop(hidden, config)
        for _ in range(MEMORY_STEPS):
            loop.step()

    return peak_tensor_bytes(work)


def main() -> None:
    of_grit, of_probe, grit = [], [], GRITConfig()
    for hidden in SHAPES:
        kinds = {"AdamW": (None, 0), "GRIT": (grit, 0), "AdamW, probe": (None, EVERY), "GRIT, probe": (grit, EVERY)}
        steps = {name: Loop(hidden, *kind).step for name, kind in kinds.items()}
        seconds = blocks_in_turn(steps, SHAPES[hidden][-1], BLOCK, WARM_UP)
        ms = {name: 1000 * statistics.fmean(seconds[name]) for name in ("AdamW", "GRIT")}
        of_grit.append({
            "hidden_size": hidden, **step_time(seconds, "GRIT", "AdamW"), "plain_ms_per_step": ms["AdamW"],
            "memory_ratio": peak_bytes(hidden, grit) / peak_bytes(hidden, None),
        })  # fmt: skip
        of_probe += [
            {"hidden_size": hidden, "optimizer": name, "every": EVERY,
             **step_time(seconds, f"{name}, probe", name), "plain_ms_per_step": ms[name]}
            for name in ms
        ]  # fmt: skip
    columns = {
        "hidden": lambda row: row["hidden_size"],
        "optimizer": lambda row: row.get("optimizer", "GRIT over AdamW"),
        "step time / without [min, max]": step_time_text,
        "ms without": lambda row: f"{row['plain_ms_per_step']:.1f}",
        "memory / without": lambda row: f"{row['memory_ratio']:.4f}" if "memory_ratio" in row else "",
    }
    for name, title, rows in (
        ("grit_overhead", "Step time and memory with GRIT over AdamW alone", of_grit),
        ("probe_overhead", "Step time with the probe over without", of_probe),
    ):
        show(title, columns, rows)
        write(name, title, rows=rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    command(main)
