from __future__ import annotations

import json
import math
import multiprocessing
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from result_tree import artifact, edit, make_arm, make_tree, run_json, sha, write
from sqlalchemy import func, select, update

from db import DatabaseError, IngestError, open_session, queries
from db.ingest import ingest, rebuild
from db.models import Artifact, Environment, Metric, Run, Sample, Speed
from db.queries_compare import Choice, chosen_runs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "project")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "c.db"


def dump(path: Path) -> list[str]:
    """Every row of every table with its rowid."""
    connection = sqlite3.connect(path)
    try:
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = [
            repr((name, row))
            for name in sorted(names)
            for row in connection.execute(f"SELECT rowid, * FROM {name} ORDER BY rowid")
        ]
        return rows + list(connection.iterdump())
    finally:
        connection.close()


def counts(summary: object) -> tuple[int, int, int, int]:
    return summary.inserted, summary.updated, summary.unchanged, summary.retired  # type: ignore[attr-defined]


def test_every_file_reaches_its_table(tree: Path, path: Path) -> None:
    summary = ingest(tree, path)
    assert counts(summary) == (3, 0, 0, 0)
    assert summary.skipped == ()
    with open_session(path) as session:
        runs = {(run.arm, run.seed): session.get_one(Run, run.id) for run in chosen_runs(session, Choice())}
        assert set(runs) == {("base", 0), ("baseline_lora", 0), ("baseline_lora", 1)}
        run, base = runs["baseline_lora", 0], runs["base", 0]
        assert run.reference_run_id == base.id and base.reference_run_id is None
        assert run.model_name == "baseline_lora_model" and run.backend_version == "0.3.36"
        assert run.ended is not None and run.ended.isoformat() == "2026-11-21T03:30:00+00:00"
        assert run.params["train"] == {"train": {"learning_rate": 0.001, "steps": 100}}
        assert run.stages["train"]["started"].startswith("2026-11-21T01:00")
        assert run.prompt_template == "Q: {prompt} A:"
        assert run.parity_first_difference == {"prompt": "p", "hf": "a", "merged_gguf": "b"}
        assert session.scalar(select(func.count()).select_from(Sample)) == 300
        assert session.scalar(select(func.count()).select_from(Environment)) == 1
        sample = session.scalars(select(Sample).where(Sample.run_id == run.id, Sample.item_id == "aqi-000099")).one()
        assert (sample.correct, sample.predicted, sample.abs_error) == (False, 159.0, 60.0)
        final = queries.final_metrics(session, [run.id])[run.id]
        assert final["test", "aqi_category_accuracy"].value == 0.7
        assert final["parity", "pair/hf/base+adapter_gguf"].value == 0.99
        assert queries.curve(session, run.id, "loss") == [(10, 1.5)]
        assert queries.curve(session, run.id, "loss", "eval") == [(10, 1.2)]
        merged = session.scalars(
            select(Artifact).where(Artifact.run_id == run.id, Artifact.kind == "merged_gguf")
        ).one()
        adapter = session.scalars(select(Artifact).where(Artifact.sha256 == merged.parent_sha256)).one()
        assert (adapter.kind, adapter.run_id) == ("adapter", run.id)
        assert session.scalars(select(Artifact.kind).where(Artifact.run_id == base.id)).all() == [
            "base_gguf",
            "base_model",
        ]
        unmeasured = select(Speed).where(Speed.run_id == run.id, Speed.phase == "load")
        assert session.scalars(unmeasured).one().tokens is None


def test_reading_the_same_files_again_changes_nothing(tree: Path, path: Path) -> None:
    ingest(tree, path)
    before, content, moment = dump(path), path.read_bytes(), path.stat().st_mtime_ns
    assert counts(ingest(tree, path)) == (0, 0, 3, 0)
    assert dump(path) == before
    assert path.read_bytes() == content and path.stat().st_mtime_ns == moment
    assert [p.name for p in path.parent.iterdir()] == ["c.db"], "the log is folded into the file"


def test_changed_learning_rate_makes_a_new_current_run(tree: Path, path: Path) -> None:
    ingest(tree, path)
    train = tree / "adapters/baseline_lora/0/run.json"
    edit(train, params={"train": {"learning_rate": 0.002, "steps": 100}})
    assert counts(ingest(tree, path)) == (1, 0, 2, 1)
    with open_session(path) as session:
        both = session.scalars(select(Run).where(Run.arm == "baseline_lora", Run.seed == 0).order_by(Run.id))
        old, new = both.all()
        assert (old.is_current, new.is_current) == (False, True)
        assert new.params["train"]["train"]["learning_rate"] == 0.002
        assert len(queries.view(session, "evaluation_results")) == 3
        assert session.scalar(select(func.count()).where(Sample.run_id == old.id)) == 100
    edit(train, params={"train": {"learning_rate": 0.001, "steps": 100}})
    assert counts(ingest(tree, path)) == (0, 1, 2, 1), "the old experiment is current again"


def test_repeated_evaluation_replaces_its_numbers(tree: Path, path: Path) -> None:
    ingest(tree, path)
    make_arm(tree, "baseline_lora", 0, correct=[i < 80 for i in range(100)])
    assert counts(ingest(tree, path)) == (0, 1, 2, 0)
    with open_session(path) as session:
        rows = queries.view(session, "v_leaderboard")
        assert sorted(row["aqi_accuracy"] for row in rows) == [40.0, 70.0, 80.0]
        assert session.scalar(select(func.count()).select_from(Sample)) == 300


def test_nan_and_infinite_losses_survive(tree: Path, path: Path) -> None:
    text = '[{"step": 1, "loss": NaN}, {"step": 2, "loss": Infinity}, {"step": 3, "loss": -Infinity}]'
    write(tree / "adapters/baseline_lora/0/loss_history.json", text)
    ingest(tree, path)
    with open_session(path) as session:
        run = next(run for run in chosen_runs(session, Choice()) if (run.arm, run.seed) == ("baseline_lora", 0))
        curve = queries.curve(session, run.id, "loss")
        assert math.isnan(curve[0][1]) and curve[1:] == [(2, math.inf), (3, -math.inf)]
        stored = session.execute(
            select(Metric.value, Metric.value_kind).where(Metric.run_id == run.id, Metric.split == "train")
        )
        assert [tuple(row) for row in stored] == [(None, "nan"), (None, "inf"), (None, "-inf")]


def test_strange_text_is_stored(tree: Path, path: Path) -> None:
    file = tree / "scores/base/0/samples.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "answer": "a\x00b\ud800 | 汉\n'; DROP TABLE run"})
    write(file, "\n".join(lines))
    with pytest.raises(IngestError, match=r"samples\.jsonl: line 1"):
        ingest(tree, path)  # half of a UTF-16 pair is no JSON
    write(file, "\n".join(lines).replace("\\ud800", ""))
    ingest(tree, path)
    with open_session(path) as session:
        answer = session.scalars(select(Sample.answer).where(Sample.answer.like("%DROP%"))).one()
        assert answer == "a\ufffdb | 汉\n'; DROP TABLE run"


def test_all_problems_are_named_and_the_old_content_stands(tree: Path, path: Path) -> None:
    ingest(tree, path)
    before = dump(path)
    scores = tree / "scores/baseline_lora/0/scores.json"
    content = json.loads(scores.read_text(encoding="utf-8"))
    content["metrics"][0]["value"] = "0.7"
    del content["backend"]["version"]
    write(scores, content)
    other = tree / "scores/baseline_lora/1/scores.json"
    write(other, other.read_text(encoding="utf-8")[:200])
    lines = (tree / "scores/base/0/samples.jsonl").read_text(encoding="utf-8").splitlines()
    write(tree / "scores/base/0/samples.jsonl", "\n".join([*lines[:3], '{"item_id": 3}', lines[0]]))
    (tree / "gguf/baseline_lora/1/run.json").unlink()
    write(tree / "adapters/baseline_lora/0/loss_history.json", [{"loss": 1.0}])
    with pytest.raises(IngestError) as caught:
        ingest(tree, path)
    found = {(problem.file, problem.key) for problem in caught.value.problems}
    assert ("scores/baseline_lora/0/scores.json", "metrics.0.value") in found
    assert ("scores/baseline_lora/0/scores.json", "backend.version") in found
    assert ("scores/baseline_lora/1/scores.json", "") in found
    assert ("scores/base/0/samples.jsonl", "line 4.item_id") in found
    assert ("scores/base/0/samples.jsonl", "line 5") in found, "an item given twice"
    assert ("gguf/baseline_lora/1/run.json", "") in found
    assert ("adapters/baseline_lora/0/loss_history.json", "") in found
    text = str(caught.value)
    assert "valid number, came '0.7'" in text and "dvc repro" in text
    assert dump(path) == before


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("scores/baseline_lora/0/scores.json", {"seed": 1}, "expected baseline_lora/0 as in the path"),
        ("gguf/baseline_lora/0/parity.json", {"arm": "pure_grit"}, "came pure_grit/0"),
        ("scores/baseline_lora/0/scores.json", {"schema": 2}, "schema"),
        ("scores/baseline_lora/0/scores.json", {"test_items_sha256": "abc"}, "test_items_sha256"),
        ("scores/baseline_lora/0/run.json", {"stage": "train"}, "expected 'evaluate', came 'train'"),
        ("scores/baseline_lora/0/run.json", {"started": "2026-11-21T01:00:00"}, "started: .*timezone"),
        ("scores/baseline_lora/0/run.json", {"ended": "2026-11-20T01:00:00+00:00"}, "lies before"),
        ("scores/baseline_lora/0/run.json", {"ended": None}, "needs the time"),
        ("gguf/baseline_lora/0/parity.json", {"greedy_equal": 1.5}, "greedy_equal"),
    ],
)
def test_rubbish_is_refused(tree: Path, path: Path, file: str, change: dict[str, object], words: str) -> None:
    edit(tree / file, **change)
    with pytest.raises(IngestError, match=words):
        ingest(tree, path)
    assert not path.exists()


def test_shares_and_speed_rows_are_checked(tree: Path, path: Path) -> None:
    scores = tree / "scores/baseline_lora/0/scores.json"
    content = json.loads(scores.read_text(encoding="utf-8"))
    metrics = [{"name": "aqi_category_accuracy", "split": "test", "value": 87.0, "n": 100}]
    write(scores, {**content, "metrics": metrics})
    with pytest.raises(IngestError, match=r"share from 0 to 1, came 87\.0"):
        ingest(tree, path)
    write(scores, {**content, "speed": [{**content["speed"][0], "arm": "pure_grit"}]})
    with pytest.raises(IngestError, match="speed rows of the arms"):
        ingest(tree, path)
    write(scores, {**content, "speed": [content["speed"][0]] * 2})
    with pytest.raises(IngestError, match="more than once"):
        ingest(tree, path)


def test_arms_that_are_not_there_yet_or_failed_are_noted(tree: Path, path: Path) -> None:
    ingest(tree, path)
    (tree / "scores/baseline_lora/1/scores.json").unlink()
    edit(tree / "adapters/baseline_lora/0/run.json", status="failed", error="loss was nan")
    (tree / "scores/baseline_lora/notes").mkdir()
    summary = ingest(tree, path, arms=["baseline_lora", "pure_grit"])
    assert counts(summary) == (0, 0, 1, 2)
    assert summary.skipped == (
        "baseline_lora/notes: skipped, the folder's name is no seed",
        "pure_grit: no scores yet",
        "baseline_lora/0: skipped, its stage train is failed: loss was nan",
        "baseline_lora/1: no scores yet",
    )


def test_only_the_asked_arms_and_seeds_are_current(tree: Path, path: Path) -> None:
    ingest(tree, path)
    assert counts(ingest(tree, path, arms=["baseline_lora"], seeds=[1])) == (0, 0, 2, 1)
    with open_session(path) as session:
        assert [(run.arm, run.seed) for run in chosen_runs(session, Choice())] == [
            ("base", 0),
            ("baseline_lora", 1),
        ]
        assert session.scalar(select(func.count()).select_from(Run)) == 3


def test_scores_of_an_older_export_are_left_out(tree: Path, path: Path) -> None:
    name = "gguf/baseline_lora/0/model.gguf"
    made = [artifact("merged_gguf", name, "exported again")]
    write(tree / "gguf/baseline_lora/0/run.json", run_json("export", "baseline_lora", 0, artifacts=made))
    summary = ingest(tree, path)
    assert summary.inserted == 2
    assert "used an older gguf/baseline_lora/0/model.gguf than export made" in summary.skipped[0]


def test_other_test_items_have_no_reference(tree: Path, path: Path) -> None:
    edit(tree / "scores/baseline_lora/0/scores.json", test_items_sha256=sha("other items"))
    summary = ingest(tree, path)
    assert any("no base with the same items" in note for note in summary.skipped)
    with open_session(path) as session:
        rows = {row["seed"]: row for row in queries.view(session, "v_leaderboard") if row["arm"] != "base"}
        assert rows[0]["delta_aqi"] is None and rows[1]["delta_aqi"] == pytest.approx(30)


def test_views_agree_with_numbers_worked_out_by_hand(tree: Path, path: Path) -> None:
    ingest(tree, path, seeds=[0])
    with open_session(path) as session:
        base, arm = sorted(queries.view(session, "evaluation_results"), key=lambda row: row["aqi_accuracy"])
        parity = {row["pair"]: row["greedy_equal"] for row in queries.view(session, "v_parity")}
    assert list(arm) == [
        "model_name",
        "aqi_accuracy",
        "delta_aqi",
        "inference_speed",
        "delta_speed",
        "timestamp",
    ]
    # Base: 500 tokens in 4 s. Arm: 600 tokens in 6 s, the base beside it 600 in 5 s, so 100 - 120.
    assert base == {
        "model_name": "base_model",
        "aqi_accuracy": 40.0,
        "delta_aqi": 0.0,
        "inference_speed": 125.0,
        "delta_speed": 0.0,
        "timestamp": "2026-11-21T03:30:00.000000+00:00",
    }
    assert arm["aqi_accuracy"] == 70.0 and arm["delta_aqi"] == pytest.approx(30.0)
    assert arm["inference_speed"] == pytest.approx(100.0) and arm["delta_speed"] == pytest.approx(-20.0)
    assert parity == {"all": 99.0, "hf/merged_gguf": 100.0, "hf/base+adapter_gguf": 99.0}


def _ingest_in_child(tree: Path, path: Path, results: multiprocessing.Queue[str]) -> None:
    try:
        results.put(str(ingest(tree, path)).splitlines()[0])
    except Exception as error:  # noqa: BLE001  reported to the test
        results.put(f"{type(error).__name__}: {error}")


def test_two_processes_ingest_at_once(tree: Path, path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[str] = context.Queue()
    children = [context.Process(target=_ingest_in_child, args=(tree, path, results)) for _ in range(3)]
    for child in children:
        child.start()
    lines = sorted(results.get(timeout=60) for _ in children)
    for child in children:
        child.join(timeout=60)
    assert lines == ["0 runs inserted, 0 updated, 3 unchanged, 0 retired"] * 2 + [
        "3 runs inserted, 0 updated, 0 unchanged, 0 retired"
    ]
    with open_session(path) as session:
        assert session.scalar(select(func.count()).select_from(Sample)) == 300


def test_a_killed_ingest_leaves_the_old_content(tree: Path, path: Path) -> None:
    ingest(tree, path)
    before = dump(path)
    make_arm(tree, "baseline_lora", 0, correct=[True] * 100)
    code = (
        "import os, signal, sys; from pathlib import Path; import db.ingest as i\n"
        "store = i.store\n"
        "def store_and_die(*a):\n"
        "    store(*a); a[0].flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "i.store = store_and_die\n"
        "i.ingest(Path(sys.argv[1]), sys.argv[2])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tree), str(path)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert dump(path) == before
    assert counts(ingest(tree, path)) == (0, 1, 2, 0)


def test_rebuild_swaps_a_fresh_file_in(tree: Path, path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    assert counts(rebuild(tree, path)) == (3, 0, 0, 0)
    edit(tree / "adapters/baseline_lora/0/run.json", params={"train": {"learning_rate": 0.002}})
    ingest(tree, path)
    assert counts(rebuild(tree, path)) == (3, 0, 0, 0)
    with open_session(path) as session:
        assert session.scalar(select(func.count()).select_from(Run)) == 3, "superseded runs are gone"
    before = dump(path)
    write(tree / "scores/base/0/scores.json", "{")
    with pytest.raises(IngestError):
        rebuild(tree, path)
    assert dump(path) == before
    assert [p.name for p in path.parent.iterdir()] == ["c.db"]


def test_rebuild_waits_for_nobody_and_refuses_a_file_in_use(tree: Path, path: Path) -> None:
    ingest(tree, path)
    with open_session(path, write=True) as session:
        session.execute(update(Run).values(git_commit="mine"))
        with pytest.raises(DatabaseError, match="another process uses it"):
            rebuild(tree, path)
    with open_session(path) as session:
        assert set(session.scalars(select(Run.git_commit))) == {"mine"}


def test_an_unfinished_arm_blocks_nobody(tree: Path, path: Path) -> None:
    edit(tree / "scores/baseline_lora/0/run.json", status="running", ended=None)
    (tree / "gguf/baseline_lora/0/run.json").unlink()
    summary = ingest(tree, path)
    assert summary.inserted == 2
    assert summary.skipped == ("baseline_lora/0: skipped, its stage evaluate is running",)


def test_disagreeing_scores_and_samples_are_noted(tree: Path, path: Path) -> None:
    scores = tree / "scores/base/0/scores.json"
    metrics = json.loads(scores.read_text(encoding="utf-8"))["metrics"]
    metrics[0]["value"] = 0.5
    edit(scores, metrics=metrics)
    assert ingest(tree, path).skipped == ("base/0: scores.json says 0.5, samples.jsonl says 0.4",)


@pytest.mark.parametrize(("written", "stored"), [("null", None), ("NaN", None), ("0.0", 0.0), ("12.5", 12.5)])
def test_an_answer_without_a_number_has_no_error(tmp_path, written, stored):
    make_tree(tmp_path)
    file = tmp_path / "scores/baseline_lora/0/samples.jsonl"
    first, rest = file.read_text().split("\n", 1)
    changed = {**json.loads(first), "predicted": None, "abs_error": "HERE"}
    file.write_text(json.dumps(changed).replace('"HERE"', written) + "\n" + rest)
    ingest(tmp_path, tmp_path / "x.db")
    with open_session(tmp_path / "x.db") as session:
        item = select(Sample).where(Sample.item_id == changed["item_id"]).join(Run)
        item = item.where(Run.arm == "baseline_lora", Run.seed == 0)
        assert session.scalars(item).one().abs_error == stored


def test_a_negative_error_is_refused(tmp_path):
    make_tree(tmp_path)
    file = tmp_path / "scores/baseline_lora/0/samples.jsonl"
    first, rest = file.read_text().split("\n", 1)
    file.write_text(json.dumps({**json.loads(first), "abs_error": -1.0}) + "\n" + rest)
    with pytest.raises(IngestError, match="abs_error"):
        ingest(tmp_path, tmp_path / "x.db")
