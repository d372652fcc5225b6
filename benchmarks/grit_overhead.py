"""What GRIT costs: the same loop with AdamW alone and with GRIT, steps in turn; peak memory.

A block is 50 steps of each, so that every periodic piece of work (statistics, inversion, reprojection, records) falls
into it; the ratio is that of the block's total times. Memory is the peak of all tensors that torch holds, from an empty
process to the end of 12 steps. Run as `python -m benchmarks.grit_overhead`, on an idle machine.
"""

import statistics

import torch

from benchmarks._harness import blocks_in_turn, command, peak_tensor_bytes, show, step_time, step_time_text, write
from benchmarks._steps import BLOCK, SHAPES, WARM_UP, Loop
from grit import GRITConfig

MEMORY_STEPS = 12


def peak_bytes(hidden: int, config: GRITConfig | None) -> int:
    """Most bytes in tensors at any moment, model and optimizer included."""

    def work() -> None:
        loop = Loop(hidden, config)
        for _ in range(MEMORY_STEPS):
            loop.step()

    return peak_tensor_bytes(work)


def main() -> None:
    rows = []
    for hidden in SHAPES:
        steps = {"plain": Loop(hidden, None).step, "GRIT": Loop(hidden, GRITConfig()).step}
        seconds = blocks_in_turn(steps, SHAPES[hidden][-1], BLOCK, WARM_UP)
        rows.append({
            "hidden_size": hidden, **step_time(seconds, "GRIT", "plain"),
            "plain_ms_per_step": 1000 * statistics.fmean(seconds["plain"]),
            "memory_ratio": peak_bytes(hidden, GRITConfig()) / peak_bytes(hidden, None),
        })  # fmt: skip
    columns = {
        "hidden": lambda row: row["hidden_size"],
        "step time / plain [min, max]": step_time_text,
        "plain ms": lambda row: f"{row['plain_ms_per_step']:.1f}",
        "memory / plain": lambda row: f"{row['memory_ratio']:.4f}",
    }
    show("GRIT", columns, rows)
    title = "Step time and memory with GRIT over AdamW alone"
    write("grit_overhead", title, rows=rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    command(main)
