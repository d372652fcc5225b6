"""What the probe costs: the same training loop with and without it, steps in turn, at the pipeline's default sampling.

A block is 50 steps of each, so that sampled steps fall into it in their proportion. Run it on an idle machine:
`python -m benchmarks.probe_overhead`.
"""

import statistics

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._harness import command, write
from benchmarks._steps import SHAPES, Loop, block_ratios
from grit import GRITConfig

EVERY = 50
"""The default of profiles/tiny.yaml (train.probe_every)."""


def main() -> None:
    """Measure and write the result."""
    table = Table(
        "hidden", "optimizer", "a sample every", "step time / without [min, max]", "ms without", title="Probe"
    )
    rows = []
    for hidden in SHAPES:
        for name, config in (("AdamW", None), ("GRIT", GRITConfig())):
            ratios, plain = block_ratios(Loop(hidden, config), Loop(hidden, config, EVERY), SHAPES[hidden][-1])
            middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
            rows.append(
                {
                    "hidden_size": hidden,
                    "optimizer": name,
                    "every": EVERY,
                    "step_time_ratio": middle,
                    "step_time_ratio_low": low,
                    "step_time_ratio_high": high,
                    "blocks": ratios,
                    "plain_ms_per_step": 1000 * plain,
                }
            )
            spread = f"{middle:.3f} [{low:.3f}, {high:.3f}]"
            table.add_row(str(hidden), name, f"{EVERY} steps", spread, f"{1000 * plain:.1f}")
    Console().print(table)
    write("probe_overhead", "Step time with the probe over without", rows=rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    command(main)
