"""Databases from before there were precisions and verifications, and the rules of the tables that hold these."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, select, text

from db import DatabaseError, open_session, queries, schema
from db.engine import make_engine, resolve_url
from db.ingest import ingest, rebuild
from db.models import Quantization, QuantizedSample, Run, Sample, Speed, Verification
from db.queries_compare import Choice, chosen_runs
from tests.db.result_tree import make_arm, make_quantized, make_tree, make_verified, precision, sha, verification

F16, Q8, Q4 = [i < 70 for i in range(100)], [1 < i < 70 for i in range(100)], [i < 60 for i in range(100)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The baseline's first seed was quantized and verified."""
    tree = make_tree(tmp_path / "project")
    make_quantized(tree, "baseline_lora", rows={"f16": (F16, 1.0), "q8_0": (Q8, 0.9), "q4_K_M": (Q4, 0.5)})
    checked = [("llama_cpp", "merged"), ("llama_cpp", "adapter"), ("ollama", "merged")]
    make_verified(tree, "baseline_lora", rows=[verification(*what) for what in checked])
    return tree


def counts(summary: Any) -> tuple[int, int, int, int]:
    return summary.inserted, summary.updated, summary.unchanged, summary.retired


def make_0001(path: Path) -> None:
    """A database as the first release left it: its own tables, two runs, and rows in the tables that change."""
    engine = make_engine(resolve_url(path), write=True)
    with engine.connect() as connection:
        schema.upgrade(connection, str(path), "0001")
        connection.execute(
            text("INSERT INTO environment (id, key, device_class, packages) VALUES (1, :key, 'cpu', '{}')"),
            {"key": sha("environment")},
        )
        for number, (arm, backend) in enumerate([("base", "hf"), ("baseline_lora", "hf"), ("pure_grit", "llama_cpp")]):
            connection.execute(
                text(
                    "INSERT INTO run (id, run_key, source_sha256, arm, seed, model_name, status, is_current, started,"
                    " ended, stages, params, inputs, backend_name, backend_version, device_class, environment_id,"
                    " test_items_sha256) VALUES (:id, :key, :key, :arm, 0, :arm, 'finished', 1,"
                    " '2026-11-21 01:00:00.000000', '2026-11-21 02:00:00.000000', '{}', '{}', '{}', :backend, '1',"
                    " 'cpu', 1, :key)"
                ),
                {"id": number + 1, "key": sha(arm), "arm": arm, "backend": backend},
            )
            for phase in ("load", "prefill", "decode"):
                connection.execute(
                    text("INSERT INTO speed (id, run_id, arm, phase, repetition, tokens, nanoseconds)"
                         " VALUES (:id, :run, :arm, :phase, 0, 10, 1000000000)"),
                    {"id": 10 * number + len(phase), "run": number + 1, "arm": arm, "phase": phase},
                )  # fmt: skip
            connection.execute(
                text("INSERT INTO sample (run_id, item_id, task, split, prompt, truth, answer, correct)"
                     " VALUES (:run, 'i', 'aqi', 'test', 'p', 't', 'a', 1)"),
                {"run": number + 1},
            )  # fmt: skip
        connection.commit()
    engine.dispose()


def all_rows(path: Path, tables: tuple[str, ...]) -> dict[str, list[Any]]:
    connection = sqlite3.connect(path)
    try:
        return {table: connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in tables}
    finally:
        connection.close()


OLD_TABLES = ("environment", "speed", "sample", "v_leaderboard", "evaluation_results")


def test_an_older_database_is_upgraded_without_loss(path: Path) -> None:
    make_0001(path)
    before, runs = all_rows(path, OLD_TABLES), all_rows(path, ("run",))["run"]
    assert len(before["speed"]) == 9 and len(before["v_leaderboard"]) == 3
    with open_session(path, write=True) as session:
        session.execute(insert(Speed), {"run_id": 3, "arm": "pure_grit", "phase": "ttft", "repetition": 0})
        session.rollback()
    assert all_rows(path, OLD_TABLES) == before, "an upgrade that is not committed has not been"
    with open_session(path, write=True):
        pass
    after = all_rows(path, (*OLD_TABLES, "run"))
    grown = {"run": runs, "sample": before.pop("sample")}
    for table, rows in grown.items():
        assert [row[: len(rows[0])] for row in after[table]] == rows, "new columns stand behind the old ones"
    assert {table: after[table] for table in before} == before, "the others have no new ones"
    assert [row[len(grown["sample"][0]) :] for row in after["sample"]] == [(1.0,)] * 3, "credit of right answers"
    with open_session(path, write=True) as session:
        assert session.scalar(text("SELECT version_num FROM alembic_version")) == schema.NEWEST
        assert {r.arm: r.serving_mode for r in chosen_runs(session, Choice())} == {
            "base": "merged", "baseline_lora": "adapter", "pure_grit": "merged"}  # fmt: skip
        session.execute(insert(Speed), {"run_id": 3, "arm": "pure_grit", "phase": "ttft", "repetition": 0})
        assert session.scalar(select(func.count()).select_from(Sample)) == 3
        assert queries.view(session, "v_quantization") == []


def test_results_are_read_into_an_older_database(path: Path, tree: Path) -> None:
    make_0001(path)
    make_arm(tree, "pure_grit", correct=F16)
    assert counts(ingest(tree, path)) == (4, 0, 0, 3)
    with open_session(path) as session:
        tables = (Quantization, QuantizedSample, Verification)
        assert [session.scalar(select(func.count()).select_from(table)) for table in tables] == [3, 300, 3]
        assert session.scalar(select(func.count()).select_from(Run)) == 7, "older runs stay"
    assert counts(rebuild(tree, path)) == (4, 0, 0, 0)


def test_the_upgrade_can_be_taken_back(path: Path) -> None:
    from alembic import command
    from alembic.config import Config

    make_0001(path)
    before = all_rows(path, OLD_TABLES)
    with open_session(path, write=True) as session:
        session.execute(insert(Speed), {"run_id": 3, "arm": "pure_grit", "phase": "ttft", "repetition": 0})
    with open_session(path, write=True) as session:
        config = Config()
        config.set_main_option("script_location", str(schema.MIGRATIONS))
        config.set_main_option("path_separator", "os")
        config.attributes["connection"] = session.connection()
        command.downgrade(config, "0001")
    assert all_rows(path, OLD_TABLES) == before
    connection = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="ck_speed_phase"):
        connection.execute("INSERT INTO speed (run_id, arm, phase, repetition) VALUES (1, 'base', 'ttft', 0)")
    connection.close()


@pytest.mark.parametrize(
    ("table", "change"),
    [
        (Quantization, {"type": ""}),
        (Quantization, {"correct": 101}),
        (Quantization, {"category_accuracy": 1.1}),
        (Quantization, {"bits_per_weight": 0.0}),
        (Quantization, {"type": "f16"}),
        (Verification, {"mode": "both"}),
        (Verification, {"answered": None}),
        (Verification, {"rendered": 1.01}),
        (Verification, {"prompts": 0}),
        (Verification, {"prompts": 0, "answered": None, "rendered": None}),
        (Verification, {"prompts": 0, "answered": None, "counted": None}),
        (Verification, {"gguf_sha256": "abc"}),
        (Quantization, {"credit": None}),
        (Quantization, {"credit": -0.01}),
        (QuantizedSample, {"credit": None}),
        (QuantizedSample, {"credit": 1.01}),
        (QuantizedSample, {"answer": None}),
        (QuantizedSample, {"item_id": ""}),
    ],
)
def test_the_tables_keep_their_rules(path: Path, table: Any, change: dict[str, Any]) -> None:
    rows = {
        Quantization: precision("q8_0", Q8, 0.9),
        Verification: verification("llama_cpp", "adapter"),
        QuantizedSample: {"type": "q8_0", "item_id": "i", "correct": True, "answer": "a", "credit": 1.0},
    }
    rows[Quantization]["credit"] = 0.68
    make_0001(path)
    with open_session(path, write=True) as session:
        session.execute(insert(table), {"run_id": 1, **rows[table]})
    with pytest.raises(DatabaseError, match="rows that keep the rules"), open_session(path, write=True) as session:
        session.execute(table.__table__.insert(), {"run_id": 2, **rows[table], **change})
    with pytest.raises(DatabaseError, match="UNIQUE"), open_session(path, write=True) as session:
        session.execute(insert(table), {"run_id": 1, **rows[table]})
