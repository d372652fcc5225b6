"""Models that a check registers on a server for its own time, and those that a killed check left there.

The name holds the machine and the process, so that a later check can tell whose it is and whether that one still runs.
"""

import hashlib
import os
import re
import socket
import uuid

import psutil

from export.ollama_client import list_models, remove

_NAME = re.compile(r"grit-verify-([0-9a-f]{8})-([0-9]+)-[0-9a-f]{12}(:latest)?")


def temporary_name() -> str:
    """A new name of this process."""
    return f"grit-verify-{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"


def remove_abandoned(host: str | None) -> list[str]:
    """Deletes what checks of this machine registered whose process is gone; those of other machines stay.

    Returns:
        Their names.

    Raises:
        OllamaUnavailable, OllamaError: the server cannot be asked.
    """
    matches = [found for name in list_models(host) if (found := _NAME.fullmatch(name))]
    left = [found[0] for found in matches if found[1] == _machine() and not _runs(int(found[2]))]
    return [name for name in left if remove(host, name)]


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _runs(pid: int) -> bool:
    """Whether a process runs; one that is dead and that nobody has reaped does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
