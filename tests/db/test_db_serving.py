"""Precisions and verifications on their way into the database."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db import IngestError, open_session, queries
from db.ingest import ingest
from db.models import Quantization, QuantizedSample, Run, Verification
from db.queries_compare import Choice, chosen_runs
from tests.db.result_tree import (
    edit,
    make_quantized,
    make_tree,
    make_verified,
    precision,
    sha,
    verification,
    write,
)

F16, Q8, Q4 = [i < 70 for i in range(100)], [1 < i < 70 for i in range(100)], [i < 60 for i in range(100)]
ROWS = {"f16": (F16, 1.0), "q8_0": (Q8, 0.9), "q4_K_M": (Q4, 0.5)}
CHECKED = [verification("llama_cpp", "merged"), verification("llama_cpp", "adapter"), verification("ollama", "merged")]


@pytest.fixture
def old_tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "project")


@pytest.fixture
def tree(old_tree: Path) -> Path:
    """The baseline's first seed was quantized and verified."""
    make_quantized(old_tree, "baseline_lora", rows=ROWS)
    make_verified(old_tree, "baseline_lora", rows=CHECKED)
    return old_tree


def counts(summary: Any) -> tuple[int, int, int, int]:
    return summary.inserted, summary.updated, summary.unchanged, summary.retired


def run_of(session: Session, arm: str = "baseline_lora", seed: int = 0) -> Run:
    (run,) = (run for run in chosen_runs(session, Choice()) if (run.arm, run.seed) == (arm, seed))
    return session.get_one(Run, run.id)


def rows_of(session: Session) -> list[int]:
    tables = (Quantization, QuantizedSample, Verification)
    return [session.scalar(select(func.count()).select_from(table)) or 0 for table in tables]


def test_every_row_reaches_its_table(tree: Path, path: Path) -> None:
    assert ingest(tree, path).skipped == ()
    with open_session(path) as session:
        run = run_of(session)
        assert rows_of(session) == [3, 300, 3]
        found = queries.quantizations(session, run.id)
        assert [row.type for row in found] == ["f16", "q8_0", "q4_K_M"]
        q8 = found[1]
        assert (q8.bytes, q8.bits_per_weight, q8.correct, q8.n, q8.fallbacks) == (8_500_000, 8.5, 68, 100, 0)
        assert (q8.category_accuracy, q8.answers_equal_to_f16) == (0.68, 0.9)
        assert q8.tensor_types == {"Q8_0": 15, "F32": 5}
        answers = queries.quantized_outcomes(session, run.id)
        assert sum(answers["q4_K_M"].values()) == 60 and answers["q8_0"]["aqi-000000"] is False
        checked = [(row.backend, row.mode, row.answered) for row in queries.verifications(session, run.id)]
        assert checked == [("llama_cpp", "merged", 1.0), ("llama_cpp", "adapter", 0.95), ("ollama", "merged", 1.0)]
        adapter = queries.verifications(session, run.id)[1]
        assert adapter.perturbed_noticed is True and adapter.adapter_sha256 == sha("adapter")
        assert adapter.first_difference == "prompt 3: token 2 | differs\nLikely cause: scale"
        assert {"quantize", "verify"} <= run.stages.keys()
        view = {row["type"]: row for row in queries.view(session, "v_quantization")}
        assert view["q4_K_M"]["delta_f16"] == pytest.approx(-10) and view["q8_0"]["megabytes"] == 8.5
        served = {(row["backend"], row["mode"]): row for row in queries.view(session, "v_verification")}
        assert served["llama_cpp", "merged"]["equal_to_merged"] is None and len(served) == 3
        assert served["llama_cpp", "adapter"]["equal_to_merged"] == pytest.approx(95)


def test_reading_again_changes_nothing(tree: Path, path: Path) -> None:
    ingest(tree, path)
    before = path.read_bytes()
    assert counts(ingest(tree, path)) == (0, 0, 3, 0)
    assert path.read_bytes() == before


def test_measuring_more_of_a_run_makes_no_new_run(old_tree: Path, path: Path) -> None:
    """Precisions and verifications change nothing of how a run was trained, exported or scored."""
    ingest(old_tree, path)
    make_quantized(old_tree, "baseline_lora", rows=ROWS)
    make_verified(old_tree, "baseline_lora", rows=CHECKED)
    assert counts(ingest(old_tree, path)) == (0, 1, 2, 0)
    edit(old_tree / "quantized/baseline_lora/0/run.json", params={"quantize": {"types": ["q8_0"]}})
    make_quantized(old_tree, "baseline_lora", rows={"f16": (F16, 1.0)})
    make_verified(old_tree, "baseline_lora", rows=CHECKED[:1])
    assert counts(ingest(old_tree, path)) == (0, 1, 2, 0)
    with open_session(path) as session:
        assert rows_of(session) == [1, 100, 1]
        assert session.scalar(select(func.count()).select_from(Run)) == 3


def test_the_base_has_precisions_too(tree: Path, path: Path) -> None:
    make_quantized(tree, "base", rows={"f16": (F16, 1.0), "q8_0": (F16, 1.0)})
    make_verified(tree, "base", rows=[verification("llama_cpp", "merged")])
    ingest(tree, path)
    with open_session(path) as session:
        assert len(queries.quantizations(session, run_of(session, "base").id)) == 2


def test_a_mode_that_a_server_does_not_support_has_no_shares(tree: Path, path: Path) -> None:
    gone = {"rendered": None, "counted": None, "answered": None, "equal_to_merged": None, "perturbed_noticed": None}
    row = verification("ollama", "adapter", prompts=0, **gone, first_difference="not supported: no ADAPTER")
    make_verified(tree, "baseline_lora", rows=[*CHECKED, row])
    ingest(tree, path)
    with open_session(path) as session:
        last = queries.verifications(session, run_of(session).id)[-1]
        assert (last.prompts, last.answered, last.first_difference) == (0, None, "not supported: no ADAPTER")


def test_an_older_server_answers_and_tells_neither_text_nor_tokens(tree: Path, path: Path) -> None:
    make_verified(tree, "baseline_lora", rows=[verification("ollama", "merged", rendered=None, counted=None)])
    ingest(tree, path)
    with open_session(path) as session:
        (row,) = queries.verifications(session, run_of(session).id)
        assert (row.prompts, row.rendered, row.counted, row.answered) == (20, None, None, 1.0)
        (view,) = queries.view(session, "v_verification")
        assert (view["rendered"], view["counted"], view["answered"]) == (None, None, 100)


QUANTIZED, VERIFIED = "quantized/baseline_lora/0/quantized.json", "verified/baseline_lora/0/verify.json"
SAMPLES = "quantized/baseline_lora/0/quantized_samples.jsonl"
GOOD = [precision(kind, correct, same) for kind, (correct, same) in ROWS.items()]


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (QUANTIZED, {"seed": 1}, "expected baseline_lora/0 as in the path"),
        (QUANTIZED, {"schema": 2}, "schema"),
        (QUANTIZED, {"rows": []}, "expected f16 first.*came nothing"),
        (QUANTIZED, {"rows": GOOD[1:]}, "expected f16 first.*came q8_0"),
        (QUANTIZED, {"rows": [*GOOD, GOOD[1]]}, "rows of the type q8_0 given more than once"),
        (QUANTIZED, {"rows": [{**GOOD[0], "type": ""}]}, r"rows\.0\.type"),
        (QUANTIZED, {"rows": [{**GOOD[0], "bytes": "8"}]}, r"rows\.0\.bytes: .*came '8'"),
        (QUANTIZED, {"rows": [{**GOOD[0], "bits_per_weight": 0.0}]}, "bits_per_weight: .*greater than 0"),
        (QUANTIZED, {"rows": [{**GOOD[0], "category_accuracy": 0.71}]}, r"category_accuracy 0\.71 is not 70 of 100"),
        (QUANTIZED, {"rows": [{**GOOD[0], "answers_equal_to_f16": 0.5}]}, r"f16 must equal itself, came 0\.5"),
        (QUANTIZED, {"rows": [{**GOOD[0], "fallbacks": 21}]}, "21 fallbacks among 20 tensors"),
        (QUANTIZED, {"rows": [{k: v for k, v in GOOD[0].items() if k != "n"}]}, r"rows\.0\.n: Field required"),
        (QUANTIZED, {"rows": GOOD[:2]}, "expected the types of quantized.json, came 'q4_K_M' besides"),
        (QUANTIZED, {"rows": [*GOOD, {**GOOD[0], "type": "bf16"}]},
         "expected 100 items of type bf16, 70 of them correct, .* came 0 items of type bf16"),
        (VERIFIED, {"arm": "pure_grit"}, "expected baseline_lora/0 as in the path"),
        (VERIFIED, {"rows": [*CHECKED, CHECKED[1]]}, r"rows of \('llama_cpp', 'adapter'\) given more than once"),
        (VERIFIED, {"rows": [{**CHECKED[0], "mode": "both"}]}, r"rows\.0\.mode: .*'merged' or 'adapter'"),
        (VERIFIED, {"rows": [{**CHECKED[0], "answered": 1.5}]}, r"rows\.0\.answered"),
        (VERIFIED, {"rows": [{**CHECKED[0], "answered": None}]}, "answered: expected a share exactly where prompts"),
        (VERIFIED, {"rows": [{**CHECKED[0], "prompts": 0}]}, "came 1.0 of 0 prompts"),
        (VERIFIED, {"rows": [{**CHECKED[0], "prompts": 0, "answered": None}]}, "rendered: expected no share"),
        (VERIFIED, {"rows": [{**CHECKED[0], "prompts": 0, "answered": None, "rendered": None}]},
         "counted: expected no share where no prompt was asked, came 1.0"),
        (VERIFIED, {"rows": [{**CHECKED[0], "gguf_sha256": "abc"}]}, "gguf_sha256"),
        (VERIFIED, {"rows": [{**CHECKED[1], "perturbed_noticed": 1}]}, "perturbed_noticed"),
    ],
)  # fmt: skip
def test_rubbish_is_refused(tree: Path, path: Path, file: str, change: dict[str, Any], words: str) -> None:
    edit(tree / file, **change)
    with pytest.raises(IngestError, match=words) as refused:
        ingest(tree, path)
    assert file.rsplit("/", 1)[0] in str(refused.value)
    assert not path.exists()


@pytest.mark.parametrize("file", [QUANTIZED, VERIFIED, SAMPLES])
def test_truncated_and_missing_files_are_named_and_the_old_content_stands(tree: Path, path: Path, file: str) -> None:
    ingest(tree, path)
    before = path.read_bytes()
    content = (tree / file).read_text(encoding="utf-8")
    write(tree / file, content[: len(content) // 2])
    with pytest.raises(IngestError, match=file.replace(".", r"\.")):
        ingest(tree, path)
    (tree / file).unlink()
    with pytest.raises(IngestError, match=f"{file}: expected this file beside the others"):
        ingest(tree, path)
    assert path.read_bytes() == before


def test_samples_that_do_not_fit_are_refused(tree: Path, path: Path) -> None:
    lines = (tree / SAMPLES).read_text(encoding="utf-8").splitlines()
    write(tree / SAMPLES, "\n".join([*lines, lines[0]]))
    with pytest.raises(IngestError, match="line 301: item aqi-000000 given more than once"):
        ingest(tree, path)
    other = json.dumps({**json.loads(lines[-1]), "item_id": "other"})
    write(tree / SAMPLES, "\n".join([*lines[:-1], other]))
    with pytest.raises(IngestError, match="expected the same items in every type, q4_K_M has others"):
        ingest(tree, path)
    flipped = json.dumps({**json.loads(lines[0]), "correct": False})
    write(tree / SAMPLES, "\n".join([flipped, *lines[1:]]))
    with pytest.raises(IngestError, match="expected 100 items of type f16, 70 of them correct, .*, 69 of them"):
        ingest(tree, path)


@pytest.mark.parametrize(("folder", "left"), [("quantized", [0, 0, 3]), ("verified", [3, 300, 0])])
def test_results_of_a_stage_that_has_not_ended_are_left_out(tree: Path, path: Path, folder: str, left: Any) -> None:
    edit(tree / folder / "baseline_lora/0/run.json", status="failed", error="no disk")
    stage = {"quantized": "quantize", "verified": "verify"}[folder]
    summary = ingest(tree, path)
    assert summary.inserted == 3, "the run itself is whole"
    assert summary.skipped == (f"baseline_lora/0: without its stage {stage}, which is failed: no disk",)
    with open_session(path) as session:
        assert rows_of(session) == left


def test_precisions_of_an_older_export_are_left_out(tree: Path, path: Path) -> None:
    run = tree / "quantized/baseline_lora/0/run.json"
    edit(run, inputs={"gguf/baseline_lora/0/model.gguf": "0" * 64})
    (note,) = ingest(tree, path).skipped
    assert "without its stage quantize" in note and "used an older gguf/baseline_lora/0/model.gguf" in note
    with open_session(path) as session:
        assert rows_of(session) == [0, 0, 3]


@pytest.mark.parametrize("older", [True, False])
def test_a_verification_with_an_older_base_is_left_out(tree: Path, path: Path, older: bool) -> None:
    """Mode adapter runs on the base's file, which is exported by another stage."""
    base = json.loads((tree / "gguf/base/0/run.json").read_text(encoding="utf-8"))["artifacts"][0]
    used = {base["path"]: "0" * 64 if older else base["sha256"], "gguf/base/0/serving.json": "1" * 64}
    edit(tree / "verified/baseline_lora/0/run.json", inputs=used)
    note = "baseline_lora/0: without its stage verify, its stage verify used an older gguf/base/0/model.gguf than"
    summary = ingest(tree, path)
    assert [line.startswith(note) for line in summary.skipped] == [True] * older and summary.inserted == 3
    with open_session(path) as session:
        assert rows_of(session) == [3, 300, 0 if older else 3]
    edit(tree / "verified/baseline_lora/0/run.json", inputs={base["path"]: base["sha256"]})
    assert ingest(tree, path).skipped == ()
    with open_session(path) as session:
        assert rows_of(session) == [3, 300, 3]


@pytest.mark.parametrize(
    ("stage", "file", "left"), [("quantize", QUANTIZED, [0, 0, 3]), ("verify", VERIFIED, [3, 300, 0])]
)
def test_results_without_their_run_json_are_named(tree: Path, path: Path, stage: str, file: str, left: Any) -> None:
    (tree / file).with_name("run.json").unlink()
    assert ingest(tree, path).skipped == (
        f"baseline_lora/0: without its stage {stage}, {file} has no run.json; run `dvc repro`",
    )
    with open_session(path) as session:
        assert rows_of(session) == left


def test_the_serving_mode_of_the_evaluation_is_recorded(tree: Path, path: Path) -> None:
    scores = tree / "scores/baseline_lora/1/scores.json"
    backend = json.loads(scores.read_text(encoding="utf-8"))["backend"]
    edit(scores, backend={**backend, "name": "hf"})  # transformers keep the adapter beside the base
    ingest(tree, path)
    with open_session(path) as session:
        assert {(r.arm, r.seed): r.serving_mode for r in chosen_runs(session, Choice())} == {
            ("base", 0): "merged", ("baseline_lora", 0): "merged", ("baseline_lora", 1): "adapter"}  # fmt: skip
    edit(scores, backend={**backend, "mode": "adapter"})
    ingest(tree, path)
    with open_session(path) as session:
        assert run_of(session, seed=1).serving_mode == "adapter", "what the stage says comes first"
    edit(scores, backend={**backend, "mode": "half"})
    with pytest.raises(IngestError, match=r"backend\.mode"):
        ingest(tree, path)


def test_load_and_time_to_first_token_are_phases(tree: Path, path: Path) -> None:
    scores = tree / "scores/baseline_lora/0/scores.json"
    rows = json.loads(scores.read_text(encoding="utf-8"))["speed"]
    one = {"arm": "baseline_lora", "repetition": 0, "tokens": 2, "nanoseconds": 4_000_000}
    edit(scores, speed=[*rows, {**one, "phase": "ttft"}])
    ingest(tree, path)
    with open_session(path) as session:
        run = run_of(session)
        found = {row.phase: row.nanoseconds for row in queries.speed_rows(session, run.id) if row.arm == run.arm}
        assert found["ttft"] == 4_000_000 and found["load"] == 10**9
    edit(scores, speed=[*rows, {**one, "phase": "thinking"}])
    with pytest.raises(IngestError, match=r"speed\..*phase"):
        ingest(tree, path)
