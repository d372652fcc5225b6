"""Many rows: the fast way stores what SQLAlchemy's own way stores, in the same order, under the same rules."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, select

from db import DatabaseError, IngestError, bulk, open_session, queries
from db.bulk import insert_rows
from db.columns import Base
from db.ingest import ingest
from db.models import Attempt, Environment, Metric, Run, Sample
from db.queries_compare import Choice, chosen_runs
from tests.db.result_tree import make_arm, make_tree, sha, write
from tests.db.workers import content

NOON = datetime(2026, 11, 21, 12, tzinfo=timezone(timedelta(hours=5)))


def metrics(count: int, **changes: Any) -> Iterator[dict[str, Any]]:
    for step in range(count):
        yield {"name": "m", "split": "train", "step": step, "value": step / 7, "value_kind": "finite", **changes}


def run_values() -> dict[str, Any]:
    return {
        "id": 1, "run_key": sha("run"), "source_sha256": sha("files"), "arm": "pure_grit", "seed": 0,
        "model_name": "m", "status": "finished", "is_current": True, "started": NOON, "ended": NOON,
        "stages": {"train": {"é": [1, None]}}, "params": {}, "inputs": {}, "git_dirty": None,
        "backend_name": "hf", "backend_version": "1", "device_class": "cpu", "environment_id": 1,
        "test_items_sha256": sha("items"), "parity_first_difference": None,
    }  # fmt: skip


ENVIRONMENT = {"id": 1, "key": sha("e"), "device_class": "cpu", "packages": {"torch": "2"}}
SAMPLE = {
    "item_id": "i", "task": "aqi", "split": "test", "prompt": "p", "truth": "t", "answer": "汉 \x01",
    "predicted": 3, "correct": True, "abs_error": None, "prompt_tokens": None, "answer_tokens": 2**62,
    "credit": 0.25,
}  # fmt: skip
ATTEMPT = {
    "id": "a", "stage": "train", "arm": None, "seed": None, "status": "running", "error": None, "started": NOON,
    "ended": None, "host": "h", "pid": 1, "git_commit": None,
}  # fmt: skip


def fill(path: Path, fast: bool) -> None:
    with open_session(path, write=True) as session:

        def put(table: type[Base], rows: list[dict[str, Any]], **common: Any) -> None:
            if fast:
                assert insert_rows(session, table.__table__, iter(rows), **common) == len(rows)
            else:
                session.execute(insert(table), [{**common, **row} for row in rows])

        put(Environment, [ENVIRONMENT])
        put(Run, [run_values()])
        put(Metric, list(metrics(25)), run_id=1)
        put(Metric, [{"value_kind": "nan", "value": None, "step": 5, "split": "s", "name": "other"}], run_id=1)
        put(Sample, [SAMPLE, {**SAMPLE, "item_id": "j", "correct": False}], run_id=1)
        put(Attempt, [ATTEMPT])


def test_every_type_is_stored_as_sqlalchemy_stores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times with zones, JSON, truth values, floats from whole numbers; more rows than one piece."""
    monkeypatch.setattr(bulk, "CHUNK_ROWS", 10)
    for name, fast in (("fast.db", True), ("slow.db", False)):
        fill(tmp_path / name, fast)
    assert content(tmp_path / "fast.db") == content(tmp_path / "slow.db")
    with open_session(tmp_path / "fast.db") as session:
        run = session.get_one(Run, 1)
        assert run.started == NOON and run.started.tzinfo is UTC and run.stages == {"train": {"é": [1, None]}}
        assert session.scalars(select(Metric.step).where(Metric.name == "m").order_by(Metric.id)).all() == [*range(25)]


def test_what_the_session_holds_back_is_written_first(path: Path) -> None:
    with open_session(path, write=True) as session:
        session.add(Environment(**ENVIRONMENT))
        session.add(Run(**run_values()))
        assert insert_rows(session, Metric.__table__, metrics(3), run_id=1) == 3


def test_no_rows_are_no_work(path: Path) -> None:
    with open_session(path, write=True) as session:
        assert insert_rows(session, Metric.__table__, [], run_id=1) == 0


@pytest.mark.parametrize(
    "odd", [{"n": 3}, {"nonsense": 3}, {"value_kind": None, "value_knd": "finite"}, {"split": None}]
)
def test_rows_with_other_columns_than_the_first_are_refused(path: Path, odd: dict[str, Any]) -> None:
    """More columns, fewer, and as many with another name; None stands for a column that is not there."""
    fill(path, fast=True)
    changed = {**next(metrics(1, split="newer")), **odd}
    rows = [*metrics(2, split="new"), {name: value for name, value in changed.items() if value is not None}]
    with pytest.raises(ValueError, match="metric: expected rows with the columns name, split"):
        with open_session(path, write=True) as session:
            insert_rows(session, Metric.__table__, rows, run_id=1)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*metrics(20, split="new"), *metrics(1, split="new")], "UNIQUE constraint failed: metric"),
        (list(metrics(20, split="")), "named"),
        (list(metrics(20, split="new", value=float("inf"))), "value_finite"),
        (list(metrics(20, split="new", value_kind="nan")), "value_typed"),
    ],
)
def test_the_tables_rules_hold_and_nothing_of_a_refused_insert_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], words: str
) -> None:
    monkeypatch.setattr(bulk, "CHUNK_ROWS", 6)
    fill(path, fast=True)
    before = content(path)
    with pytest.raises(DatabaseError, match=f"rows that keep the rules.*{words}"):
        with open_session(path, write=True) as session:
            insert_rows(session, Metric.__table__, rows, run_id=1)
    assert content(path) == before


def test_rows_of_a_run_that_is_not_there_are_refused(path: Path) -> None:
    with pytest.raises(DatabaseError, match="FOREIGN KEY"), open_session(path, write=True) as session:
        insert_rows(session, Metric.__table__, metrics(3), run_id=7)


def test_long_curves_are_stored_and_a_second_ingest_writes_nothing(tmp_path: Path, path: Path) -> None:
    tree, draw = make_tree(tmp_path / "tree"), random.Random(0)
    steps = bulk.CHUNK_ROWS // 2 + 7
    curve = [{"loss": draw.random(), "grad_norm": draw.random(), "step": step} for step in range(steps)]
    make_arm(tree, "pure_grit", correct=[True] * 100, history=curve)
    ingest(tree, path)
    with open_session(path) as session:
        run = next(run for run in chosen_runs(session, Choice()) if run.arm == "pure_grit")
        for name in ("loss", "grad_norm"):
            assert queries.curve(session, run.id, name) == [(entry["step"], entry[name]) for entry in curve]
        number = session.scalar(select(func.count()).where(Metric.run_id == run.id, Metric.split == "train"))
        assert number == 2 * steps > bulk.CHUNK_ROWS
    before, file, moment = content(path), path.read_bytes(), path.stat().st_mtime_ns
    summary = ingest(tree, path)
    assert (summary.inserted, summary.updated, summary.unchanged) == (0, 0, 4)
    assert content(path) == before
    assert path.read_bytes() == file and path.stat().st_mtime_ns == moment


def test_a_name_logged_twice_at_one_step_keeps_the_later_number(tmp_path: Path, path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    curve = [
        {"step": 1, "loss": 3.0, "epoch": 0.1},
        {"step": 2, "eval_loss": 9.0, "loss": 8.0},  # one entry of both kinds: all of it belongs to eval
        {"step": 2, "loss": None, "epoch": 0.2},
        {"step": 2, "epoch": 0.25, "a\x00b": float("-inf")},
    ]
    make_arm(tree, "pure_grit", correct=[True] * 100, history=json.dumps(curve))
    ingest(tree, path)
    with open_session(path) as session:
        run = next(run for run in chosen_runs(session, Choice()) if run.arm == "pure_grit")
        rows = session.execute(
            select(Metric.name, Metric.split, Metric.step, Metric.value, Metric.value_kind).where(
                Metric.run_id == run.id, Metric.split.in_(["train", "eval"])
            )
        )
        assert sorted(map(tuple, rows), key=repr) == sorted(
            [
                ("loss", "train", 1, 3.0, "finite"),
                ("loss", "train", 2, None, "nan"),
                ("epoch", "train", 1, 0.1, "finite"),
                ("epoch", "train", 2, 0.25, "finite"),
                ("loss", "eval", 2, 8.0, "finite"),
                ("a\ufffdb", "train", 2, None, "-inf"),
            ],
            key=repr,
        )


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('{"step": 1e300, "loss": 1}', "entry 1 needs a `step`.*came 1e"),
        ('{"step": 9007199254740992, "loss": 1}', "entry 1 needs a `step`"),
        ('{"step": 1.5, "loss": 1}', "entry 1 needs a `step`.*came 1.5"),
        ('{"step": -1, "loss": 1}', "entry 1 needs a `step`.*came -1"),
        ('{"step": NaN, "loss": 1}', "entry 1 needs a `step`.*came nan"),
        ('{"step": null, "loss": 1}', "entry 1 needs a `step`.*came None"),
        ('{"step": 3, "": 1}', "expected a name for each number"),
        ('{"step": 3, "eval_": 1}', "expected a name for each number"),
        ('{"step": 3, "loss": "1.0"}', "valid number, came '1.0'"),
        ('{"step": true, "loss": 1}', "valid number"),
    ],
)
def test_curves_that_make_no_sense_are_refused_by_name(tmp_path: Path, path: Path, entry: str, words: str) -> None:
    tree = make_tree(tmp_path / "tree")
    write(tree / "adapters/baseline_lora/0/loss_history.json", f'[{{"step": 1, "loss": 2}}, {entry}]')
    with pytest.raises(IngestError, match=words) as refused:
        ingest(tree, path)
    assert "adapters/baseline_lora/0/loss_history.json" in str(refused.value)
    assert not path.exists()
