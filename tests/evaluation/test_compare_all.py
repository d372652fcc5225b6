"""compare_all: numbers computed by hand, which runs are compared with which, and every format."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp
from typer.testing import CliRunner, Result

from db.ingest import ingest
from evaluation.compare_all import app
from evaluation.report.alignment import in_words
from evaluation.report.arms import credit_interval
from evaluation.report.comparison import Comparison, load_comparison
from evaluation.report.data import as_json, metrics, write_tracked
from evaluation.report.serving import PrecisionRow, precision_rows
from tests.db.result_tree import edit, make_arm, make_quantized, make_tree, make_verified, sha, verification, write

ROOT = Path(__file__).parents[2]


def run(database: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--db", str(database), *arguments])


def printed(database: Path, *arguments: str) -> dict[str, Any]:
    done = run(database, "--format", "json", *arguments)
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.output))


def compared(database: Path, **more: Any) -> Comparison:
    return load_comparison(database, **more)


def stored(tree: Path) -> Path:
    ingest(tree, tree.parent / "c.db")
    return tree.parent / "c.db"


def right(first: int, of: int = 100) -> list[bool]:
    return [i < first for i in range(of)]


def table(text: str, title: str) -> list[list[str]]:
    """Cells of the first table below a heading of any level, the header first."""
    block = text.split(f"# {title}\n")[1].split("\n## ")[0]
    lines = [line for line in block.splitlines() if line.startswith("| ") and "---" not in line]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def add_rows(tree: Path, arm: str, seed: int, *, metrics: list[dict[str, Any]], retained: list[bool]) -> None:
    scores = tree / f"scores/{arm}/{seed}"
    known = json.loads((scores / "scores.json").read_text(encoding="utf-8"))["metrics"]
    edit(scores / "scores.json", metrics=[*known, *metrics])
    lines = (scores / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    more = [
        {**json.loads(lines[0]), "item_id": f"general-{k:03d}", "split": "retention", "task": "addition",
         "correct": right, "predicted": None, "abs_error": None}
        for k, right in enumerate(retained)
    ]  # fmt: skip
    write(scores / "samples.jsonl", "\n".join([*lines, *map(json.dumps, more)]) + "\n")


def alignment(index: float, delta: float | None, p_value: float | None = 0.002) -> list[dict[str, Any]]:
    values = {"alignment_null_mean": 0.02, "alignment_null_low": 0.01, "alignment_null_high": 0.05,
              "alignment_p_value": 0.001, "xie_beni": 0.33}  # fmt: skip
    for name, value in (("alignment_index", index), ("delta_alignment_index", delta)):
        if value is not None:
            values |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1}
    if delta is not None:
        values["delta_alignment_p_value"] = p_value
    return [{"name": name, "split": "alignment", "value": value, "n": 40} for name, value in values.items()]


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Base 40 of 100 right, baseline_lora 70 (two seeds), hybrid 72, pure 38 with 2 gained and 4 lost."""
    tree = make_tree(tmp_path_factory.mktemp("few") / "project")
    make_arm(tree, "hybrid_grit", correct=right(72), own=(600, 4_000_000_000))
    make_arm(tree, "pure_grit", correct=[i < 36 or i > 97 for i in range(100)], retention=0.5)
    return stored(tree)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Base 40 of 100 right; baseline_lora 70 and hybrid_grit 75 with seeds 0, 1, 2; pure_grit 70 with seed 0."""
    tree = make_tree(tmp_path_factory.mktemp("tree") / "project")
    make_arm(tree, "baseline_lora", 2, correct=right(70))
    for seed in range(3):
        make_arm(tree, "hybrid_grit", seed, correct=right(73 + seed))
    make_arm(tree, "pure_grit", correct=right(70))
    general = {"name": "perplexity", "split": "general", "n": 900}
    half = [k % 2 == 0 for k in range(100)]
    add_rows(tree, "base", 0, metrics=[{**general, "value": 3.25}, *alignment(0.5, None)], retained=half)
    more = [{"name": "update_norm", "split": "weights", "value": 1.75, "n": None}, *alignment(0.9, 0.4)]
    add_rows(tree, "pure_grit", 0, metrics=[{**general, "value": 4.5}, *more], retained=right(20))
    add_rows(tree, "hybrid_grit", 0, metrics=alignment(0.8, 0.3, 0.2), retained=[])
    for seed, delta in ((0, 0.4), (1, -0.4)):
        add_rows(tree, "baseline_lora", seed, metrics=alignment(0.5 + delta, delta), retained=[])
    return tree


@pytest.fixture(scope="module")
def path(tree: Path) -> Path:
    return stored(tree)


# Numbers


def test_numbers_computed_by_hand(few):
    comparison = compared(few)
    base, lora, hybrid, pure = comparison.rows
    assert comparison.arms == ("base", "baseline_lora", "hybrid_grit", "pure_grit")
    assert (base.accuracy, base.delta_speed, base.differences) == (40.0, 0.0, ())
    assert (lora.seeds, lora.accuracy) == ((0, 1), 70.0)
    # Speeds: arm 600 tokens in 6 s against 600 in 5 s beside it; hybrid 600 in 4 s: 150 against 120.
    assert lora.decode_speed == pytest.approx(100) and lora.delta_speed == pytest.approx(100 * (5 / 6 - 1))
    assert hybrid.decode_speed == pytest.approx(150) and hybrid.delta_speed == pytest.approx(25)
    assert pure.retention == 50.0

    gained = lora.against("base")
    assert (gained.outcome, gained.items, gained.points.estimate) == ("better", 100, pytest.approx(30))
    # Two seeds that agree to the item: Student's t with 99 degrees of freedom.
    theirs = ttest_1samp([1.0] * 30 + [0.0] * 70, 0)
    bounds = [100 * bound for bound in theirs.confidence_interval(0.95)]
    assert (gained.points.low, gained.points.high) == pytest.approx(bounds)
    assert gained.p_value == pytest.approx(theirs.pvalue)
    assert (gained.level, gained.seeds, gained.by_seed) == ("seeds and items", 2, (30.0, 30.0))
    assert (gained.gained, gained.lost) == (60, 0), "summed over seeds"

    close, mixed = hybrid.against("baseline_lora"), pure.against("base")
    assert close.points.estimate == pytest.approx(2) and close.outcome == "undecided"
    assert mixed.points.low < 0 < mixed.points.high and mixed.outcome == "undecided"
    # 2 gained, 4 lost: 2 * (1 + 6 + 15) / 64.
    assert mixed.p_value == pytest.approx(2 * 22 / 64)
    assert (mixed.level, mixed.seeds) == ("items", 1)


def test_other_items_and_seeds_without_a_partner_are_not_compared(tmp_path):
    tree = make_tree(tmp_path / "project")
    for arm, seed in (("other_grit", 0), ("late_grit", 7)):
        make_arm(tree, arm, seed, correct=right(90))
    edit(tree / "scores/other_grit/0/scores.json", test_items_sha256=sha("others"))
    comparison = compared(stored(tree))
    (_, _, late, other), (_, of_late, of_other) = comparison.rows, comparison.outcomes
    assert other.differences == () and "cannot be compared with base:" in of_other
    assert late.against("base") is not None and late.against("baseline_lora") is None
    assert "cannot be compared with baseline_lora" in of_late and "same seed" in of_late


@pytest.mark.parametrize(("some", "end"), [(40, "high"), (10, "low")])
def test_a_score_of_several_seeds_stays_between_0_and_100(some, end):
    seeds = [np.full(50, float(end == "high")), np.arange(50) < some]
    found = credit_interval([{str(i): float(credit) for i, credit in enumerate(own)} for own in seeds])
    assert getattr(found, end) == {"high": 100.0, "low": 0.0}[end]
    assert 0 <= found.low < found.estimate < found.high <= 100


# The choice of runs


def test_filters_leave_what_is_compared_with_and_are_named(path):
    def arms(*arguments: str) -> dict[str, int]:
        return {row["arm"]: len(row["seeds"]) for row in printed(path, *arguments)["rows"]}

    everything = {"base": 1, "baseline_lora": 3, "hybrid_grit": 3, "pure_grit": 1}
    assert arms() == everything and printed(path)["filters"] == ""
    assert arms("--arm", "pure_grit") == {"base": 1, "baseline_lora": 3, "pure_grit": 1}
    assert arms("--seed", "1", "--seed", "2") == {"base": 1, "baseline_lora": 2, "hybrid_grit": 2}
    chosen = ("--arm", "hybrid_grit", "--seed", "0")
    assert arms(*chosen) == {"base": 1, "hybrid_grit": 1, "baseline_lora": 1}
    filters = printed(path, *chosen)["filters"]
    assert "arms base, baseline_lora, hybrid_grit; seeds 0" in filters
    assert filters in " ".join(run(path, *chosen).output.split())


def test_another_baseline(path):
    comparison = compared(path, baseline="hybrid_grit")
    assert comparison.arms == ("base", "hybrid_grit", "baseline_lora", "pure_grit")
    difference = comparison.rows[2].against("hybrid_grit")
    assert difference.points.estimate == pytest.approx(-4) and difference.lost == 12
    assert difference.by_seed == pytest.approx((-3, -4, -5))
    assert {c.threshold for c in comparison.criteria if c.arm == "pure_grit"} >= {"AQI accuracy above hybrid_grit"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--baseline", "pure_grid"], ["'pure_grid'", "did you mean 'pure_grit'?", "baseline_lora, hybrid_grit"]),
        (["--arm", "hybird_grit"], ["did you mean 'hybrid_grit'?"]),
        (["--seed", "9"], ["'9'", "Available: 0, 1, 2"]),
        (["--all-tasks", "--task", "aqi"], ["--task", "--all-tasks"]),
        (["--all-tasks", "--format", "json"], ["--all-tasks alone"]),
    ],
)
def test_unknown_names_are_refused_with_the_available_ones(path, arguments, words):
    done = run(path, *arguments)
    assert done.exit_code == 2 and all(word in done.output for word in words), done.output


def test_nothing_to_compare_names_the_command(tmp_path):
    (tmp_path / "empty.db").touch()
    for database in (tmp_path / "none.db", tmp_path / "empty.db"):
        done = run(database)
        assert done.exit_code == 2 and "dvc repro" in done.output
    (tmp_path / "text.db").write_text("hello " * 500, encoding="utf-8")
    assert run(tmp_path / "text.db").exit_code == 1


# Formats


def test_in_a_pipe_tables_fit_a_hundred_columns_and_nothing_heavy_is_loaded(path):
    heavy = ("torch", "transformers", "scipy.stats", "pandas", "altair", "jinja2")
    code = (
        f"import sys; from evaluation.compare_all import app; "
        f"app(['--full', '--db', {str(path)!r}], standalone_mode=False); "
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, encoding="utf-8",
        env={"PATH": "/usr/bin", "NO_COLOR": "1", "COLUMNS": "40", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    *lines, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    first = next(line for line in lines if line.startswith(" baseline_lora"))
    assert [*first.split()[:2], *first.split()[-5:]] == ["baseline_lora", "70.0", "–", "80.0", "–", "plain", "AdamW"]
    assert max(len(line.rstrip()) for line in lines if not line.endswith(".")) <= 100, "all but sentences"
    assert "\x1b" not in done.stdout and "…" not in done.stdout
    assert any(line.startswith("hybrid_grit may differ from baseline_lora by chance alone (p = ") for line in lines)


def test_the_result_fits_one_screen_of_24_lines_and_100_columns(path):
    lines = run(path).output.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    rows = {line.split()[0]: line.split() for line in lines if line.startswith(" ") and line.strip()}
    assert set(rows) >= set(compared(path).arms)
    assert rows["baseline_lora"][1] == "70.0" and rows["pure_grit"][-1] == "undecided"
    assert "--full" in lines[-1]


def test_every_format_says_the_same(path):
    content, text = printed(path), run(path, "--format", "md").output
    records = list(csv.DictReader(io.StringIO(run(path, "--format", "csv").output)))
    assert [row["arm"] for row in content["rows"]] == [record["arm"] for record in records]
    for row, record in zip(content["rows"][1:], records[1:], strict=True):
        difference = row["differences"][0]
        bounds = list(difference["points"].values())
        assert [float(record[f"delta_aqi{end}"]) for end in ("", "_low", "_high")] == bounds
        assert record["delta_aqi_verdict"] == difference["verdict"]
        shown = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*bounds)
        assert f"| {shown} ({difference['verdict']}; p = {difference['p_holm']:.2g}) |" in text
    assert content["runs"][0]["environment"]["packages"] == {"peft": "0.21.2", "torch": "2.13.0"}
    assert content["verdicts"] == list(compared(path).outcomes) and records[0]["delta_aqi_verdict"] == ""
    hybrid, pure = records[2:]
    assert float(hybrid["aqi_against_baseline_lora"]) == pytest.approx(4)
    assert "| +3.0 (seed 0), +4.0 (seed 1), +5.0 (seed 2) |" in text

    found = {(c["arm"], c["name"]): c for c in content["criteria"]}
    assert found["hybrid_grit", "accuracy gain"]["outcome"] == "pass" == hybrid["criterion_accuracy_gain"]
    assert found["pure_grit", "above the baseline"]["outcome"] == "undecided"
    assert ("baseline_lora", "above the baseline") not in found
    # 20 of the base's 50 right: 40% kept.
    kept = found["pure_grit", "retention kept"]
    assert kept["outcome"] == "fail" == pure["criterion_retention_kept"]
    assert kept["estimate"]["estimate"] == pytest.approx(40) == float(pure["retention_kept"])
    # Two repetitions of one seed cannot give a 95% interval.
    few = found["pure_grit", "speed loss"]
    assert (few["outcome"], few["confidence"]) == ("undecided", 50)
    assert found["baseline_lora", "speed loss"]["outcome"] == "fail", "5/6 of the base's speed in all six"
    cells = {row[0].split(" (")[0]: row[2:] for row in table(text, "Success criteria") if row[1] == "pure_grit"}
    assert cells["retention kept"][0] == "fail" and cells["retention kept"][1].startswith("40.0 [")
    assert cells["speed loss"][1].endswith("; 50% interval)")


def test_numbers_that_could_not_be_computed_are_words(few, tmp_path):
    tree = make_tree(tmp_path / "project")
    scores = tree / "scores/baseline_lora/0/scores.json"
    known = json.loads(scores.read_text(encoding="utf-8"))["metrics"]
    edit(scores, metrics=[known[0], known[1] | {"value": math.nan}, *known[2:]])
    device = json.loads((tree / "scores/baseline_lora/0/run.json").read_text(encoding="utf-8"))["device"]
    edit(tree / "scores/baseline_lora/0/run.json", device=device | {"name": "Other CPU"})
    content = printed(stored(tree))
    assert content["rows"][1]["metrics"]["test/aqi_mae"] == "nan"
    notes = " ".join(content["notes"])
    assert "cpu Other CPU, cpu Some CPU" in notes and "not finite" in notes
    whole = compared(few)
    row = replace(whole.rows[1], accuracy=math.nan, metrics={("a", "b"): -math.inf})
    (found,) = json.loads(as_json(replace(whole, rows=(row,))), parse_constant=pytest.fail)["rows"]
    assert (found["accuracy"], found["metrics"]) == ("nan", {"a/b": "-inf"})


def test_the_report_holds_metrics_and_provenance(few):
    text = run(few, "--format", "md").output
    assert "| retention/addition | retention | – | – | 0.8 | 0.8 | 0.8 | 0.5 |" in text
    assert "| aqi_mae | test | AQI points | lower | 4.5 |" in text
    assert "| abc123 | no | llama_cpp 0.3.36 | cpu: Some CPU | 2026-11-21 03:30 UTC |" in text
    assert "torch 2.13.0" in text and "(undecided; p = " in text


def test_retention_and_alignment_have_sections_where_measured(path, few):
    text = run(path, "--format", "md").output
    kept = {row[0]: row[3] for row in table(text, "Retention")}
    assert (kept["base"], kept["baseline_lora"]) == ("100.0", "–") and kept["pure_grit"].startswith("40.0 [")
    rows = table(text, "Alignment Quality Index")
    assert rows[1][:7] == ["base", "0", "0.500 [0.400, 0.600]", "0.020 [0.010, 0.050]", "0.001", "–", "–"]
    assert rows[-1][5:7] == ["+0.400 [+0.300, +0.500]", "0.002"] and rows[-1][-1] == "0.33"
    hybrid, pure = map(in_words, compared(path).rows[2:])
    assert "cannot be distinguished" in hybrid, "though the interval excludes zero"
    assert pure in text and "p = 0.002 (1 seed" in pure
    plain = run(few, "--format", "md").output
    assert not [title for title in ("Alignment Quality Index", "## Quantization", "Perturbed") if title in plain]


@pytest.mark.parametrize(
    ("p_value", "deltas", "words"),
    [
        (0.02, (0.4, 0.4), "further apart than in base, p = 0.04 (2 seeds"),
        (0.02, (-0.4, -0.4), "closer together than in base, p = 0.04"),
        (0.02, (0.4, -0.4), "seeds disagree"),
        (0.04, (0.4, 0.4), "cannot be distinguished from base, p = 0.08 (2 seeds"),
        (0.9, (0.4, 0.4), "p = 1 (2 seeds"),
        (math.nan, (0.4, 0.4), "not finite for every seed (2 seeds"),
    ],
)
def test_alignment_outcomes_rest_on_p_values(path, p_value, deltas, words):
    """Of several seeds the p-value is twice the mean."""
    metrics = {("alignment", "delta_alignment_index"): sum(deltas) / 2 or 0.1,
               ("alignment", "delta_alignment_p_value"): p_value}  # fmt: skip
    ends = {"": 1, "_low": 0, "_high": 2}
    runs = [
        SimpleNamespace(metrics={("alignment", f"delta_alignment_index{end}"): n * delta for end, n in ends.items()})
        for delta in deltas
    ]
    assert words in in_words(replace(compared(path).rows[-1], metrics=metrics, runs=tuple(runs)))


# What is served


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Path:
    """baseline_lora in three precisions with two seeds: q8_0 loses items 0 and 1 once each and gains item 80 twice."""
    tree = make_tree(tmp_path_factory.mktemp("served") / "project")
    f16 = right(70)
    for seed in (0, 1):
        q8 = [(correct and i != seed) or i == 80 for i, correct in enumerate(f16)]
        rows = {"f16": (f16, 1.0), "q8_0": (q8, 0.9 + seed / 50), "q4_K_M": (right(50), 0.25)}
        make_quantized(tree, "baseline_lora", seed, rows=rows)
    quantized = tree / "quantized/baseline_lora/1/quantized.json"
    content = json.loads(quantized.read_text(encoding="utf-8"))["rows"]
    edit(quantized, rows=[*content[:2], {**content[2], "fallbacks": 13}])
    lost = {"rendered": None, "counted": None, "answered": None, "equal_to_merged": None, "perturbed_noticed": None,
            "tied": None}  # fmt: skip
    refused = verification("ollama", "adapter", prompts=0, **lost, first_difference="not supported by this server")
    blind = verification("llama_cpp", "adapter", perturbed_noticed=False)
    old = verification("ollama", "merged", rendered=None, counted=None)
    make_verified(tree, "baseline_lora", rows=[verification("llama_cpp", "merged"), blind, old, refused])
    second = verification("llama_cpp", "merged", form="second", answered=0.9, tied=0.1)
    plain, newline = (verification("llama_cpp", "merged", form=form) for form in ("plain", "newline"))
    make_verified(tree, "base", rows=[second, newline, plain])
    scores = tree / "scores/baseline_lora/0/scores.json"
    speed = [row for row in json.loads(scores.read_text(encoding="utf-8"))["speed"] if row["phase"] == "decode"]
    timed = [("load", None, (200, 300, 250)), ("ttft", 4, (80, 40, 60)), ("prefill", 1000, (500, 250, 125))]
    speed += [
        {"arm": "baseline_lora", "phase": p, "repetition": r, "tokens": n, "nanoseconds": ms * 1_000_000}
        for p, n, times in timed
        for r, ms in enumerate(times)
    ]
    edit(scores, speed=speed)
    return stored(tree)


def precisions(database: Path) -> list[PrecisionRow]:
    return [each for row in compared(database).rows for each in precision_rows(row.runs)]


def test_precisions_computed_by_hand(served):
    f16, q8, q4 = precisions(served)
    assert [row.type for row in (f16, q8, q4)] == ["f16", "q8_0", "q4_K_M"] and q8.seeds == (0, 1)
    theirs = binomtest(70, 100).proportion_ci(method="wilson")
    assert f16.accuracy.estimate == pytest.approx(70)
    assert (f16.accuracy.low, f16.accuracy.high) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=1e-3)
    assert (f16.delta, f16.p_value, f16.gained, f16.lost) == (None, None, 0, 0)
    # Seeds are averaged per item: -0.5 for items 0 and 1, +1 for item 80.
    assert q8.delta.estimate == pytest.approx(0.0) and q8.delta.low < 0 < q8.delta.high
    assert (q8.gained, q8.lost, q8.p_value, q8.answers_equal) == (1, 2, 1.0, pytest.approx(91))
    # 20 of 100 items lost: standard error 4 points.
    assert q4.delta.estimate == pytest.approx(-20) and (q4.gained, q4.lost) == (0, 20)
    assert (q4.delta.low, q4.delta.high) == pytest.approx((-28, -12), abs=1)
    assert q4.p_value == pytest.approx(2 / 2**20)
    assert (q8.megabytes, q8.bits_per_weight, q8.fallbacks, q4.fallbacks, q4.tensors) == (8.5, 8.5, 0, 13, 20)


def test_a_precision_of_one_seed_is_compared_with_that_seeds_f16(tmp_path):
    tree = make_tree(tmp_path / "project")
    make_quantized(tree, "baseline_lora", 0, rows={"f16": (right(70), 1.0)})
    make_quantized(tree, "baseline_lora", 1, rows={"f16": (right(50), 1.0), "q8_0": (right(45), 0.8)})
    database = stored(tree)
    both, one = precisions(database)
    assert (both.seeds, both.accuracy.estimate) == ((0, 1), pytest.approx(60))
    assert (one.seeds, one.accuracy.estimate, one.answers_equal) == ((1,), pytest.approx(45), 80)
    assert one.delta.estimate == pytest.approx(-5) and (one.gained, one.lost) == (0, 5)
    assert "different seeds" in run(database, "--format", "md").output


def test_the_report_shows_what_is_served(served):
    text = run(served, "--format", "md").output
    _, _, q8, q4 = table(text, "Quantization")
    assert q8[4].startswith("70.0 [60.") and q8[6:] == ["1, 2", "91.0", "0 of 20"] and q4[-1] == "13 of 20"
    _, base, newline, second, merged, blind, old, refused, *_ = table(text, "Served as trained")
    assert base == ["base (seed 0)", "llama_cpp 0.3.36", "merged", "plain", "20", *["100.0"] * 3, "0.0", "–", "–"]
    assert newline[3] == "newline" and second[3:5] == ["second", "20"] and second[7:9] == ["90.0", "10.0"]
    assert merged[2] == "merged" and merged[9:11] == ["–", "–"] and blind[7:11] == ["95.0", "0.0", "95.0", "NO"]
    assert "prompt 3: token 2 \\| differs Likely cause: scale" in text, "a model's words cannot end a cell"
    assert old[4:9] == ["20", "not reported", "not reported", "100.0", "0.0"]
    assert refused[1:6] == ["ollama 0.32.0", "adapter", "plain", "not supported", "–"] and "by this server" in text

    phases = {(row[0], row[2]): row[3:] for row in table(text, "Speed by phase")[1:]}
    # ttft is a sum over 4 requests.
    assert phases["baseline_lora", "Time to first token"] == ["15.00 [10.00, 20.00] ms", "75.0", "3"]
    assert "…" not in run(served).output and len(printed(served)["served"]) == 7


# What DVC shows


def test_what_dvc_shows_is_what_the_comparison_says(few, tmp_path):
    comparison = load_comparison(few, detail=True)
    found = metrics(comparison)
    assert list(found) == list(comparison.arms) and "delta_aqi" not in found["base"]
    for row in comparison.rows:
        assert found[row.arm]["aqi_accuracy"] == row.accuracy
        for d in row.differences:
            name = "delta_aqi" if d.against == "base" else f"aqi_against_{d.against}"
            assert (found[row.arm][f"{name}_low"], found[row.arm][f"{name}_verdict"]) == (d.points.low, d.outcome)
    gaps = replace(comparison.rows[1], retention=None, decode_speed=math.nan)
    known = metrics(replace(comparison, rows=(gaps,)))[gaps.arm]
    assert "aqi_accuracy" in known and not {"retention_accuracy", "decode_speed"} & known.keys()

    write_tracked(tmp_path / "metrics.json", tmp_path, comparison)
    assert json.loads((tmp_path / "metrics.json").read_text()) == found

    def lines(name: str) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO((tmp_path / f"{name}.csv").read_text(encoding="utf-8"))))

    for row, line in zip(comparison.rows, lines("accuracy"), strict=True):
        bounds = (row.accuracy_interval.low, row.accuracy_interval.high)
        assert (float(line["low"]), float(line["high"])) == pytest.approx(bounds)
    assert len(lines("differences")) == sum(len(row.differences) for row in comparison.rows) > 0
    assert {"step": "10", "arm": "pure_grit", "seed": "0", "loss": "1.5"} in lines("train_loss")
    assert {"step": "10", "arm": "pure_grit", "seed": "0", "loss": "1.2"} in lines("eval_loss")
