"""Checkpoints that survive a kill at any moment."""

import json
import shutil
from pathlib import Path

# The Trainer writes this file last; a folder without it was cut short.
_LAST_FILE = "trainer_state.json"


def _step(folder: Path) -> int:
    tail = folder.name.rsplit("-", 1)[-1]
    return int(tail) if tail.isdigit() else -1


def _is_of_the_end(checkpoint: Path) -> bool:
    state = json.loads((checkpoint / _LAST_FILE).read_text(encoding="utf-8"))
    control = (state.get("stateful_callbacks") or {}).get("TrainerControl") or {}
    return bool(state["global_step"] >= state["max_steps"] or control.get("args", {}).get("should_training_stop"))


def to_resume(folder: Path) -> Path | None:
    """The newest whole checkpoint that training can go on from; broken ones, and that of the end, are removed.

    From the checkpoint of the last step, or of an early stop, the Trainer would train on for a step (transformers
    5.17, unless an epoch ends there). So the way from the one before to the end is gone a second time.

    Args:
        folder: Holds checkpoint-<step> folders of a Trainer; need not exist.
    """
    while (checkpoint := latest_complete(folder)) is not None and _is_of_the_end(checkpoint):
        shutil.rmtree(checkpoint)
    return checkpoint


def latest_complete(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole; broken ones are removed.

    Args:
        folder: Holds checkpoint-<step> folders; need not exist.
    """
    best: Path | None = None
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step):
        try:
            state = json.loads((checkpoint / _LAST_FILE).read_text(encoding="utf-8"))
            complete = state["global_step"] == _step(checkpoint)
        except (OSError, ValueError, KeyError):
            complete = False
        if complete:
            best = checkpoint
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)
    return best
