"""Runs of one task that are not seeds of one arm: another base model, other settings, other data."""

from __future__ import annotations

import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

import db.ingest
from db import DatabaseError, open_session, queries
from db import queries_compare as compared
from db.check import faults
from db.ingest import ingest, rebuild
from db.models import Run
from db.queries_compare import Choice
from db.tasks import runs_by_task
from tests.db.result_tree import sha
from tests.db.task_switches import to_alpaca
from tests.db.test_db_releases import downgrade
from tests.evaluation.task_tree import ARMS, GSM8K, add_task, add_task_arm, change_inputs, credits_of

FORMER = Choice(task="gsm8k")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return tmp_path / "project"


def add_arm(tree: Path, arm: str, seed: int, **what: Any) -> None:
    add_task_arm(tree, GSM8K, arm, seed, credits_of(arm, seed, 0.1, binary=True), **what)


def shown(session: Session, choice: Choice) -> list[tuple[str, int]]:
    return [(run.arm, run.seed) for run in compared.chosen_runs(session, choice)]


def latest(session: Session) -> set[int]:
    """What the view calls the latest runs of GSM8K."""
    rows = queries.view(session, "task_results")
    return {row["run_id"] for row in rows if row["task"] == "gsm8k" and row["is_latest"]}


def test_two_sizes_of_a_model_are_not_seeds_of_one_arm(tree: Path, path: Path) -> None:
    add_task(tree, GSM8K, seeds=(0, 1), day=20, base="small")
    ingest(tree, path)
    add_task(tree, GSM8K, seeds=(1, 2), day=21, base="large")
    ingest(tree, path, seeds=[1, 2])
    with open_session(path) as session:
        now = compared.chosen_runs(session, Choice())
        assert compared.left_out(session, Choice()) == {}
    to_alpaca(tree)
    ingest(tree, path, seeds=[0])
    with open_session(path) as session:
        runs = compared.chosen_runs(session, FORMER)
        assert runs == now and [(run.arm, run.seed) for run in runs] == [
            ("base", 0), *((arm, seed) for arm in ARMS for seed in (1, 2))]  # fmt: skip
        assert {run.base_key for run in session.scalars(select(Run).where(Run.id.in_([r.id for r in runs])))} == {
            sha("large")}  # fmt: skip
        assert {run.reference_run_id for run in runs[1:]} == {runs[0].id} and faults(session) == []
        assert latest(session) == {run.id for run in runs}
        assert compared.left_out(session, FORMER) == {"base": 1, "baseline_lora": 2, "pure_grit": 2}
        assert compared.left_out(session, Choice(task="gsm8k", arms=("pure_grit",), seeds=(0,))) == {
            "base": 1, "pure_grit": 1}  # fmt: skip
        assert compared.names_of_runs(session, "gsm8k")[1] == [0, 1, 2], "0 is the base's"
        assert compared.chosen_runs(session, Choice(task="gsm8k", seeds=(0,))) == runs[:1]


def test_an_arm_is_never_held_against_another_size(tree: Path, path: Path) -> None:
    """The larger base takes the smaller one's place first, before its arms are there."""
    add_task(tree, GSM8K, day=20, base="small")
    ingest(tree, path)
    add_arm(tree, "base", 0, day=21, base="large")
    summary = ingest(tree, path)
    assert sum("no base with the same items and backend and of the same model" in n for n in summary.skipped) == 2
    with open_session(path) as session:
        assert shown(session, Choice()) == [("base", 0)] and faults(session) == []
        assert compared.left_out(session, Choice()) == {"baseline_lora": 1, "pure_grit": 1}
    add_task(tree, GSM8K, day=21, base="large")
    ingest(tree, path)
    with open_session(path) as session:
        runs = {(run.base_key, run.arm): run for run in session.scalars(select(Run))}
        for size in ("small", "large"):
            base = runs[sha(size), "base"].id
            assert {runs[sha(size), arm].reference_run_id for arm in ARMS} == {base}, "also once they left the disk"
        assert faults(session) == []


def test_an_arm_whose_own_base_was_never_scored_gets_no_other(tree: Path, path: Path) -> None:
    add_task(tree, GSM8K, base="small")
    add_arm(tree, "base", 0, base="large")
    ingest(tree, path)
    to_alpaca(tree)
    ingest(tree, path)
    with open_session(path) as session:
        arms = session.scalars(select(Run).where(Run.task == "gsm8k", Run.arm != "base")).all()
        assert [run.reference_run_id for run in arms] == [None, None] and faults(session) == []


def test_a_size_that_comes_back_with_its_old_results_is_the_one_on_the_disk(tree: Path, path: Path) -> None:
    add_task(tree, GSM8K, day=20, base="small")
    ingest(tree, path)
    with open_session(path) as session:
        before = compared.chosen_runs(session, Choice())
    add_task(tree, GSM8K, day=21, base="large")
    ingest(tree, path)
    add_task(tree, GSM8K, day=20, base="small")
    assert ingest(tree, path).inserted == 0
    with open_session(path) as session:
        assert compared.chosen_runs(session, Choice()) == before and compared.left_out(session, Choice()) == {}
        assert len(before) == 3 and faults(session) == []


def test_a_link_to_another_size_is_a_fault(tree: Path, path: Path) -> None:
    add_task(tree, GSM8K, base="small")
    ingest(tree, path)
    raw = sqlite3.connect(path)
    with raw:
        raw.execute("UPDATE run SET base_key = 'other' WHERE arm = 'base'")
    with open_session(path) as session:
        told = faults(session)
        assert len(told) == 2 and all(
            "no current base with the same items and backend and of the same" in t for t in told
        )
    with raw:
        raw.execute("UPDATE run SET reference_run_id = NULL")
    with open_session(path) as session:
        assert faults(session) == []
    with raw:
        raw.execute("UPDATE run SET base_key = ''")
    raw.close()
    with open_session(path) as session:
        assert all("though there is one with the same items" in told for told in faults(session)) and faults(session)


@pytest.mark.parametrize("unknown", ["base", *ARMS])
def test_a_model_that_is_not_known_may_be_the_same(tree: Path, path: Path, unknown: str) -> None:
    add_task(tree, GSM8K, base="small")
    add_arm(tree, unknown, 0)
    ingest(tree, path)
    with open_session(path) as session:
        now = compared.chosen_runs(session, Choice())
    to_alpaca(tree)
    ingest(tree, path)
    with open_session(path) as session:
        runs = compared.chosen_runs(session, FORMER)
        assert runs == now and len(runs) == 3 and {run.reference_run_id for run in runs[1:]} == {runs[0].id}
        assert latest(session) == {run.id for run in runs} and compared.left_out(session, FORMER) == {}
        assert faults(session) == []


@pytest.mark.parametrize("changed", ["rate", "data"])
def test_other_settings_or_data_make_no_seeds_of_one_arm(tree: Path, path: Path, changed: str) -> None:
    add_task(tree, GSM8K, seeds=(0, 1), day=20, base="small")
    ingest(tree, path)
    for seed in (1, 2):
        add_arm(tree, "pure_grit", seed, day=21, base="small", rate=0.002 if changed == "rate" else 0.001)
        if changed == "data":
            change_inputs(tree / "adapters/pure_grit" / str(seed), **{"data/train.jsonl": sha("fewer")})
    add_arm(tree, "baseline_lora", 2, day=21, base="small")
    ingest(tree, path)
    to_alpaca(tree)
    ingest(tree, path, seeds=[0])
    with open_session(path) as session:
        runs = compared.chosen_runs(session, FORMER)
        assert [(run.arm, run.seed) for run in runs] == [
            ("base", 0), *(("baseline_lora", seed) for seed in (0, 1, 2)), ("pure_grit", 1), ("pure_grit", 2)
        ], "the other arm keeps its seeds"  # fmt: skip
        assert latest(session) == {run.id for run in runs}
        assert compared.left_out(session, FORMER) == {"pure_grit": 2}, "seed 0, and the former seed 1"


def test_an_older_database_learns_its_models_and_settings_from_itself(tree: Path, path: Path) -> None:
    add_task(tree, GSM8K, base="small")
    add_arm(tree, "pure_grit", 0, rate=0.5)
    query = select(Run.arm, Run.base_key, Run.train_key).order_by(Run.id)
    ingest(tree, path)
    with open_session(path) as session:
        before = session.execute(query).all()
    base, plain, grit = before
    assert base[1:] == (sha("small"), "") and plain[1] == sha("small") and grit[1] == ""
    assert len({"", plain[2], grit[2]}) == 3
    with open_session(path, write=True) as session:
        downgrade(session, "0003")
    with open_session(path, write=True) as session:
        assert session.execute(query).all() == before


def test_whether_runs_would_be_lost_must_be_known(
    tree: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_task(tree, GSM8K)
    ingest(tree, path)
    assert runs_by_task(path) == {"gsm8k": 3}
    impatient = partial(runs_by_task, timeout_s=0.05)
    monkeypatch.setattr(db.ingest, "runs_by_task", impatient)
    to_alpaca(tree)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA journal_mode = DELETE")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(DatabaseError, match=r"free database.*is locked"):
        impatient(path)
    with pytest.raises(DatabaseError, match="is locked"):
        rebuild(tree, path)
    other.execute("ROLLBACK")
    other.close()
    assert runs_by_task(path) == {"gsm8k": 3}
    with pytest.raises(DatabaseError, match="a file that can be opened"):
        runs_by_task(tmp_path)
    empty, text = tmp_path / "empty.db", tmp_path / "text.db"
    empty.touch()
    text.write_text("no database\n" * 100)
    theirs = sqlite3.connect(tmp_path / "theirs.db")
    theirs.execute("CREATE TABLE run (distance)")
    theirs.close()
    places = (empty, text, tmp_path / "none.db", tmp_path / "theirs.db")
    assert [runs_by_task(place) for place in places] == [{}] * 4
    with pytest.raises(DatabaseError, match="a database with other tables"):
        rebuild(tree, tmp_path / "theirs.db")
    assert not (tmp_path / "none.db").exists()
