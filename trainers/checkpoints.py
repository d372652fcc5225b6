"""Checkpoints that survive a kill at any moment."""

import json
import shutil
from pathlib import Path

# The Trainer writes this file last; a folder without it was cut short.
_LAST_FILE = "trainer_state.json"


def _step(folder: Path) -> int:
    tail = folder.name.rsplit("-", 1)[-1]
    return int(tail) if tail.isdigit() else -1


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
