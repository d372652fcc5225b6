"""Stage tune: tuned/<arm>/tuned.json, the settings that an arm is trained with.

Every arm has the same budget: one run per combination of the grid, on a seed that is not in the matrix. The lowest
evaluation loss wins. Finished runs are kept under a hash of everything that decides them, so a killed stage resumes.
"""

import gc
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from db.files import exclusive, key_of, read_json, staged, write_json
from pipelines.code import code_hash
from pipelines.params import ConfigError, load_params
from pipelines.stage import cli, main_for
from pipelines.train import TUNED, Params, job_of, key_of_run, load_arm
from trainers.run import run as train

KEPT = Path("checkpoints/tune")
_PLUGINS = ("trainers.arms", "evaluation.tasks")


def result_of(params: Params, arm: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """One run: its settings, evaluation loss in nats per token (null if not finite), and seconds."""
    section, settings = params.tune, params.train_for(arm, values)
    if section.steps is not None:
        settings = settings.model_copy(update={"max_steps": section.steps, "epochs": None})
    if not settings.keeps_best:
        settings = settings.model_copy(update={"eval_steps": 10**9})  # only the final loss counts
    used = {"train": settings.model_dump(), "prompt": params.prompt.model_dump()}
    # Unlike a checkpoint it stays, so all code that decides it counts.
    code = code_hash("pipelines.train", f"trainers.arms.{params.code_of(arm)}", plugins=dict.fromkeys(_PLUGINS, ()))
    kept = KEPT / arm / f"{key_of([key_of_run(params, arm, section.seed, used), code])[:16]}.json"
    checkpoints = kept.with_suffix("")
    with exclusive(kept.with_suffix(".lock"), f"tune {arm}"):
        if not kept.is_file():
            with TemporaryDirectory() as folder:
                summary = train(
                    load_arm(arm, params), job_of(params, settings, section.seed, Path(folder), checkpoints)
                )
            loss = summary["final_eval_loss"]
            result = {"evaluation_loss": loss if math.isfinite(loss) else None, "seconds": summary["train_seconds"]}
            write_json(kept, {"settings": dict(values), **result})
            shutil.rmtree(checkpoints, ignore_errors=True)
            gc.collect()  # reference cycles keep a Trainer alive, and two models may not fit a GPU
    return dict(read_json(kept))


def at_border(grid: Mapping[str, Sequence[Any]], chosen: Mapping[str, Any]) -> list[str]:
    """Keys whose chosen value is the smallest or largest of three or more: the best value may lie beyond."""
    numbers = {
        key: values for key, values in grid.items() if len(values) > 2 and all(type(v) in (int, float) for v in values)
    }
    return [key for key, values in numbers.items() if chosen[key] in (min(values), max(values))]


def run(params: Params, arm: str) -> None:
    """Raises ConfigError if no try of the arm ended with a finite loss."""
    section = params.tune
    tries = section.tries if params.adapter_of(arm, section.seed) is None else []  # it was trained elsewhere
    runs = []
    for number, values in enumerate(tries, start=1):
        runs.append(result_of(params, arm, values))
        settings = ", ".join(f"{key} {value}" for key, value in values.items())
        print(f"tune {arm}, {number} of {len(tries)}: {settings}: {runs[-1]['evaluation_loss']}", flush=True)
    content: dict[str, Any] = {"arm": arm, "runs": runs}
    if tries:
        finite = [one for one in runs if one["evaluation_loss"] is not None]
        if not finite:
            raise ConfigError(f"tune.grid: no try of {arm} ended with a finite loss; lower the learning rates")
        chosen = min(finite, key=lambda one: one["evaluation_loss"])["settings"]
        content |= {**section.model_dump(), "chosen": chosen, "at_border": at_border(section.grid, chosen)}
    with staged(TUNED / arm) as folder:
        write_json(folder / "tuned.json", content)


def main(arm: Annotated[str, typer.Argument(help="baseline_lora, …")]) -> None:
    main_for(f"tune {arm}", lambda: run(load_params(Params), arm))


if __name__ == "__main__":
    cli(main)
