"""How long the whole command takes to read a large database, imports included.

Two databases of 10,000 finished runs: "history" is one experiment that was repeated (10 runs are current, with 500
test items each), "matrix" one with 10 trained arms of 1,000 seeds each (all current, 20 test items each). Every run
has final metrics, parity, a probe's verdict, five retention items and decoding timed twice beside the base. Run as
`python -m benchmarks.compare_all`.
"""

import os
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._harness import write
from db.session import open_session

ROUNDS, RUNS, LIMIT_S = 5, 10_000, 2.0
HISTORY_CURRENT, HISTORY_ITEMS, MATRIX_ARMS, MATRIX_ITEMS = 10, 500, 10, 20
REPETITIONS, RETENTION_ITEMS = 2, 5
BASE_ID = 1
KEY = "0" * 64
Rows = dict[str, list[dict[str, Any]]]


def run_rows(run_id: int, arm: str, seed: int, *, current: bool, items: int, draw: random.Random) -> Rows:
    """All rows of one run, table by table; the parameters are as long as those of a real run."""
    base = run_id == BASE_ID
    params = {"train": {f"parameter_{k}": draw.random() for k in range(60)}}
    values = [
        ("aqi_category_accuracy", "test", draw.random()),
        ("aqi_mae", "test", 20 * draw.random()),
        ("retention_accuracy", "retention", draw.random()),
        ("greedy_equal", "parity", 1.0),
        ("perplexity", "general", 5 * draw.random()),
    ]
    run = {
        "id": run_id, "run_key": f"{run_id:064x}", "source_sha256": KEY, "arm": arm, "seed": seed,
        "model_name": f"{arm}_model", "status": "finished", "is_current": current, "started": "2026-11-21 03:00:00",
        "ended": "2026-11-21 03:30:00", "stages": "{}", "params": str(params).replace("'", '"'), "inputs": "{}",
        "git_commit": "abc", "git_dirty": False, "backend_name": "llama_cpp", "backend_version": "0.3.36",
        "serving_mode": "merged", "device_class": "cpu", "environment_id": 1, "test_items_sha256": KEY,
        "reference_run_id": None if base else BASE_ID,
    }  # fmt: skip
    chance = 0.4 if base else 0.7
    sample = {"run_id": run_id, "task": "aqi", "truth": "50", "answer": "The air quality index is 50."}
    splits = [("test", items), ("retention", RETENTION_ITEMS)]
    return {
        "run": [run],
        "metric": [
            {"run_id": run_id, "name": name, "split": split, "step": -1, "value": value, "value_kind": "finite"}
            for name, split, value in values
        ],
        "probe": []
        if base
        else [
            {"run_id": run_id, "name": name, "layer": "", "step": -1, "value": 1.0, "value_kind": "finite",
             "unit": "", "verdict": "pass", "diagnosis": "effective: none: because"}
            for name in ("verdict", "angle_to_shadow")
        ],
        "speed": [
            {"run_id": run_id, "arm": who, "phase": "decode", "repetition": r, "tokens": 600,
             "nanoseconds": draw.randrange(4_000_000_000, 6_000_000_000)}
            for who in dict.fromkeys((arm, "base")) for r in range(REPETITIONS)
        ],
        "sample": [
            {**sample, "split": split, "item_id": f"{split}-{k:04d}", "prompt": f"Predict the index of item {k}",
             "correct": (right := draw.random() < chance), "credit": float(right)}
            for split, count in splits if count and items for k in range(count)
        ],
    }  # fmt: skip


def history(draw: random.Random) -> Iterator[Rows]:
    """The base, two arms, of which a few runs are current and have their items."""
    for run_id in range(1, RUNS + 1):
        current = run_id <= HISTORY_CURRENT
        arm = "base" if run_id == BASE_ID else ("baseline_lora", "pure_grit")[run_id % 2]
        items = HISTORY_ITEMS if current else 0
        yield run_rows(run_id, arm, 0 if run_id == BASE_ID else run_id // 2, current=current, items=items, draw=draw)


def matrix(draw: random.Random) -> Iterator[Rows]:
    """The base, and all seeds of all arms, each current."""
    yield run_rows(BASE_ID, "base", 0, current=True, items=MATRIX_ITEMS, draw=draw)
    names = ["baseline_lora", *(f"arm_{k}" for k in range(1, MATRIX_ARMS))]
    for number in range(RUNS):
        arm, seed = names[number % MATRIX_ARMS], number // MATRIX_ARMS
        yield run_rows(BASE_ID + 1 + number, arm, seed, current=True, items=MATRIX_ITEMS, draw=draw)


def build(path: Path, runs: Iterator[Rows]) -> dict[str, int]:
    """Write a database, and return the number of rows of each table."""
    with open_session(path, write=True):
        pass
    connection = sqlite3.connect(path)
    connection.execute(
        "INSERT INTO environment (id, key, device_class, packages) VALUES (1, ?, 'cpu', '{\"torch\": \"2.13.0\"}')",
        (KEY,),
    )
    counts: dict[str, int] = {}
    for rows in runs:
        for table, records in rows.items():
            counts[table] = counts.get(table, 0) + len(records)
            if records:
                names = list(records[0])
                marks = ", ".join(f":{name}" for name in names)
                connection.executemany(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})", records)  # noqa: S608  our own names
    connection.commit()
    connection.close()
    return counts


def timed(path: Path) -> tuple[float, float, int]:
    """Seconds of the whole command, its processor seconds, and the number of bytes it printed."""
    command = [sys.executable, "-m", "evaluation.compare_all", "--db", str(path), "--format", "json"]
    before, started = os.times(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    taken, after = time.perf_counter() - started, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return taken, used, len(done.stdout)


def main() -> None:
    """Build both databases, time the command on each in turn, write the results."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {"history": Path(folder) / "history.db", "matrix": Path(folder) / "matrix.db"}
        rows = {
            "history": build(paths["history"], history(random.Random(0))),
            "matrix": build(paths["matrix"], matrix(random.Random(0))),
        }
        seconds: dict[str, list[float]] = {name: [] for name in paths}
        used: dict[str, list[float]] = {name: [] for name in paths}
        printed: dict[str, int] = {}
        for number in range(-1, ROUNDS):  # the first round warms the file cache
            for name, path in paths.items():
                taken, worked, printed[name] = timed(path)
                if number >= 0:
                    seconds[name].append(taken)
                    used[name].append(worked)
        sizes = {name: path.stat().st_size for name, path in paths.items()}
    for name, values in seconds.items():
        print(
            f"{name}: median {statistics.median(values):.2f} s, slowest {max(values):.2f} s, "
            f"of the processor {statistics.median(used[name]):.2f} s; rows {rows[name]}"
        )
    slowest = max(max(values) for values in seconds.values())
    write(
        "compare_all",
        f"python -m evaluation.compare_all --format json on {RUNS} runs, imports included",
        seconds=seconds,
        processor_seconds=used,
        rows=rows,
        database_bytes=sizes,
        printed_bytes=printed,
        slowest_s=slowest,
        limit_s=LIMIT_S,
        load_average=os.getloadavg()[0],
    )


if __name__ == "__main__":
    main()
