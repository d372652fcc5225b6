"""Whether result files changed between two looks: names, sizes and times, which costs less than reading them again."""

from __future__ import annotations

import os
import time
from pathlib import Path

FOLDERS = ("scores", "gguf", "adapters", "verdicts", "quantized", "verified", "measured", "attempts", "models/base")
"""All that ingest reads from."""

_SUFFIXES = (".json", ".jsonl")
# The clock of file systems ticks every few milliseconds: a file may change twice and keep its time.
_TICK_NS = 50_000_000

Look = dict[str, tuple[int, ...]]


def look_at(root: Path) -> Look | None:
    """Return path to identity, size and times of each result file under a folder.

    Returns:
        None when a file was written a moment ago, so that a later change of it might not show.
    """
    found: Look = {}
    now = time.time_ns()
    for folder in FOLDERS:
        # What cannot be listed is named by who reads it.
        for place, folders, names in os.walk(root / folder, followlinks=True):
            if folder == "models/base":
                folders.clear()
            for name in names:
                if name.endswith(_SUFFIXES):
                    path = Path(place, name)
                    try:
                        status = path.stat()
                    except OSError:
                        found[str(path)] = ()
                        continue
                    if abs(now - status.st_mtime_ns) < _TICK_NS:
                        return None
                    found[str(path)] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return found


def unchanged(root: Path, before: Look | None) -> bool:
    """Whether everything still is as it was at an earlier look."""
    return before is not None and look_at(root) == before
