"""What the probe costs: the same training loop with and without it, steps in turn, at the pipeline's default sampling.

A block is 50 steps of each, so that sampled steps fall into it in their proportion. Run it on an idle machine:
`python -m benchmarks.probe_overhead`.
"""

import statistics

import torch

from benchmarks._harness import blocks_in_turn, command, show, step_time, step_time_text, write
from benchmarks._steps import BLOCK, SHAPES, WARM_UP, Loop
from grit import GRITConfig

EVERY = 50
"""The default of profiles/tiny.yaml (train.probe_every)."""


def main() -> None:
    rows = []
    for hidden in SHAPES:
        for name, config in (("AdamW", None), ("GRIT", GRITConfig())):
            steps = {"without": Loop(hidden, config).step, "with": Loop(hidden, config, EVERY).step}
            seconds = blocks_in_turn(steps, SHAPES[hidden][-1], BLOCK, WARM_UP)
            rows.append({
                "hidden_size": hidden, "optimizer": name, "every": EVERY, **step_time(seconds, "with", "without"),
                "plain_ms_per_step": 1000 * statistics.fmean(seconds["without"]),
            })  # fmt: skip
    columns = {
        "hidden": lambda row: row["hidden_size"],
        "optimizer": lambda row: row["optimizer"],
        "a sample every": lambda row: f"{row['every']} steps",
        "step time / without [min, max]": step_time_text,
        "ms without": lambda row: f"{row['plain_ms_per_step']:.1f}",
    }
    show("Probe", columns, rows)
    write("probe_overhead", "Step time with the probe over without", rows=rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    command(main)
