"""What the documents claim of GRIT-VLM, held against what was trained: every arm against vanilla LoRA.

Documents 000 and 001 say: 38% fewer parameters, 60% faster convergence, at most 15% more memory, higher accuracy. Each
is measured per seed, the arm against the baseline of the same seed, and given with the 95% interval of Student's t over
the seeds (of ratios, over their logarithms). Convergence is the steps until the arm's validation loss is the baseline's
last one, interpolated between evaluations, over the baseline's steps; memory is what torch's tensors held at most in a
process of its own, by `benchmarks.vlm_memory`, and beside it the whole process's peak. The accuracy here is over
seeds alone; the report's is over seeds and items. Run as `python -m benchmarks.vlm_claims` after
`make repro PROFILE=vision`.
"""

import json
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy import stats

from benchmarks._harness import RESULTS, command, write

FOLDER = Path(__file__).resolve().parents[1]
BASELINE = "baseline_lora"


def read(arm: str, seed: int) -> dict[str, Any]:
    """What the stages have left of one run: validation losses by step, accuracy, parameters, seconds a step, memory.

    Raises:
        FileNotFoundError: it has not been trained or scored.
    """
    folder = FOLDER / "adapters" / arm / str(seed)
    history = json.loads((folder / "loss_history.json").read_text(encoding="utf-8"))
    extra = json.loads((folder / "run.json").read_text(encoding="utf-8"))["extra"]
    scores = json.loads((FOLDER / "scores" / arm / str(seed) / "scores.json").read_text(encoding="utf-8"))
    primary = scores["task"]["primary"]
    return {
        "losses": [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry],
        "accuracy": next(m["value"] for m in scores["metrics"] if (m["name"], m["split"]) == (primary, "test")),
        "parameters": extra["trainable_parameters"],
        "seconds_per_step": extra["train_seconds"] / extra["steps"],
        "peak_memory_bytes": extra["peak_memory_bytes"],
    }


def steps_until(losses: Sequence[tuple[int, float]], target: float) -> float:
    """Steps until the loss is `target` for the first time, linear between two evaluations; infinity: never."""
    if losses[0][1] <= target:
        return float(losses[0][0])
    for (step, loss), (next_step, next_loss) in pairwise(losses):
        if next_loss <= target:
            return step + (next_step - step) * (loss - target) / (loss - next_loss)
    return math.inf


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95% interval of Student's t over the seeds; NaN where one cannot be computed."""
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    if n < 2 or not all(math.isfinite(v) for v in values):
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.975, n - 1)) * float(stats.sem(values))
    return mean, mean - half, mean + half


def ratio_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of ratios, with the interval of their logarithms."""
    if any(not math.isfinite(v) for v in values):
        return math.nan, math.nan, math.nan
    mean, low, high = (math.exp(v) for v in interval([math.log(v) for v in values]))
    return mean, low, high


def claims(arm: str, seeds: Sequence[int]) -> dict[str, Any]:
    """One arm against the baseline, seed by seed."""
    pairs = [(read(arm, seed), read(BASELINE, seed)) for seed in seeds]
    convergence = [steps_until(own["losses"], plain["losses"][-1][1]) / plain["losses"][-1][0] for own, plain in pairs]
    return {
        "arm": arm,
        "steps_to_baseline_loss": ratio_interval(convergence),
        "steps_to_baseline_loss_by_seed": convergence,
        "validation_loss_difference": interval([own["losses"][-1][1] - plain["losses"][-1][1] for own, plain in pairs]),
        "accuracy": interval([own["accuracy"] for own, _ in pairs]),
        "accuracy_difference": interval([own["accuracy"] - plain["accuracy"] for own, plain in pairs]),
        "parameters_ratio": pairs[0][0]["parameters"] / pairs[0][1]["parameters"],
        "step_time_ratio": ratio_interval(
            [own["seconds_per_step"] / plain["seconds_per_step"] for own, plain in pairs]
        ),
        "process_memory_ratio": ratio_interval(
            [own["peak_memory_bytes"] / plain["peak_memory_bytes"] for own, plain in pairs]
        ),
    }


def shown(values: Sequence[float], digits: int = 3) -> str:
    """Mean and interval as text."""
    mean, low, high = values
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def main() -> None:
    """Read, compare, print and write."""
    there = {
        path.parent.name: sorted(int(p.name) for p in path.parent.iterdir()) for path in FOLDER.glob("adapters/*/0")
    }
    if BASELINE not in there:
        sys.exit(f"{FOLDER}/adapters: expected arms of profile vision, found none; run `make repro PROFILE=vision`")
    seeds = there[BASELINE]
    rows = [claims(arm, seeds) for arm in sorted(there) if arm != BASELINE and there[arm] == seeds]
    plain = interval([read(BASELINE, seed)["accuracy"] for seed in seeds])
    title = f"Against vanilla LoRA ({shown(plain)}), {len(seeds)} seeds, 95% intervals"
    columns = ("steps to vanilla's last loss", "validation loss, difference", "accuracy", "accuracy, difference")
    table = Table("arm", *columns, "parameters", "seconds a step", "process memory", title=title)
    for row in rows:
        reached = sum(math.isfinite(v) for v in row["steps_to_baseline_loss_by_seed"])
        table.add_row(
            row["arm"],
            shown(row["steps_to_baseline_loss"]) if reached == len(seeds) else f"reached by {reached} of {len(seeds)}",
            shown(row["validation_loss_difference"]),
            shown(row["accuracy"]),
            shown(row["accuracy_difference"]),
            f"{row['parameters_ratio']:.3f}",
            shown(row["step_time_ratio"], 2),
            shown(row["process_memory_ratio"]),
        )
    Console(width=200).print(table)
    measured = RESULTS / "vlm_memory.json"
    memory = json.loads(measured.read_text(encoding="utf-8"))["rows"] if measured.is_file() else []
    for row in memory:
        print(f"memory at SmolVLM-256M's widths, {row['configuration']}, {row['estimate']}: {row['memory_ratio']:.3f}")
    plainly = json.loads(
        json.dumps({"rows": rows, "vanilla_accuracy": plain, "seeds": seeds})
        .replace("Infinity", "null")
        .replace("NaN", "null")
    )
    write("vlm_claims", "The documents' claims of GRIT-VLM against vanilla LoRA", **plainly)


if __name__ == "__main__":
    command(main)
