"""Curves while it trains: TensorBoard's event files, Weights & Biases."""

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

from trainers.settings import TrainSettings

PROJECT = "grit-pipeline"
"""At Weights & Biases, where WANDB_PROJECT names no other."""


class ReporterError(ValueError):
    """Curves cannot be written where the settings ask for them."""


def check_reporters(settings: TrainSettings, folder: Path | None) -> None:
    """Refuse reporters that cannot report, before anything is loaded.

    Args:
        settings: Of the run.
        folder: For what they write.

    Raises:
        ReporterError: a package is missing (named, with the command that installs it), or there is no folder.
    """
    missing = [name for name in settings.report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise ReporterError(
            f"train.report_to: expected the package {' and '.join(missing)} to be installed, found none: run "
            f"`python -m pip install {' '.join(missing)}`, or take it out of report_to"
        )
    if settings.report_to and folder is None:
        raise ReporterError(f"train.report_to: expected a folder for {settings.report_to}, got none")


def report_arguments(settings: TrainSettings, name: str, folder: Path | None) -> dict[str, Any]:
    """What a TrainingArguments is told about W&B; TensorBoard's callback is made by `tensorboard`.

    Project, mode (online, offline, disabled) and folder are W&B's own environment variables, and are left as they are
    where they are set.

    Args:
        settings: Of the run.
        name: Of the run.
        folder: For what W&B writes; made here, since W&B takes another one where it does not exist.
    """
    if "wandb" not in settings.report_to or folder is None:
        return {"report_to": "none"}
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.setdefault("WANDB_DIR", str(folder))
    return {"report_to": ["wandb"], "run_name": name}


def remove_reporters(trainer: Any) -> None:
    """Let nothing of what a Trainer still does appear in any curve."""
    from transformers.integrations import TensorBoardCallback, WandbCallback

    for kind in (TensorBoardCallback, WandbCallback):
        trainer.remove_callback(kind)


def _await_next_second(folder: Path) -> None:
    """Wait while a file of this second's may be there, for a second at most.

    TensorBoard reads event files by name, and a name begins with the second of its making: of two made in the same one,
    the later might be read first, and what it hides would not be hidden.
    """
    stamps = [file.name.split(".")[3] for file in folder.glob("events.out.tfevents.*")]
    newest = max((int(stamp) for stamp in stamps if stamp.isdigit()), default=0)
    time.sleep(min(1.0, max(0.0, newest + 1 - time.time())))


def tensorboard(folder: Path, resumed_from: int | None) -> Any:
    """TensorBoard's callback: events go to `folder`, and those there that no longer count are hidden.

    They are what an earlier run left, or what came after the checkpoint that a resumed run goes on from.

    Args:
        folder: Made if it is not there.
        resumed_from: Step of the checkpoint; None = from the start.
    """
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    _await_next_second(folder)
    start = 0 if resumed_from is None else resumed_from + 1
    return TensorBoardCallback(SummaryWriter(str(folder), purge_step=start))
