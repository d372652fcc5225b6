"""Tables and views as CSV and Parquet."""

import json
from functools import partial

import pandas as pd
import pytest
from typer.testing import CliRunner

from db import DatabaseError
from db.cli import app
from db.dump import export
from db.ingest import ingest
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


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_files_have_every_row_in_full(filled, tmp_path, form):
    counts = export(filled, tmp_path, form)
    assert counts == {name: len(rows) for name, rows in content(filled).items()}
    load = {"csv": partial(pd.read_csv, keep_default_na=False, na_values=[""]), "parquet": pd.read_parquet}[form]
    frames = {name: load(tmp_path / f"{name}.{form}") for name in counts}
    assert {name: len(frame) for name, frame in frames.items()} == counts
    bad = frames["metric"].query("name == 'loss' and value_kind != 'finite'")
    assert list(bad["value_kind"]) == ["nan"] and bad["value"].isna().all()
    hard = frames["sample"][frames["sample"]["answer"] == ANSWER].iloc[0]
    assert pd.isna(hard["predicted"]) and hard["prompt_tokens"] == 40 and hard["correct"]
    assert json.loads(frames["run"]["params"][1])["train"]["train"] == {"learning_rate": 0.001, "steps": 100}


def test_a_failed_export_leaves_the_old_files(filled, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export(filled, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    calls = []

    def full(frame, file, **_):
        calls.append(file)
        file.write_text("half")
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(DatabaseError, match="a writable folder at .*, got .*No space left on device"):
        export(filled, out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_faults_are_named_with_the_next_step(filled, tmp_path):
    def output(*options, code=1):
        done = CliRunner().invoke(app, ["export", *options])
        assert done.exit_code == code
        return done.output

    out, db = ["--out", str(tmp_path / "out")], ["--db", str(filled)]
    assert "no such file" in output("--db", str(tmp_path / "none.db"), *out)
    (tmp_path / "file").write_text("")
    assert "a writable folder at" in output(*db, "--out", str(tmp_path / "file"))
    assert f"{tmp_path}/out/spectrum.csv: 3 rows\n" in output(*db, *out, code=0)
