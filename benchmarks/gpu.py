"""What GRIT, the probe and preserve cost at Llama-3-8B's shapes on a GPU: steps in turn with AdamW LoRA, peak memory.

Needs torch, transformers and PEFT; 4 bit where bitsandbytes is there too. Weights are random: neither time nor memory
knows what they say. In a round every contender takes its steps on the one base, with a LoRA of r 16 on all linear
layers, gradient checkpointing, bf16. Under 8 minutes on one GPU with 24 GB or more:

  python benchmarks/gpu.py                  # writes benchmarks/results/gpu.json
  python benchmarks/gpu.py --shape tiny     # a minute on a CPU; writes nothing unless --out says where
"""

import argparse
import gc
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(FOLDER))  # as a script it needs nothing installed
from grit import GRITConfig, GRITManager, GritOptimizer, Preserve  # noqa: E402
from probes import Probe  # noqa: E402

# hidden size, MLP size, layers, heads, heads of keys and values, vocabulary, items a batch, tokens an item
SHAPES = {"llama3_8b": (4096, 14336, 32, 32, 8, 128256, 2, 512), "tiny": (64, 128, 2, 4, 2, 256, 4, 32)}
EVERY = 10
"""Steps between two that the probe looks at closely; its default is 50, so its cost is overstated."""
CONTENDERS = ("AdamW", "GRIT", "AdamW + probe", "AdamW + preserve (kfac)")


def base_of(shape: str, device: str, *, four_bit: bool) -> Any:
    """A random Llama in bf16 with LoRA; its linear layers in NF4 where asked for."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, mlp, layers, heads, shared, vocabulary, *_ = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=shared, use_cache=False, rope_theta=500000.0,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    if four_bit:
        _quantize(model, device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return get_peft_model(model, GRITConfig().lora_config()).train()


def _quantize(model: Any, device: str) -> None:
    """One layer after the other, so that never more than the bf16 model is held."""
    import bitsandbytes as bnb

    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            made = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            made.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            parent, _, last = name.rpartition(".")
            setattr(model.model.get_submodule(parent), last, made.to(device))
    model.is_loaded_in_4bit = True  # what PEFT asks


@contextmanager
def contender(name: str, model: Any, shape: str, device: str) -> Iterator[Callable[[], None]]:
    """One optimizer step, from an adapter that starts anew."""
    *_, vocabulary, items, tokens = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def batch() -> dict[str, torch.Tensor]:
        ids = torch.randint(0, vocabulary, (items, tokens), generator=generator).to(device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    for module in model.modules():
        if hasattr(module, "reset_lora_parameters"):
            module.reset_lora_parameters("default", init_lora_weights=True)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(weights, lr=1e-4)
    with ExitStack() as stack:
        if name == "GRIT":
            manager = stack.enter_context(GRITManager(model, GRITConfig()))
            optimizer = GritOptimizer(optimizer, manager, max_grad_norm=1.0)
        elif "probe" in name:
            stack.enter_context(Probe(model, optimizer, every=EVERY, max_grad_norm=1.0))
        elif "preserve" in name:
            keep = Preserve(model, [batch()], "kfac", strength=30.0)
            handle = optimizer.register_step_pre_hook(keep.add_gradients)
            stack.callback(handle.remove)

        def step() -> None:
            model(**batch()).loss.backward()
            if name != "GRIT":
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        yield step


def measure(shape: str, device: str, *, four_bit: bool, rounds: int, steps: int) -> list[dict[str, Any]]:
    """A row a contender: seconds a step and peak bytes, each round's, and the ratios to AdamW's."""
    model, gpu = base_of(shape, device, four_bit=four_bit), device == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    peaks = dict.fromkeys(CONTENDERS, 0)
    wait = torch.cuda.synchronize if gpu else lambda: None
    for number in range(rounds):
        first = number % len(CONTENDERS)
        for name in (*CONTENDERS[first:], *CONTENDERS[:first]):
            with contender(name, model, shape, device) as step:
                if gpu:
                    gc.collect()
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                for _ in range(3):  # GRIT's first statistics and inversion among them
                    step()
                wait()
                started = time.perf_counter()
                for _ in range(steps):
                    step()
                wait()
                seconds[name].append((time.perf_counter() - started) / steps)
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() if gpu else 0)
    rows = []
    for name in CONTENDERS:
        ratios = [own / plain for own, plain in zip(seconds[name], seconds["AdamW"], strict=True)]
        rows.append({
            "base": "nf4" if four_bit else "bf16", "contender": name, "seconds_a_step": seconds[name],
            "step_time_ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
            "peak_bytes": peaks[name] or None, "memory_ratio": peaks[name] / peaks["AdamW"] if gpu else None,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], epilog="Writes benchmarks/results/gpu.json on a GPU."
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama3_8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3, help="in which every contender takes its turn")
    parser.add_argument(
        "--steps", type=int, default=20, help="of a contender in a round, after three that do not count"
    )
    parser.add_argument(
        "--out", type=Path, help="file to write; by default benchmarks/results/gpu.json, of a GPU alone"
    )
    given = parser.parse_args()
    if given.device == "cpu" and given.shape != "tiny":
        parser.error("expected a GPU for --shape llama3_8b, found none; --shape tiny runs on a CPU")
    ways = [False, *([True] if given.device == "cuda" and importlib.util.find_spec("bitsandbytes") else [])]
    rows = []
    for four_bit in ways:
        rows += measure(given.shape, given.device, four_bit=four_bit, rounds=given.rounds, steps=given.steps)
    for row in rows:
        memory = f"{row['peak_bytes'] / 1e9:6.1f} GB, {row['memory_ratio']:.3f} ×" if row["peak_bytes"] else ""
        spread = f"{row['step_time_ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        print(
            f"{row['base']:5}{row['contender']:26}{statistics.median(row['seconds_a_step']):8.4f} s  {spread}  {memory}"
        )
    out = given.out or (FOLDER / "benchmarks/results/gpu.json" if given.device == "cuda" else None)
    if out is not None:
        name = torch.cuda.get_device_name() if given.device == "cuda" else platform.processor() or platform.machine()
        facts = {
            "benchmark": "gpu", "title": "Step time and peak memory over AdamW LoRA's, in turn", "shape": given.shape,
            "date": datetime.now(UTC).date().isoformat(), "device": name, "torch": torch.__version__, "rows": rows,
        }  # fmt: skip
        out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        print(out)


if __name__ == "__main__":
    main()
