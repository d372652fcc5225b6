"""What DVC shows is what the comparison says."""

import csv
import json
import math
from dataclasses import replace

import pytest

from db.ingest import ingest
from evaluation.comparison import load_comparison
from evaluation.tracked import metrics, write_tracked
from tests.db.result_tree import make_tree


@pytest.fixture
def database(tmp_path):
    ingest(make_tree(tmp_path / "project"), tmp_path / "c.db")
    return tmp_path / "c.db"


def lines(file):
    with file.open(encoding="utf-8") as source:
        return list(csv.DictReader(source))


def test_numbers_are_those_of_the_comparison(database):
    comparison = load_comparison(database)
    found = metrics(comparison)
    assert list(found) == [row.arm for row in comparison.rows]
    for row in comparison.rows:
        assert found[row.arm]["aqi_accuracy"] == row.accuracy
        for d in row.differences:
            name = "delta_aqi" if d.against == "base" else f"aqi_against_{d.against}"
            assert (found[row.arm][f"{name}_low"], found[row.arm][f"{name}_verdict"]) == (d.points.low, d.verdict)
    assert "delta_aqi" not in found["base"]


def test_what_is_missing_or_not_finite_is_left_out(database):
    comparison = load_comparison(database)
    row = replace(comparison.rows[1], retention=None, decode_speed=math.nan)
    found = metrics(replace(comparison, rows=(row,)))[row.arm]
    assert "retention_accuracy" not in found and "decode_speed" not in found and "aqi_accuracy" in found


def test_files(database, tmp_path):
    comparison = load_comparison(database)
    plots = tmp_path / "plots"
    plots.mkdir()
    write_tracked(tmp_path / "metrics.json", plots, database, comparison)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics(comparison)
    accuracy = {line["arm"]: line for line in lines(plots / "accuracy.csv")}
    for row in comparison.rows:
        bounds = (row.accuracy_interval.low, row.accuracy_interval.high)
        assert (float(accuracy[row.arm]["low"]), float(accuracy[row.arm]["high"])) == pytest.approx(bounds)
    assert len(lines(plots / "differences.csv")) == sum(len(row.differences) for row in comparison.rows) > 0
    logged = {(line["arm"], line["step"]) for line in lines(plots / "train_loss.csv")}
    history = json.loads((tmp_path / "project/adapters/baseline_lora/0/loss_history.json").read_text())
    assert logged >= {
        ("baseline_lora", str(int(e["step"]))) for e in history if math.isfinite(e.get("loss") or math.nan)
    }
