"""Databases that older versions of this project left, as SQL dumps that their own code wrote."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import func, insert, select, text
from sqlalchemy.orm import Session

from db import SchemaVersionError, open_session, queries, rows, schema
from db.check import faults
from db.columns import Base
from db.ingest import ingest
from db.models import Attempt, LayerMetric, Run, Spectrum
from db.queries_compare import Choice, chosen_runs
from tests.db.result_tree import make_arm
from tests.db.result_tree_layers import make_full_tree

RELEASES = Path(__file__).parent / "releases"
VERSIONS = schema.REVISIONS[:-1]
Tables = dict[str, list[dict[str, Any]]]


def load(version: str, path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.executescript((RELEASES / f"{version}.sql").read_text(encoding="utf-8"))
    connection.close()


def content(path: Path, kind: str, columns: Tables | None = None) -> Tables:
    """Rows of all tables (or views); with `columns`, only of the tables and columns that stand there."""
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    named = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = ?", (kind,))]
    found: Tables = {}
    for name in named if columns is None else columns:
        picked = ", ".join(columns[name][0]) if columns else "*"
        if name != "alembic_version":
            found[name] = [dict(row) for row in connection.execute(f"SELECT {picked} FROM {name} ORDER BY 1, 2, 3")]
    connection.close()
    return found


@pytest.fixture(params=VERSIONS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    load(request.param, tmp_path / "old.db")
    return tmp_path / "old.db"


def test_there_is_a_dump_of_every_older_version() -> None:
    """A new migration needs the dump of the version before it: see the first lines of the others."""
    assert sorted(file.stem for file in RELEASES.glob("*.sql")) == list(VERSIONS)


def test_no_row_is_lost_and_no_value_changed(old: Path) -> None:
    before = content(old, "table")
    assert all(before.values()) and len(before["run"]) == 4, "every table had rows"
    assert {row["value_kind"] for row in before["metric"]} == {"finite", "nan", "inf", "-inf"}
    with open_session(old, write=True):
        pass
    after = content(old, "table", before)
    assert after == before


def test_views_say_the_same(old: Path) -> None:
    before = content(old, "view")
    with open_session(old, write=True):
        pass
    after = content(old, "view")
    assert {name: after[name] for name in before} == before
    assert set(after) == set(queries.VIEWS)


def test_the_tables_become_those_of_today(old: Path) -> None:
    with open_session(old, write=True) as session:
        assert session.scalar(text("SELECT version_num FROM alembic_version")) == schema.NEWEST
        context = MigrationContext.configure(session.connection(), opts={"compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
        stored = " ".join(session.scalars(text("SELECT sql FROM sqlite_master WHERE type = 'table'")))
        rules = {str(rule.name) for table in Base.metadata.tables.values() for rule in table.constraints}
        assert [name for name in rules if name.startswith("ck_") and f"CONSTRAINT {name} " not in stored] == []
        assert faults(session) == []


def test_readers_are_told_to_upgrade(old: Path) -> None:
    with pytest.raises(SchemaVersionError, match=r"python -m db\.cli ingest"), open_session(old):
        pass


def test_results_are_read_into_it(old: Path, tmp_path: Path) -> None:
    tree = make_full_tree(tmp_path / "project")
    make_arm(tree, "pure_grit", 3, correct=[True] * 100)
    first = ingest(tree, old)
    assert first.inserted + first.updated == 4
    assert ingest(tree, old).unchanged == 4
    with open_session(old) as session:
        assert [(r.arm, r.seed) for r in chosen_runs(session, Choice())] == [
            ("base", 0), ("baseline_lora", 0), ("baseline_lora", 1), ("pure_grit", 3)]  # fmt: skip
        assert (session.scalar(select(func.count()).select_from(Run)) or 0) > 4, "superseded runs stay"
        filled = [session.scalar(select(func.count()).select_from(t)) for t in (LayerMetric, Spectrum, Attempt)]
        assert all(filled)
        assert faults(session) == []


def test_files_known_to_an_older_version_are_read_again_for_the_new_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older version stored the same files, but had no tables for all that is in them."""
    tree, path = make_full_tree(tmp_path / "project"), tmp_path / "c.db"
    monkeypatch.setattr(rows, "NEWEST", "0002")
    ingest(tree, path)
    monkeypatch.undo()
    with open_session(path, write=True) as session:
        downgrade(session, "0002")
    summary = ingest(tree, path)
    assert (summary.inserted, summary.updated) == (0, 3)
    with open_session(path) as session:
        assert all(session.scalar(select(func.count()).select_from(t)) for t in (LayerMetric, Spectrum))
        assert all(run.row_counts for run in session.scalars(select(Run)))
        assert faults(session) == []


def downgrade(session: Session, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(schema.MIGRATIONS))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = session.connection()
    command.downgrade(config, revision)


def test_an_upgrade_can_be_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    load("0002", path)
    tables, views = content(path, "table"), content(path, "view")
    with open_session(path, write=True) as session:
        row = {"name": "n", "split": "s", "layer": "l", "step": 0, "value": 1.0, "value_kind": "finite"}
        session.execute(insert(LayerMetric), {"run_id": 1, **row})
        session.execute(insert(Spectrum), {"run_id": 1, "layer": "l", "factor": "a", "step": 0, "eigenvalues": [1.0]})
    with open_session(path, write=True) as session:
        downgrade(session, "0002")
    assert content(path, "table") == tables and content(path, "view") == views
