"""What GRIT costs: the same loop with AdamW alone and with GRIT, steps in turn; peak memory.

A block is 50 steps of each, so that every periodic piece of work (statistics, inversion, reprojection, records) falls
into it; the ratio is that of the block's total times. Memory is the peak of all tensors that torch holds, from an empty
process to the end of 12 steps. Run as `python -m benchmarks.grit_overhead`, on an idle machine.
"""

import statistics

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._harness import command, peak_tensor_bytes, write
from benchmarks._steps import SHAPES, Loop, block_ratios
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
    """Measure and write the result."""
    rows = []
    table = Table("hidden", "step time / plain [min, max]", "plain ms", "memory / plain", title="GRIT")
    for hidden in SHAPES:
        ratios, plain = block_ratios(Loop(hidden, None), Loop(hidden, GRITConfig()), SHAPES[hidden][-1])
        memory = peak_bytes(hidden, GRITConfig()) / peak_bytes(hidden, None)
        rows.append(
            {
                "hidden_size": hidden,
                "step_time_ratio": statistics.median(ratios),
                "step_time_ratio_low": min(ratios),
                "step_time_ratio_high": max(ratios),
                "blocks": ratios,
                "plain_ms_per_step": 1000 * plain,
                "memory_ratio": memory,
            }
        )
        spread = f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
        table.add_row(str(hidden), spread, f"{1000 * plain:.1f}", f"{memory:.4f}")
    Console().print(table)
    write(
        "grit_overhead", "Step time and memory with GRIT over AdamW alone", rows=rows, threads=torch.get_num_threads()
    )


if __name__ == "__main__":
    command(main)
