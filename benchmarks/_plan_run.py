"""One training run of the benchmark of the plan, in a process of its own: its peak resident size, or its tensors'."""

import importlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from benchmarks._harness import peak_tensor_bytes
from pipelines.planning.overhead import peak_of_this_process
from pipelines.stage import cli, quiet_libraries
from trainers import ARMS
from trainers.common import Arm, TrainingJob, run
from trainers.settings import BaseReference, TrainSettings


def main(
    code: Annotated[str, typer.Option(help="arm whose code runs")],
    given: Annotated[Path, typer.Option(help="JSON file: settings, base, train, valid")],
    out: Annotated[Path, typer.Option(help="JSON file for the peak, bytes")],
    tensors: Annotated[bool, typer.Option(help="of the tensors alone")] = False,
) -> None:
    """Train and write the peak."""
    quiet_libraries()
    content = json.loads(given.read_text(encoding="utf-8"))
    arm: Arm = importlib.import_module(ARMS[code]).ARM
    with TemporaryDirectory() as name:
        output = Path(name) / "out"
        output.mkdir()
        job = TrainingJob(
            base=BaseReference(location=content["base"]),
            settings=TrainSettings(**content["settings"]),
            seed=0,
            train=[tuple(pair) for pair in content["train"]],
            valid=[tuple(pair) for pair in content["valid"]],
            output=output,
            checkpoints=Path(name) / "checkpoints",
        )
        if tensors:
            peak = peak_tensor_bytes(lambda: run(arm, job))
        else:
            run(arm, job)
            peak = peak_of_this_process()
    out.write_text(json.dumps({"peak": peak}), encoding="utf-8")


if __name__ == "__main__":
    cli(main)
