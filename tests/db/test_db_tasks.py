"""Several tasks in one database: the files of one replace those of another, the rows of both stay."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from db import open_session, queries
from db import queries_compare as compared
from db.check import faults
from db.ingest import ingest
from db.models import Run
from db.queries_compare import Choice, tasks_of_runs
from tests.db.result_tree import edit, sha
from tests.db.result_tree_layers import make_full_tree
from tests.db.task_switches import F16, Q8, everything, read, to_alpaca, to_gsm8k
from tests.evaluation.task_tree import GSM8K, add_task_arm, credits_of


def test_a_task_that_left_the_disk_is_read_as_it_was(tree: Path, path: Path) -> None:
    seen: dict[str, dict[str, Any]] = {}
    for name, switch in (("aqi", None), ("gsm8k", to_gsm8k), ("alpaca", to_alpaca)):
        if switch is not None:
            switch(tree)
        read(tree, path)
        with open_session(path) as session:
            assert faults(session) == []
            seen[name] = everything(session, Choice())
            assert seen[name] == everything(session, Choice(task=name)), "on disk: named or not is the same"
            for former, expected in seen.items():
                assert everything(session, Choice(task=former)) == expected
    assert [(run.task, run.arm, run.seed) for run in seen["aqi"]["runs"]] == [
        ("aqi", "base", 0), ("aqi", "baseline_lora", 0), ("aqi", "baseline_lora", 1)]  # fmt: skip
    assert all(seen["aqi"][part] for part in seen["aqi"] if part != "retained"), "every part takes part"
    credit = {value for own in seen["gsm8k"]["answers"].values() for value in own.values()}
    assert credit == {0.0, 1.0} and all(isinstance(value, float) for value in credit)
    run = next(run for run in seen["alpaca"]["runs"] if run.arm == "pure_grit")
    assert (run.task, run.task_title, run.primary_metric) == ("alpaca", "ROUGE-L", "alpaca_rouge_l")
    assert list(seen["alpaca"]["answers"][run.id].values()) == credits_of("pure_grit", 0, 0.2)
    assert {kind: list(own.values()) for kind, own in seen["alpaca"]["quantized"][run.id].items()} == {
        "f16": F16, "q8_0": Q8}  # fmt: skip


def test_tasks_are_listed_newest_first(three: Path) -> None:
    with open_session(three) as session:
        tasks = tasks_of_runs(session)
        assert [(t.name, t.title, t.primary_metric, t.current, t.runs) for t in tasks] == [
            ("alpaca", "ROUGE-L", "alpaca_rouge_l", True, 3),
            ("gsm8k", "GSM8K exact match", "gsm8k_exact_match", False, 3),
            ("aqi", "AQI accuracy", "aqi_category_accuracy", False, 3),
        ]
        assert [t.last.day for t in tasks] == [23, 22, 21] and all(t.last.tzinfo for t in tasks)
        assert compared.chosen_runs(session, Choice(task="nonsense")) == []
        assert compared.names_of_runs(session, "gsm8k") == (["base", "baseline_lora", "pure_grit"], [0], ["llama_cpp"])
        arms = {run.arm for run in compared.chosen_runs(session, Choice(arms=("pure_grit",), task="gsm8k"))}
        assert arms == {"base", "pure_grit"}
        seeds = {
            run.seed for run in compared.chosen_runs(session, Choice(arms=("baseline_lora",), seeds=(1,), task="aqi"))
        }
        assert seeds == {0, 1}, "the base has seed 0"


def test_no_runs_are_of_no_task(path: Path) -> None:
    with open_session(path, write=True) as session:
        assert tasks_of_runs(session) == [] and compared.chosen_runs(session, Choice()) == []


def test_a_task_that_comes_back_is_the_same_runs(tree: Path, path: Path) -> None:
    ingest(tree, path)
    with open_session(path) as session:
        before = everything(session, Choice())
    to_gsm8k(tree)
    summary = read(tree, path)
    assert (summary.inserted, summary.retired) == (3, 3)
    left = "3 runs of task aqi no longer on disk; `python -m evaluation.compare_all --task aqi` compares them"
    assert left in summary.skipped
    assert not any("no longer on disk" in note for note in read(tree, path).skipped), "said once"
    make_full_tree(tree)
    (tree / "scores/pure_grit/0/scores.json").unlink()
    (tree / "scores/pure_grit/0/run.json").unlink()
    summary = ingest(tree, path)
    assert (summary.inserted, summary.updated, summary.retired) == (0, 3, 3)
    with open_session(path) as session:
        assert everything(session, Choice()) == before and faults(session) == []


def test_while_one_task_replaces_another_neither_is_torn(tree: Path, path: Path) -> None:
    """The base is scored on the new task first; somebody reads the results in between."""
    ingest(tree, path)
    with open_session(path) as session:
        before = everything(session, Choice())
    add_task_arm(tree, GSM8K, "base", 0, credits_of("base", 0, 0.0, binary=True))
    summary = ingest(tree, path)
    assert any("several tasks are on disk (aqi, gsm8k)" in note for note in summary.skipped)
    with open_session(path) as session:
        assert [(run.task, run.arm) for run in compared.chosen_runs(session, Choice())] == [("gsm8k", "base")]
        assert everything(session, Choice(task="aqi")) == before
        assert [task.current for task in tasks_of_runs(session)] == [True, False]
        assert faults(session) == []
    to_gsm8k(tree)
    read(tree, path)
    with open_session(path) as session:
        assert everything(session, Choice(task="aqi")) == before
        base = session.scalars(select(Run.id).where(Run.arm == "base", Run.task == "aqi")).one()
        retired = session.scalars(select(Run.reference_run_id).where(Run.task == "aqi", Run.arm != "base"))
        assert set(retired) == {base}, "they have their base again"
        assert faults(session) == []


def test_of_a_former_task_the_latest_run_of_each_arm_and_seed_counts(tree: Path, path: Path) -> None:
    ingest(tree, path)
    edit(tree / "gguf/baseline_lora/1/run.json", params={"export": {"max_length": 512}})
    run = tree / "scores/baseline_lora/1/run.json"
    edit(run, started="2026-11-21T05:00:00+00:00", ended="2026-11-21T05:30:00+00:00")
    ingest(tree, path)
    # The base again, by another version of what runs it: its former self is what older runs refer to.
    scores = tree / "scores/base/0/scores.json"
    backend = json.loads(scores.read_text(encoding="utf-8"))["backend"]
    edit(scores, backend={**backend, "version": "9"})
    edit(tree / "scores/base/0/run.json", ended="2026-11-21T06:00:00+00:00")
    ingest(tree, path, seeds=[1])
    to_gsm8k(tree)
    read(tree, path)
    with open_session(path) as session:
        assert faults(session) == []
        base, first, second = compared.chosen_runs(session, Choice(task="aqi"))
        assert base.backend_version == "9"
        assert session.get_one(Run, second.id).params["export"]["export"]["max_length"] == 512
        assert session.get_one(Run, first.id).reference_run_id != base.id
        assert first.reference_run_id == second.reference_run_id == base.id, "held against the base that is shown"
        assert [task.runs for task in tasks_of_runs(session)] == [3, 5]
        rows = [row for row in queries.view(session, "task_results") if row["task"] == "aqi"]
        assert {row["run_id"] for row in rows if row["is_latest"]} == {base.id, first.id, second.id}


def test_runs_with_other_items_refer_to_no_base(tree: Path, path: Path) -> None:
    ingest(tree, path)
    edit(tree / "scores/base/0/scores.json", test_items_sha256=sha("other items"))
    run = json.loads((tree / "scores/base/0/run.json").read_text(encoding="utf-8"))
    edit(tree / "scores/base/0/run.json", inputs=run["inputs"] | {"data/test.jsonl": sha("other items")},
         ended="2026-11-21T06:00:00+00:00")  # fmt: skip
    ingest(tree, path)
    to_gsm8k(tree)
    read(tree, path)
    with open_session(path) as session:
        runs = compared.chosen_runs(session, Choice(task="aqi"))
        assert [run.reference_run_id for run in runs] == [None] * 3


def test_views_show_every_task(three: Path) -> None:
    with open_session(three) as session:
        shown = {(row["task"], row["arm"], row["seed"]): row for row in queries.view(session, "task_results")}
        assert len(shown) == 9
        aqi, grit = shown["aqi", "baseline_lora", 1], shown["alpaca", "pure_grit", 0]
        assert (aqi["value"], aqi["delta_base"], aqi["metric"], aqi["task_title"], aqi["direction"], aqi["n"]) == (
            pytest.approx(70), pytest.approx(30), "aqi_category_accuracy", "AQI accuracy", "higher", 100)  # fmt: skip
        own, base = (100 * sum(c) / len(c) for c in (F16, credits_of("base", 0, 0.0)))
        assert (grit["value"], grit["delta_base"]) == (pytest.approx(own), pytest.approx(own - base))
        assert (aqi["is_current"], grit["is_current"]) == (0, 1) and all(row["is_latest"] for row in shown.values())
        assert grit["timestamp"] == "2026-11-23T03:30:00.000000+00:00" and grit["retention_accuracy"] == 80
        assert shown["alpaca", "base", 0]["delta_base"] == 0
        rows = queries.view(session, "evaluation_results")
        assert {(row["aqi_accuracy"], row["delta_aqi"]) for row in rows} == {(None, None)} and len(rows) == 3
        assert all(row["inference_speed"] for row in rows)
        precisions = [row for row in queries.view(session, "task_quantization") if row["task"] == "alpaca"]
        mean = [100 * sum(c) / len(c) for c in (F16, Q8)]
        assert [row["value"] for row in precisions] == pytest.approx(mean)
        assert [row["delta_f16"] for row in precisions] == pytest.approx([0, mean[1] - mean[0]])
        old = queries.view(session, "v_quantization")
        assert [row["aqi_accuracy"] for row in old] == [None, None]
        assert [row["delta_f16"] for row in old] == pytest.approx([0, mean[1] - mean[0]])


DAMAGES = {
    "UPDATE sample SET credit = 0 WHERE run_id = (SELECT max(id) FROM run) AND item_id = 'alpaca-000000'": (
        "(pure_grit/0): alpaca_rouge_l is "
    ),
    "UPDATE sample SET credit = 0 WHERE run_id = 2 AND item_id = 'aqi-000000'": (
        "run 2 (baseline_lora/0): aqi_category_accuracy is 0.7, but the mean credit of its 100 test items is 0.69"
    ),
    "UPDATE quantized_sample SET credit = 0 WHERE type = 'q8_0' AND item_id = 'alpaca-000000'": (
        "(pure_grit/0): q8_0 has a mean credit of"
    ),
    "UPDATE run SET reference_run_id = 1 WHERE task = 'alpaca' AND arm = 'pure_grit'": (
        "(pure_grit/0) is held against run 1 (base/0), which is no current base with the same items and backend"
    ),
    "UPDATE run SET reference_run_id = 1 WHERE task = 'gsm8k' AND arm = 'pure_grit'": (
        "(pure_grit/0) is held against run 1 (base/0), which is no base with the same items and backend"
    ),
    "UPDATE run SET task = 'dolly' WHERE task = 'alpaca' AND arm = 'base'": "which is no current base with the same",
    "DROP VIEW task_results": "the view task_results is missing",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_whatever_the_task(three: Path, damage: str) -> None:
    with open_session(three) as session:
        assert faults(session) == []
    raw = sqlite3.connect(three)
    raw.execute(damage)
    raw.commit()
    raw.close()
    with open_session(three) as session:
        assert DAMAGES[damage] in " | ".join(faults(session))
