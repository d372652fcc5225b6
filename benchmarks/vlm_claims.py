"""The documents' claims about GRIT-VLM, compared with what was trained: every arm against vanilla LoRA.

Documents 000 and 001 claim 38% fewer parameters, 60% faster convergence, at most 15% more memory and higher accuracy.
Each is measured per seed, the arm against the baseline of the same seed, with the 95% interval of Student's t over the
seeds (for ratios over their logarithms). Convergence is the number of steps until the arm reaches the baseline's last
validation loss, interpolated between evaluations, over the baseline's steps; memory is the peak of torch's tensors in a
separate process (`benchmarks.vlm_overhead`) and the peak of the whole process. The accuracy here is over
seeds alone; the report's is over seeds and items. Run as `python -m benchmarks.vlm_claims` after
`make repro PROFILE=vision`.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from benchmarks._harness import FOLDER, Interval, command, interval, interval_text, show, write

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


def ratio_interval(values: Sequence[float]) -> Interval:
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

    def reached(row: dict[str, Any]) -> str:
        count = sum(map(math.isfinite, row["steps_to_baseline_loss_by_seed"]))
        whole = count == len(seeds)
        return interval_text(row["steps_to_baseline_loss"], 3) if whole else f"reached by {count} of {len(seeds)}"

    columns: dict[str, Callable[[Any], object]] = {
        "arm": lambda row: row["arm"],
        "steps to vanilla's last loss": reached,
        "validation loss, difference": lambda row: interval_text(row["validation_loss_difference"], 3),
        "accuracy": lambda row: interval_text(row["accuracy"], 3),
        "accuracy, difference": lambda row: interval_text(row["accuracy_difference"], 3),
        "parameters": lambda row: f"{row['parameters_ratio']:.3f}",
        "seconds a step": lambda row: interval_text(row["step_time_ratio"], 2),
        "process memory": lambda row: interval_text(row["process_memory_ratio"], 3),
    }
    title = f"Against vanilla LoRA ({interval_text(plain, 3)}), {len(seeds)} seeds, 95% intervals"
    show(title, columns, rows, width=200)
    plainly = json.loads(
        json.dumps({"rows": rows, "vanilla_accuracy": plain, "seeds": seeds})
        .replace("Infinity", "null")
        .replace("NaN", "null")
    )
    write("vlm_claims", "The documents' claims of GRIT-VLM against vanilla LoRA", **plainly)


if __name__ == "__main__":
    command(main)
