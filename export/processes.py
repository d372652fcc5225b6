"""Whether the process that left something behind still runs."""

import psutil


def runs(pid: int, since: float) -> bool:
    """Whether a process runs and began before a moment: a dead one that nobody has reaped does not, nor a namesake.

    Args:
        pid: Of the process.
        since: When it is known to have run, seconds since the epoch.
    """
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= since + 1
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
