from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from result_tree import make_tree, sha
from sqlalchemy import delete, func, insert, select, text
from sqlalchemy.exc import IntegrityError
from typer.testing import CliRunner

from db import DatabaseError, DatabaseMissingError, SchemaVersionError, open_session, queries, schema
from db.cli import app
from db.columns import Base
from db.models import Artifact, Environment, Metric, Probe, Run, Sample, Speed
from tests.conftest import not_root

NOW = datetime(2026, 11, 21, 3, 0, tzinfo=timezone(timedelta(hours=5)))


def environment_values() -> dict[str, Any]:
    return {"id": 1, "key": sha("env"), "device_class": "cpu", "packages": {}}


def run_values(**changes: Any) -> dict[str, Any]:
    return {
        "id": 1,
        "run_key": sha("run"),
        "source_sha256": sha("files"),
        "arm": "baseline_lora",
        "seed": 0,
        "model_name": "baseline_lora_model",
        "status": "finished",
        "is_current": True,
        "started": NOW,
        "ended": NOW,
        "stages": {},
        "params": {},
        "inputs": {},
        "backend_name": "llama_cpp",
        "backend_version": "0.3.36",
        "device_class": "cpu",
        "environment_id": 1,
        "test_items_sha256": sha("items"),
        **changes,
    }


def metric_values(**changes: Any) -> dict[str, Any]:
    return {
        "run_id": 1,
        "name": "m",
        "split": "test",
        "step": -1,
        "value": 1.0,
        "value_kind": "finite",
    } | changes


def sample_values(**changes: Any) -> dict[str, Any]:
    texts = dict.fromkeys(("item_id", "task", "split", "prompt", "truth", "answer"), "x")
    return {"run_id": 1, **texts, "correct": True, "credit": 1.0, **changes}


def speed_values(**changes: Any) -> dict[str, Any]:
    return {"run_id": 1, "arm": "base", "phase": "decode", "repetition": 0, "tokens": 1, **changes}


def probe_values(**changes: Any) -> dict[str, Any]:
    words = {"name": "angle", "layer": "", "unit": "degrees", "verdict": "pass", "diagnosis": "turned"}
    return {"run_id": 1, "step": -1, "value": 30.0, "value_kind": "finite", **words, **changes}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new folder" / "50% #1?.db"


@pytest.fixture
def filled(path: Path) -> Path:
    with open_session(path, write=True) as session:
        session.execute(insert(Environment), environment_values())
        session.execute(insert(Run), run_values())
    return path


def test_migrations_make_exactly_the_models(path: Path) -> None:
    with open_session(path, write=True) as session:
        context = MigrationContext.configure(session.connection(), opts={"compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
        rules = {
            (table.name, rule.name)
            for table in Base.metadata.tables.values()
            for rule in table.constraints
            if str(rule.name).startswith("ck_")
        }
        stored = " ".join(session.scalars(text("SELECT sql FROM sqlite_master WHERE type = 'table'")))
        assert len(rules) > 30
        assert [name for _, name in rules if f"CONSTRAINT {name} " not in stored] == []
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
        assert session.scalar(text("PRAGMA foreign_keys")) == 1


def test_known_revisions_are_alembics() -> None:
    config = Config()
    config.set_main_option("script_location", str(schema.MIGRATIONS))
    script = ScriptDirectory.from_config(config)
    assert tuple(r.revision for r in script.walk_revisions())[::-1] == schema.REVISIONS
    assert script.get_current_head() == schema.NEWEST


def test_times_are_stored_in_utc(filled: Path) -> None:
    with open_session(filled) as session:
        run = session.get_one(Run, 1)
        assert run.started == NOW and run.started.tzinfo is UTC
        assert session.scalar(text("SELECT started FROM run")) == "2026-11-20 22:00:00.000000"
    with pytest.raises(DatabaseError, match="time zone"), open_session(filled, write=True) as session:
        session.get_one(Run, 1).started = datetime(2026, 11, 21)
        session.flush()


@pytest.mark.parametrize(
    ("table", "row"),
    [
        (Run, run_values(id=2)),  # the run key again
        (Run, run_values(id=2, run_key=sha("2"))),  # a second current run of arm and seed
        (Run, run_values(id=2, run_key=sha("2"), is_current=False, status="done")),
        (Run, run_values(id=2, run_key=sha("2"), is_current=False, ended=NOW - timedelta(hours=1))),
        (Run, run_values(id=2, run_key=sha("2"), is_current=False, ended=None)),
        (Run, run_values(id=2, run_key="short", is_current=False)),
        (Run, run_values(id=2, run_key=sha("2"), seed=-1)),
        (Run, run_values(id=2, run_key=sha("2"), is_current=False, environment_id=9)),
        (Run, run_values(id=2, run_key=sha("2"), arm="base", reference_run_id=1)),
        (Run, run_values(id=2, run_key=sha("2"), seed=1, reference_run_id=2)),
        (Metric, metric_values(run_id=7)),
        (Metric, metric_values(value=None)),
        (Metric, metric_values(value_kind="nan")),
        (Metric, metric_values(value=None, value_kind="unknown")),
        (Metric, metric_values(value=float("inf"))),
        (Metric, metric_values(step=-2)),
        (Metric, metric_values(name="")),
        (Sample, sample_values(abs_error=-1.0)),
        (Sample, sample_values(credit=None)),
        (Sample, sample_values(credit=1.01)),
        (Run, run_values(id=2, run_key=sha("2"), seed=1, task="")),
        (Run, run_values(id=2, run_key=sha("2"), seed=1, primary_metric="")),
        (Sample, sample_values(prompt_tokens=-1)),
        (Sample, sample_values(item_id="")),
        (Speed, speed_values(phase="sleep")),
        (Speed, speed_values(nanoseconds=-5)),
        (
            Artifact,
            {"run_id": 1, "stage": "train", "kind": "toy", "path": "p", "sha256": sha("a"), "bytes": 1},
        ),
        (Probe, probe_values(verdict="fine")),
    ],
)
def test_rubbish_rows_are_refused(filled: Path, table: type[Base], row: dict[str, Any]) -> None:
    with pytest.raises(DatabaseError) as caught, open_session(filled, write=True) as session:
        session.execute(insert(table), row)
    assert isinstance(caught.value.__cause__, IntegrityError)


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO metric (run_id, name, split, step, value, value_kind) VALUES (1, 'm', 't', -1, 'abc', 'finite')",
        "INSERT INTO speed (run_id, arm, phase, repetition, tokens) VALUES (1, 'base', 'decode', 0, 'many')",
        "UPDATE run SET is_current = 2",
        "UPDATE run SET seed = 'zero'",
    ],
)
def test_text_in_number_columns_is_refused(filled: Path, sql: str) -> None:
    with pytest.raises(DatabaseError, match="constraint"), open_session(filled, write=True) as session:
        session.execute(text(sql))


def test_the_same_metric_twice_is_refused_and_nothing_of_it_stays(filled: Path) -> None:
    with pytest.raises(DatabaseError, match="UNIQUE"), open_session(filled, write=True) as session:
        session.execute(insert(Metric), metric_values())
        session.execute(insert(Metric), metric_values(value=2.0))
    with open_session(filled) as session:
        assert session.scalar(select(func.count()).select_from(Metric)) == 0


def test_rows_of_a_run_go_with_it(filled: Path) -> None:
    with open_session(filled, write=True) as session:
        for table, row in ((Metric, metric_values()), (Sample, sample_values()), (Speed, speed_values())):
            session.execute(insert(table), row)
        session.execute(insert(Probe), probe_values())
        session.execute(delete(Run))
        for table in (Metric, Sample, Speed, Probe):
            assert session.scalar(select(func.count()).select_from(table)) == 0


def test_probe_summary_lets_one_failure_decide(filled: Path) -> None:
    with open_session(filled, write=True) as session:
        for layer, verdict, value in (("a", "pass", 30.0), ("b", "pass", 10.0), ("c", "fail", None)):
            kind = "nan" if value is None else "finite"
            row = probe_values(layer=layer, verdict=verdict, value=value, value_kind=kind)
            session.execute(insert(Probe), row)
    with open_session(filled) as session:
        (row,) = queries.view(session, "v_probe_summary")
    assert (row["verdict"], row["passed"], row["failed"], row["layers"]) == ("fail", 2, 1, 3)
    assert (row["lowest"], row["highest"], row["not_finite"]) == (10.0, 30.0, 1)


def test_an_exception_rolls_back(filled: Path) -> None:
    with pytest.raises(KeyError), open_session(filled, write=True) as session:
        session.execute(delete(Run))
        raise KeyError("the caller's own mistake passes through untranslated")
    with open_session(filled) as session:
        assert session.scalar(select(func.count()).select_from(Run)) == 1


def test_a_reader_cannot_write_and_leaves_no_trace(filled: Path) -> None:
    before = (filled.read_bytes(), filled.stat().st_mtime_ns)
    with open_session(filled) as session:
        assert session.scalars(select(Run.arm)).all() == ["baseline_lora"]
    with pytest.raises(DatabaseError, match="readonly"), open_session(filled) as session:
        session.execute(delete(Run))
    assert (filled.read_bytes(), filled.stat().st_mtime_ns) == before
    assert [p.name for p in filled.parent.iterdir()] == [filled.name]


def test_a_reader_sees_the_old_content_while_a_writer_works(filled: Path) -> None:
    with open_session(filled, write=True) as writer:
        writer.execute(delete(Run))
        with open_session(filled) as reader:
            assert reader.scalar(select(func.count()).select_from(Run)) == 1
    with open_session(filled) as reader:
        assert reader.scalar(select(func.count()).select_from(Run)) == 0


def test_a_locked_database_says_so(filled: Path) -> None:
    with open_session(filled, write=True) as session:
        session.execute(delete(Run))
        with pytest.raises(DatabaseError) as caught, open_session(filled, write=True, timeout_s=0.1):
            pass
    assert "locked" in caught.value.came and "wait" in caught.value.do


@pytest.fixture
def locked_folder() -> Iterator[Path]:
    """A folder that everybody may read and nobody write, with a database in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open_session(folder / "c.db", write=True) as session:
            session.execute(insert(Environment), environment_values())
        (folder / "c.db").chmod(0o444)
        folder.chmod(0o555)
        try:
            yield folder
        finally:
            folder.chmod(0o755)


def test_read_only_folder_can_be_read_and_refuses_writing_in_words(locked_folder: Path) -> None:
    with not_root():
        with open_session(locked_folder / "c.db") as session:
            assert session.scalars(select(Environment.device_class)).all() == ["cpu"]
        with (
            pytest.raises(DatabaseError) as caught,
            open_session(locked_folder / "c.db", write=True) as session,
        ):
            session.execute(delete(Environment))
        assert "permission" in caught.value.do
        with pytest.raises(DatabaseError), open_session(locked_folder / "sub" / "new.db", write=True):
            pass
    assert [p.name for p in locked_folder.iterdir()] == ["c.db"]


def test_a_full_disk_keeps_the_old_content(filled: Path) -> None:
    with pytest.raises(DatabaseError, match="full") as caught, open_session(filled, write=True) as session:
        session.execute(text("PRAGMA max_page_count = 1"))  # SQLite then stops at the present size
        rows = [sample_values(item_id=str(i), prompt="x" * 5000) for i in range(50)]
        session.execute(insert(Sample), rows)
    assert "free some space" in caught.value.do
    with open_session(filled) as session:
        assert session.scalar(select(func.count()).select_from(Sample)) == 0


def test_missing_foreign_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatabaseMissingError, match="dvc repro"), open_session(tmp_path / "none.db"):
        pass
    with pytest.raises(DatabaseMissingError, match="a folder"), open_session(tmp_path):
        pass
    (tmp_path / "text.db").write_text("hello " * 1000, encoding="utf-8")
    for write in (False, True):
        with pytest.raises(DatabaseError, match="rebuild"), open_session(tmp_path / "text.db", write=write):
            pass
    foreign = sqlite3.connect(tmp_path / "foreign.db")
    foreign.execute("CREATE TABLE recipes (id INTEGER)")
    foreign.close()
    for write in (False, True):
        with (
            pytest.raises(DatabaseError, match="recipes"),
            open_session(tmp_path / "foreign.db", write=write),
        ):
            pass
    sqlite3.connect(tmp_path / "empty.db").close()
    (tmp_path / "empty.db").touch()
    with pytest.raises(DatabaseMissingError, match="without tables"), open_session(tmp_path / "empty.db"):
        pass
    with pytest.raises(DatabaseError, match="correct the database's address"), open_session("nonsense://x"):
        pass


@pytest.mark.parametrize(("version", "words"), [("0000", "newer|know"), ("9999", "git pull")])
def test_unknown_schema_versions_name_the_command(filled: Path, version: str, words: str) -> None:
    with open_session(filled, write=True) as session:
        session.execute(text("UPDATE alembic_version SET version_num = :v"), {"v": version})
    for write in (False, True):
        with pytest.raises(SchemaVersionError, match=words), open_session(filled, write=write):
            pass


def test_older_schema_is_refused_to_readers_with_the_command(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current = schema.NEWEST
    monkeypatch.setattr(schema, "REVISIONS", (*schema.REVISIONS, "9999"))
    monkeypatch.setattr(schema, "NEWEST", "9999")
    with pytest.raises(SchemaVersionError, match=rf"older version {current}.*db\.cli ingest"), open_session(filled):
        pass


def test_a_database_in_memory_lives_for_the_block() -> None:
    with open_session("sqlite://", write=True) as session:
        session.execute(insert(Environment), environment_values())
        session.execute(insert(Run), run_values())
        assert len(queries.view(session, "evaluation_results")) == 1


def test_downgrade_removes_everything(path: Path) -> None:
    from alembic import command

    with open_session(path, write=True) as session:
        config = Config()
        config.set_main_option("script_location", str(schema.MIGRATIONS))
        config.attributes["connection"] = session.connection()
        command.downgrade(config, "base")
        left = session.scalars(text("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")).all()
        assert left == ["alembic_version"]


def test_commands(tmp_path: Path) -> None:
    tree, path = make_tree(tmp_path / "project"), tmp_path / "c.db"
    runner = CliRunner()
    where = ["--root", str(tree), "--db", str(path)]
    first = runner.invoke(app, ["ingest", *where, "--seed", "0"])
    assert (first.exit_code, first.output) == (0, "2 runs inserted, 0 updated, 0 unchanged, 0 retired\n")
    assert "3 runs inserted" in runner.invoke(app, ["rebuild", *where]).output
    checked = runner.invoke(app, ["check", "--db", str(path)])
    assert checked.exit_code == 0 and "sound" in checked.output and "300 rows" in checked.output
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA foreign_keys=OFF")
    raw.execute("DELETE FROM environment")
    raw.commit()
    raw.close()
    checked = runner.invoke(app, ["check", "--db", str(path)])
    assert checked.exit_code == 1 and "missing environment" in checked.output
    (tree / "scores/base/0/samples.jsonl").unlink()
    refused = runner.invoke(app, ["ingest", *where])
    assert refused.exit_code == 2 and "scores/base/0/samples.jsonl" in refused.output
    assert runner.invoke(app, ["check", "--db", str(tmp_path / "none.db")]).exit_code == 1
