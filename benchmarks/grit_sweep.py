"""The validation sweep behind GRIT's defaults: mode × capture × learning rate on the tiny profile's task.

150 steps, r 16, α 128, one seed, evaluation loss at the end; plain AdamW with the same learning rates beside it. Needs
what `make repro` leaves; about 6 minutes on 2 cores. Run as `python -m benchmarks.grit_sweep`.
"""

import itertools
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._harness import write
from benchmarks._lora_task import Job, Recipe, train_all

STEPS, ALPHA, SEEDS = 150, 128.0, (0,)
RATES, SGD_RATES = (2e-3, 4e-3, 8e-3), (0.01, 0.03, 0.1)
PLAIN: dict[str, Any] = {"reprojection": "none", "rank_shrink": "never"}
MODES: dict[str, dict[str, Any]] = {
    "eigen_adamw p=0": {"mode": "eigen_adamw", "eigen_power": 0.0},
    "eigen_adamw p=0.5": {"mode": "eigen_adamw", "eigen_power": 0.5},
    "eigen_adamw p=1": {"mode": "eigen_adamw", "eigen_power": 1.0},
    "adamw": {"mode": "adamw"},
    "sgd": {"mode": "sgd"},
}
VARIANTS: dict[str, dict[str, Any] | None] = {"AdamW, no GRIT": None}
for _name, _capture in itertools.product(MODES, ("hooks", "gradients")):
    VARIANTS[f"{_name}, {_capture}"] = {**PLAIN, **MODES[_name], "capture": _capture}


def main() -> None:
    """Measure and write the result."""
    jobs = []
    for name, settings in VARIANTS.items():
        rates = SGD_RATES if settings is not None and settings["mode"] == "sgd" else RATES
        for rate, seed in itertools.product(rates, SEEDS):
            jobs.append(Job(Recipe(rate, ALPHA, settings), STEPS, seed, {"variant": name, "lr": rate}))
    losses = train_all(jobs)
    rows: list[dict[str, Any]] = [
        {**job.label, "seed": job.seed, "eval_loss": loss} for job, loss in zip(jobs, losses, strict=True)
    ]
    table = Table("variant", "best learning rate", "loss, mean of the seeds", "each", title=f"{STEPS} steps")
    best = {}
    for name in VARIANTS:
        by_rate: dict[float, list[float]] = {}
        for row in rows:
            if row["variant"] == name:
                by_rate.setdefault(row["lr"], []).append(row["eval_loss"])
        best[name] = min((statistics.mean(values), rate, values) for rate, values in by_rate.items())
    for name, (mean, rate, values) in sorted(best.items(), key=lambda item: item[1][0]):
        table.add_row(name, f"{rate:g}", f"{mean:.4f}", ", ".join(f"{v:.4f}" for v in values))
    Console().print(table)
    write("grit_sweep", "Evaluation loss by mode, capture and learning rate", steps=STEPS, alpha=ALPHA, rows=rows)


if __name__ == "__main__":
    main()
