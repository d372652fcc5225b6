"""Verdicts on their way from verdict.json into the database, the view and the comparison."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from sqlalchemy import func, select

from db import queries
from db.errors import IngestError
from db.ingest import ingest
from db.models import Probe, Run
from db.queries_compare import Choice, chosen_runs
from db.session import open_session
from evaluation.compare_all import load_comparison
from evaluation.report import as_csv, as_markdown, cells
from tests.db.result_tree import edit, make_arm, make_tree, verdict_json, write


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = make_tree(tmp_path / "project")
    make_arm(tree, "pure_grit", correct=[i < 75 for i in range(100)])
    return tree


READINGS = verdict_json("pure_grit", 0)["readings"]


def verdict_file(tree: Path, arm: str = "pure_grit") -> Path:
    return tree / "verdicts" / arm / "0" / "verdict.json"


def test_every_reading_reaches_the_table(tree: Path, tmp_path: Path) -> None:
    assert ingest(tree, tmp_path / "c.db").skipped == ()
    with open_session(tmp_path / "c.db") as session:
        runs = {(run.arm, run.seed): session.get_one(Run, run.id) for run in chosen_runs(session, Choice())}
        assert session.scalar(select(func.count()).select_from(Probe)) == 3 * 4
        pure = queries.probe_readings(session, [runs["pure_grit", 0].id])[runs["pure_grit", 0].id]
        assert pure["verdict"] == queries.Reading(1.0, "pass", "effective: none: because")
        assert math.isinf(pure["twin_divergence"].value) and pure["angle_to_shadow"].value == 26.5
        assert "layer_angle" not in pure, "readings of one layer are not those of the run"
        summary = {(row["arm"], row["seed"], row["probe"]): row for row in queries.view(session, "v_probe_summary")}
        assert summary["pure_grit", 0, "verdict"]["verdict"] == "pass"
        assert summary["pure_grit", 0, "twin_divergence"]["not_finite"] == 1
        assert {row["probe"] for row in summary.values()} >= {"verdict", "angle_to_shadow", "layer_angle"}
        assert "probe" in runs["pure_grit", 0].stages and "probe" not in runs["base", 0].stages


def test_a_changed_verdict_replaces_the_old_one(tree: Path, tmp_path: Path) -> None:
    ingest(tree, tmp_path / "c.db")
    said = verdict_json("pure_grit", 0)
    said["readings"][0] |= {"value": 0.0, "verdict": "fail", "diagnosis": "no_effect: scalar_preconditioner: c·I"}
    write(verdict_file(tree), {**said, "verdict": "no_effect", "as_claimed": False})
    summary = ingest(tree, tmp_path / "c.db")
    assert (summary.inserted, summary.updated) == (0, 1)
    with open_session(tmp_path / "c.db") as session:
        assert session.scalar(select(func.count()).select_from(Probe)) == 3 * 4
    comparison = load_comparison(tmp_path / "c.db")
    row = next(row for row in comparison.rows if row.arm == "pure_grit")
    assert row.updates == "no_effect!" and row.probes[0].reason == "scalar_preconditioner: c·I"
    assert any("pure_grit seed 0: no_effect: scalar_preconditioner" in note for note in comparison.notes)


def test_the_comparison_shows_what_the_optimizers_did(tree: Path, tmp_path: Path) -> None:
    ingest(tree, tmp_path / "c.db")
    comparison = load_comparison(tmp_path / "c.db")
    assert [cells(row)[-1] for row in comparison.rows] == ["–", "plain AdamW", "effective"]
    text = as_markdown(comparison)
    section = text.split("## What the optimizers did")[1].split("## ")[0]
    assert "| pure_grit | 0 | effective | 26.5 |" in section and "not finite" in section
    assert section.count("equals_shadow") == 2
    assert as_csv(comparison).splitlines()[-1].endswith(",effective")


def test_results_without_a_verdict_stay_readable_and_say_so(tree: Path, tmp_path: Path) -> None:
    for file in verdict_file(tree).parent.iterdir():
        file.unlink()
    summary = ingest(tree, tmp_path / "c.db")
    assert summary.inserted == 4
    assert [note for note in summary.skipped if "verdict" in note] == [
        "pure_grit/0: no verdict.json, so nothing shows what the optimizer did"
    ]
    assert next(r for r in load_comparison(tmp_path / "c.db").rows if r.arm == "pure_grit").updates == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verdict": "fine"}, "effective"),
        ({"arm": "hybrid_grit"}, "expected pure_grit/0"),
        ({"readings": [*READINGS, READINGS[0]]}, "more than once"),
        ({"readings": [{**READINGS[0], "value": "much"}]}, "value"),
        ({"readings": [{**READINGS[0], "step": -2}]}, "step"),
    ],
)  # fmt: skip
def test_a_verdict_that_makes_no_sense_is_refused_by_name(tree: Path, tmp_path: Path, changes, message) -> None:
    edit(verdict_file(tree), **changes)
    with pytest.raises(IngestError, match=message) as refused:
        ingest(tree, tmp_path / "c.db")
    assert "verdict.json" in str(refused.value)
    assert not (tmp_path / "c.db").exists()


def test_a_verdict_on_an_older_adapter_is_stale(tree: Path, tmp_path: Path) -> None:
    run = verdict_file(tree).with_name("run.json")
    name = "adapters/pure_grit/0/adapter_model.safetensors"
    edit(run, inputs={**json.loads(run.read_text(encoding="utf-8"))["inputs"], name: "0" * 64})
    assert any("its stage probe used an older" in note for note in ingest(tree, tmp_path / "c.db").skipped)
