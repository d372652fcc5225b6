"""`db.cli check`: what the tables' own rules let pass."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import select, text
from typer.testing import CliRunner

from db import open_session
from db.check import faults
from db.cli import app
from db.columns import Base
from db.ingest import ingest
from db.models import Run
from tests.db.result_tree_layers import make_full_tree


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Everything there is; runs 1 to 3 are base/0, baseline_lora/0 and baseline_lora/1."""
    ingest(make_full_tree(tmp_path / "project"), tmp_path / "c.db")
    return tmp_path / "c.db"


def test_a_full_database_is_sound(path: Path) -> None:
    with open_session(path) as session:
        assert faults(session) == []


DAMAGES = {
    "DELETE FROM sample WHERE run_id = 2 AND item_id = 'aqi-000000'": (
        "run 2 (baseline_lora/0): aqi_category_accuracy of split test rests on 100 items, sample has 99 of them"
    ),
    "DELETE FROM sample WHERE run_id = 3": "run 3 (baseline_lora/1) is finished and has no row in sample",
    "DELETE FROM metric WHERE run_id = 1": "run 1 (base/0) is finished and has no row in metric",
    "UPDATE sample SET correct = 0 WHERE run_id = 2 AND item_id = 'aqi-000000'": (
        "run 2 (baseline_lora/0): its accuracy is 0.7, but 69 of its 100 test items are correct"
    ),
    "UPDATE metric SET value = NULL, value_kind = 'nan' WHERE run_id = 2 AND name = 'aqi_category_accuracy'": (
        "run 2 (baseline_lora/0): its accuracy is None, but 70 of its 100 test items are correct"
    ),
    "UPDATE run SET reference_run_id = 3 WHERE id = 2": (
        "run 2 (baseline_lora/0) is held against run 3 (baseline_lora/1), which is no current base with the same"
    ),
    "UPDATE run SET is_current = 0 WHERE id = 1": "run 3 (baseline_lora/1) is held against run 1 (base/0), which is no",
    "UPDATE run SET backend_name = 'hf' WHERE id = 1": "is held against run 1 (base/0), which is no current",
    "UPDATE run SET test_items_sha256 = run_key WHERE id = 1": "is held against run 1 (base/0), which is no current",
    "UPDATE run SET reference_run_id = NULL WHERE id = 3": (
        "run 3 (baseline_lora/1) is held against no base, though there is one with the same items and backend"
    ),
    "DELETE FROM quantized_sample WHERE type = 'q8_0' AND item_id = 'aqi-000000'": (
        "run 2 (baseline_lora/0): q8_0 has 70 of 100 items correct, quantized_sample 69 of 99"
    ),
    "DELETE FROM quantized_sample WHERE type = 'f16'": (
        "run 2 (baseline_lora/0): f16 has 70 of 100 items correct, quantized_sample 0 of 0"
    ),
    "DROP VIEW v_attempts": "the view v_attempts is missing",
    "DELETE FROM environment": "points to a missing environment",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_and_mended(path: Path, damage: str) -> None:
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA foreign_keys=OFF")
    raw.execute(damage)
    raw.commit()
    raw.close()
    checked = CliRunner().invoke(app, ["check", "--db", str(path)])
    assert checked.exit_code == 1 and DAMAGES[damage] in checked.output and "rebuild" in checked.output
    root = path.parent / "project"
    assert CliRunner().invoke(app, ["rebuild", "--db", str(path), "--root", str(root)]).exit_code == 0
    with open_session(path) as session:
        assert faults(session) == [], "what the check advises helps"


@pytest.mark.parametrize("table", [t.name for t in Base.metadata.sorted_tables if "run_id" in t.columns])
def test_one_lost_row_of_any_table_is_found(path: Path, table: str) -> None:
    raw = sqlite3.connect(path)
    (number,) = raw.execute(f"SELECT count(*) FROM {table} WHERE run_id = 2").fetchone()
    raw.execute(f"DELETE FROM {table} WHERE id = (SELECT min(id) FROM {table} WHERE run_id = 2)")
    raw.commit()
    raw.close()
    with open_session(path) as session:
        found = faults(session)
    assert number > 0
    assert f"run 2 (baseline_lora/0) was written with {number} rows in {table}, has {number - 1}" in found
    assert not any("run 1 " in fault or "run 3 " in fault for fault in found), "only what is wrong is named"


def test_a_row_too_many_is_found(path: Path) -> None:
    raw = sqlite3.connect(path)
    raw.execute("INSERT INTO speed (run_id, arm, phase, repetition) VALUES (1, 'base', 'decode', 99)")
    raw.commit()
    raw.close()
    with open_session(path) as session:
        assert [fault.split(" in ")[1][:5] for fault in faults(session)] == ["speed"]


def test_rows_of_an_older_version_are_not_counted_until_they_are_read_again(path: Path) -> None:
    raw = sqlite3.connect(path)
    raw.execute("UPDATE run SET row_counts = NULL, source_sha256 = run_key")
    raw.execute("DELETE FROM speed WHERE run_id = 2")
    raw.commit()
    raw.close()
    with open_session(path) as session:
        assert faults(session) == []
    ingest(path.parent / "project", path)
    with open_session(path) as session:
        assert faults(session) == []
        counts = [run.row_counts or {} for run in session.scalars(select(Run))]
    assert [c["speed"] for c in counts] == [3, 5, 5]


def test_results_left_out_are_no_fault(path: Path) -> None:
    """Runs that were current once keep the base that they were held against."""
    root = path.parent / "project"
    (root / "scores/base/0/run.json").unlink()
    (root / "scores/base/0/scores.json").unlink()
    assert ingest(root, path).retired == 1
    with open_session(path) as session:
        assert faults(session) == []


def test_damage_is_found_on_postgresql_too(tmp_path: Path, postgres: str) -> None:
    ingest(make_full_tree(tmp_path / "project"), postgres)
    with open_session(postgres) as session:
        assert faults(session) == []
    with open_session(postgres, write=True) as session:
        for damage in ("DELETE FROM sample WHERE run_id = 3", "DELETE FROM quantized_sample WHERE type = 'f16'"):
            session.execute(text(damage))
        session.execute(text("UPDATE run SET reference_run_id = NULL WHERE id = 2"))
        session.execute(text("DROP VIEW v_attempts"))
    with open_session(postgres) as session:
        found = " | ".join(faults(session))
    for words in ("no row in sample", "quantized_sample 0 of 0", "held against no base", "view v_attempts is missing"):
        assert words in found
