"""Measurements, numbers of layers and spectra on their way into the database."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db import open_session, queries
from db.ingest import ingest
from db.models import LayerMetric, Run, Spectrum
from db.queries_compare import Choice, chosen_runs
from db.rows_layers import GRIT_NUMBERS, MEANINGS, PROBE_NUMBERS, layer_name
from tests.db.result_tree import edit, make_arm, make_tree, write
from tests.db.result_tree_layers import (
    WRAPPED,
    Q,
    V,
    make_logs,
    make_measured,
)

MEASURED = "measured/baseline_lora/0/measured.json"
LEDGER_FILE, GRIT_FILE = "adapters/baseline_lora/0/probe_ledger.jsonl", "adapters/baseline_lora/0/grit_log.jsonl"


@pytest.fixture
def old_tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "project")


@pytest.fixture
def tree(old_tree: Path) -> Path:
    """The base and the baseline's first seed were measured; this seed has logs."""
    make_measured(old_tree, "base")
    make_measured(old_tree, "baseline_lora")
    make_logs(old_tree, "baseline_lora")
    return old_tree


def counts(summary: Any) -> tuple[int, int, int, int]:
    return summary.inserted, summary.updated, summary.unchanged, summary.retired


def run_of(session: Session, arm: str = "baseline_lora", seed: int = 0) -> Run:
    (run,) = (run for run in chosen_runs(session, Choice()) if (run.arm, run.seed) == (arm, seed))
    return session.get_one(Run, run.id)


def layers_of(session: Session, split: str) -> dict[tuple[str, str, int], float]:
    found = queries.layer_metrics(session, run_of(session).id, split)
    assert {row.split for row in found} <= {split}
    return {(row.name, row.layer, row.step): row.value for row in found}


def test_measurements_stand_beside_the_scores(tree: Path, path: Path) -> None:
    assert ingest(tree, path).skipped == ()
    with open_session(path) as session:
        ids = {r.arm: r.id for r in chosen_runs(session, Choice()) if r.seed == 0}
        found = queries.final_metrics(session, ids.values())
        arm, base = found[ids["baseline_lora"]], found[ids["base"]]
        assert (arm["general", "perplexity"].value, arm["general", "perplexity"].n) == (7.5, 4000)
        assert arm["weights", "update_norm"].value == 3.5 and arm["test", "aqi_category_accuracy"].value == 0.7
        assert ("weights", "update_norm") not in base and base["alignment", "alignment_index"].n == 120
        assert queries.metric_meanings(session)["update_norm"].description == "‖ΔW‖_F"
        assert "measure" in run_of(session).stages


def test_each_layer_has_its_numbers(tree: Path, path: Path) -> None:
    ingest(tree, path)
    with open_session(path) as session:
        assert layers_of(session, "weights") == {("update_norm", Q, -1): 2.5, ("update_norm", V, -1): 1.5}
        hidden = layers_of(session, "alignment")
        assert hidden["alignment_index", "layer 2", -1] == 0.2
        assert math.isnan(hidden["xie_beni", "layer 2", -1]), "null: it could not be computed"
        stored = session.scalars(select(LayerMetric.value_kind).where(LayerMetric.name == "xie_beni")).all()
        assert stored == ["nan"] * 2
        by_name = queries.layer_metrics(session, run_of(session).id, names=["angle", "update_norm"])
        assert {row.split for row in by_name} == {"probe", "weights"} and len(by_name) == 4


def test_the_ledger_gives_angles_over_steps(tree: Path, path: Path) -> None:
    ingest(tree, path)
    with open_session(path) as session:
        assert layers_of(session, "probe") == {
            ("cos_raw_inner", Q, 0): 1.0,
            ("angle", Q, 25): 26.5, ("cos_raw_step", Q, 25): 0.5, ("lr_ratio", Q, 25): 1.25,
            ("cos_raw_inner", Q, 25): 0.75,
            ("angle", V, 25): 13.25, ("cos_raw_step", V, 25): 0.25, ("lr_ratio", V, 25): 0.5,
            ("cos_raw_inner", V, 25): 0.5,
        }, "a number that there was not (null) makes no row"  # fmt: skip


def test_grits_log_gives_ranks_and_spectra(tree: Path, path: Path) -> None:
    ingest(tree, path)
    with open_session(path) as session:
        ranks = layers_of(session, "grit")
        assert (ranks["rank", Q, 0], ranks["kept_rank", Q, 0], ranks["effective_rank_a", Q, 0]) == (4, 4, 3.5)
        assert (ranks["rank", Q, 20], ranks["kept_rank_b", Q, 20]) == (3, 3), "the later record of a step stays"
        assert math.isnan(ranks["relative_change", Q, 20])
        final = {name: value for (name, layer, step), value in ranks.items() if (layer, step) == (Q, -1)}
        assert final == {"base_rank": 4, "rank": 3, "kept_rank_a": 3, "kept_rank_b": 2}
        assert ranks["samples", V, 0] == 0 and ("effective_rank_a", V, 0) not in ranks
        assert (ranks["condition_a", Q, 20], ranks["condition_g", Q, 20]) == (3, math.inf), "an eigenvalue is zero"
        spectra = {(s.layer, s.factor, s.step): s.eigenvalues for s in queries.spectra(session, run_of(session).id)}
        assert spectra == {
            (Q, "a", 0): (0.75, 0.5, 0.25, 0.125),
            (Q, "a", 20): (math.inf, 1.5, 0.5),
            (Q, "g", 20): (0.5, 0.25, 0.0),
        }, "largest first"
        assert queries.spectra(session, run_of(session, seed=1).id) == []
        meanings = queries.metric_meanings(session)
        assert meanings["angle"].unit == "degrees" and meanings["condition_g"].description.endswith("there")


def test_every_logged_name_has_a_meaning() -> None:
    assert set(MEANINGS) == {*PROBE_NUMBERS, *GRIT_NUMBERS.values()}


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (WRAPPED + Q, Q),
        (Q, Q),
        ("model." + Q, Q),
        ("base_model.model.transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
        ("layer 2", "layer 2"),
        ("base_model.model.lm_head", "lm_head"),
    ],
)
def test_layers_have_one_name_in_logs_and_measurements(name: str, short: str) -> None:
    assert layer_name(name) == short


def test_reading_again_changes_nothing(tree: Path, path: Path) -> None:
    ingest(tree, path)
    before = path.read_bytes()
    assert counts(ingest(tree, path)) == (0, 0, 3, 0)
    assert path.read_bytes() == before


@pytest.mark.parametrize("file", [MEASURED, LEDGER_FILE, GRIT_FILE])
def test_a_changed_file_is_read_again(tree: Path, path: Path, file: str) -> None:
    """All of them are part of what tells whether there is anything to do."""
    ingest(tree, path)
    content = (tree / file).read_text(encoding="utf-8")
    changed = content.replace("26.5", "27.5").replace("0.75, 0.5", "0.875, 0.5").replace('"value": 3.5', '"value": 4.5')
    assert changed != content
    write(tree / file, changed)
    assert counts(ingest(tree, path)) == (0, 1, 2, 0)
    with open_session(path) as session:
        run = run_of(session)
        now = [
            queries.final_metrics(session, [run.id])[run.id]["weights", "update_norm"].value,
            layers_of(session, "probe")["angle", Q, 25],
            queries.spectra(session, run.id)[0].eigenvalues[0],
        ]
        then = [3.5, 26.5, 0.75]
        place = [MEASURED, LEDGER_FILE, GRIT_FILE].index(file)
        assert [a != b for a, b in zip(now, then, strict=True)] == [i == place for i in range(3)]


def test_measuring_a_run_makes_no_new_run(old_tree: Path, path: Path) -> None:
    ingest(old_tree, path)
    make_measured(old_tree, "base")
    make_measured(old_tree, "baseline_lora")
    make_logs(old_tree, "baseline_lora")
    assert counts(ingest(old_tree, path)) == (0, 2, 1, 0)
    edit(old_tree / "measured/baseline_lora/0/run.json", params={"measure": {"bootstrap": 10}})
    assert counts(ingest(old_tree, path)) == (0, 1, 2, 0)
    with open_session(path) as session:
        assert session.scalar(select(func.count()).select_from(Run)) == 3


def test_older_results_have_neither(old_tree: Path, path: Path) -> None:
    summary = ingest(old_tree, path)
    assert summary.inserted == 3 and summary.skipped == ()
    with open_session(path) as session:
        assert [session.scalar(select(func.count()).select_from(t)) for t in (LayerMetric, Spectrum)] == [0, 0]


def test_measurements_of_an_older_adapter_are_left_out(tree: Path, path: Path) -> None:
    make_arm(tree, "baseline_lora", correct=[True] * 100)
    adapter = "adapters/baseline_lora/0/adapter_model.safetensors"
    edit(tree / "measured/baseline_lora/0/run.json", inputs={adapter: "0" * 64})
    (note,) = ingest(tree, path).skipped
    assert "without its stage measure" in note and f"used an older {adapter} than train made" in note
    with open_session(path) as session:
        assert layers_of(session, "weights") == {} and len(layers_of(session, "probe")) == 9


def test_measurements_against_an_older_base_are_left_out(tree: Path, path: Path) -> None:
    """Their differences are from numbers that nobody can see any more."""
    make_measured(tree, "base", metrics=[])
    (note,) = ingest(tree, path).skipped
    words = "without its stage measure, its stage measure used an older measured/base/0/measured.json than measure of"
    assert words in note
    make_measured(tree, "baseline_lora")
    assert ingest(tree, path).skipped == ()


def test_a_failed_measurement_leaves_the_run(tree: Path, path: Path) -> None:
    edit(tree / "measured/baseline_lora/0/run.json", status="failed", error="no memory")
    summary = ingest(tree, path)
    assert summary.inserted == 3
    assert summary.skipped == ("baseline_lora/0: without its stage measure, which is failed: no memory",)
