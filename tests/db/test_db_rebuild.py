"""The database is derived: deleted and made again from the JSON files, it is the same row by row."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from db import open_session
from db.check import faults
from db.columns import Base
from db.ingest import ingest, rebuild
from db.models import Attempt, Environment, Run
from tests.db.result_tree import edit, make_arm
from tests.db.result_tree_layers import make_attempt, make_measured


def rows(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table as SQLite has it, ids included."""
    connection = sqlite3.connect(path)
    names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = {name: connection.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall() for name in names}
    connection.close()
    return found


def natural(path: Path) -> dict[str, list[str]]:
    """Every row that belongs to a current run, by what it means: keys in the place of ids, in no order."""
    with open_session(path) as session:
        current = session.scalars(select(Run).where(Run.is_current)).all()
        runs = {run.id: run.run_key for run in session.scalars(select(Run))}
        environments = {row.id: row.key for row in session.scalars(select(Environment))}
        mine, used = {run.id for run in current}, {run.environment_id for run in current}
        return {name: _natural(session, name, runs, environments, mine, used) for name in Base.metadata.tables}


def _natural(
    session: Session, name: str, runs: dict[int, str], environments: dict[int, str], mine: set[int], used: set[int]
) -> list[str]:
    found = []
    for row in session.execute(select(Base.metadata.tables[name])).mappings():
        values = dict(row)
        if values.get("run_id", values["id"] if name == "run" else None) not in {None, *mine}:
            continue
        if name == "environment" and values["id"] not in used:
            continue
        if name != "attempt":
            values.pop("id", None)
        for key, keys in (("run_id", runs), ("reference_run_id", runs), ("environment_id", environments)):
            if values.get(key) is not None:
                values[key] = keys[values[key]]
        found.append(json.dumps(values, sort_keys=True, default=str))
    return sorted(found)


def test_deleted_and_made_again_it_is_the_same_to_the_id(tree: Path, path: Path) -> None:
    ingest(tree, path)
    before = rows(path)
    assert set(before) == {*Base.metadata.tables, "alembic_version"} and all(before.values()), "every table has rows"
    path.unlink()
    ingest(tree, path)
    assert rows(path) == before
    rebuild(tree, path)
    assert rows(path) == before


def test_whatever_happened_before_the_files_decide(tree: Path, path: Path) -> None:
    """Evaluated again, trained again, measured again, another arm, starts that ended: then rebuilt elsewhere."""
    ingest(tree, path)
    make_arm(tree, "baseline_lora", 1, correct=[i % 2 == 0 for i in range(100)])
    ingest(tree, path)
    edit(tree / "adapters/baseline_lora/0/run.json", params={"train": {"learning_rate": 0.01, "steps": 100}})
    make_arm(tree, "pure_grit", 2, correct=[True] * 90 + [False] * 10)
    make_measured(tree, "pure_grit", 2)
    ingest(tree, path)
    make_measured(tree, "pure_grit", 2, metrics=[])
    (tree / "gguf/baseline_lora/1/parity.json").unlink()
    make_attempt(tree, "one", status="crashed", ended=None, error="gone")
    assert ingest(tree, path).updated == 2
    other = path.with_name("other.db")
    rebuild(tree, other)
    one, two = natural(path), natural(other)
    for name in Base.metadata.tables:
        assert one[name] == two[name], name
    assert all(two.values())
    with open_session(path) as old, open_session(other) as new:
        assert len(old.scalars(select(Run)).all()) == 5 and len(new.scalars(select(Run)).all()) == 4
        assert faults(old) == faults(new) == []
    rebuild(tree, path)
    assert rows(path) == rows(other)


def test_a_row_that_differs_would_be_noticed(tree: Path, path: Path) -> None:
    """The comparison of the two tests above can fail: one changed value in any table shows."""
    ingest(tree, path)
    before, by_meaning = rows(path), natural(path)
    changes = {
        "metric": "value = value + 1 WHERE value IS NOT NULL", "sample": "answer = 'x'", "speed": "tokens = 1",
        "spectrum": "step = step + 7", "layer_metric": "step = step + 7", "attempt": "pid = 1", "probe": "unit = 'x'",
        "environment": "cores = 99", "metric_def": "unit = 'x'", "artifact": "bytes = 1", "run": "seed = seed + 5",
        "quantization": "fallbacks = 3", "quantized_sample": "answer = 'x'", "verification": "prompts = 5",
    }  # fmt: skip
    assert set(changes) == set(Base.metadata.tables)
    for table, change in changes.items():
        raw = sqlite3.connect(path)
        raw.execute(f"UPDATE {table} SET {change}")
        raw.commit()
        raw.close()
        assert rows(path)[table] != before[table]
        assert natural(path)[table] != by_meaning[table]


def test_starts_without_a_run_are_made_again_too(tree: Path, path: Path) -> None:
    make_attempt(tree, "three", arm="never", seed=9, status="crashed", ended=None)
    rebuild(tree, path)
    with open_session(path) as session:
        assert {a.id for a in session.scalars(select(Attempt))} == {"one", "two", "three"}
