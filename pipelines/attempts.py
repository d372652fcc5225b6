"""One small file for every start of a stage, so that a start which ended without a word is known of afterwards.

While a stage runs it holds a lock beside its file. The system lets go of the lock when the process ends, however it
ends; so a file that says `running` and has no lock held is that of a process which was killed.
"""

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipelines.runinfo import git_state, now

ATTEMPTS = Path("attempts")
_LONGEST_ERROR = 2000


@contextmanager
def recorded(stage: str, arm: str | None = None, seed: int | None = None) -> Iterator[None]:
    """Write down that a stage starts and how it ends; mark earlier starts that were killed.

    A folder that cannot be written stops nothing: the stage runs unrecorded, and says so.

    Args:
        stage: Its name.
        arm: What it is about.
        seed: Of the training run.
    """
    attempt = None
    with ExitStack() as stack:
        try:
            mark_crashed()
            attempt = _begin(stage, arm, seed)
            stack.enter_context(_lock(attempt["id"]))
            _write(attempt)
        except OSError as error:
            print(f"{stage}: this start is not recorded in {ATTEMPTS}/: {error}", file=sys.stderr)
            attempt = None
        try:
            yield
        except BaseException as error:
            words = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
            _end(attempt, "failed", words[:_LONGEST_ERROR])
            raise
        _end(attempt, "finished", None)


def mark_crashed() -> list[str]:
    """Turn `running` into `crashed` where nobody runs any more.

    Returns:
        The ids that were marked.

    Raises:
        OSError: the folder cannot be read or written.
    """
    marked = []
    for file in sorted(ATTEMPTS.glob("*.json")):
        attempt = _read(file)
        if attempt.get("status") != "running":
            continue
        with ExitStack() as stack:
            try:
                stack.enter_context(_lock(file.stem))
            except BlockingIOError:
                continue
            if _read(file).get("status") != "running":  # it ended between the two looks
                continue
            _write({**attempt, "status": "crashed", "error": "its process ended without a word"})
            marked.append(file.stem)
    return marked


def _begin(stage: str, arm: str | None, seed: int | None) -> dict[str, Any]:
    ATTEMPTS.mkdir(exist_ok=True)
    started = now()
    about = "-".join([stage, *([] if arm is None else [arm, str(seed)])])
    moment = "".join(sign for sign in started[:26] if sign.isdigit())
    return {
        "schema": 1,
        "id": f"{moment}-{about}-{os.getpid()}",
        "stage": stage,
        "arm": arm,
        "seed": seed,
        "status": "running",
        "error": None,
        "started": started,
        "ended": None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "git_commit": git_state()["commit"],
    }


def _end(attempt: dict[str, Any] | None, status: str, error: str | None) -> None:
    if attempt is None:
        return
    try:
        # A clock that was set back must not leave a file which ends before it starts.
        ended = max(attempt["started"], now())
        _write({**attempt, "status": status, "error": error, "ended": ended})
    except OSError as problem:
        print(f"{attempt['stage']}: its end is not recorded in {ATTEMPTS}/: {problem}", file=sys.stderr)


@contextmanager
def _lock(name: str) -> Iterator[None]:
    """Hold the lock of one attempt.

    Raises:
        BlockingIOError: another process holds it.
    """
    path = ATTEMPTS / f"{name}.lock"
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Any]:
    """What a file says; nothing where it is damaged, which ingest reports."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(attempt: dict[str, Any]) -> None:
    file = ATTEMPTS / f"{attempt['id']}.json"
    beside = file.with_suffix(f".{os.getpid()}.partial")
    try:
        beside.write_text(json.dumps(attempt, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
