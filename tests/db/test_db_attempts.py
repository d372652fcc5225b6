"""Starts of stages: crashed ones leave no results, but they are not forgotten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert
from typer.testing import CliRunner

from db import DatabaseError, open_session, queries
from db.cli import app
from db.ingest import ingest, rebuild
from db.models import Attempt
from tests.db.result_tree import make_tree, write
from tests.db.result_tree_layers import make_attempt


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "project")


def stored(path: Path) -> dict[str, str]:
    with open_session(path) as session:
        return {attempt.id: attempt.status for attempt in queries.attempts(session)}


def test_a_start_is_stored_as_it_was(tree: Path, path: Path) -> None:
    make_attempt(tree, "b", started="2026-11-21T03:00:00+02:00", status="failed", error="no space\x00")
    make_attempt(tree, "a", started="2026-11-21T01:00:01Z", arm=None, seed=None, status="crashed", ended=None)
    ingest(tree, path)
    with open_session(path) as session:
        first, second = queries.attempts(session)
        assert (first.id, first.stage, first.arm, first.seed) == ("b", "train", "baseline_lora", 0)
        assert first.started.isoformat() == "2026-11-21T01:00:00+00:00"
        assert (first.status, first.error) == (
            "failed",
            "no space\ufffd",
        )
        assert (first.host, first.pid, first.git_commit) == ("somewhere", 4242, "abc123")
        assert (second.id, second.arm, second.seed, second.ended) == ("a", None, None, None)


def test_a_start_is_brought_up_to_date(tree: Path, path: Path) -> None:
    """It was running when the database was filled; by the next time it had crashed, and so had its machine's clock."""
    make_attempt(tree, "one", status="running", ended=None)
    ingest(tree, path)
    assert stored(path) == {"one": "running"}
    make_attempt(tree, "one", status="crashed", ended=None)
    make_attempt(tree, "two")
    ingest(tree, path)
    assert stored(path) == {"one": "crashed", "two": "finished"}
    before = path.read_bytes()
    assert ingest(tree, path).unchanged == 3 and path.read_bytes() == before


def test_a_start_without_its_file_stays_until_the_database_is_rebuilt(tree: Path, path: Path) -> None:
    make_attempt(tree, "one")
    make_attempt(tree, "two")
    ingest(tree, path)
    (tree / "attempts/one.json").unlink()
    ingest(tree, path)
    assert set(stored(path)) == {"one", "two"}
    rebuild(tree, path)
    assert set(stored(path)) == {"two"}


def test_starts_of_other_arms_are_read_too(tree: Path, path: Path) -> None:
    make_attempt(tree, "one", arm="pure_grit", seed=7)
    ingest(tree, path, arms=["baseline_lora"], seeds=[0])
    assert stored(path) == {"one": "finished"}


def test_the_view_counts_how_starts_ended(tree: Path, path: Path) -> None:
    hours = [("finished", 1), ("crashed", 4), ("failed", 2), ("crashed", 3)]
    for number, (status, hour) in enumerate(hours):
        ended = None if status == "crashed" else f"2026-11-21T0{hour}:30:00+00:00"
        start = f"2026-11-21T0{hour}:00:00+00:00"
        error = "no memory" if hour == 4 else "other"
        make_attempt(tree, f"{number}", status=status, started=start, ended=ended, error=error)
    make_attempt(tree, "other seed", seed=1)
    for name in ("x", "y"):
        make_attempt(tree, name, stage="prepare_data", arm=None, seed=None, status="running", ended=None)
    ingest(tree, path)
    with open_session(path) as session:
        rows = {(row["stage"], row["arm"], row["seed"]): row for row in queries.view(session, "v_attempts")}
    assert len(rows) == 3
    train = rows["train", "baseline_lora", 0]
    assert [train[name] for name in ("starts", "finished", "failed", "crashed", "running")] == [4, 1, 1, 2, 0]
    assert (train["last_status"], train["last_error"]) == ("crashed", "no memory")
    assert str(train["last_started"]).startswith("2026-11-21 04:00:00")
    assert rows["prepare_data", None, None]["running"] == 2, "starts for all arms belong together"


def test_check_finds_nothing_wrong_with_crashes(tree: Path, path: Path) -> None:
    make_attempt(tree, "one", status="crashed", ended=None)
    make_attempt(tree, "two", status="running", ended=None, arm="never_finished", seed=3)
    ingest(tree, path)
    checked = CliRunner().invoke(app, ["check", "--db", str(path)])
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "lost"}, "status"),
        ({"ended": None}, "a finished stage needs the time `ended`"),
        ({"status": "running"}, "a running stage has not `ended`"),
        ({"ended": "2026-11-21T00:00:00+00:00"}, "lies before `started`"),
        ({"started": "2026-11-21T01:00:00"}, "started"),
        ({"pid": -1}, "pid"),
        ({"id": "other"}, "id: expected 'one' as in the file's name, came 'other'"),
    ],
)
def test_records_that_make_no_sense_are_left_out_with_a_note(
    tree: Path, path: Path, changes: dict[str, Any], words: str
) -> None:
    write(tree / "attempts/one.json", {**make_attempt(tree, "one"), **changes})
    make_attempt(tree, "two")
    summary = ingest(tree, path)
    (note,) = summary.skipped
    assert note.startswith("without this start: attempts/one.json: ") and words in note
    assert summary.inserted == 3 and stored(path) == {"two": "finished"}, "nothing else is lost"


@pytest.mark.parametrize("length", [0, 100])
def test_a_record_cut_off_by_a_crash_is_left_out_with_a_note(tree: Path, path: Path, length: int) -> None:
    write(tree / "attempts/one.json", json.dumps(make_attempt(tree, "one"))[:length])
    make_attempt(tree, "two")
    summary = ingest(tree, path)
    assert len(summary.skipped) == 1 and "attempts/one.json: " in summary.skipped[0]
    assert summary.inserted == 3 and stored(path) == {"two": "finished"}


def test_a_damaged_record_takes_nothing_from_what_was_known(tree: Path, path: Path) -> None:
    make_attempt(tree, "one")
    ingest(tree, path)
    write(tree / "attempts/one.json", "")
    ingest(tree, path)
    assert stored(path) == {"one": "finished"}


@pytest.mark.parametrize(
    "change",
    [
        {"id": ""},
        {"stage": ""},
        {"arm": ""},
        {"host": ""},
        {"status": "lost"},
        {"status": "running"},
        {"ended": None},
        {"seed": -1},
        {"pid": -1},
        {"id": "one"},
    ],
)
def test_the_table_keeps_its_rules(tree: Path, path: Path, change: dict[str, Any]) -> None:
    make_attempt(tree, "one")
    ingest(tree, path)
    with open_session(path) as session:
        (one,) = queries.attempts(session)
        row = {column.name: getattr(one, column.name) for column in Attempt.__table__.columns}
    with pytest.raises(DatabaseError, match="rows that keep the rules"), open_session(path, write=True) as session:
        session.execute(insert(Attempt), {**row, "id": "two", **change})
    with open_session(path, write=True) as session:
        session.execute(insert(Attempt), {**row, "id": "two"})
