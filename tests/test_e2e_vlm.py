"""The real DVC pipeline on profile vision+smoke, in a clone, from nothing to the database."""

import hashlib
import json

import pytest

from tests.project_clone import make_clone
from tests.vision_sizes import ARMS, ASKED_AGAIN, RETENTION_ITEMS, TEST_ITEMS


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    c = make_clone(tmp_path_factory.mktemp("clone") / "project")
    c.run("python", "-m", "pipelines.profile", "vision+smoke")
    c.run("python", "-m", "pipelines.repro", "--workers", "1")
    return c


def test_1_the_database_has_verdicts_scores_and_every_answer(clone):
    assert clone.query("select arm, primary_metric, serving_mode from run order by arm") == [
        ("base", "aqi_vision_accuracy", "merged"),
        *((arm, "aqi_vision_accuracy", "adapter") for arm in ARMS),
    ]
    said = clone.query("select arm, probe.value, probe.verdict from probe join run on run.id = run_id "
                       "where probe.name = 'verdict' order by arm")  # fmt: skip
    assert said == [("baseline_lora", 0.0, "pass"), ("grit_vlm", 1.0, "pass")]
    assert clone.query("select count(*) from sample") == [(3 * (TEST_ITEMS + RETENTION_ITEMS + ASKED_AGAIN),)]
    names = {name for (name,) in clone.query("select distinct name from metric where split = 'test'")}
    assert names >= {"aqi_vision_accuracy", *(f"aqi_vision_{kind}_accuracy" for kind in ("colour", "bars", "gauge"))}
    shown = clone.query("select distinct substr(prompt, 1, 18) from sample where split = 'test'")
    assert all(prompt.startswith("![](images/test-") for (prompt,) in shown)
    refers = clone.query("select count(*) from run where arm <> 'base' and reference_run_id is not null")
    assert refers == [(len(ARMS),)]
    assert clone.query("select count(*) from speed where nanoseconds is null") == [(0,)]


def test_2_what_was_scored_is_what_was_trained(clone):
    for arm in ARMS:
        trained = json.loads((clone.folder / f"adapters/{arm}/0/run.json").read_text())
        scored = json.loads((clone.folder / f"scores/{arm}/0/run.json").read_text())
        adapter = trained["artifacts"][0]
        assert adapter["path"] == f"adapters/{arm}/0/adapter_model.safetensors"
        assert scored["inputs"][adapter["path"]] == adapter["sha256"]
        for record, splits in ((trained, {"train", "valid"}), (scored, {"test", "retention", "paraphrased"})):
            assert {name[5:-6] for name in record["inputs"] if name.startswith("data/")} == splits
            assert "models/base/base.json" in record["inputs"]
        assert scored["git"]["commit"] == trained["git"]["commit"] is not None
        assert scored["git"]["dirty"] is False, "a profile changes params.yaml, which is no code"
    lines = [line for file in (clone.folder / "data").glob("*.jsonl") for line in file.read_text().splitlines()]
    hashes = {path: digest for line in lines for path, digest in json.loads(line).get("pictures", {}).items()}
    for path, digest in hashes.items():
        assert hashlib.sha256((clone.folder / "data" / path).read_bytes()).hexdigest() == digest
    assert {path.split("/")[-1] for path in hashes} == {path.name for path in (clone.folder / "data/images").iterdir()}


def test_3_the_reports_are_about_this_task_and_nothing_exported(clone):
    report = (clone.folder / "outputs/grit_evaluation.md").read_text()
    assert report.startswith("# ") and "Task: aqi_vision" in report
    assert "| grit_vlm (seed 0) | effective (as claimed) |" in report and "Served as trained" not in report
    page = (clone.folder / "outputs/report.html").read_text()
    assert "images/test-" in page
    told = json.loads(clone.run("python", "-m", "evaluation.compare_all", "--format", "json"))
    assert [row["arm"] for row in told["rows"]] == ["base", *ARMS]
    assert set(json.loads((clone.folder / "outputs/metrics.json").read_text())) == {"base", *ARMS}


def test_4_what_pictures_leave_out_says_why_and_nothing_is_left_to_do(clone):
    for made in ("gguf", "verified", "quantized", "measured"):
        for arm in ("base", *ARMS):
            (file,) = (clone.folder / made / arm / "0").iterdir()
            said = json.loads(file.read_text())
            assert file.name == "left_out.json" and said["arm"] == arm and said["reason"]
    assert "Running stage" not in clone.run("dvc", "repro")
    changed = clone.run("git", "status", "--porcelain").splitlines()
    assert [line.split()[-1] for line in changed] == ["params.yaml", "dvc.lock"]
