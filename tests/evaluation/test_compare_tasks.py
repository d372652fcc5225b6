"""Several tasks in one database: each is compared by its own metric, and a new one replaces none."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy.stats import permutation_test
from typer.testing import CliRunner

from db.ingest import ingest
from db.records import AQI
from db.runs import Choice
from evaluation.compare_all import app
from evaluation.report.comparison import Primary, load_comparison
from evaluation.report.data import accuracy_table, as_csv, as_json, metrics, write_tracked
from evaluation.report.judgement import by_difference
from evaluation.statistics.seeds import crossed_interval
from tests.db.result_tree import make_tree
from tests.evaluation import page_report
from tests.evaluation.task_tree import ALPACA, ARMS, GSM8K, add_task, add_task_arm, clear, credits_of


@cache
def report(task=None):
    return load_comparison(page_report.report("tasks").database, Choice(task=task), detail=True)


def of(task=None):
    return report(task)


def run(*args, database=None):
    done = CliRunner().invoke(app, ["--db", str(database or page_report.report("tasks").database), *args])
    return done.exit_code, done.stdout, done.stderr


def test_the_task_on_disk_is_compared_and_any_other_by_name():
    assert of().primary == Primary("alpaca", "ROUGE-L", "alpaca_rouge_l") == of("alpaca").primary
    assert of("gsm8k").primary.title == "GSM8K exact match" and of("aqi").primary == Primary(
        AQI.name, AQI.title, AQI.primary
    )
    assert [row.arm for row in of("aqi").rows] == ["base", "baseline_lora"]
    assert [row.seeds for row in of("gsm8k").rows] == [(0,), (0, 1), (0, 1)]
    told = {row.arm: row.accuracy for row in of().rows}
    assert told["pure_grit"] == pytest.approx(100 * sum(credits_of("pure_grit", 0, 0.2)) / 60)


def test_a_task_that_left_the_disk_is_compared_as_when_it_was_there(tmp_path):
    ingest(make_tree(tmp_path / "project"), tmp_path / "c.db")
    before, after = load_comparison(tmp_path / "c.db"), of("aqi")
    assert (before.rows, before.outcomes, before.power) == (after.rows, after.outcomes, after.power)
    assert before.criteria == after.criteria and len(before.runs) == len(after.runs)
    new = [note for note in after.notes if note not in before.notes]
    assert len(new) == 1 and "alpaca" in new[0]
    assert not any("on disk" in note for note in (*before.notes, *of().notes))


def test_credit_of_one_seed_is_judged_by_flipped_signs():
    (against_base, lead) = next(row for row in of().rows if row.arm == "pure_grit").differences
    own, base = credits_of("pure_grit", 0, 0.2), credits_of("base", 0, 0.0)
    assert against_base.points.estimate == pytest.approx(100 * (sum(own) - sum(base)) / 60)
    assert not against_base.binary and (against_base.outcome, lead.outcome) == ("better", "undecided")
    assert "ahead of baseline_lora on these items" in by_difference(lead).reason
    assert against_base.p_value == pytest.approx(1 / 10_001), "no flip of 10,000 goes as far"
    assert against_base.gained == sum(a > b for a, b in zip(own, base, strict=True))
    low = next(row for row in of().rows if row.arm == "baseline_lora").differences[0]
    gaps = [a - b for a, b in zip(credits_of("baseline_lora", 0, 0.05), base, strict=True)]
    theirs = permutation_test((gaps,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=9999)
    assert low.p_value == pytest.approx(theirs.pvalue, abs=0.002)
    words = " ".join(of().notes)
    assert "credit from 0 to 1" in words


def test_keys_for_other_programs(tmp_path):
    """Only the air quality task keeps its older names."""
    _, _, arm = csv.DictReader(io.StringIO(as_csv(of())))
    assert (arm["task"], arm["primary_metric"]) == ("alpaca", "alpaca_rouge_l")
    assert float(arm["score_low"]) < float(arm["score"]) < float(arm["score_high"])
    old = next(csv.DictReader(io.StringIO(as_csv(of("aqi")))))
    assert old["task"] == "aqi" and old["aqi_accuracy"] and "score" not in old
    told = json.loads(as_json(of()))
    assert told["rows"][1]["metrics"]["test/alpaca_rouge_l"] == pytest.approx(told["rows"][1]["accuracy"] / 100)
    found = metrics(of())["pure_grit"]
    assert {"score", "delta_score", "delta_score_low", "score_against_baseline_lora_verdict"} <= found.keys()
    assert not [key for key in (*arm, *found) if "aqi" in key]
    assert "aqi_accuracy" in metrics(of("aqi"))["base"] and "score" not in metrics(of("aqi"))["base"]
    for name, title in ((None, "ROUGE-L with 95% intervals"), ("aqi", "AQI category accuracy with 95% intervals")):
        for line, row in zip(csv.DictReader(io.StringIO(accuracy_table(of(name)))), of(name).rows, strict=True):
            assert (line["arm"], float(line["score"]), line["title"]) == (row.arm, pytest.approx(row.accuracy), title)
    write_tracked(tmp_path / "metrics.json", tmp_path, report("gsm8k"))
    with (tmp_path / "train_loss.csv").open(encoding="utf-8") as lines:
        drawn = {(line["arm"], line["seed"]) for line in csv.DictReader(lines)}
    assert drawn == {(arm, seed) for arm in ARMS for seed in "01"}, "of the runs compared, not of those on the disk"


def test_all_tasks_in_one_table():
    rows = of().tasks
    assert rows == of("aqi").tasks, "whatever the task that is shown"
    expected = [(name, row) for name in ("alpaca", "gsm8k", "aqi") for row in of(name).rows]
    for row, (name, own) in zip(rows, expected, strict=True):
        assert (row.task, row.arm, row.current) == (name, own.arm, name == "alpaca")
        assert (row.accuracy, row.differences) == (own.accuracy, own.differences)
    outcomes = [row.outcome("baseline_lora") for row in (rows[0], rows[2], replace(rows[2], differences=()))]
    assert outcomes == ["", "better than base; undecided against baseline_lora",
                        "not comparable with base; not comparable with baseline_lora"]  # fmt: skip

    code, out, _ = run("--all-tasks")
    assert code == 0 and "(on disk)" in out and "GSM8K exact match" in out and "Success criteria" not in out
    records = json.loads(run("--format", "json")[1])["tasks"]
    assert [record["task"] for record in records] == [row.task for row in rows] and records[0]["verdict"] == ""
    assert "gsm8k (GSM8K exact match), aqi (AQI accuracy)" in run("--full")[1]


def test_an_unknown_task_is_refused_with_those_there_are():
    code, out, error = run("--task", "gsm8")
    assert code == 2 and not out
    assert "'gsm8'; did you mean 'gsm8k'?" in error
    assert "Available: alpaca, gsm8k, aqi" in error
    code, _, error = run("--task", "aqi", "--arm", "pure_grit")
    assert code == 2 and "Available: base, baseline_lora" in error, "arms are those of the task"


def test_credit_of_several_seeds_is_judged_over_seeds_and_items(tmp_path):
    add_task(tmp_path / "project", ALPACA, seeds=(0, 1, 2))
    ingest(tmp_path / "project", tmp_path / "c.db")
    comparison = load_comparison(tmp_path / "c.db")
    credit = np.array([credits_of("pure_grit", seed, 0.2) for seed in range(3)])
    base = np.array(credits_of("base", 0, 0.0))
    expected, p_value = crossed_interval(credit - base)
    row = comparison.rows[2]
    found = row.differences[0]
    assert (found.points, found.p_value) == (expected.scaled(100), p_value) and found.level == "seeds and items"
    assert (found.binary, found.gained) == (False, int((credit > base).sum()))
    assert row.accuracy_interval == crossed_interval(credit)[0].scaled(100)
    assert "standard deviation" in comparison.power[0].why


def test_runs_of_another_size_or_other_settings_are_left_out_with_a_note(tmp_path):
    root, file = tmp_path / "project", tmp_path / "c.db"
    add_task(root, GSM8K, binary=True, day=20, base="small")
    ingest(root, file)
    clear(root)
    add_task(root, GSM8K, seeds=(1, 2), binary=True, day=21, base="large")
    ingest(root, file)
    add_task_arm(root, GSM8K, "pure_grit", 2, credits_of("pure_grit", 2, 0.2), day=22, base="large", rate=0.01)
    ingest(root, file)
    clear(root)
    add_task(root, ALPACA, day=23)
    ingest(root, file)
    comparison = load_comparison(file, Choice(task="gsm8k"))
    assert [(row.arm, row.seeds) for row in comparison.rows] == [
        ("base", (0,)), ("baseline_lora", (1, 2)), ("pure_grit", (2,))]  # fmt: skip
    assert {row.arm: row.seeds for row in comparison.tasks if row.task == "gsm8k"}["pure_grit"] == (2,)
    told = "Finished runs of gsm8k left out: 1 of base, 1 of baseline_lora, 3 of pure_grit."
    assert comparison.notes[-1].startswith(told)
    assert not any("left out" in note for note in load_comparison(file).notes)
    # The table of all tasks says it too, whatever the task that is shown.
    assert told in " ".join(run("--all-tasks", database=file)[1].split())
