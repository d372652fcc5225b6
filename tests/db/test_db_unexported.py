"""Results of models that were scored as training left them, without an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from result_tree import ITEMS, edit, make_tree, run_json, sha, write

from db import IngestError, open_session
from db.ingest import ingest
from db.models import Run
from db.queries_compare import Choice, chosen_runs
from evaluation.compare_all import load_comparison
from evaluation.page import write_page
from evaluation.report_markdown import as_markdown

BASE_JSON = "models/base/base.json"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """As `make_tree`, but base and adapter were scored beside each other."""
    root = make_tree(tmp_path / "project")
    shutil.rmtree(root / "gguf")
    for scores in sorted(root.glob("scores/*/*")):
        arm, seed = scores.parts[-2:]
        backend = {"name": "hf", "version": "5.17.0", "device_class": "cpu"}
        edit(
            scores / "scores.json",
            exported=False,
            backend={**backend, "mode": "merged" if arm == "base" else "adapter"},
        )
        used = {"data/test.jsonl": ITEMS, BASE_JSON: sha("base.json")}
        if arm != "base":
            used[f"adapters/{arm}/{seed}/adapter_model.safetensors"] = sha(f"adapter {arm}/{seed}")
        write(scores / "run.json", run_json("evaluate", arm, int(seed), inputs=used))
    return root


def test_no_export_is_asked_for_and_a_note_says_so_once(tree: Path, path: Path) -> None:
    summary = ingest(tree, path)
    assert summary.inserted == 3
    labels = "base/0, baseline_lora/0, baseline_lora/1"
    assert summary.skipped == (f"{labels}: scored as training left them, so there is no export to check",)
    with open_session(path) as session:
        runs = {(run.arm, run.seed): session.get_one(Run, run.id) for run in chosen_runs(session, Choice())}
        assert {run.base_key for run in runs.values()} == {sha("base.json")}
        assert {key: run.serving_mode for key, run in runs.items()} == {
            ("base", 0): "merged", ("baseline_lora", 0): "adapter", ("baseline_lora", 1): "adapter",
        }  # fmt: skip
        assert runs["baseline_lora", 1].reference_run_id == runs["base", 0].id
        assert set(runs["baseline_lora", 0].stages) == {"train", "probe", "evaluate"}


def test_scores_of_an_adapter_that_was_trained_anew_are_left_out(tree: Path, path: Path) -> None:
    file = tree / "adapters/baseline_lora/1/run.json"
    content = json.loads(file.read_text())
    content["artifacts"][0]["sha256"] = sha("another adapter")
    edit(file, artifacts=content["artifacts"])
    shutil.rmtree(tree / "verdicts/baseline_lora/1")
    summary = ingest(tree, path)
    assert summary.inserted == 2
    why = "its stage evaluate used an older adapters/baseline_lora/1/adapter_model.safetensors than train made"
    assert f"baseline_lora/1: skipped, {why}; run `dvc repro`" in summary.skipped


def test_an_export_that_scores_rest_on_is_still_asked_for(tree: Path, path: Path) -> None:
    edit(tree / "scores/baseline_lora/0/scores.json", exported=True)
    with pytest.raises(IngestError, match=r"gguf/baseline_lora/0/run\.json: expected this file beside the others"):
        ingest(tree, path)


def test_what_lies_in_gguf_of_another_pipeline_is_not_read(tree: Path, path: Path) -> None:
    write(tree / "gguf/baseline_lora/0/run.json", "no JSON")
    write(tree / "gguf/baseline_lora/0/parity.json", "no JSON")
    assert ingest(tree, path).inserted == 3


def test_reports_have_no_section_about_exports(tree: Path, path: Path) -> None:
    ingest(tree, path)
    comparison = load_comparison(str(path))
    text = as_markdown(comparison)
    assert "Parity of the exported" not in text and "| baseline_lora_model | 2 | 70.0 |" in text
    assert "An adapter beside the base is arithmetic of its own" in text and "Merged LoRA" not in text
    page = path.with_name("report.html")
    write_page(page, str(path), comparison)
    shown = page.read_text(encoding="utf-8")
    assert "Exports and parity" not in shown and "All 3 files, their sizes and hashes" in shown
