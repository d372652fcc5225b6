"""Files of several tasks: what a rebuild may lose, what older files and databases say, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from db import IngestError, open_session, queries
from db.check import faults
from db.cli import app
from db.errors import TasksLostError
from db.ingest import ingest, rebuild
from db.models import Quantization, QuantizedSample, Run, Sample
from db.queries_compare import tasks_of_runs
from tests.db.result_tree import edit, make_tree
from tests.db.task_switches import to_alpaca, to_gsm8k
from tests.db.test_db_releases import content, downgrade, load
from tests.db.workers import content as digest
from tests.evaluation.task_tree import GSM8K


def test_a_rebuild_loses_no_task_unasked(tree: Path, three: Path) -> None:
    before = digest(three)
    where = ["--db", str(three), "--root", str(tree), "--seed", "0"]
    stopped = CliRunner().invoke(app, ["rebuild", *where])
    assert stopped.exit_code == 1 and "3 runs of task aqi, 3 runs of task gsm8k whose files are gone" in stopped.output
    assert "db.cli ingest" in stopped.output and "rebuild --yes" in stopped.output
    assert digest(three) == before
    done = CliRunner().invoke(app, ["rebuild", *where, "--yes"])
    assert done.exit_code == 0 and "note: 3 runs of task aqi, 3 runs of task gsm8k are lost" in done.output
    with open_session(three) as session:
        assert [task.name for task in tasks_of_runs(session)] == ["alpaca"] and faults(session) == []
    again = CliRunner().invoke(app, ["rebuild", *where])
    assert again.exit_code == 0 and "lost" not in again.output


@pytest.mark.parametrize("version", ["0001", "0002", "0003"])
def test_a_rebuild_over_an_older_version_loses_no_task_either(tree: Path, path: Path, version: str) -> None:
    load(version, path)
    rebuild(tree, path)  # the same task: superseded runs go, as ever
    path.unlink()
    load(version, path)
    to_gsm8k(tree)
    with pytest.raises(TasksLostError, match="4 runs of task aqi"):
        rebuild(tree, path, seeds=[0])
    assert len(content(path, "table")["run"]) == 4


def test_a_file_that_cannot_be_read_has_nothing_to_lose(tree: Path, three: Path) -> None:
    with three.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (three.stat().st_size - 4096))
    assert rebuild(tree, three, seeds=[0]).inserted == 3


def test_files_without_the_new_keys_are_of_aqi_and_right_or_wrong(tree: Path, path: Path) -> None:
    ingest(tree, path)
    with open_session(path) as session:
        assert set(session.execute(select(Run.task, Run.task_title, Run.primary_metric)).all()) == {
            ("aqi", "AQI accuracy", "aqi_category_accuracy")}  # fmt: skip
        for table in (Sample, QuantizedSample):
            assert {(c, v) for c, v in session.execute(select(table.correct, table.credit))} == {(True, 1), (False, 0)}
        assert {(a, c) for a, c in session.execute(select(Quantization.category_accuracy, Quantization.credit))} == {
            (0.7, 0.7)}  # fmt: skip


@pytest.mark.parametrize("version", ["0001", "0002", "0003"])
def test_an_older_version_gets_task_and_credit(path: Path, version: str) -> None:
    load(version, path)
    with open_session(path, write=True) as session:
        assert [(t.name, t.runs, t.current) for t in tasks_of_runs(session)] == [("aqi", 4, True)]
        assert {(c, v) for c, v in session.execute(select(Sample.correct, Sample.credit))} == {(True, 1), (False, 0)}
        assert all(row.credit == row.category_accuracy for row in session.scalars(select(Quantization)))
        assert all(row.credit == row.correct for row in session.scalars(select(QuantizedSample)))
        assert len(queries.view(session, "task_results")) == 4
        assert faults(session) == []


def test_the_newest_upgrade_can_be_taken_back(path: Path) -> None:
    load("0003", path)
    tables, views = content(path, "table"), content(path, "view")
    with open_session(path, write=True):
        pass
    with open_session(path, write=True) as session:
        downgrade(session, "0003")
    assert content(path, "table") == tables and content(path, "view") == views


def change_lines(path: Path, **changes: Any) -> None:
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), **changes}), *rest]) + "\n", encoding="utf-8")


@pytest.mark.parametrize("credit", [1.2, -0.1, float("nan"), "1", True])
@pytest.mark.parametrize("name", ["scores/pure_grit/0/samples.jsonl", "quantized/pure_grit/0/quantized_samples.jsonl"])
def test_credit_is_a_share(tree: Path, path: Path, name: str, credit: Any) -> None:
    to_alpaca(tree)
    change_lines(tree / name, credit=credit)
    with pytest.raises(IngestError, match=r"line 1.*credit"):
        ingest(tree, path, seeds=[0])


def test_numbers_that_contradict_each_other_are_named(tree: Path, path: Path) -> None:
    to_alpaca(tree)
    change_lines(tree / "scores/pure_grit/0/samples.jsonl", credit=1.0)
    told = " ".join(ingest(tree, path, seeds=[0]).skipped)
    assert "pure_grit/0: scores.json says 0.5" in told and "samples.jsonl says 0.5" in told
    change_lines(tree / "quantized/pure_grit/0/quantized_samples.jsonl", credit=1.0)
    with pytest.raises(IngestError, match=r"expected a mean credit of 0\.\d+ of type f16, as quantized\.json says"):
        ingest(tree, path, seeds=[0])


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({**GSM8K, "primary": "gsm8k_f1"}, "expected the primary metric gsm8k_f1 among those of split test, came"),
        ({**GSM8K, "name": ""}, "task.name"),
        ({"name": "gsm8k"}, "task.title"),
        (None, "task"),
    ],
)
def test_a_task_needs_its_name_title_and_primary_metric(tree: Path, path: Path, task: Any, words: str) -> None:
    to_gsm8k(tree)
    edit(tree / "scores/base/0/scores.json", task=task)
    with pytest.raises(IngestError, match=words):
        ingest(tree, path, seeds=[0])


def test_the_same_files_for_another_task_are_another_run(tmp_path: Path, path: Path) -> None:
    tree = make_tree(tmp_path / "project")
    ingest(tree, path)
    for scores in tree.glob("scores/*/*/scores.json"):
        edit(scores, task={"name": "mine", "title": "Mine", "primary": "aqi_category_accuracy"})
    assert ingest(tree, path).inserted == 3
