"""What GRIT, the probe and preserve cost at Llama-3-8B's shapes on a GPU: steps in turn with AdamW LoRA, peak memory.

Needs torch, transformers and PEFT; 4 bit where bitsandbytes is there too, and AdamW and GRIT on Unsloth's kernels, in
a process of their own, where Unsloth is. Weights are random: neither time nor memory knows what they say. In a round
every contender takes its steps on the one base, with a LoRA of r 16 on all linear layers, gradient checkpointing, bf16.
Under 8 minutes on one GPU with 24 GB or more:

  python benchmarks/gpu.py                  # writes benchmarks/results/gpu.json
  python benchmarks/gpu.py --shape tiny     # a minute on a CPU; writes nothing unless --out says where
"""

import argparse
import gc
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
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
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONTENDERS = ("AdamW", "GRIT", "AdamW + probe", "AdamW + preserve (kfac)")


def _llama(shape: str, device: str) -> Any:
    """A random one in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, mlp, layers, heads, shared, vocabulary, *_ = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=shared, use_cache=False, rope_theta=500000.0,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


def base_of(shape: str, device: str, *, four_bit: bool) -> Any:
    """With LoRA; its linear layers in NF4 where asked for."""
    from peft import get_peft_model

    model = _llama(shape, device)
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


def unsloth_base_of(shape: str, device: str, *, four_bit: bool) -> Any:
    """The same as Unsloth loads and patches it, which it does for the whole process."""
    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_BLOCK_COMPILE": "0", "HF_HUB_OFFLINE": "1"}
    with TemporaryDirectory() as folder:
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", f"{folder}/unsloth")
        loader = importlib.import_module("unsloth").FastLanguageModel  # before transformers and PEFT
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        made = _llama(shape, device)
        made.save_pretrained(folder)
        words = Tokenizer(models.WordLevel({str(i): i for i in range(made.config.vocab_size)}))
        ends = {"eos_token": "1", "pad_token": "2"}
        PreTrainedTokenizerFast(tokenizer_object=words, **ends).save_pretrained(folder)  # it loads no model without one
        del made
        model, _ = loader.from_pretrained(
            folder, max_seq_length=SHAPES[shape][-1], dtype=torch.bfloat16, load_in_4bit=four_bit,
            use_exact_model_name=True,
        )  # fmt: skip
        config = GRITConfig().lora_config()
        return loader.get_peft_model(
            model, r=config.r, lora_alpha=config.lora_alpha, lora_dropout=0.0, bias="none",
            target_modules=sorted(LINEAR), use_gradient_checkpointing=True,
        ).train()  # fmt: skip


def on_unsloth(args: argparse.Namespace, *, four_bit: bool) -> list[dict[str, Any]]:
    """Rows of a process that imports it, none where that fails."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        asked = [f"--{name}={getattr(args, name)}" for name in ("shape", "device", "rounds", "steps")]
        way = "nf4" if four_bit else "bf16"
        done = subprocess.run([sys.executable, __file__, *asked, f"--unsloth={way}", f"--out={out}"], check=False)
        if done.returncode:
            print(f"Unsloth: left out, it ended with exit code {done.returncode}")
            return []
        return list(json.loads(out.read_text(encoding="utf-8"))["rows"])


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


def measure(model: Any, base: str, names: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a contender: seconds a step and peak bytes, each round's, and the ratios to AdamW's."""
    shape, device, rounds, steps = args.shape, args.device, args.rounds, args.steps
    gpu = device == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0)
    wait = torch.cuda.synchronize if gpu else lambda: None
    for number in range(rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
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
    for name in names:
        ratios = [own / plain for own, plain in zip(seconds[name], seconds["AdamW"], strict=True)]
        rows.append({
            "base": base, "contender": name, "seconds_a_step": seconds[name],
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
    parser.add_argument(
        "--unsloth", choices=("bf16", "nf4"), help="its contenders alone, with a base in that precision"
    )
    args = parser.parse_args()
    if args.device == "cpu" and args.shape != "tiny":
        parser.error("expected a GPU for --shape llama3_8b, found none; --shape tiny runs on a CPU")
    rows = []
    if args.unsloth:
        base = unsloth_base_of(args.shape, args.device, four_bit=args.unsloth == "nf4")
        rows = measure(base, f"{args.unsloth}, Unsloth", CONTENDERS[:2], args)
    else:
        ways = [False, *([True] if args.device == "cuda" and importlib.util.find_spec("bitsandbytes") else [])]
        for four_bit in ways:
            base = base_of(args.shape, args.device, four_bit=four_bit)
            rows += measure(base, "nf4" if four_bit else "bf16", CONTENDERS, args)
            del base
            gc.collect()
            torch.cuda.empty_cache()
        if args.device == "cuda" and importlib.util.find_spec("unsloth"):
            rows += on_unsloth(args, four_bit=ways[-1])
    for row in rows if not args.unsloth else ():
        memory = f"{row['peak_bytes'] / 1e9:6.1f} GB, {row['memory_ratio']:.3f} ×" if row["peak_bytes"] else ""
        spread = f"{row['step_time_ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        seconds = statistics.median(row["seconds_a_step"])
        print(f"{row['base']:15}{row['contender']:26}{seconds:8.4f} s  {spread}  {memory}")
    whole = args.device == "cuda" and not args.unsloth
    out = args.out or (FOLDER / "benchmarks/results/gpu.json" if whole else None)
    if out is not None:
        name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
        facts = {
            "benchmark": "gpu", "title": "Step time and peak memory over AdamW LoRA's, in turn", "shape": args.shape,
            "date": datetime.now(UTC).date().isoformat(), "device": name, "torch": torch.__version__, "rows": rows,
        }  # fmt: skip
        out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        print(out)


if __name__ == "__main__":
    main()
