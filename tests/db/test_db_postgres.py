"""The same database on PostgreSQL: every promise that SQLite keeps by itself must be kept here as well."""

from __future__ import annotations

import math
import random
import shutil
import signal
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import delete, insert, select, text
from typer.testing import CliRunner

from db import DatabaseError, bulk, open_session, queries, schema
from db.check import faults
from db.cli import app
from db.columns import Base
from db.engine import make_engine, resolve_url
from db.errors import TasksLostError
from db.ingest import ingest, rebuild
from db.models import Metric, Run, Speed
from db.queries_compare import Choice, chosen_runs, tasks_of_runs
from tests.db.postgres_server import outline
from tests.db.result_tree import edit, make_arm, make_tree, sha, write
from tests.db.result_tree_layers import make_full_tree
from tests.db.task_switches import F16, Q8, everything
from tests.db.test_db_releases import downgrade
from tests.db.workers import CONTEXT, Worker
from tests.evaluation.task_tree import ALPACA, GSM8K, add_precisions, add_task

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_full_tree(tmp_path / "project")


def same(value: Any) -> Any:
    """Views have no types on SQLite: moments are text there, truths are numbers. Sums are taken in another order."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
    if isinstance(value, bool):
        return int(value)
    return float(f"{value:.12g}") if isinstance(value, float | Decimal) else value


def tables(url: str | Path, *, ids: bool = True) -> dict[str, list[dict[str, Any]]]:
    """Table or view → its rows."""
    found: dict[str, list[dict[str, Any]]] = {}
    hidden = set() if ids else {"id", "run_id", "environment_id", "reference_run_id"}
    with open_session(url) as session:
        for table in Base.metadata.sorted_tables:
            found[table.name] = [dict(row) for row in session.execute(select(table)).mappings()]
        for name in queries.VIEWS:
            found[name] = queries.view(session, name)
    return {
        name: sorted(({k: same(v) for k, v in row.items() if k not in hidden} for row in rows), key=repr)
        for name, rows in found.items()
    }


def counts(summary: Any) -> tuple[int, int, int, int]:
    return summary.inserted, summary.updated, summary.unchanged, summary.retired


def assert_equal(found: dict[str, list[dict[str, Any]]], expected: dict[str, list[dict[str, Any]]]) -> None:
    assert {name: len(rows) for name, rows in found.items()} == {name: len(rows) for name, rows in expected.items()}
    for name, rows in found.items():
        for row, other in zip(rows, expected[name], strict=True):
            assert row == other, name


def test_all_tables_and_views_equal_those_of_sqlite(tree: Path, tmp_path: Path, postgres: str) -> None:
    assert str(ingest(tree, postgres)) == str(ingest(tree, tmp_path / "c.db"))
    expected = tables(tmp_path / "c.db")
    assert [name for name, rows in expected.items() if not rows] == [], "every table and view takes part"
    assert_equal(tables(postgres), expected)


def test_several_tasks_equal_those_of_sqlite(tree: Path, tmp_path: Path, postgres: str) -> None:
    places = (tmp_path / "c.db", postgres)
    for number, task in enumerate((None, GSM8K, ALPACA)):
        if task is not None:
            for folder in ("quantized", "verified", "measured"):
                shutil.rmtree(tree / folder, ignore_errors=True)
            add_task(tree, task, day=22 + number)
        if task is ALPACA:
            add_precisions(tree, task, "pure_grit", {"f16": F16, "q8_0": Q8})
        summaries = [str(ingest(tree, place, seeds=[0])) for place in places]
        assert summaries[0] == summaries[1]
    assert_equal(tables(postgres), tables(places[0]))
    read = [everything_of(place) for place in places]
    assert read[0] == read[1]
    with open_session(postgres) as session:
        assert faults(session) == []
    with pytest.raises(TasksLostError, match="2 runs of task aqi, 3 runs of task gsm8k"):
        rebuild(tree, postgres, seeds=[0])
    assert_equal(tables(postgres), tables(places[0]))
    assert [counts(rebuild(tree, place, seeds=[0], lose_tasks=True)) for place in places] == [(3, 0, 0, 0)] * 2
    assert_equal(tables(postgres, ids=False), tables(places[0], ids=False))


def everything_of(place: str | Path) -> list[Any]:
    with open_session(place) as session:
        return [tasks_of_runs(session), *(everything(session, Choice(task=t)) for t in (None, "aqi", "gsm8k"))]


def test_the_newest_upgrade_is_taken_back_and_done_again(tree: Path, postgres: str) -> None:
    engine = make_engine(resolve_url(postgres), write=True)
    with engine.connect() as connection:
        schema.upgrade(connection, postgres, "0003")
        connection.commit()
    engine.dispose()
    old = outline(postgres)
    ingest(tree, postgres)
    before, new = tables(postgres), outline(postgres)
    assert all(mine != theirs for mine, theirs in zip(new, old, strict=True)), "0004 changes every part"
    with open_session(postgres, write=True) as session:
        downgrade(session, "0003")
    assert outline(postgres) == old
    with pytest.raises(DatabaseError, match="older version 0003"), open_session(postgres):
        pass
    with open_session(postgres, write=True) as session:
        assert compare_metadata(MigrationContext.configure(session.connection()), Base.metadata) == []
    assert_equal(tables(postgres), before)
    assert outline(postgres) == new


def test_the_same_files_again_change_nothing(tree: Path, postgres: str) -> None:
    ingest(tree, postgres)
    before = tables(postgres)
    assert counts(ingest(tree, postgres)) == (0, 0, 3, 0)
    assert tables(postgres) == before


def test_updates_and_rebuilds_equal_those_of_sqlite(tree: Path, tmp_path: Path, postgres: str) -> None:
    places = (postgres, tmp_path / "c.db")
    for place in places:
        ingest(tree, place)
    make_arm(tree, "baseline_lora", 0, correct=[i < 80 for i in range(100)])
    edit(tree / "adapters/baseline_lora/1/run.json", params={"train": {"learning_rate": 0.002}})
    assert [counts(ingest(tree, place)) for place in places] == [(1, 1, 1, 1)] * 2
    # SQLite gives the numbers of deleted rows to new ones, a sequence never does.
    assert_equal(tables(postgres, ids=False), tables(tmp_path / "c.db", ids=False))
    assert [counts(rebuild(tree, place)) for place in places] == [(3, 0, 0, 0)] * 2
    assert_equal(tables(postgres, ids=False), tables(tmp_path / "c.db", ids=False))


def test_nan_and_infinity_are_typed(tree: Path, postgres: str) -> None:
    losses = '[{"step": 1, "loss": NaN}, {"step": 2, "loss": Infinity}, {"step": 3, "loss": -Infinity}]'
    write(tree / "adapters/baseline_lora/0/loss_history.json", losses)
    ingest(tree, postgres)
    with open_session(postgres) as session:
        run = next(run for run in chosen_runs(session, Choice()) if (run.arm, run.seed) == ("baseline_lora", 0))
        curve = queries.curve(session, run.id, "loss")
        assert math.isnan(curve[0][1]) and curve[1:] == [(2, math.inf), (3, -math.inf)]
        stored = select(Metric.value, Metric.value_kind).where(Metric.run_id == run.id, Metric.split == "train")
        assert [tuple(row) for row in session.execute(stored)] == [(None, "nan"), (None, "inf"), (None, "-inf")]
    for number in ("NaN", "Infinity"):
        with pytest.raises(DatabaseError, match="keep the rules"), open_session(postgres, write=True) as session:
            session.execute(text("UPDATE metric SET value = :number, value_kind = 'finite'"), {"number": number})


def test_more_rows_than_one_message_holds(tree: Path, tmp_path: Path, postgres: str) -> None:
    draw = random.Random(0)
    steps = bulk.CHUNK_ROWS // 2 + 10
    curve = [{"loss": draw.random(), "grad_norm": draw.random(), "step": step} for step in range(steps)]
    write(tree / "adapters/baseline_lora/0/loss_history.json", curve)
    ingest(tree, postgres)
    ingest(tree, tmp_path / "c.db")
    found = tables(postgres)
    assert sum(row["split"] == "train" for row in found["metric"]) > bulk.CHUNK_ROWS
    assert_equal(found, tables(tmp_path / "c.db"))


@pytest.mark.parametrize("actions", [("ingest", "ingest"), ("ingest", "rebuild")])
def test_two_processes_at_once(tree: Path, tmp_path: Path, postgres: str, actions: tuple[str, str]) -> None:
    other = make_tree(tmp_path / "other")
    make_arm(other, "pure_grit", correct=[True] * 100)
    serial = []
    for number, order in enumerate([(0, 1), (1, 0)]):
        for turn in order:
            work = ingest if actions[turn] == "ingest" else rebuild
            work((tree, other)[turn], tmp_path / f"{number}.db")
        serial.append(tables(tmp_path / f"{number}.db", ids=False))
    start = CONTEXT.Barrier(2)
    workers = [Worker(a, root, postgres, start) for a, root in zip(actions, (tree, other), strict=True)]
    outcomes = [worker.end() for worker in workers]
    assert all("runs inserted" in outcome for outcome in outcomes), outcomes
    assert tables(postgres, ids=False) in serial


def test_a_killed_process_leaves_the_old_content(tree: Path, tmp_path: Path, postgres: str) -> None:
    ingest(tree, postgres)
    before = tables(postgres)
    curve = [{"loss": float(step), "step": step} for step in range(8000)]
    make_arm(tree, "pure_grit", correct=[True] * 100, history=curve)
    for delay in (0.0, 0.03, 0.06):
        worker = Worker("ingest", tree, postgres)
        assert worker.kill("transaction", delay) == "transaction"
        assert tables(postgres) == before
    assert worker.process.exitcode == -signal.SIGKILL
    assert counts(ingest(tree, postgres))[0] == 1
    ingest(tree, tmp_path / "c.db")
    assert_equal(tables(postgres, ids=False), tables(tmp_path / "c.db", ids=False))


def test_a_reader_keeps_one_moment(tree: Path, postgres: str) -> None:
    ingest(tree, postgres)
    question = text("SELECT count(*) FROM metric")
    with open_session(postgres) as reader:
        before = reader.scalar(text("SELECT count(*) FROM run"))
        rows = before and reader.scalar(question)
        with open_session(postgres, write=True) as writer:
            writer.execute(delete(Run))
        assert reader.scalar(question) == rows > 0
    with open_session(postgres) as reader:
        assert reader.scalar(question) == 0


def test_readers_cannot_write_and_tables_are_the_models(tree: Path, postgres: str) -> None:
    ingest(tree, postgres)
    with open_session(postgres, write=True) as session:
        assert compare_metadata(MigrationContext.configure(session.connection()), Base.metadata) == []
    with pytest.raises(DatabaseError, match="read-only"), open_session(postgres) as session:
        session.execute(delete(Run))
    checked = CliRunner().invoke(app, ["check", "--db", postgres])
    assert checked.exit_code == 0 and "sound" in checked.output, checked.output


def first_release(url: str) -> None:
    """Tables of revision 0001 with a row in each that later revisions touch."""
    engine = make_engine(resolve_url(url), write=True)
    facts = {"key": sha("x"), "run": sha("run")}
    with engine.connect() as connection:
        schema.upgrade(connection, url, "0001")
        for statement in (
            "INSERT INTO environment (id, key, device_class, packages) VALUES (1, :key, 'cpu', '{}')",
            "INSERT INTO run (id, run_key, source_sha256, arm, seed, model_name, status, is_current, started, ended,"
            " stages, params, inputs, backend_name, backend_version, device_class, environment_id, test_items_sha256)"
            " VALUES (1, :run, :key, 'pure_grit', 0, 'm', 'finished', true, '2026-11-21 01:00:00+00',"
            " '2026-11-21 02:00:00+00', '{}', '{}', '{}', 'hf', '1', 'cpu', 1, :key)",
            "INSERT INTO metric (run_id, name, split, step, value, value_kind) VALUES (1, 'm', 's', 3, NULL, 'nan')",
            "INSERT INTO speed (run_id, arm, phase, repetition, tokens) VALUES (1, 'pure_grit', 'decode', 0, 9)",
            "INSERT INTO sample (run_id, item_id, task, split, prompt, truth, answer, correct)"
            " VALUES (1, 'i', 'aqi', 'test', 'p', 't', 'a', true)",
        ):
            connection.execute(text(statement), {k: v for k, v in facts.items() if f":{k}" in statement})
        connection.commit()
    engine.dispose()


def test_a_database_of_the_first_release_is_upgraded_without_loss(tree: Path, postgres: str) -> None:
    first_release(postgres)
    with pytest.raises(DatabaseError, match=r"older version 0001.*db\.cli ingest"), open_session(postgres):
        pass
    with open_session(postgres, write=True) as session:
        session.execute(insert(Speed), {"run_id": 1, "arm": "pure_grit", "phase": "ttft", "repetition": 0})
    found = tables(postgres)
    assert {name: len(found[name]) for name in ("run", "metric", "speed", "sample")} == {
        "run": 1, "metric": 1, "speed": 2, "sample": 1}  # fmt: skip
    assert (found["run"][0]["run_key"], found["run"][0]["serving_mode"]) == (sha("run"), "adapter")
    assert (found["run"][0]["task"], found["sample"][0]["credit"]) == ("aqi", 1.0)
    with open_session(postgres, write=True) as session:
        # Rows with numbers of their own leave the sequence where it was.
        session.execute(text("SELECT setval('run_id_seq', 1), setval('environment_id_seq', 1)"))
    assert counts(ingest(tree, postgres)) == (3, 0, 0, 1)
    with open_session(postgres, write=True) as session:
        assert compare_metadata(MigrationContext.configure(session.connection()), Base.metadata) == []


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with (
        pytest.raises(DatabaseError, match=r"postgresql\+psycopg"),
        open_session(f"postgresql+psycopg://nobody:secret@/none?host={tmp_path}", write=True),
    ):
        pass
    with pytest.raises(DatabaseError) as caught, open_session("postgresql+psycopg://a:secret@127.0.0.1:9/b"):
        pass
    assert "secret" not in str(caught.value) and "start the server" in caught.value.do
