"""Measurements and logs that make no sense, and the rules of the tables that hold them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from db import DatabaseError, IngestError, open_session
from db.ingest import ingest
from db.models import LayerMetric, Spectrum
from tests.db.result_tree import make_tree, write
from tests.db.result_tree_layers import GRIT_LOG, LEDGER, make_logs, make_measured, measured_json, write_lines

MEASURED = "measured/baseline_lora/0/measured.json"
LEDGER_FILE, GRIT_FILE = "adapters/baseline_lora/0/probe_ledger.jsonl", "adapters/baseline_lora/0/grit_log.jsonl"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = make_tree(tmp_path / "project")
    make_measured(tree, "base")
    make_measured(tree, "baseline_lora")
    make_logs(tree, "baseline_lora")
    return tree


def number(name: str, split: str, value: Any) -> dict[str, Any]:
    return {"name": name, "split": split, "value": value, "n": None}


def layer(value: Any = 1.0, **changes: Any) -> dict[str, Any]:
    return {"name": "x", "split": "weights", "layer": "l", "value": value, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": [number("aqi_mae", "test", 1.0)]}, "numbers that scores.json has not, came aqi_mae of test"),
        ({"metrics": [number("x", "general", 1.0)] * 2}, "metrics ('x', 'general') given more than once"),
        ({"layers": [layer()] * 2}, "layers ('x', 'weights', 'l') given more than once"),
        ({"metrics": [number("x", "general", "1")]}, "metrics.0.value"),
        ({"layers": [layer(layer="")]}, "layers.0.layer"),
        ({"layers": [layer(True)]}, "layers.0.value"),
        ({"schema": 2}, "schema"),
        ({"seed": 1}, "arm, seed: expected baseline_lora/0 as in the path, came baseline_lora/1"),
        (
            {
                "metrics": [number("x", "hidden", 1.5)],
                "metric_defs": {"x": {"unit": "share", "direction": "none", "description": ""}},
            },
            "x is a share from 0 to 1, came 1.5",
        ),
    ],
)
def test_measurements_that_make_no_sense_are_refused(
    tree: Path, path: Path, changes: dict[str, Any], words: str
) -> None:
    write(tree / MEASURED, {**measured_json("baseline_lora", 0), **changes})
    with pytest.raises(IngestError) as refused:
        ingest(tree, path)
    assert f"{MEASURED}: " in str(refused.value) and words in str(refused.value)
    assert not path.exists()


@pytest.mark.parametrize(
    ("file", "lines", "words"),
    [
        (LEDGER_FILE, [*LEDGER, LEDGER[1]], "line 4: step 25 given more than once"),
        (LEDGER_FILE, [{"loss": 1.0}], "line 1: expected either a `step`"),
        (LEDGER_FILE, [{**LEDGER[1], "step": -1}], "line 1.step"),
        (LEDGER_FILE, [{"step": 1, "units": {"q": {"angle": "wide"}}}], "line 1.units.q.angle"),
        (GRIT_FILE, [{"step": 1, "kind": ""}], "line 1.kind"),
        (GRIT_FILE, [{"kind": "spectra"}], "line 1.step"),
        (GRIT_FILE, [{"step": 1, "kind": "spectra", "layers": {"q": {"r": 1.5}}}], "line 1.layers.q.r"),
        (GRIT_FILE, [{"step": 1, "kind": "spectra", "layers": {"q": {"eigenvalues_a": [None]}}}], "eigenvalues_a.0"),
    ],
)
def test_logs_that_make_no_sense_are_refused(tree: Path, path: Path, file: str, lines: list[Any], words: str) -> None:
    write_lines(tree / file, lines)
    with pytest.raises(IngestError) as refused:
        ingest(tree, path)
    assert f"{file}: " in str(refused.value) and words in str(refused.value)


def test_a_log_that_was_cut_off_is_named(tree: Path, path: Path) -> None:
    write(tree / GRIT_FILE, "".join(json.dumps(line) + "\n" for line in GRIT_LOG)[:-20])
    with pytest.raises(IngestError, match=f"{GRIT_FILE}: line 6: "):
        ingest(tree, path)


@pytest.mark.parametrize(
    ("table", "change"),
    [
        (LayerMetric, {"name": ""}),
        (LayerMetric, {"split": ""}),
        (LayerMetric, {"layer": ""}),
        (LayerMetric, {"step": -2}),
        (LayerMetric, {"value": None}),
        (LayerMetric, {"value_kind": "nan"}),
        (LayerMetric, {"value_kind": "big"}),
        (LayerMetric, {"value": math.inf}),
        (Spectrum, {"layer": ""}),
        (Spectrum, {"factor": "c"}),
        (Spectrum, {"step": -1}),
        (Spectrum, {"eigenvalues": []}),
        (Spectrum, {"eigenvalues": None}),
    ],
)
def test_the_tables_keep_their_rules(tree: Path, path: Path, table: Any, change: dict[str, Any]) -> None:
    rows: dict[Any, dict[str, Any]] = {
        LayerMetric: {"name": "n", "split": "s", "layer": "l", "step": 0, "value": 1.0, "value_kind": "finite"},
        Spectrum: {"layer": "l", "factor": "a", "step": 0, "eigenvalues": [1.0]},
    }
    ingest(tree, path)
    with open_session(path, write=True) as session:
        session.execute(insert(table), {"run_id": 1, **rows[table]})
    with pytest.raises(DatabaseError, match="rows that keep the rules"), open_session(path, write=True) as session:
        session.execute(insert(table), {"run_id": 2, **rows[table], **change})
    with pytest.raises(DatabaseError, match="UNIQUE"), open_session(path, write=True) as session:
        session.execute(insert(table), {"run_id": 1, **rows[table]})
