"""Stage harness: measured/lm-eval/<task>/<arm>/<seed>/, a benchmark of lm-evaluation-harness, item by item.

The model answers through transformers in the precision of section train (4 bit if that is), with its adapter unmerged.
"""

import json
from importlib import metadata
from pathlib import Path
from typing import Annotated, Self

import typer
from pydantic import model_validator

from db.files import finish_run, hash_inputs, staged, start_run, write_record, write_records
from db.records import HarnessRecord, SampleRecord
from evaluation.measure import lm_harness
from pipelines.base_model import load_model
from pipelines.params import THEIRS, Evaluate, StageParams, check_arm, load_params
from pipelines.stage import BASE, BASE_ARM, adapter_dir, benchmark_dir, cli, main_for
from trainers.settings import TrainSettings

TASK_FILES = THEIRS / "harness"
"""The user's own task files, and the Python and data files that they name."""
RECORD = "harness.json"


class Params(StageParams):
    evaluate: Evaluate
    train: TrainSettings

    @model_validator(mode="after")
    def _benchmarks_exist(self) -> Self:
        if lines := lm_harness.problems(self.evaluate.harness, TASK_FILES):
            raise ValueError("\n".join(f"evaluate.harness: {line}" for line in lines))
        return self


def user_files(task: str) -> list[Path]:
    """The files in TASK_FILES that a task depends on."""
    return lm_harness.own_files(task, TASK_FILES)


def run(params: Params, arm: str, seed: int, task: str) -> None:
    if arm != BASE_ARM:
        check_arm(arm, params)
    section = params.evaluate
    settings = {"harness": task, "harness_limit": section.harness_limit, "parallel": section.parallel}
    used = {"evaluate": settings, "train": params.train.model_dump(include={"quantize_base", "precision"})}
    inputs = hash_inputs(BASE, *([] if arm == BASE_ARM else [adapter_dir(arm, seed)]), *user_files(task))
    with staged(benchmark_dir(task, arm, seed)) as folder:
        record = start_run("harness", params=used, inputs=inputs, arm=arm, seed=seed)
        model, tokenizer, _ = load_model(params.train, arm, seed)
        results, samples = lm_harness.ask(
            model, tokenizer, task, TASK_FILES, limit=section.harness_limit, batch_size=section.parallel
        )
        content = {"schema": 1, "arm": arm, "seed": seed, "benchmark": task, "lm_eval": metadata.version("lm-eval")}
        write_records(folder / "samples.jsonl", [SampleRecord.of(row) for row in samples])
        write_record(folder / RECORD, HarnessRecord.of(content | results))
        finish_run(record, folder)
    print(json.dumps({f"{m['split']} {m['name']}": m["value"] and round(m["value"], 4) for m in results["metrics"]}))


def main(
    arm: Annotated[str, typer.Argument(help="base, baseline_lora, …")],
    seed: Annotated[int, typer.Argument(help="of the training run; 0 for base")],
    task: Annotated[str, typer.Argument(help="arc_easy, …, or a task in theirs/harness/")],
) -> None:
    """Ask an arm a benchmark of lm-evaluation-harness."""
    main_for("harness", lambda: run(load_params(Params), arm, seed, task), arm, seed)


if __name__ == "__main__":
    cli(main)
