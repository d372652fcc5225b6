"""compare_all: which runs, compared with what; criteria, power, retention and alignment in every format."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine
from typer.testing import CliRunner, Result

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "db"))

from result_tree import edit, make_arm, make_tree, write  # noqa: E402

from db.ingest import ingest  # noqa: E402
from evaluation.compare_all import Choice, ChoiceError, app, load_comparison  # noqa: E402
from evaluation.report import as_csv, cells  # noqa: E402
from evaluation.tracked import metrics  # noqa: E402


def add_rows(tree: Path, arm: str, seed: int, *, metrics: list[dict[str, Any]], retained: list[bool]) -> None:
    """Give a run further metrics, and retention items."""
    scores = tree / f"scores/{arm}/{seed}"
    edit(
        scores / "scores.json",
        metrics=[*json.loads((scores / "scores.json").read_text(encoding="utf-8"))["metrics"], *metrics],
    )
    lines = (scores / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    pattern = json.loads(lines[0])
    more = [
        {**pattern, "item_id": f"general-{k:03d}", "split": "retention", "task": "addition", "correct": right,
         "predicted": None, "abs_error": None}
        for k, right in enumerate(retained)
    ]  # fmt: skip
    write(scores / "samples.jsonl", "\n".join([*lines, *map(json.dumps, more)]) + "\n")


def alignment(index: float, delta: float | None, p_value: float = 0.002) -> list[dict[str, Any]]:
    values = {
        "alignment_index": index, "alignment_index_low": index - 0.1, "alignment_index_high": index + 0.1,
        "alignment_null_mean": 0.02, "alignment_null_low": 0.01, "alignment_null_high": 0.05,
        "alignment_p_value": 0.001, "silhouette": 0.33,
    }  # fmt: skip
    if delta is not None:
        values |= {
            "delta_alignment_index": delta,
            "delta_alignment_index_low": delta - 0.1,
            "delta_alignment_index_high": delta + 0.1,
            "delta_alignment_p_value": p_value,
        }
    return [{"name": name, "split": "alignment", "value": value, "n": 40} for name, value in values.items()]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Base 40 of 100 right; baseline_lora 70 and hybrid_grit 75 with seeds 0, 1, 2; pure_grit 70 with seed 0."""
    tree = make_tree(tmp_path / "project")
    make_arm(tree, "baseline_lora", 2, correct=[i < 70 for i in range(100)])
    for seed in range(3):
        make_arm(tree, "hybrid_grit", seed, correct=[i < 73 + seed for i in range(100)])
    make_arm(tree, "pure_grit", correct=[i < 70 for i in range(100)])
    general = {"name": "perplexity", "split": "general", "n": 900}
    half = [k % 2 == 0 for k in range(100)]
    add_rows(tree, "base", 0, metrics=[{**general, "value": 3.25}, *alignment(0.5, None)], retained=half)
    more = [{"name": "update_norm", "split": "weights", "value": 1.75, "n": None}, *alignment(0.9, 0.4)]
    add_rows(tree, "pure_grit", 0, metrics=[{**general, "value": 4.5}, *more], retained=[True] * 20 + [False] * 80)
    add_rows(tree, "hybrid_grit", 0, metrics=alignment(0.8, 0.3, 0.2), retained=[])
    for seed, delta in ((0, 0.4), (1, -0.4)):
        add_rows(tree, "baseline_lora", seed, metrics=alignment(0.5 + delta, delta), retained=[])
    return tree


@pytest.fixture
def path(tree: Path, tmp_path: Path) -> Path:
    ingest(tree, tmp_path / "c.db")
    return tmp_path / "c.db"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def arms(path: Path, *arguments: str) -> dict[str, int]:
    """Arm -> number of seeds, as printed."""
    done = run("--db", str(path), "--format", "json", *arguments)
    assert done.exit_code == 0, done.output
    return {row["arm"]: len(row["seeds"]) for row in json.loads(done.output)["rows"]}


def test_filters_leave_what_is_compared_with(path: Path) -> None:
    everything = {"base": 1, "baseline_lora": 3, "hybrid_grit": 3, "pure_grit": 1}
    assert arms(path) == everything
    assert arms(path, "--arm", "pure_grit") == {"base": 1, "baseline_lora": 3, "pure_grit": 1}
    assert arms(path, "--arm", "pure_grit", "--arm", "hybrid_grit") == everything
    assert arms(path, "--seed", "1", "--seed", "2") == {"base": 1, "baseline_lora": 2, "hybrid_grit": 2}
    assert arms(path, "--backend", "llama_cpp") == everything
    one = {"base": 1, "hybrid_grit": 1, "baseline_lora": 1}
    assert arms(path, "--arm", "hybrid_grit", "--seed", "0") == one


def test_another_baseline(path: Path) -> None:
    comparison = load_comparison(path, baseline="hybrid_grit")
    assert comparison.baseline == "hybrid_grit"
    assert [row.arm for row in comparison.rows] == ["base", "hybrid_grit", "baseline_lora", "pure_grit"]
    plain = next(row for row in comparison.rows if row.arm == "baseline_lora")
    difference = plain.against("hybrid_grit")
    assert difference is not None and difference.points.estimate == pytest.approx(-4)
    assert difference.by_seed == pytest.approx((-3, -4, -5)) and difference.lost == 12
    assert {c.threshold for c in comparison.criteria if c.arm == "pure_grit"} >= {"AQI accuracy above hybrid_grit"}
    assert json.loads(run("--db", str(path), "--baseline", "hybrid_grit", "--format", "json").output)["baseline"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--baseline", "pure_grid"], ["'pure_grid'", "did you mean 'pure_grit'?", "baseline_lora, hybrid_grit"]),
        (["--arm", "hybird_grit"], ["did you mean 'hybrid_grit'?"]),
        (["--seed", "9"], ["'9'", "Available: 0, 1, 2"]),
        (["--backend", "olama", "--arm", "x"], ["'olama'", "Available: llama_cpp", "'x'"]),
    ],
)
def test_unknown_names_are_told_with_those_that_exist(path: Path, arguments: list[str], words: list[str]) -> None:
    done = run("--db", str(path), *arguments)
    assert done.exit_code == 2
    assert all(word in done.output for word in words), done.output
    with pytest.raises(ChoiceError):
        load_comparison(path, Choice(arms=["nobody"]))


def test_seeds_without_a_partner_are_not_compared(tree: Path, tmp_path: Path) -> None:
    make_arm(tree, "late_grit", 7, correct=[i < 90 for i in range(100)])
    ingest(tree, tmp_path / "d.db")
    comparison = load_comparison(tmp_path / "d.db")
    row = next(row for row in comparison.rows if row.arm == "late_grit")
    assert row.against("base") is not None and row.against("baseline_lora") is None
    line = next(line for line in comparison.verdicts if line.startswith("late_grit"))
    assert "not comparable with baseline_lora: no run of it with the same seed" in line


def test_several_seeds_speak_of_seeds_and_one_does_not(path: Path) -> None:
    comparison = load_comparison(path)
    rows = {row.arm: row for row in comparison.rows}
    several, one = rows["hybrid_grit"].against("base"), rows["pure_grit"].against("base")
    assert several is not None and one is not None
    assert (several.level, several.seeds) == ("seeds and items", 3) and (one.level, one.seeds) == ("items", 1)
    assert several.points.low != several.items_only.low and one.points == one.items_only
    lines = {line.split(":")[0]: line for line in comparison.verdicts}
    assert "100 items and 3 seeds; over items alone [" in lines["hybrid_grit"]
    assert "one seed: others may differ" in lines["pure_grit"]
    assert "undecided against baseline_lora (+0.0 points" in lines["pure_grit"]


def test_criteria_in_every_format(path: Path) -> None:
    content = json.loads(run("--db", str(path), "--format", "json").output)
    found = {(c["arm"], c["name"]): c["outcome"] for c in content["criteria"]}
    assert found["hybrid_grit", "accuracy gain"] == "pass"
    assert found["pure_grit", "above the baseline"] == "undecided"
    assert ("baseline_lora", "above the baseline") not in found
    # 20 of the base's 50 right: 40% kept.
    kept = next(c for c in content["criteria"] if (c["arm"], c["name"]) == ("pure_grit", "retention kept"))
    assert kept["estimate"]["estimate"] == pytest.approx(40) and kept["outcome"] == "fail"
    assert kept["estimate"]["high"] < 70
    # Two repetitions of one seed cannot give a 95% interval.
    assert found["pure_grit", "speed loss"] == "undecided"
    assert found["baseline_lora", "speed loss"] == "fail", "three seeds of two: 5/6 of the base's speed in all six"

    records = {r["arm"]: r for r in csv.DictReader(io.StringIO(run("--db", str(path), "--format", "csv").output))}
    assert records["pure_grit"]["criterion_retention_kept"] == "fail"
    assert float(records["pure_grit"]["retention_share_percent"]) == pytest.approx(40)
    assert records["hybrid_grit"]["criterion_accuracy_gain"] == "pass" and records["base"]["verdict"] == ""
    assert float(records["hybrid_grit"]["lead_points"]) == pytest.approx(4)
    assert records["hybrid_grit"]["level"] == "seeds and items"

    table = run("--db", str(path)).output
    assert "Success criteria" in table and "retention > 70% of the base's" in table and "│ fail " in table
    text = run("--db", str(path), "--format", "md").output
    assert "| pure_grit | retention &gt; 70% of the base's | 40.0 [" in text


def test_a_filtered_comparison_says_so_in_every_format(path: Path) -> None:
    words = "Only arms base, baseline_lora, pure_grit; seeds 0, 1 of the trained arms; backends llama_cpp"
    chosen = ("--arm", "pure_grit", "--seed", "1", "--seed", "0", "--backend", "llama_cpp", "--db", str(path))
    assert json.loads(run(*chosen, "--format", "json").output)["filters"] == f"{words}: other runs are left out"
    for shape in ("md", "table"):
        assert words in " ".join(run(*chosen, "--format", shape).output.split())
    everything = run("--db", str(path), "--baseline", "hybrid_grit", "--format", "md").output
    assert load_comparison(path).filters == "" and "left out" not in everything


def test_speed_is_one_estimate_everywhere(tree: Path, tmp_path: Path) -> None:
    """Median, not mean: one repetition that stumbles changes nothing."""
    for seed in range(3):
        speed = tree / f"scores/baseline_lora/{seed}/scores.json"
        content = json.loads(speed.read_text(encoding="utf-8"))["speed"]
        slow = [dict(row, nanoseconds=row["nanoseconds"] * 100) if row["arm"] == "baseline_lora" else row
                for row in content if seed == 0]  # fmt: skip
        edit(speed, speed=slow or content)
    ingest(tree, tmp_path / "s.db")
    comparison = load_comparison(tmp_path / "s.db")
    row = next(row for row in comparison.rows if row.arm == "baseline_lora")
    criterion = next(c for c in comparison.criteria if (c.arm, c.name) == ("baseline_lora", "speed loss"))
    assert criterion.estimate is not None and criterion.confidence == 95
    assert row.delta_speed == criterion.estimate.estimate == pytest.approx(100 * (5 / 6 - 1))
    assert row.delta_speed_interval == criterion.estimate
    assert metrics(comparison)["baseline_lora"]["delta_speed_percent"] == row.delta_speed
    records = {r["arm"]: r for r in csv.DictReader(io.StringIO(as_csv(comparison)))}
    assert float(records["baseline_lora"]["delta_speed_percent"]) == row.delta_speed
    assert cells(row)[6].startswith("-16.7 [-99.2, -16.7")
    few = next(row for row in comparison.rows if row.arm == "hybrid_grit")
    assert few.delta_speed_interval is not None, "three seeds of two repetitions"


def test_an_interval_below_95_percent_says_so(path: Path) -> None:
    comparison = load_comparison(path)
    few = next(c for c in comparison.criteria if (c.arm, c.name) == ("pure_grit", "speed loss"))
    assert few.confidence == 50, "two repetitions"
    for shape in ("md", "table"):
        lines = [
            line for line in run("--db", str(path), "--format", shape).output.splitlines() if "% interval)" in line
        ]
        assert len(lines) == 1 and "pure_grit" in lines[0] and "(50% interval)" in lines[0]


def test_seed_by_seed_names_the_seeds(tree: Path, tmp_path: Path) -> None:
    for seed in (3, 4, 11, 12, 13, 14, 15, 16):
        make_arm(tree, "hybrid_grit", seed, correct=[i < 60 + seed for i in range(100)])
    ingest(tree, tmp_path / "n.db")
    rows = {row.arm: row for row in load_comparison(tmp_path / "n.db").rows}
    several = rows["hybrid_grit"].against("baseline_lora")
    assert several is not None and several.seed_numbers == (0, 1, 2)
    assert several.by_seed == pytest.approx((3, 4, 5))
    text = section(
        run("--db", str(tmp_path / "n.db"), "--format", "md").output, "Paired differences of AQI category accuracy"
    )
    assert "| +3.0 (seed 0), +4.0 (seed 1), +5.0 (seed 2) |" in text
    assert "| +23.0 (seed 3) to +36.0 (seed 16) |" in text, "of many, the smallest and the largest"


def test_power_stands_in_every_format(path: Path) -> None:
    content = json.loads(run("--db", str(path), "--format", "json").output)
    asked = [(row["arm"], row["against"], row["points"]) for row in content["power"]]
    assert asked.count(("pure_grit", "base", 1)) == 1 and len(asked) == 3 * 5
    text = run("--db", str(path), "--format", "md").output
    row = next(r for r in content["power"] if (r["arm"], r["against"], r["points"]) == ("pure_grit", "base", 3))
    assert f"| pure_grit | base | 3 | {row['items']} | 100 | 1 |" in text
    assert f"{row['items']} items" in run("--db", str(path)).output


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_retention_and_alignment_have_sections_where_measured(path: Path, tmp_path: Path) -> None:
    text = run("--db", str(path), "--format", "md").output
    kept = section(text, "Retention and forgetting")
    assert "| Kept of the base's, % [95%] | 100.0 | – | – | 40.0 [" in kept
    assert "| Perplexity | 3.25 | – | – | 4.5 |" in kept
    assert "| Length of the update, ‖ΔW‖\\_F | – | – | – | 1.75 |" in kept
    assert "| Task addition, % | 80.0 |" in kept
    found = section(text, "Alignment Quality Index")
    assert "| base | 0 | 0.500 [0.400, 0.600] | 0.020 [0.010, 0.050] | 0.001 | – | – |" in found
    assert "| +0.400 [+0.300, +0.500] |" in found and "| 0.33 |" in found
    assert "- pure_grit: significantly further apart than in base, p = 0.002 (1 seed" in found
    assert "- hybrid_grit: undecided against base, p = 0.2 (1 seed" in found, "though the interval excludes zero"
    assert "- baseline_lora: changed against base, but the seeds disagree about the direction, p = 0.004 (2" in found
    assert "answers of the retention questions" in kept
    plain = make_tree(tmp_path / "plain")
    ingest(plain, tmp_path / "plain.db")
    assert "Alignment Quality Index" not in run("--db", str(tmp_path / "plain.db"), "--format", "md").output


@pytest.mark.parametrize(
    ("p_values", "words"),
    [
        ((0.02, 0.02), "significantly further apart than in base, p = 0.04 (2 seeds"),
        ((0.04, 0.04), "undecided against base, p = 0.08 (2 seeds"),
        ((0.9, 0.9), "undecided against base, p = 1 (2 seeds"),
        ((0.001, None), "no verdict against base: not finite for every seed (2 seeds"),
    ],
)
def test_the_verdict_on_the_alignment_index_rests_on_p_values(
    tmp_path: Path, p_values: tuple[float, float | None], words: str
) -> None:
    """Over several seeds twice their mean, whatever the intervals say."""
    tree = make_tree(tmp_path / "project")
    for seed, p_value in enumerate(p_values):
        rows = alignment(0.9, 0.4)
        found = [row | {"value": p_value} if row["name"] == "delta_alignment_p_value" else row for row in rows]
        add_rows(tree, "baseline_lora", seed, metrics=found, retained=[])
    ingest(tree, tmp_path / "c.db")
    text = section(run("--db", str(tmp_path / "c.db"), "--format", "md").output, "Alignment Quality Index")
    assert f"- baseline_lora: {words}" in text


def test_names_cannot_break_the_report(tree: Path, tmp_path: Path) -> None:
    make_arm(tree, "<b>|x|", correct=[True] * 100)
    ingest(tree, tmp_path / "e.db")
    text = run("--db", str(tmp_path / "e.db"), "--format", "md").output
    assert "&lt;b&gt;\\|x\\|" in text and "<b>" not in text
    assert {
        row["arm"] for row in json.loads(run("--db", str(tmp_path / "e.db"), "--format", "json").output)["rows"]
    } > {"<b>|x|"}


def test_the_number_of_queries_does_not_grow_with_the_runs(tree: Path, path: Path, tmp_path: Path) -> None:
    for seed in range(3, 9):
        make_arm(tree, "hybrid_grit", seed, correct=[i < 70 for i in range(100)])
    ingest(tree, tmp_path / "more.db")

    def queries(database: Path) -> int:
        seen: list[str] = []

        def count(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
            seen.append(statement)

        event.listen(Engine, "before_cursor_execute", count)
        try:
            load_comparison(database)
        finally:
            event.remove(Engine, "before_cursor_execute", count)
        return len(seen)

    assert 5 < queries(path) == queries(tmp_path / "more.db")


def test_html_is_written_by_request_only(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "page" / "report.html"
    assert run("--db", str(path), "--html", str(target)).exit_code == 0
    assert "pure_grit" in target.read_text(encoding="utf-8")
    code = "import sys, evaluation.compare_all; print([m for m in ('altair', 'jinja2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("form", ["table", "md", "csv", "json"])
def test_the_table_of_all_tasks_says_what_was_left_out(path: Path, form: str) -> None:
    whole = run("--db", str(path), "--all-tasks", "--format", form)
    some = run("--db", str(path), "--all-tasks", "--arm", "pure_grit", "--format", form)
    assert whole.exit_code == some.exit_code == 0 and not whole.stderr
    assert "Only arms base, baseline_lora, pure_grit" in some.stderr and "count these alone" in some.stderr
    assert "hybrid_grit" in whole.stdout and "hybrid_grit" not in some.stdout


def test_one_task_and_all_tasks_exclude_each_other(path: Path) -> None:
    found = run("--db", str(path), "--all-tasks", "--task", "aqi")
    assert found.exit_code == 2 and "expected one of --task and --all-tasks" in found.stderr
