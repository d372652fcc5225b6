"""The smallest adapter as good as one of full rank: shrinking by GRIT at the end, or training at that rank.

One training at rank 16 per seed; then every threshold τ shrinks a copy of it. For comparison: plain LoRA and GRIT at
smaller ranks from the start, with s = α/r as at rank 16. Settings are those that benchmarks/frontier.py found at 300
steps, losses those of split test, seeds 0 to 4. Rows go to results/rank_runs.jsonl, and none that is there is repeated.
Run as `python -m benchmarks.rank`.
"""

import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from benchmarks import frontier
from benchmarks._harness import FOLDER, RESULTS, command, interval, interval_text, show, write

ROWS = RESULTS / "rank_runs.jsonl"
STEPS, RANKS, THRESHOLDS = 300, (16, 8, 4), (0.9999, 0.999, 0.997, 0.99, 0.97, 0.95, 0.9)
METHODS = ("adamw", frontier.OURS)


def shrunk(trainer: Any) -> list[dict[str, Any]]:
    """Parameters and loss after shrinking by each threshold, in a copy of this process."""
    manager, context = trainer.grit_manager, get_context("fork")
    rows = []

    def shrink(threshold: float, out: Any) -> None:
        manager.config.enable_rank_adaptation, manager.config.rank_adaptation_threshold = True, threshold
        manager.neural_reprojection(trainer.optimizer, shrink=True)
        parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        out.put({"threshold": threshold, "parameters": parameters, "loss": trainer.evaluate()["eval_loss"]})

    for threshold in THRESHOLDS:
        out = context.Queue()
        process = context.Process(target=shrink, args=(threshold, out))
        process.start()
        rows.append(out.get(timeout=600))
        process.join()
    return rows


def train(name: str, rank: int, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    frontier.RANK = rank
    run = frontier._run(name, STEPS, settings, "compare", seed)
    said: list[dict[str, Any]] = []

    def after(trainer: Any, job: Any) -> dict[str, Any]:
        said.extend(shrunk(trainer) if rank == RANKS[0] and name != "adamw" else ())
        return {}

    row = frontier.train(run, report=after)
    whole = {"threshold": None, "parameters": row["parameters"], "loss": row["loss"]}
    return {"method": name, "rank": rank, "seed": seed, "settings": settings, "after": [whole, *said]}


def read_rows(best: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with the currently best settings."""
    return [row for row in frontier.rows_of(ROWS) if row["settings"] == best[row["method"]]]


def main() -> None:
    os.chdir(FOLDER)
    from pipelines.stage import quiet_libraries

    quiet_libraries()
    rows = frontier.read_rows()
    tuned = {name: frontier.ranked(name, STEPS, rows) for name in METHODS}
    if untuned := [name for name, ranking in tuned.items() if not ranking]:
        raise SystemExit(f"not tuned at {STEPS} steps: {', '.join(untuned)}; run python -m benchmarks.frontier first")
    best = {name: ranking[0][1] for name, ranking in tuned.items()}
    done = {(row["method"], row["rank"], row["seed"]) for row in read_rows(best)}
    for seed in frontier.SEEDS:
        for name in METHODS:
            for rank in RANKS:
                if (name, rank, seed) not in done:
                    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
                        row = pool.submit(train, name, rank, seed, best[name]).result()
                    frontier.append(row, ROWS)
    report(read_rows(best))


def report(rows: list[dict[str, Any]]) -> None:
    at: dict[tuple[str, int, float | None], dict[int, dict[str, Any]]] = {}
    for row in rows:
        for one in row["after"]:
            at.setdefault((row["method"], row["rank"], one["threshold"]), {})[row["seed"]] = one
    lines = []
    for (name, rank, threshold), by_seed in at.items():
        full = at[name, RANKS[0], None]
        seeds = sorted(by_seed.keys() & full.keys())
        parameters = statistics.fmean(by_seed[s]["parameters"] for s in seeds)
        line: dict[str, Any] = {"method": name, "rank": rank, "threshold": threshold, "parameters": parameters}
        line["share"] = parameters / statistics.fmean(full[s]["parameters"] for s in seeds)
        line["loss"] = interval([by_seed[s]["loss"] for s in seeds])
        line["to_full"] = interval([by_seed[s]["loss"] - full[s]["loss"] for s in seeds])
        lines.append(line)
    columns: dict[str, Callable[[Any], object]] = {
        "method": lambda line: line["method"],
        "rank": lambda line: line["rank"],
        "τ": lambda line: line["threshold"] or "",
        "parameters": lambda line: f"{line['parameters']:.0f}",
        "share": lambda line: f"{line['share']:.2f}",
        "loss": lambda line: interval_text(line["loss"], 4),
        "− full rank's": lambda line: interval_text(line["to_full"], 4),
    }
    lines.sort(key=lambda line: (line["method"], -line["parameters"]))
    show(f"{STEPS} steps, split test", columns, lines, width=140)
    write("rank", "Parameters that can be spared", seeds=sorted({row["seed"] for row in rows}), table=lines, rows=rows)


if __name__ == "__main__":
    command(main)
