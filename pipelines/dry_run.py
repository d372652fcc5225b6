"""What a run needs, tried on this machine: `python -m pipelines.dry_run [--arm ARM]`, after `dvc repro base_texts`.

Every arm takes two real optimizer steps with the longest items of the training data: the first one makes the
optimizer's state, the second one is timed. What stage tune tries is not counted. The probe looks on, and the longest
validation items are evaluated. Exit code 0: it fits, 1: it does not, 2: it cannot be tried.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

from pipelines.base_model import load_reference
from pipelines.check import Params, load_params
from pipelines.prompt import prompt_text
from pipelines.stage import DATA, clear_errors, cli, quiet_libraries, sees_pictures, set_threads
from pipelines.train import base_texts, examples, load_arm, training_items

STEPS, TWINS = 2, 2
"""Optimizer steps that are tried; curves of a twin run, at most."""
COPIES = 3
"""Of an adapter in a checkpoint, its weights and Adam's two moments; and checkpoints at once."""
NO_MEMORY = 3
"""Exit code of one arm's process."""


def tried(params: Params, name: str) -> dict[str, Any]:
    """Two steps of one arm in this process: memory in bytes, seconds, tokens, parameters, steps of a whole run."""
    import torch

    from trainers.run import TrainingJob, build, peak_memory_bytes

    prompt_text(params.prompt)  # refuses a system message that prepare_base did not know
    arm, settings, template = load_arm(name, params), params.train_for(name), params.prompt.template
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    cuda = torch.cuda.is_available()
    with TemporaryDirectory() as folder:
        job = TrainingJob(
            base=load_reference()[0],
            settings=settings,
            seed=params.first_seed,
            train=training_items(settings, template, params.first_seed),
            valid=examples("valid", template),
            output=Path(folder),
            checkpoints=Path(folder),
            texts=base_texts(),
            images=DATA,
        )
        trainer, _, valid = build(arm, job, max_steps=STEPS, save_strategy="no", eval_strategy="no")
        from transformers import TrainerCallback

        from probes import ProbeCallback

        def longest(data: Any, count: int) -> Any:
            order = sorted(range(len(data)), key=lambda i: -len(data[i]["input_ids"]))[:count]
            return data.select(order) if hasattr(data, "select") else torch.utils.data.Subset(data, order)

        rows = trainer.train_dataset
        trainer.train_dataset = longest(rows, STEPS * settings.batch_size * settings.gradient_accumulation)
        ends: list[float] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append(time.perf_counter())

        trainer.add_callback(Clock())
        trainer.add_callback(ProbeCallback(every=STEPS))  # its memory from the first step, its sample not in the second
        trainer.train()
        trainer.evaluate(longest(valid.dataset, settings.batch_size))
    return {
        "arm": name,
        "device": torch.cuda.get_device_name(0) if cuda else "CPU",
        "longest": len(trainer.train_dataset[0]["input_ids"]),
        "peak": torch.cuda.max_memory_reserved() if cuda else peak_memory_bytes(),
        "memory": torch.cuda.get_device_properties(0).total_memory if cuda else free,
        "seconds": ends[-1] - ends[-2],
        "steps": settings.steps_for(len(rows)) + TWINS * params.probe.twin_steps,
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "base": int(trainer.model.get_base_model().num_parameters()),
    }


def disk(params: Params, row: dict[str, Any]) -> int:
    """Bytes that the runs of one arm leave, DVC's copy of them included, with checkpoints of one run beside them."""
    adapter = 4 * row["trainable"]
    kept = adapter
    if not sees_pictures():
        bits = {"f32": 32, "f16": 16, "bf16": 16}.get(params.export.quantization)
        bits = bits or int(re.findall(r"\d", params.export.quantization)[0]) + 1
        kept += adapter // 2 + row["base"] * bits // 8
    return 2 * kept * len(params.matrix.seeds) + COPIES * COPIES * adapter


def in_its_own_process(arm: str) -> dict[str, Any]:
    """`tried` in a process of its own: its peak is the arm's, and Unsloth changes TRL for a whole process."""
    command = [sys.executable, "-m", "pipelines.dry_run", "--arm", arm, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == NO_MEMORY:
        return {"arm": arm, "failed": "out of memory"}
    if done.returncode < 0:
        return {"arm": arm, "failed": f"killed by signal {-done.returncode}, most likely out of memory"}
    if done.returncode:
        raise typer.Exit(2)  # its own words are on the screen
    return dict(json.loads(done.stdout.splitlines()[-1]))


def show(params: Params, rows: list[dict[str, Any]]) -> bool:
    """Print what was found; whether everything fits."""
    table = Table(
        "arm", "device", "longest item", "peak memory", "of", "s a step", "hours of all seeds", title="Dry run"
    )
    hours, needed, fits = 0.0, 0, True
    for row in rows:
        if "failed" in row:
            table.add_row(row["arm"], row["failed"])
            fits = False
            continue
        spent = row["seconds"] * row["steps"] * len(params.matrix.seeds) / 3600
        hours, needed, fits = hours + spent, needed + disk(params, row), fits and row["peak"] <= row["memory"]
        gigabytes = (f"{row[key] / 1e9:.2f} GB" for key in ("peak", "memory"))
        table.add_row(
            row["arm"], row["device"], f"{row['longest']} tokens", *gigabytes, f"{row['seconds']:.3f}", f"{spent:.2f}"
        )
    free = shutil.disk_usage(Path.cwd()).free
    fits = fits and needed <= free
    Console(width=100).print(table)
    print(f"training and twins: {hours:.2f} h; disk: {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free")
    print("fits" if fits else "does not fit")
    return fits


def main(
    arm: Annotated[str, typer.Option(help="only this arm; empty: all of the matrix")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="of one arm: its numbers")] = False,
) -> None:
    """Try two optimizer steps of every arm with the longest items, and say what the whole matrix needs."""
    quiet_libraries()
    with clear_errors("dry_run", code=2):
        params = load_params()
        set_threads(alone=False)
        if as_json:
            try:
                print(json.dumps(tried(params, arm)))
            except Exception as error:
                if type(error).__name__ != "OutOfMemoryError":
                    raise
                raise typer.Exit(NO_MEMORY) from error
        else:
            trained = [name for name in params.matrix.arms if params.adapter_of(name, params.first_seed) is None]
            if not show(params, [in_its_own_process(name) for name in ([arm] if arm else trained)]):
                raise typer.Exit(1)


if __name__ == "__main__":
    cli(main)
