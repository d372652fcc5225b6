"""How many steps pure GRIT needs for the loss that tuned AdamW LoRA ends at after 150 and 300 steps.

Both sides get the same tuning budget: a grid of learning rate × α, one seed, the same number of runs, judged by the
evaluation loss at the end. AdamW is tuned at its own horizon; GRIT at two thirds of it. Then, with three other seeds,
AdamW runs its horizon and GRIT runs a ladder of shorter horizons (a linear decay of its own for each: a run cut short
is no run). GRIT has caught up at the shortest horizon whose mean loss over the seeds is at most AdamW's, and where
that stays so for every longer one of the ladder.

Needs what `make repro` leaves; about 12 minutes on 2 cores. Run as `python -m benchmarks.grit_convergence`.
"""

import itertools
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._harness import write
from benchmarks._lora_task import Job, Recipe, train_all

HORIZONS = (150, 300)
SEEDS = (1, 2, 3)
RATES, ALPHAS = (2e-3, 4e-3, 8e-3), (64.0, 128.0)
LADDER = (0.5, 0.67, 0.8)
GRIT: dict[str, Any] = {"rank_shrink": "never"}  # the default configuration, at full rank to the end


def tune(name: str, grit: dict[str, Any] | None, steps: int) -> tuple[Recipe, list[dict[str, float]]]:
    """The best of the grid at that horizon, and the whole grid."""
    grid = list(itertools.product(RATES, ALPHAS))
    jobs = [
        Job(Recipe(rate, alpha, grit), steps, 0, {"tune": name, "lr": rate, "alpha": alpha}) for rate, alpha in grid
    ]
    losses = train_all(jobs)
    entries = [{"lr": rate, "alpha": a, "eval_loss": x} for (rate, a), x in zip(grid, losses, strict=True)]
    best = min(entries, key=lambda entry: entry["eval_loss"])
    return Recipe(best["lr"], best["alpha"], grit), entries


def main() -> None:
    """Measure and write the result."""
    table = Table("AdamW steps", "its loss", "GRIT steps needed", "share", "loss there", title="Shortest horizon")
    results = []
    for horizon in HORIZONS:
        adamw, adamw_grid = tune("AdamW", None, horizon)
        grit, grit_grid = tune("GRIT", GRIT, round(horizon * 2 / 3))
        steps = [round(horizon * share) for share in LADDER]
        jobs = [Job(adamw, horizon, seed, {"run": "AdamW"}) for seed in SEEDS]
        jobs += [Job(grit, n, seed, {"run": "GRIT"}) for n in steps for seed in SEEDS]
        losses = train_all(jobs)
        target, rest = losses[: len(SEEDS)], losses[len(SEEDS) :]
        ladder: list[dict[str, Any]] = []
        for i, (share, n) in enumerate(zip(LADDER, steps, strict=True)):
            own = rest[i * len(SEEDS) : (i + 1) * len(SEEDS)]
            ladder.append({"share": share, "steps": n, "losses": own, "mean": statistics.mean(own)})
        goal = statistics.mean(target)
        caught: dict[str, Any] | None = None
        for entry in reversed(ladder):
            if entry["mean"] > goal:
                break
            caught = entry
        results.append(
            {
                "adamw_steps": horizon,
                "adamw": {"lr": adamw.lr, "alpha": adamw.alpha, "losses": target, "mean": goal, "grid": adamw_grid},
                "grit": {"lr": grit.lr, "alpha": grit.alpha, "settings": GRIT, "grid": grit_grid, "ladder": ladder},
                "share_needed": caught["share"] if caught else None,
            }
        )
        table.add_row(
            str(horizon),
            f"{goal:.4f} ± {statistics.stdev(target):.4f}",
            str(caught["steps"]) if caught else "more than all",
            f"{caught['share']:.2f}" if caught else "–",
            f"{caught['mean']:.4f} ± {statistics.stdev(caught['losses']):.4f}" if caught else "–",
        )
    Console().print(table)
    write("grit_convergence", "Steps for AdamW's final loss", seeds=SEEDS, results=results)


if __name__ == "__main__":
    main()
