"""The same tuning budget for every arm of the vision pipeline: learning rates and β₁, by the validation loss.

Data and base are those that `make repro PROFILE=vision` has made; the seed is one that the pipeline does not compare.
The rates of profiles/sizes/vision.yaml come from here. Run as `python -m benchmarks.vlm_tuning`; rows of another rate,
β₁ or arm stay in the result.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks._harness import FOLDER, RESULTS, show, write

SEED = 1000
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


def train(arm_name: str, rate: float, beta1: float) -> dict[str, Any]:
    """One row of the table, the working directory being the project's."""
    from pipelines.params import load_params
    from pipelines.train import Params, job_of, load_arm
    from trainers.run import run

    params = load_params(Params)
    settings = params.train_for(arm_name)
    adam = {"learning_rate": rate, "optim_args": {"betas": [beta1, 0.999]}}
    settings = settings.model_copy(update={**adam, "eval_steps": settings.max_steps or 10**6})
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "adapter").mkdir()
        job = job_of(params, settings, SEED, folder / "adapter", folder / "checkpoints")
        result = run(load_arm(arm_name, params), replace(job, texts=[]))
    return {
        "arm": arm_name,
        "learning_rate": rate,
        "beta1": beta1,
        "validation_loss": result["final_eval_loss"],
        "seconds": result["train_seconds"],
        "trainable_parameters": result["trainable_parameters"],
    }


def main() -> None:
    """Train every arm of the matrix with every rate, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arm", action="append", help="only this arm (may be repeated)")
    parser.add_argument("--rate", action="append", type=float, help="only this rate (may be repeated)")
    parser.add_argument("--beta1", action="append", type=float, help="default: 0.9 (may be repeated)")
    args = parser.parse_args()
    os.chdir(FOLDER)
    from pipelines.params import load_params
    from pipelines.stage import quiet_libraries
    from pipelines.train import Params

    quiet_libraries()
    file = RESULTS / "vlm_tuning.json"
    there = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    rows_of = {(row["arm"], row["learning_rate"], row.get("beta1", 0.9)): row for row in there}
    for arm in args.arm or load_params(Params).matrix.arms:
        for rate in args.rate or RATES:
            for beta1 in args.beta1 or [0.9]:
                row = rows_of[arm, rate, beta1] = train(arm, rate, beta1)
                print(row, flush=True)
    rows = [{**row, "beta1": beta1} for (_, _, beta1), row in sorted(rows_of.items())]
    best = {
        arm: min((r for r in rows if r["arm"] == arm), key=lambda r: r["validation_loss"])
        for arm in {r["arm"] for r in rows}
    }
    columns: dict[str, Callable[[Any], object]] = {
        "arm": lambda row: row["arm"],
        "learning rate": lambda row: f"{row['learning_rate']:g}",
        "β₁": lambda row: f"{row['beta1']:g}",
        "validation loss": lambda row: f"{row['validation_loss']:.4f}" + " *" * (row is best[row["arm"]]),
        "s": lambda row: f"{row['seconds']:.0f}",
    }
    show(f"Learning rates and β₁, seed {SEED}", columns, rows)
    write("vlm_tuning", "Validation loss by learning rate and β₁, vision pipeline", rows=rows, seed=SEED)


if __name__ == "__main__":
    main()
