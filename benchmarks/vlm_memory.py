"""Memory of GRIT-VLM at the widths of SmolVLM-256M: peak of all tensors that torch holds, against vanilla LoRA.

Model, LoRA and batch are those of `benchmarks.vlm_overhead`, with one image of 512 pixels; the peak is over three
steps, all of which update the estimates, model and optimizer included. Run as `python -m benchmarks.vlm_memory`.
"""

from typing import Any

import torch

from benchmarks._harness import command, peak_tensor_bytes, show, write
from benchmarks.vlm_overhead import ESTIMATES, Loop

IMAGE = 512
CONFIGURATIONS = ("smolvlm_fast", "smolvlm_256m")


def peak_bytes(configuration: str, estimate: str | None) -> int:
    """Most bytes in tensors at any moment of three steps."""

    def work() -> None:
        loop = Loop(configuration, estimate, IMAGE, batch=1)
        for _ in range(3):
            loop.step()

    return peak_tensor_bytes(work)


def main() -> None:
    rows: list[dict[str, Any]] = []
    for configuration in CONFIGURATIONS:
        plain = peak_bytes(configuration, None)
        for estimate in ESTIMATES:
            ratio = peak_bytes(configuration, estimate) / plain
            rows.append({
                "configuration": configuration, "estimate": estimate, "memory_ratio": ratio,
                "vanilla_peak_bytes": plain,
            })  # fmt: skip
    columns = {
        "configuration": lambda row: row["configuration"],
        "estimate": lambda row: row["estimate"],
        "memory / vanilla": lambda row: f"{row['memory_ratio']:.3f}",
        "vanilla, bytes": lambda row: f"{row['vanilla_peak_bytes']:,}",
    }
    title = "Peak memory with GRIT-VLM over vanilla LoRA, SmolVLM-256M's widths"
    show(title, columns, rows)
    write("vlm_memory", title, rows=rows, image=IMAGE, threads=torch.get_num_threads())


if __name__ == "__main__":
    command(main)
