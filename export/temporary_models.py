"""Models that a check registers on a server for its own time, and those that a killed check left there.

The name holds the machine, the process and the time, so that a later check can tell whose it is and whether that one
still runs.
"""

import hashlib
import os
import re
import socket
import time
import uuid
from pathlib import Path

from export.ollama_client import list_models, remove
from export.processes import runs

_NAME = re.compile(r"grit-verify-([0-9a-f]{8})-([0-9]+)-([0-9]+)-[0-9a-f]{12}(:latest)?")


def temporary_name() -> str:
    """A new name of this process."""
    return f"grit-verify-{_machine()}-{os.getpid()}-{int(time.time())}-{uuid.uuid4().hex[:12]}"


def remove_abandoned(host: str | None) -> list[str]:
    """Deletes what checks of this machine registered whose process is gone; those of other machines stay.

    Returns:
        Their names.

    Raises:
        OllamaUnavailable, OllamaError: the server cannot be asked.
    """
    matches = [found for name in list_models(host) if (found := _NAME.fullmatch(name))]
    left = [found[0] for found in matches if found[1] == _machine() and not runs(int(found[2]), int(found[3]))]
    return [name for name in left if remove(host, name)]


def _machine() -> str:
    """Tells process numbers apart: containers may share a name, but not those."""
    try:
        numbers = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux
        numbers = ""
    return hashlib.sha256(f"{socket.gethostname()} {numbers}".encode()).hexdigest()[:8]
