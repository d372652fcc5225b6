"""Results of lm-evaluation-harness from their files to the report, with numbers worked out by hand."""

import csv
import io
import json

import pytest

from db.errors import FileError
from db.ingest import ingest, rebuild
from evaluation.report.comparison import load_comparison
from evaluation.report.data import as_csv, as_json
from evaluation.report.sections import sections
from tests.db.asking import ask
from tests.db.result_tree import edit, make_arm, make_benchmark, sha

RIGHT = {"base": 10, "baseline_lora": 20, "pure_grit": 34}
"""Of 40 items, the first ones."""


@pytest.fixture
def tree(tmp_path):
    for arm, right in RIGHT.items():
        make_arm(tmp_path, arm, correct=[i < right for i in range(100)])
        make_benchmark(tmp_path, arm, right=[i < right for i in range(40)])
    return tmp_path


def report_of(tree):
    summary = ingest(tree, tree / "c.db")
    return load_comparison(tree / "c.db", detail=True), summary


def test_numbers_worked_out_by_hand(tree):
    base, lora, pure = report_of(tree)[0].benchmarks
    assert [(row.task, row.arm, row.metric, row.accuracy) for row in (base, lora, pure)] == [
        ("own_sums", "base", "acc", 25.0), ("own_sums", "baseline_lora", "acc", 50.0),
        ("own_sums", "pure_grit", "acc", 85.0)]  # fmt: skip
    of_base, (of_lora,), (of_pure, lead) = base.differences, lora.differences, pure.differences
    assert of_base == () and (of_lora.points.estimate, of_pure.points.estimate) == pytest.approx((25.0, 60.0))
    # McNemar's exact test of 10 and 24 items gained and none lost; Holm: of two, the smaller counts twice.
    assert (of_lora.p_value, of_lora.p_holm) == (2 / 2**10, 2 / 2**10)
    assert (of_pure.p_value, of_pure.p_holm) == (2 / 2**24, 4 / 2**24)
    assert (lead.points.estimate, lead.items) == (pytest.approx(35.0), 40)
    assert lora.outcome("baseline_lora") == "better than base"
    assert pure.outcome("baseline_lora") == "better than base; undecided against baseline_lora", (
        "one seed tells no arm from another"
    )


def test_several_seeds_and_the_items_that_all_share(tree):
    for arm, right in (("baseline_lora", 24), ("pure_grit", 36)):
        make_arm(tree, arm, 1, correct=[i < right for i in range(100)])
        make_benchmark(tree, arm, 1, right=[i < right for i in range(39)])
    pure = report_of(tree)[0].benchmarks[-1]
    lead = pure.against("baseline_lora")
    assert (pure.seeds, lead.items, lead.level) == ((0, 1), 39, "seeds and items")
    assert pure.accuracy == pytest.approx(100 * (34 + 36) / 78)
    assert lead.by_seed == pytest.approx((100 * 14 / 39, 100 * 12 / 39))
    assert pure.outcome("baseline_lora") == "better than base; better than baseline_lora"


def test_items_credited_by_different_metrics_are_not_judged(tree):
    told = {"own_sums": {"version": "1.0", "shots": 0, "items": 3, "metric": "f1"}}
    edit(tree / "measured/lm-eval/own_sums/pure_grit/0/harness.json", tasks=told)
    assert report_of(tree)[0].benchmarks == ()


def test_every_format_has_them(tree):
    make_benchmark(tree, "base", right=31.5, task="own_texts")
    report, _ = report_of(tree)
    section = next(section for section in sections(report) if section.title == "Standard benchmarks")
    _, table, note = section.blocks
    rows = [[cell.text for cell in row] for row in table.rows]
    assert rows[0][:2] == ["own_sums", "base"] and rows[2][1] == "pure_grit"
    assert rows[2][2].startswith("85.0 [") and rows[2][3].startswith("+60.0 [") and rows[2][4].startswith("+35.0 [")
    assert table.rows[0][0].hint == "acc\n40 items"
    assert "own_texts" in note.text and "Every number" in note.text, "a perplexity is no share of an item"
    told = json.loads(as_json(report))["benchmarks"][2]
    assert (told["task"], told["score"], told["delta_score"]) == ("own_sums", 85.0, pytest.approx(60.0))
    lines = list(csv.DictReader(io.StringIO(as_csv(report))))
    assert [line["own_sums_score"] for line in lines] == ["25.0", "50.0", "85.0"]
    assert [line["own_sums_delta_score_verdict"] for line in lines] == ["", "better", "better"]


def test_archive_and_database_have_the_items(tree):
    report_of(tree)
    rebuild(tree, tree / "again.db")
    for path in (tree / "c.db", tree / "again.db"):
        found = ask(path, "SELECT arm, COUNT(*), SUM(credit) FROM sample JOIN run ON run.id = run_id "
                          "WHERE split = 'harness/own_sums' GROUP BY arm")  # fmt: skip
        assert found == [("base", 40, 10.0), ("baseline_lora", 40, 20.0), ("pure_grit", 40, 34.0)]
        figure = "SELECT value, n FROM metric JOIN run ON run.id = run_id WHERE arm = 'base' AND split LIKE 'harness%'"
        assert ask(path, figure) == [(0.25, 3)]
    assert ask(path, "SELECT unit FROM metric_def WHERE name = 'acc'") == [("share",)]


def test_a_result_of_an_older_adapter_or_base_is_left_out(tree):
    make_arm(tree, "pure_grit", correct=[True] * 100)
    place = tree / "measured/lm-eval/own_sums"
    edit(place / "pure_grit/0/run.json", inputs={"adapters/pure_grit/0/adapter_model.safetensors": sha("older")})
    edit(place / "base/0/run.json", inputs={"models/base/base.json": sha("older")})
    edit(tree / "gguf/base/0/run.json", inputs={"models/base/base.json": sha("newer")})
    report, summary = report_of(tree)
    assert [row.arm for row in report.benchmarks] == ["baseline_lora"]
    notes = " ".join(summary.notes)
    assert "used an older adapters/pure_grit/0/adapter_model.safetensors" in notes
    assert "used an older models/base/base.json" in notes
    assert "`dvc repro`, or remove measured/lm-eval/own_sums" in notes


def test_a_copied_folder_is_not_another_benchmark(tree):
    (tree / "measured/lm-eval/own_sums").rename(tree / "measured/lm-eval/others")
    with pytest.raises(FileError, match="expected items of harness/others as in the path, got harness/own_sums"):
        ingest(tree, tree / "c.db")
