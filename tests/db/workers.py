"""Other processes that ingest or rebuild, say which phase they are in, and may be killed in it."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import db.ingest
import db.session
import db.swap

PHASES = {
    "ingest": ("started", "reading", "transaction", "commit", "checkpoint", "done"),
    "rebuild": ("started", "reading", "transaction", "swap", "checkpoint", "done"),
}
WAIT_S = 60
CONTEXT = multiprocessing.get_context("forkserver")
# Children are forked from a process that has the packages, so that they begin to work at once.
CONTEXT.set_forkserver_preload(["alembic.command", "alembic.autogenerate", "db.cli", "db.ingest"])


def before(module: Any, name: str, act: Callable[[], None]) -> None:
    """Do something whenever a function of a module is called."""
    function = getattr(module, name)

    def wrapped(*args: Any, **more: Any) -> Any:
        act()
        return function(*args, **more)

    setattr(module, name, wrapped)


def _work(action: str, root: Path, target: str | Path, reports: Connection, start: Any) -> None:
    """In the child: report phases as they begin, then the outcome in words."""
    from sqlalchemy import Engine, event

    def enter(phase: str) -> Callable[[], None]:
        return lambda: reports.send(phase)

    before(db.ingest, "read_results", enter("reading"))
    before(db.session, "take_turn", enter("transaction"))
    if action == "ingest":
        event.listen(Engine, "commit", lambda _: reports.send("commit"))
        before(db.session, "checkpoint", enter("checkpoint"))
    else:
        before(db.ingest, "replace_content", enter("swap"))
        before(db.swap, "checkpoint", enter("checkpoint"))
    reports.send("started")
    if start is not None:
        start.wait(WAIT_S)
    try:
        outcome = str(getattr(db.ingest, action)(root, target)).splitlines()[0]
    except Exception as error:  # noqa: BLE001  reported to the test
        outcome = f"{type(error).__name__}: {error}"
    reports.send("done")
    reports.send(outcome)


class Worker:
    """A process at work on a database.

    Args:
        action: `ingest` or `rebuild`.
        start: A barrier at which it waits before it begins.
    """

    def __init__(self, action: str, root: Path, target: str | Path, start: Any = None) -> None:
        self.action = action
        self.reports, far_end = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=_work, args=(action, root, target, far_end, start))
        self.process.start()
        far_end.close()
        self.began: dict[str, float] = {}
        self.outcome = ""

    def follow(self, until: str | None = None) -> None:
        """Read the reports up to the beginning of a phase, or all of them."""
        while until is None or until not in self.began:
            try:
                if not self.reports.poll(WAIT_S):
                    raise TimeoutError(f"no word from the {self.action} after {self.began}")
                word = self.reports.recv()
            except EOFError:
                return
            if word in PHASES[self.action]:
                self.began.setdefault(word, time.perf_counter())
            else:
                self.outcome = word

    def end(self) -> str:
        """Wait for the process and return what came of it."""
        self.follow()
        self.process.join(WAIT_S)
        return self.outcome

    def kill(self, phase: str, delay_s: float) -> str:
        """Send SIGKILL some time after a phase began; return the phase that it met, `done` when it came too late."""
        self.follow(phase)
        ends = time.perf_counter() + delay_s
        while time.perf_counter() < ends:
            pass  # sleeping is too coarse for phases of a millisecond
        pid = self.process.pid
        assert pid is not None
        with suppress(ProcessLookupError):  # it has ended already
            os.kill(pid, signal.SIGKILL)
        self.follow()
        self.process.join(WAIT_S)
        if self.process.exitcode == 0:
            return "done"
        assert self.process.exitcode == -signal.SIGKILL
        return list(self.began)[-1]

    def durations(self) -> dict[str, float]:
        """Phase → seconds, after the end."""
        names = list(self.began)
        return {a: self.began[b] - self.began[a] for a, b in pairwise(names)}


def content(path: Path) -> str:
    """The number of rows of each table, and a hash of all of them with their rowids."""
    connection = sqlite3.connect(path, isolation_level=None)
    digest, counts = hashlib.sha256(), []
    try:
        connection.execute("BEGIN")  # all tables as they are at one moment
        master = connection.execute("SELECT type, name FROM sqlite_master ORDER BY type, name").fetchall()
        digest.update(repr(master).encode())
        for name in [name for kind, name in master if kind == "table" and not name.startswith("sqlite_")]:
            rows = connection.execute(f"SELECT rowid, * FROM {name} ORDER BY rowid").fetchall()
            digest.update(repr(rows).encode())
            counts.append(f"{name} {len(rows)}")
    finally:
        connection.close()
    return f"{', '.join(counts)}: {digest.hexdigest()}"
