"""Tables and views as CSV and Parquet files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sqlalchemy import select, text
from typer.testing import CliRunner

from db import DatabaseError, export, open_session, queries
from db.cli import app
from db.columns import Base
from db.export import export as write_files
from db.export import names_of_all
from db.ingest import ingest
from tests.db.result_tree_layers import make_full_tree

ANSWER = 'two\r\nlines\rand "quotes", µ – 漢字 \u2028 , '


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything there is, with an answer that is hard to write and a name that has to be quoted."""
    root = make_full_tree(tmp_path_factory.mktemp("export") / "project")
    samples = root / "scores/baseline_lora/1/samples.jsonl"
    first, *others = samples.read_text(encoding="utf-8").splitlines()
    hard = json.dumps({**json.loads(first), "answer": ANSWER, "predicted": None, "abs_error": None})
    samples.write_text("\n".join([hard, *others]), encoding="utf-8")
    history = root / "adapters/baseline_lora/1/loss_history.json"
    history.write_text('[{"step": 10, "loss": NaN}, {"step": 20, "loss": Infinity}]', encoding="utf-8")
    ingest(root, root.parent / "c.db")
    return root.parent / "c.db"


def rows_of(path: Path, name: str) -> list[dict[str, Any]]:
    """A table or view through its own door, in the order of the export."""
    with open_session(path) as session:
        if name in queries.VIEWS:
            return queries.view(session, name)
        source = Base.metadata.tables[name]
        return [dict(row) for row in session.execute(select(source).order_by(*source.primary_key)).mappings()]


def plain(value: Any) -> Any:
    """A value as it is after a trip through a file, whatever type carried it."""
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, sort_keys=True)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return value


def comparable(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(str([(key, plain(value)) for key, value in row.items()]) for row in rows)


TIMES = {"v_leaderboard": ("started", "ended"), "v_attempts": ("last_started",)}
FLAGS = {
    "v_leaderboard": ("git_dirty",),
    "v_verification": ("perturbed_noticed",),
    "task_results": ("is_current", "is_latest"),
    "task_quantization": ("is_current",),
}


def as_typed(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """SQLite's views have lost what is a time and what is a truth value."""
    for row in rows:
        for key in TIMES.get(name, ()):
            row[key] = None if row[key] is None else pd.Timestamp(row[key], tz="UTC").to_pydatetime()
        for key in FLAGS.get(name, ()):
            row[key] = None if row[key] is None else bool(row[key])
    return rows


def test_parquet_reads_back_with_equal_content(path: Path, tmp_path: Path) -> None:
    counts = write_files(path, tmp_path, "parquet")
    assert list(counts) == names_of_all() and min(counts.values()) > 0, "every table and view has rows here"
    for name, count in counts.items():
        frame = pd.read_parquet(tmp_path / f"{name}.parquet", dtype_backend="pyarrow")
        assert len(frame) == count
        assert comparable(frame.to_dict("records")) == comparable(as_typed(name, rows_of(path, name))), name


def test_csv_reads_back_with_equal_content(path: Path, tmp_path: Path) -> None:
    counts = write_files(path, tmp_path)
    for name, count in counts.items():
        read = {"keep_default_na": False, "na_values": [""], "lineterminator": None, "encoding": "utf-8"}
        frame = pd.read_csv(tmp_path / f"{name}.csv", dtype="string", **read)
        assert len(frame) == count
        written = [
            {key: None if plain(value) in (None, "") else str(plain(value)) for key, value in row.items()}
            for row in as_typed(name, rows_of(path, name))
        ]
        assert comparable(frame.to_dict("records")) == comparable(written), name


def test_types_stay_with_gaps(path: Path, tmp_path: Path) -> None:
    write_files(path, tmp_path, "parquet")
    metric = pd.read_parquet(tmp_path / "metric.parquet", dtype_backend="pyarrow")
    bad = metric[(metric["name"] == "loss") & (metric["value_kind"] != "finite")]
    assert list(bad["value_kind"]) == ["nan", "inf"] and bad["value"].isna().all()
    sample = pd.read_parquet(tmp_path / "sample.parquet", dtype_backend="pyarrow")
    (hard,) = sample[sample["answer"] == ANSWER].to_dict("records")
    assert pd.isna(hard["predicted"]) and hard["prompt_tokens"] == 40 and hard["correct"] is True
    run = pd.read_parquet(tmp_path / "run.parquet", dtype_backend="pyarrow")
    assert str(run["started"].dtype) == "timestamp[us, tz=UTC][pyarrow]"
    assert str(run["reference_run_id"].dtype) == "int64[pyarrow]" and run["reference_run_id"].isna().sum() == 1
    assert json.loads(run["params"][1])["train"]["train"] == {"learning_rate": 0.001, "steps": 100}
    spectrum = pd.read_parquet(tmp_path / "spectrum.parquet")
    assert json.loads(spectrum["eigenvalues"][0]) == [0.75, 0.5, 0.25, 0.125]


def test_csv_is_written_in_full(path: Path, tmp_path: Path) -> None:
    """Whole numbers beside gaps stay whole, times have a zone, lines end as RFC 4180 says."""
    write_files(path, tmp_path, "csv", ["v_leaderboard", "run"])
    content = (tmp_path / "run.csv").read_bytes()
    assert content.count(b"\r\n") == 4 and b",2026-11-21T03:00:00.123456+00:00," in content
    references = pd.read_csv(tmp_path / "run.csv", dtype="string")["reference_run_id"]
    assert list(references.fillna("")) == ["", "1", "1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.csv", "v_leaderboard.csv"], "nothing else is left"


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_many_rows_are_written_in_pieces(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    whole = write_files(path, tmp_path / "whole", form)  # type: ignore[arg-type]
    monkeypatch.setattr(export, "_CHUNK_ROWS", 7)
    assert write_files(path, tmp_path / "pieces", form) == whole  # type: ignore[arg-type]
    read = pd.read_csv if form == "csv" else pd.read_parquet
    for name in whole:
        one, other = (read(tmp_path / folder / f"{name}.{form}") for folder in ("whole", "pieces"))
        pd.testing.assert_frame_equal(one, other)


def test_a_failed_export_leaves_the_old_files(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(path, tmp_path, "csv", ["metric", "speed"])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    write = export._write

    def full(session: Any, name: str, *rest: Any) -> int:
        if name == "speed":
            raise OSError(28, "No space left on device")
        return write(session, "sample" if name == "metric" else name, *rest)

    monkeypatch.setattr(export, "_write", full)
    with pytest.raises(DatabaseError, match="a folder that can be written at .*; came: No space left on device"):
        write_files(path, tmp_path, "csv", ["metric", "speed"])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_killed_export_does_not_stop_the_next(path: Path, tmp_path: Path) -> None:
    """Its folder is still there, and process ids come round again."""
    left = tmp_path / f".{os.getpid()}.partial"
    left.mkdir()
    (left / "run.csv").write_text("half")
    assert write_files(path, tmp_path, "csv", ["run"]) == {"run": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == [left.name, "run.csv"]


def test_faults_are_named_with_the_next_step(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*options: str) -> str:
        done = CliRunner().invoke(app, ["export", *options])
        assert done.exit_code == 1 and not (tmp_path / "out").exists()
        return done.output

    out, db = ["--out", str(tmp_path / "out")], ["--db", str(path)]
    assert "came: 'metrics'. Do: did you mean metric? Available: artifact," in said(*db, *out, "--table", "metrics")
    assert "name one of: artifact" in said(*db, *out, "--table", "#")
    assert "no such file" in said("--db", str(tmp_path / "none.db"), *out)
    (tmp_path / "file").write_text("")
    assert "a folder that can be written at" in said(*db, "--out", str(tmp_path / "file"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "use --format csv" in said(*db, *out, "--format", "parquet")


def test_the_command_says_what_it_wrote(path: Path, tmp_path: Path) -> None:
    where = ["--db", str(path), "--out", str(tmp_path), "--format", "parquet"]
    done = CliRunner().invoke(app, ["export", *where, "--table", "spectrum", "--table", "run"])
    assert done.exit_code == 0
    assert done.output.splitlines() == [f"{tmp_path}/spectrum.parquet: 3 rows", f"{tmp_path}/run.parquet: 3 rows"]


def test_nothing_is_changed_by_an_export(path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    write_files(path, tmp_path)
    assert path.read_bytes() == before
    with open_session(path) as session:
        assert session.scalar(text("SELECT COUNT(*) FROM run")) == 3


def test_postgresql_exports_the_same(path: Path, tmp_path: Path, postgres: str) -> None:
    ingest(path.parent / "project", postgres)
    assert write_files(path, tmp_path / "sqlite", "parquet") == write_files(postgres, tmp_path / "pg", "parquet")
    for name in names_of_all():
        one, other = (pd.read_parquet(tmp_path / folder / f"{name}.parquet") for folder in ("sqlite", "pg"))
        assert list(one.columns) == list(other.columns) and list(one.dtypes) == list(other.dtypes), name
        assert comparable(one.to_dict("records")) == comparable(other.to_dict("records")), name
