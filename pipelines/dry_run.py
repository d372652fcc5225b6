"""Whether a run fits this machine: `python -m pipelines.dry_run [--arm ARM]`, after `dvc repro base_texts`.

Every arm takes two real optimizer steps on the longest training items: the first allocates the optimizer's state, the
second is timed. The probe is attached, and the longest validation items are evaluated. The tries of stage tune are not
counted. Exit code 0: it fits, 1: it does not, 2: it could not be tried.
"""

import re
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

from pipelines.check import Params, load_params
from pipelines.stage import clear_errors, cli, quiet_libraries, sees_pictures, set_threads
from pipelines.train import job_of, load_arm

STEPS = 2
COPIES = 3
"""Copies of an adapter in a checkpoint (weights and Adam's two moments), and checkpoints that exist at once."""


def try_arm(params: Params, name: str) -> dict[str, Any]:
    """Two steps of one arm in this process: memory in bytes, seconds, tokens, parameters, steps of a whole run."""
    import torch
    from transformers import TrainerCallback

    from probes import ProbeCallback
    from trainers.run import build, peak_memory_bytes

    arm, settings = load_arm(name, params), params.train_for(name)
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    def longest(data: Any, count: int) -> Any:
        order = sorted(range(len(data)), key=lambda i: -len(data[i]["input_ids"]))[:count]
        return data.select(order) if hasattr(data, "select") else torch.utils.data.Subset(data, order)

    with TemporaryDirectory() as folder:
        job = job_of(params, settings, params.first_seed, Path(folder), Path(folder))
        trainer, _, valid = build(arm, job, max_steps=STEPS, save_strategy="no", eval_strategy="no")
        rows = trainer.train_dataset
        trainer.train_dataset = longest(rows, STEPS * settings.batch_size * settings.gradient_accumulation)
        trainer.add_callback(Clock())
        trainer.add_callback(ProbeCallback(every=STEPS))  # needs memory from step 1 on, takes no sample in step 2
        trainer.train()
        trainer.evaluate(longest(valid.dataset, settings.batch_size))
    cuda = torch.cuda.is_available()
    return {
        "arm": name,
        "device": torch.cuda.get_device_name(0) if cuda else "CPU",
        "longest": len(trainer.train_dataset[0]["input_ids"]),
        "peak": torch.cuda.max_memory_reserved() if cuda else peak_memory_bytes(),
        "memory": torch.cuda.get_device_properties(0).total_memory if cuda else free,
        "seconds": ends[-1] - ends[-2],
        "steps": settings.steps_for(len(rows)),
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "base": int(trainer.model.get_base_model().num_parameters()),
    }


def disk_bytes(params: Params, row: dict[str, Any]) -> int:
    """What the runs of one arm leave, including DVC's copy, plus the checkpoints of one run."""
    adapter = 4 * row["trainable"]
    kept = adapter
    if not sees_pictures():
        bits = {"f32": 32, "f16": 16, "bf16": 16}.get(params.export.quantization)
        bits = bits or int(re.findall(r"\d", params.export.quantization)[0]) + 1
        kept += adapter // 2 + row["base"] * bits // 8
    return 2 * kept * len(params.matrix.seeds) + COPIES * COPIES * adapter


def try_in_process(name: str) -> dict[str, Any]:
    """`try_arm` in a separate process, so that the peak is this arm's, and because Unsloth patches TRL for good."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_try_arm_alone, name).result()
        except BrokenProcessPool:
            return {"arm": name, "failed": "killed, most likely out of memory"}


def _try_arm_alone(name: str) -> dict[str, Any]:
    """Errors are printed here; the exit code reaches the waiting process."""
    quiet_libraries()
    with clear_errors("dry_run", code=2), redirect_stdout(sys.stderr):
        set_threads()
        try:
            return try_arm(load_params(), name)
        except Exception as error:
            if type(error).__name__ != "OutOfMemoryError":
                raise
            return {"arm": name, "failed": "out of memory"}
    raise AssertionError("clear_errors leaves the process")


def show(params: Params, rows: list[dict[str, Any]]) -> bool:
    """Print the results; returns whether everything fits."""
    columns = "arm", "device", "longest item", "peak memory", "of", "s per step", "hours, all seeds"
    table = Table(*columns, title="Dry run")
    hours, needed, fits = 0.0, 0, True
    for row in rows:
        if "failed" in row:
            table.add_row(row["arm"], row["failed"])
            fits = False
            continue
        spent = row["seconds"] * row["steps"] * len(params.matrix.seeds) / 3600
        hours, needed, fits = hours + spent, needed + disk_bytes(params, row), fits and row["peak"] <= row["memory"]
        gigabytes = (f"{row[key] / 1e9:.2f} GB" for key in ("peak", "memory"))
        table.add_row(
            row["arm"], row["device"], f"{row['longest']} tokens", *gigabytes, f"{row['seconds']:.3f}", f"{spent:.2f}"
        )
    free = shutil.disk_usage(Path.cwd()).free
    fits = fits and needed <= free
    Console(width=100).print(table)
    print(f"training: {hours:.2f} h; disk: {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free")
    print("fits" if fits else "does not fit")
    return fits


def main(arm: Annotated[str, typer.Option(help="only this arm; empty: all of the matrix")] = "") -> None:
    """Try two optimizer steps of every arm on the longest items, and show what the whole matrix needs."""
    quiet_libraries()
    with clear_errors("dry_run", code=2):
        params = load_params()
        trained = [name for name in params.matrix.arms if params.adapter_of(name, params.first_seed) is None]
        if not show(params, [try_in_process(name) for name in ([arm] if arm else trained)]):
            raise typer.Exit(1)


if __name__ == "__main__":
    cli(main)
