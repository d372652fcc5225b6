"""A recipe end to end through DVC on the smoke profile: from files in the hub's format to database and report."""

import csv
import hashlib
import json
import re

import pytest

from evaluation.tasks import load
from tests import recipe_data
from tests.project_clone import ROOT, make_clone

pytestmark = pytest.mark.full

TASK, PRIMARY = "gsm8k", "gsm8k_exact_match"
ROWS, TEST_ROWS, TEST_ITEMS = 360, 60, 40
ARMS = ("baseline_lora", "hybrid_grit", "pure_grit")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    clone = make_clone(tmp_path_factory.mktemp("recipe") / "project")
    clone.env["HF_HUB_OFFLINE"] = "1"
    recipe_data.write(clone.folder / "inputs" / TASK, TASK, ROWS, TEST_ROWS)
    clone.run("python", "-m", "pipelines.profile", f"{TASK}+smoke")
    clone.change("prepare_data", source=f"inputs/{TASK}")
    clone.run("python", "-m", "pipelines.repro", "--workers", "1")
    return clone


def read(recipe, path):
    return json.loads((recipe.folder / path).read_text())


def items(recipe, split):
    return [json.loads(line) for line in (recipe.folder / f"data/{split}.jsonl").open()]


def test_data_come_from_the_local_files_without_leaks(recipe):
    created = read(recipe, "data/run.json")
    written = {
        p.relative_to(recipe.folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in (recipe.folder / "inputs" / TASK).rglob("*")
        if p.is_file()
    }
    assert created["inputs"] == written and written, "each file that was written was read, and no other"
    assert created["extra"]["items"]["test"] == TEST_ITEMS and created["extra"]["items"]["train"] > 200
    some = [load(TASK).make_item("", row) for row in recipe_data.rows(TASK, ROWS + TEST_ROWS)]
    pairs = {(i["prompt"].strip(), i["completion"]) for split in ("test", "train") for i in items(recipe, split)}
    assert pairs <= {(one.prompt, one.completion) for one in some}
    tested, trained = ({i["prompt"].strip() for i in items(recipe, split)} for split in ("test", "train"))
    assert not tested & trained


def test_every_arm_is_trained_judged_exported_and_scored(recipe):
    for arm in ARMS:
        history = read(recipe, f"adapters/{arm}/0/loss_history.json")
        losses, facts = ([e[k] for e in history if k in e] for k in ("loss", "eval_loss"))
        assert losses[-1] < 0.95 * losses[0] and facts[-1] < facts[0], arm
        assert {row["counted"] for row in read(recipe, f"gguf/{arm}/0/parity.json")["rows"]} == {1.0}
        scores = read(recipe, f"scores/{arm}/0/scores.json")
        assert (scores["task"]["name"], scores["task"]["primary"]) == (TASK, PRIMARY)
        values = {m["name"]: m["value"] for m in scores["metrics"] if m["split"] == "test"}
        assert 0 <= values[PRIMARY] <= 1 and values["gsm8k_unparseable"] < 1
    output = dict(
        recipe.query("select r.arm, p.value from probe p join run r on r.id = p.run_id where p.name = 'verdict'")
    )
    assert output == {"baseline_lora": 0.0, "hybrid_grit": 1.0, "pure_grit": 1.0}


def test_every_answer_is_in_the_database_and_the_task_metric_is_compared(recipe):
    rows = recipe.query(
        "select r.arm, count(*), avg(s.credit), max(m.value) from run r "
        "join sample s on s.run_id = r.id and s.split = 'test' "
        "join metric m on m.run_id = r.id and m.split = 'test' and m.step = -1 and m.name = r.primary_metric "
        "group by r.id order by r.arm"
    )
    assert [row[0] for row in rows] == ["base", *ARMS]
    assert all(n == TEST_ITEMS and credit == pytest.approx(value, abs=1e-9) for _, n, credit, value in rows)
    shown = json.loads(recipe.run("python", "-m", "evaluation.compare_all", "--task", TASK, "--format", "json"))
    assert {row["arm"]: row["accuracy"] for row in shown["rows"]} == {
        arm: pytest.approx(100 * value) for arm, _, _, value in rows
    }


def test_a_user_task_is_one_file_and_one_profile_as_documented(recipe):
    blocks = re.findall(r"```(python|yaml)\n(.*?)```", (ROOT / "docs/tasks.md").read_text(), re.DOTALL)
    code, profile = (
        next(text for kind, text in blocks if kind == of and "capitals" in text) for of in ("python", "yaml")
    )
    (recipe.folder / "evaluation/tasks/capitals.py").write_text(code)
    (recipe.folder / "profiles/tasks/capitals.yaml").write_text(profile)
    with (recipe.folder / "inputs/capitals.csv").open("w", newline="") as file:
        rows = [(f"Land {i}", f"Town {i}") for i in range(30)]
        csv.writer(file).writerows([("country", "capital"), *rows, ("Nil", "")])
    recipe.run("python", "-m", "pipelines.profile", "--force", "capitals+smoke")
    output = recipe.run("dvc", "repro", "prepare_data")
    created = items(recipe, "test")
    assert created and all(item["prompt"].startswith("What is the capital of Land ") for item in created)
    assert all(item["completion"] == item["truth"]["capital"] for item in created)
    assert read(recipe, "data/run.json")["extra"]["rejected_rows"] == 1 and "rejected.jsonl" in output
