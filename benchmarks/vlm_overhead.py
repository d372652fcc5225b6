"""What GRIT-VLM costs at the widths of SmolVLM-256M: steps of vanilla LoRA and of each estimate in turn.

The model has SmolVLM-256M's widths and depths and random weights; LoRA is that of the ready configurations
smolvlm_fast and smolvlm_256m. A block is ten steps of each, the interval at which estimates are updated, so that the
update falls into it; the ratio is that of the block's total times. Memory is the peak of all tensors, model and
optimizer included, over three steps on one image of 512 pixels, all of which update the estimates. Run as
`python -m benchmarks.vlm_overhead`, on an idle machine.
"""

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks._harness import blocks_in_turn, peak_tensor_bytes, show, step_time, step_time_text, write
from grit_vlm import GRITLoRAConfig, VLMGRITAdapter, create_grit_optimizer

VISION = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
TEXT = dict(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    head_dim=64, vocab_size=1000, pad_token_id=0, bos_token_id=2, eos_token_id=3, model_type="llama",
)  # fmt: skip
IMAGE_TOKEN, PATCH, SCALE = 1, 16, 4
ESTIMATES = ("diagonal", "kfac")
BLOCK, MEMORY_IMAGE = 10, 512


def build_model(image: int) -> Any:
    """SmolVLM-256M with random weights and a small vocabulary, for images of so many pixels a side."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    torch.manual_seed(0)
    config = Idefics3Config(
        vision_config={**VISION, "image_size": image, "patch_size": PATCH},
        text_config=TEXT,
        image_token_id=IMAGE_TOKEN,
        scale_factor=SCALE,
        pad_token_id=0,
    )
    return Idefics3ForConditionalGeneration(config)


class Loop:
    """A training loop on one batch of random images and tokens.

    Args:
        configuration: Ready configuration that says which layers have LoRA.
        estimate: Of GRIT-VLM; None: vanilla LoRA with AdamW.
        image: Pixels a side.
        batch: Images.
        tokens: Text tokens an item, beside the image's.
        model: To train on; default: one of its own.
    """

    def __init__(
        self,
        configuration: str,
        estimate: str | None,
        image: int = 128,
        batch: int = 2,
        tokens: int = 48,
        model: Any = None,
    ) -> None:
        shown = (image // PATCH) ** 2 // SCALE**2
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(4, 1000, (batch, shown + tokens), generator=generator)
        ids[:, :shown] = IMAGE_TOKEN
        labels = ids.clone()
        labels[:, : shown + tokens // 2] = -100
        self.batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
            "pixel_values": torch.randn(batch, 1, 3, image, image, generator=generator),
        }
        config = GRITLoRAConfig(lora_dropout=0.0, fisher_approximation=estimate or "diagonal")
        adapter = VLMGRITAdapter(model or build_model(image), config, model_config_name=configuration)
        self.model = adapter.model
        weights = adapter.get_trainable_parameters()
        self.layers, self.parameters = len(adapter.grit_layers), sum(p.numel() for p in weights)
        if estimate is None:
            self.optimizer: Any = torch.optim.AdamW(weights, lr=1e-4)
        else:
            self.optimizer = create_grit_optimizer(weights, "grit_adam", adapter.get_grit_layers(), lr=1e-4)

    def step(self) -> float:
        """One optimizer step; its seconds."""
        started = time.perf_counter()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


def compare(configuration: str, image: int, blocks: int) -> list[dict[str, Any]]:
    """Rows of the table for one configuration."""
    loops: dict[str, Loop] = {"vanilla": Loop(configuration, None, image)}
    loops |= {estimate: Loop(configuration, estimate, image) for estimate in ESTIMATES}
    steps = {name: loop.step for name, loop in loops.items()}
    seconds = blocks_in_turn(steps, blocks, BLOCK, BLOCK + 1)  # the first steps update the estimates every time
    return [
        {
            "configuration": configuration,
            "estimate": estimate,
            "layers": loops["vanilla"].layers,
            "trainable_parameters": loops[estimate].parameters,
            "trainable_parameters_vanilla": loops["vanilla"].parameters,
            **step_time(seconds, estimate, "vanilla"),
            "vanilla_ms_per_step": 1000 * statistics.median(seconds["vanilla"]),
        }
        for estimate in ESTIMATES
    ]


def peak_bytes(configuration: str, estimate: str | None) -> int:
    """Most bytes in tensors at any moment of three steps."""

    def work() -> None:
        loop = Loop(configuration, estimate, MEMORY_IMAGE, batch=1)
        for _ in range(3):
            loop.step()

    return peak_tensor_bytes(work)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--image", type=int, default=128, help="pixels a side, a multiple of 64 (default 128)")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of ten steps (default 3)")
    args = parser.parse_args()
    rows = []
    for name in ("smolvlm_fast", "smolvlm_256m"):
        plain = peak_bytes(name, None)
        for row in compare(name, args.image, args.blocks):
            rows.append({**row, "memory_ratio": peak_bytes(name, row["estimate"]) / plain, "vanilla_peak_bytes": plain})
    columns = {
        "configuration": lambda row: row["configuration"],
        "estimate": lambda row: row["estimate"],
        "parameters": lambda row: f"{row['trainable_parameters']:,}",
        "step time / vanilla [min, max]": step_time_text,
        "vanilla ms": lambda row: f"{row['vanilla_ms_per_step']:.0f}",
        "memory / vanilla": lambda row: f"{row['memory_ratio']:.3f}",
    }
    title = "Step time and memory with GRIT-VLM over vanilla LoRA, SmolVLM-256M's widths"
    show(title, columns, rows)
    write("vlm_overhead", title, rows=rows, image=args.image, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
