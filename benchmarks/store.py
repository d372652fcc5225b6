"""A million metric rows: reading the result files into the database, beside what SQLite itself needs for the rows.

Contenders, in turn, each into a fresh file that is committed and closed in the end:

- ingest: `db.ingest` from the files on: hash, JSON, validation, rows, one transaction, the log folded into the file.
- executemany: sqlite3 alone, tuples ready in memory, into a table with the same constraints and indexes.
- json + executemany: the same from the files on, with no checks: `json.loads`, tuples, sqlite3.
- SQLAlchemy: `session.execute(insert(Metric), …)` of dictionaries ready in memory.

And the same files again into a filled database, which must change nothing. The CPU's seconds are noted beside those of
the clock, since other work on the machine disturbs them less. Run as `python -m benchmarks.store`; about 3 minutes.
"""

import gc
import hashlib
import json
import random
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from benchmarks._harness import alternate, ratios, report
from db.ingest import ingest
from db.models import Metric
from db.session import open_session

ADAPTERS, ENTRIES, ROUNDS = 10, 25_000, 5
NAMES = ("loss", "grad_norm", "learning_rate", "epoch")
COLUMNS = ("run_id", "name", "split", "step", "value", "value_kind", "n")
INSERT = f"INSERT INTO metric ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"  # noqa: S608  fixed names
ARM = "baseline_lora"


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def make_tree(root: Path) -> None:
    """Write what the stages leave for `ADAPTERS` seeds of one arm, each with a training curve of `ENTRIES` entries."""
    sha = hashlib.sha256(b"items").hexdigest()
    for seed in range(ADAPTERS):
        run = {
            "schema": 1, "arm": ARM, "seed": seed, "status": "finished", "error": None,
            "started": "2026-11-21T01:00:00+00:00", "ended": "2026-11-21T02:00:00+00:00", "params": {},
            "git": {"commit": None, "dirty": None}, "packages": {}, "device": {"class": "cpu"}, "inputs": {},
            "artifacts": [],
        }  # fmt: skip
        folders = {"train": "adapters", "export": "gguf", "evaluate": "scores"}
        for stage, folder in folders.items():
            _write(root / folder / ARM / str(seed) / "run.json", {**run, "stage": stage})
        draw = random.Random(seed)
        curve = [
            {"loss": 3 * draw.random(), "grad_norm": draw.random(), "learning_rate": 1e-3 * (1 - step / ENTRIES),
             "epoch": step / 1000, "step": step}
            for step in range(1, ENTRIES + 1)
        ]  # fmt: skip
        _write(root / "adapters" / ARM / str(seed) / "loss_history.json", curve)
        scores = root / "scores" / ARM / str(seed)
        scores.joinpath("samples.jsonl").touch()
        _write(
            scores / "scores.json",
            {"schema": 1, "arm": ARM, "seed": seed, "model_name": "m", "test_items_sha256": sha, "metrics": [],
             "backend": {"name": "llama_cpp", "version": "1", "device_class": "cpu"}, "metric_defs": {}, "speed": []},
        )  # fmt: skip


class Store:
    """The contenders, and the CPU seconds of their calls."""

    def __init__(self, folder: Path) -> None:
        self.root, self.filled, self.empty = folder / "tree", folder / "filled.db", folder / "empty.db"
        self.fresh = folder / "fresh.db"
        self.cpu: dict[str, list[float]] = {}
        make_tree(self.root)
        ingest(self.root, self.filled)
        # The raw contenders' file: all tables, the runs, and no metric.
        shutil.copy(self.filled, self.empty)
        with self.connect(self.empty) as connection:
            connection.execute("DELETE FROM metric")
        connection.execute("VACUUM")
        connection.close()
        connection = sqlite3.connect(self.filled)
        self.tuples = connection.execute(f"SELECT {', '.join(COLUMNS)} FROM metric ORDER BY id").fetchall()  # noqa: S608
        self.seeds = dict(connection.execute("SELECT seed, id FROM run"))
        connection.close()
        self.dictionaries = [dict(zip(COLUMNS, row, strict=True)) for row in self.tuples]

    @staticmethod
    def connect(path: Path) -> sqlite3.Connection:
        """Open with the rules that `db` has: write-ahead log, foreign keys."""
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    def start(self, *, empty: bool) -> None:
        """Remove the last round's file; where asked, put one with empty tables in its place."""
        for suffix in ("", "-wal", "-shm"):
            self.fresh.with_name(self.fresh.name + suffix).unlink(missing_ok=True)
        if empty:
            shutil.copy(self.empty, self.fresh)

    def ingest(self) -> None:
        """Files to a new database."""
        self.start(empty=False)
        assert ingest(self.root, self.fresh).inserted == ADAPTERS  # noqa: S101

    def again(self) -> None:
        """The same files once more."""
        before = self.filled.stat().st_mtime_ns
        summary = ingest(self.root, self.filled)
        if (summary.unchanged, summary.updated, summary.inserted) != (ADAPTERS, 0, 0):
            raise RuntimeError(f"expected {ADAPTERS} unchanged runs, came: {summary}")
        if self.filled.stat().st_mtime_ns != before:
            raise RuntimeError("expected an untouched file, came another time of change")

    def raw(self) -> None:
        """Tuples, sqlite3."""
        self.start(empty=True)
        connection = self.connect(self.fresh)
        with connection:
            connection.executemany(INSERT, self.tuples)
        connection.close()

    def raw_from_files(self) -> None:
        """Files, tuples, sqlite3."""
        self.start(empty=True)
        connection = self.connect(self.fresh)
        with connection:
            for seed, run_id in self.seeds.items():
                path = self.root / "adapters" / ARM / str(seed) / "loss_history.json"
                curve = json.loads(path.read_bytes())
                connection.executemany(
                    INSERT,
                    [(run_id, name, "train", e["step"], e[name], "finite", None) for name in NAMES for e in curve],
                )
        connection.close()

    def sqlalchemy(self) -> None:
        """Dictionaries, SQLAlchemy."""
        self.start(empty=True)
        with open_session(self.fresh, write=True) as session:
            session.execute(insert(Metric), self.dictionaries)

    def timed(self, name: str, work: Callable[[], None]) -> Callable[[], None]:
        """Note the CPU seconds as well."""

        def call() -> None:
            started = time.process_time()
            work()
            self.cpu.setdefault(name, []).append(time.process_time() - started)

        return call

    def arrived(self, path: Path | None = None) -> tuple[int, str]:
        """The number of metric rows in a file, by default the fresh one, and a hash of them in the order of the key."""
        connection = sqlite3.connect(path or self.fresh)
        digest, count = hashlib.sha256(), 0
        question = f"SELECT {', '.join(COLUMNS)} FROM metric ORDER BY run_id, name, split, step"  # noqa: S608
        for row in connection.execute(question):
            digest.update(repr(row).encode())
            count += 1
        connection.close()
        return count, digest.hexdigest()


def main() -> None:
    """Measure and write the result."""
    with tempfile.TemporaryDirectory() as name:
        store = Store(Path(name))
        rows, expected = len(store.tuples), store.arrived(store.filled)
        contenders = {
            "ingest": store.ingest,
            "executemany": store.raw,
            "json + executemany": store.raw_from_files,
            "SQLAlchemy": store.sqlalchemy,
            "ingest again": store.again,
        }
        for work in (store.ingest, store.raw, store.raw_from_files, store.sqlalchemy):
            work()  # the first call of each does not count, and shows that every row arrives
            came = store.arrived()
            if came != expected:
                raise RuntimeError(f"{work.__name__}: expected {expected} (rows, hash), came {came}")
        gc.collect()
        gc.freeze()  # the rows kept in memory are no burden on the contenders that do not use them
        seconds = alternate({n: store.timed(n, work) for n, work in contenders.items()}, ROUNDS, warm_up=0)
        size = store.filled.stat().st_size
    wall, cpu = ratios(seconds, "ingest"), ratios(store.cpu, "ingest")
    report(
        "store",
        f"{rows:,} metric rows",
        seconds,
        "executemany",
        rows=rows,
        database_bytes=size,
        sqlite=sqlite3.sqlite_version,
        rows_per_second={n: rows / statistics.median(s) for n, s in seconds.items() if n != "ingest again"},
        ingest_ratio=wall["executemany"]["median"],
        ingest_ratio_spread=wall["executemany"],
        ingest_ratio_cpu=cpu["executemany"],
        ingest_ratio_equal_work=wall["json + executemany"],
        ingest_ratio_equal_work_cpu=cpu["json + executemany"],
        second_ingest_s=statistics.median(seconds["ingest again"]),
        cpu_seconds=store.cpu,
    )
    for name, found in (("by the clock", wall), ("by the CPU", cpu)):
        for other in ("executemany", "json + executemany"):
            r = found[other]
            print(f"rows/s of ingest over {other}, {name}: {r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}]")


if __name__ == "__main__":
    main()
