"""Tables and views as CSV and Parquet."""

import csv
import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from db import DatabaseError
from db.cli import app
from db.dump import export
from db.ingest import ingest
from db.tables import METADATA, VIEWS
from tests.db.asking import content
from tests.db.result_tree import write

ANSWER = '=1+1, "quoted"\r\nsecond line | 汉 "'


@pytest.fixture
def filled(tree, path):
    samples = tree / "scores/baseline_lora/0/samples.jsonl"
    first, rest = samples.read_text(encoding="utf-8").split("\n", 1)
    write(samples, json.dumps({**json.loads(first), "answer": ANSWER, "predicted": None}) + "\n" + rest)
    write(tree / "adapters/baseline_lora/0/loss_history.json", '[{"step": 1, "loss": NaN}, {"step": 2, "loss": 1.5}]')
    ingest(tree, path)
    return path


def as_text(value):
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, sort_keys=True)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return "" if value is None else str(value)


def test_csv_has_every_row_in_full(filled, tmp_path):
    counts = export(filled, tmp_path / "out")
    rows = content(filled)
    assert counts == {name: len(rows[name]) for name in (*sorted(METADATA.tables), *VIEWS)}
    for name in METADATA.tables:
        with (tmp_path / f"out/{name}.csv").open(encoding="utf-8", newline="") as file:
            read = list(csv.DictReader(file))
        assert read == [{key: as_text(value) for key, value in row.items()} for row in rows[name]], name
    text = (tmp_path / "out/run.csv").read_bytes()
    assert text.count(b"\r\n") == 4 and b",2026-11-21T03:00:00.123456+00:00," in text


def comparable(rows):
    """As SQLite has it, which in views knows neither times nor truth values, and in one order."""

    def plain(value):
        if isinstance(value, dict | list):
            return as_text(value)
        if pd.isna(value):
            return None
        if hasattr(value, "strftime"):
            return value.strftime("%Y-%m-%d %H:%M:%S.%f")
        return float(value) if isinstance(value, int) else value

    return sorted(repr([(key, plain(value)) for key, value in row.items()]) for row in rows)


def test_parquet_has_every_row_in_the_tables_types(filled, tmp_path):
    counts = export(filled, tmp_path, "parquet")

    def frame(name):
        return pd.read_parquet(tmp_path / f"{name}.parquet", dtype_backend="pyarrow")

    for name, rows in content(filled).items():
        assert len(frame(name)) == counts[name] > 0
        assert comparable(frame(name).to_dict("records")) == comparable(rows), name
    metric = frame("metric")
    bad = metric[(metric["name"] == "loss") & (metric["value_kind"] != "finite")]
    assert list(bad["value_kind"]) == ["nan"] and bad["value"].isna().all()
    (hard,) = frame("sample").query("answer == @ANSWER").to_dict("records")
    assert pd.isna(hard["predicted"]) and hard["prompt_tokens"] == 40 and hard["correct"] is True
    run, shown, checked = frame("run"), frame("task_results"), frame("verification")
    assert str(run["started"].dtype) == "timestamp[us, tz=UTC][pyarrow]"
    assert str(frame("costs")["model_gguf_bytes"].dtype) == "int64[pyarrow]"
    assert str(run["reference_run_id"].dtype) == "int64[pyarrow]" and run["reference_run_id"].isna().sum() == 1
    assert str(shown["delta_score"].dtype) == "double[pyarrow]" and str(shown["git_dirty"].dtype) == "bool[pyarrow]"
    assert str(checked["perturbed_noticed"].dtype) == "bool[pyarrow]"
    assert json.loads(run["params"][1])["train"]["train"] == {"learning_rate": 0.001, "steps": 100}


def test_a_failed_export_leaves_the_old_files(filled, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export(filled, out, "csv", ["metric", "speed"])
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    calls = []

    def full(file, *_):
        calls.append(file)
        file.write_text("half")
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("db.dump._write_csv", full)
    with pytest.raises(DatabaseError, match="a writable folder at .*, got .*No space left on device"):
        export(filled, out, "csv", ["metric", "speed"])
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_faults_are_named_with_the_next_step(filled, tmp_path):
    def output(*options, code=1):
        done = CliRunner().invoke(app, ["export", *options])
        assert done.exit_code == code
        return done.output

    out, db = ["--out", str(tmp_path / "out")], ["--db", str(filled)]
    assert "got 'metrics'. Name one of: artifact," in output(*db, *out, "--table", "metrics")
    assert "no such file" in output("--db", str(tmp_path / "none.db"), *out)
    (tmp_path / "file").write_text("")
    assert "a writable folder at" in output(*db, "--out", str(tmp_path / "file"))
    assert output(*db, *out, "--table", "spectrum", code=0) == f"{tmp_path}/out/spectrum.csv: 3 rows\n"
