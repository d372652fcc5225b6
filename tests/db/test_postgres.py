"""The same database on PostgreSQL: filled from the same runs/, in one transaction."""

import time
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from db import DatabaseError
from db.ingest import ingest, rebuild
from db.store import open_session
from db.tables import SCHEMA
from tests.db.asking import ask, ask_one, content, forked
from tests.db.result_tree import make_arm, write

pytestmark = pytest.mark.full


def plain(value):
    """Views have no types on SQLite: moments are text there, truths are numbers. Sums are taken in another order."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
    return float(f"{value:.12g}") if isinstance(value, bool | int | float | Decimal) else value


def comparable(found):
    return {
        name: sorted(repr({key: plain(value) for key, value in row.items()}) for row in rows)
        for name, rows in found.items()
    }


def raw(url):
    return create_engine(url, poolclass=NullPool).begin()


def test_all_tables_and_views_equal_those_of_sqlite(tree, three, postgres):
    """Of three tasks, with NaN and infinity, rebuilt, and read by all commands."""
    write(tree / "adapters/pure_grit/0/loss_history.json", '[{"step": 1, "loss": NaN}, {"step": 2, "loss": Infinity}]')
    assert str(ingest(tree, postgres, seeds=[0])) == str(ingest(tree, three, seeds=[0])).replace("0 of", "1 of")
    expected = comparable(content(three))
    assert comparable(content(postgres)) == expected
    assert [name for name, rows in expected.items() if not rows] == [], "all take part"
    kinds = "SELECT value, value_kind FROM metric WHERE value_kind <> 'finite' ORDER BY value_kind"
    assert ask(postgres, kinds) == [(None, "inf"), (None, "nan")]
    rebuild(tree, postgres)
    assert comparable(content(postgres)) == expected, "the same to the id"


def test_others_tables_views_and_rights_survive(tree, postgres):
    with raw(postgres) as connection:
        connection.execute(text("CREATE TABLE recipes (id INTEGER)"))
    ingest(tree, postgres)
    with raw(postgres) as connection:
        connection.execute(text("CREATE VIEW mine AS SELECT count(*) AS runs FROM run"))
    make_arm(tree, "pure_grit", correct=[True] * 100)
    ingest(tree, postgres)
    assert ask_one(postgres, "SELECT runs FROM mine") == (4,) and ask(postgres, "SELECT * FROM recipes") == []


@pytest.mark.parametrize(
    "tables", [("alembic_version", "attempt", "run", "metric"), ("run", "recipes"), ("environment",)]
)
def test_what_is_not_ours_and_what_older_versions_left_stays(tree, postgres, tables):
    """Versions 1 to 4 had no runs/: their tables are the only copy."""
    with raw(postgres) as connection:
        for name in tables:
            connection.execute(text(f"CREATE TABLE {name} (id INTEGER)"))
        connection.execute(text("CREATE VIEW task_results AS SELECT 1 AS mine"))
    for work in (ingest, rebuild):
        with pytest.raises(DatabaseError, match="tables of something else, or of versions 1 to 4.*another database"):
            work(tree, postgres)
    with raw(postgres) as connection:
        there = connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"))
        assert {*there} == {*tables} and connection.scalar(text("SELECT mine FROM task_results")) == 1
    if "run" in tables:
        with pytest.raises(DatabaseError, match=rf"schema {SCHEMA} in .*older one"), open_session(postgres):
            pass


def test_another_schema_number_is_refused_to_readers_and_made_anew(tree, postgres):
    ingest(tree, postgres)
    before = comparable(content(postgres))
    with raw(postgres) as connection:
        connection.execute(text(f"COMMENT ON TABLE run IS 'schema {SCHEMA + 1}'"))
        connection.execute(text("ALTER TABLE sample DROP COLUMN credit CASCADE"))
    with pytest.raises(DatabaseError, match=f"schema {SCHEMA + 1}, which another version"), open_session(postgres):
        pass
    rebuild(tree, postgres)
    assert comparable(content(postgres)) == before


def test_two_processes_at_once_and_a_killed_one(tree, path, postgres):
    ingest(tree, postgres)
    before = comparable(content(postgres))
    curve = [{"loss": float(step), "step": step} for step in range(4000)]
    make_arm(tree, "pure_grit", correct=[True] * 100, history=curve)
    ingest(tree, path)
    expected = comparable(content(path))
    process = forked(ingest, tree, postgres)
    time.sleep(0.2)
    process.kill()
    process.join()
    assert comparable(content(postgres)) in (before, expected)
    workers = [forked(ingest, tree, postgres) for _ in range(2)]
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert comparable(content(postgres)) == expected


def test_readers_keep_one_moment_and_cannot_write(tree, postgres):
    ingest(tree, postgres)
    question = text("SELECT count(*) FROM metric")
    with open_session(postgres) as reader:
        before = reader.scalar(question)
        with raw(postgres) as connection:
            connection.execute(text("DELETE FROM metric"))
        assert reader.scalar(question) == before > 0
    with pytest.raises(DatabaseError, match="read-only"), open_session(postgres) as session:
        session.execute(text("DELETE FROM run"))
