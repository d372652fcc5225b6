from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, ttest_1samp
from typer.testing import CliRunner, Result

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "db"))

from result_tree import (  # noqa: E402
    edit,
    make_arm,
    make_quantized,
    make_tree,
    make_verified,
    sha,
    verification,
)

from db.ingest import ingest  # noqa: E402
from evaluation.compare_all import app, load_comparison, write_report  # noqa: E402
from evaluation.report import as_json  # noqa: E402
from evaluation.statistics import (  # noqa: E402
    Interval,
    bootstrap_mean,
    holm,
    judge,
    paired_differences,
    sign_test,
    wilson,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Base 40 of 100 right, baseline_lora 70 (two seeds), hybrid 72, pure 38 with 2 gained and 4 lost."""
    tree = make_tree(tmp_path / "project")
    make_arm(tree, "hybrid_grit", correct=[i < 72 for i in range(100)], own=(600, 4_000_000_000))
    make_arm(tree, "pure_grit", correct=[i < 36 or i > 97 for i in range(100)], retention=0.5)
    ingest(tree, tmp_path / "c.db")
    return tmp_path / "c.db"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


# --- statistics -------------------------------------------------------------------------------------------


def test_bootstrap_agrees_with_scipy_and_the_normal_formula() -> None:
    values = np.array([1.0] * 60 + [0.0] * 100 + [-1.0] * 40)
    interval = bootstrap_mean(values)
    theirs = bootstrap((values,), np.mean, method="percentile", random_state=1).confidence_interval
    assert interval.estimate == pytest.approx(0.1)
    assert (interval.low, interval.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    half = 1.96 * values.std() / np.sqrt(200)
    assert (interval.low, interval.high) == pytest.approx((0.1 - half, 0.1 + half), abs=0.01)
    assert bootstrap_mean(values) == interval, "the same data give the same interval"
    assert bootstrap_mean(values, level=0.5).low > interval.low


def test_bootstrap_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        bootstrap_mean(np.zeros(0))


def test_thirds_that_cancel_do_not_count_as_a_gain() -> None:
    values = np.array([1 / 3, 1 / 3, 1 / 3, -1.0] * 50)
    interval = bootstrap_mean(values)
    assert interval.low < 0 < interval.high
    assert bootstrap_mean(np.zeros(50)).crosses_zero


def test_differences_pair_items_and_average_seeds() -> None:
    base = {"a": True, "b": False, "c": False, "only base": True}
    first, second = {"c": True, "b": True, "a": True}, {"a": False, "b": True, "c": False}
    assert paired_differences([(first, base), (second, base)]).tolist() == [-0.5, 1.0, 0.5]
    assert paired_differences([]).size == 0


def test_sign_test_is_mcnemars_exact_test() -> None:
    values = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 500)
    assert sign_test(values) == pytest.approx(binomtest(9, 11).pvalue)
    assert sign_test(np.zeros(10)) == 1.0
    assert sign_test(np.array([1.0] * 3000 + [-1.0] * 2900)) == pytest.approx(binomtest(3000, 5900).pvalue)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_no_winner_while_zero_is_possible() -> None:
    assert judge(Interval(1.0, -0.1, 2.0), 0.001) == "undecided"
    assert judge(Interval(1.0, 0.0, 2.0), 0.001) == "undecided"
    assert judge(Interval(1.0, 0.1, 2.0), 0.2) == "undecided", "four of four differing items are no proof"
    assert judge(Interval(1.0, 0.1, 2.0), 0.001) == "better"
    assert judge(Interval(-1.0, -2.0, -0.1), 0.001) == "worse"


def test_wilson_is_scipys_and_never_certain() -> None:
    for right, items in ((0, 40), (3, 40), (20, 40), (40, 40), (499, 500)):
        theirs = binomtest(right, items).proportion_ci(method="wilson")
        ours = wilson(right / items, items)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
        assert 0 <= ours.low <= ours.estimate <= ours.high <= 1 and ours.high - ours.low > 0
    assert all(wilson(0.0, n).low == 0.0 and wilson(1.0, n).high == 1.0 for n in range(1, 300)), "rounding too"


# --- the comparison ---------------------------------------------------------------------------------------


def test_numbers_worked_out_by_hand(path: Path) -> None:
    rows = {row.arm: row for row in load_comparison(path).rows}
    assert list(rows) == ["base", "baseline_lora", "hybrid_grit", "pure_grit"]
    base, lora, hybrid, pure = rows.values()
    assert (base.accuracy, base.delta_speed, base.parity, base.differences) == (40.0, 0.0, None, ())
    assert (lora.seeds, lora.accuracy, lora.accuracy_by_seed) == ((0, 1), 70.0, (70.0, 70.0))
    # Speeds: arm 600 tokens in 6 s against 600 in 5 s beside it; hybrid 600 in 4 s: 150 against 120.
    assert lora.decode_speed == pytest.approx(100) and lora.delta_speed == pytest.approx(100 * (5 / 6 - 1))
    assert hybrid.decode_speed == pytest.approx(150) and hybrid.delta_speed == pytest.approx(25)
    assert (pure.retention, pure.parity) == (50.0, 99.0)

    gained = lora.against("base")
    assert gained is not None and gained.verdict == "better"
    assert gained.points.estimate == pytest.approx(30) and gained.items == 100
    # 30 ones among 100 zeros: standard error 4.58 points.
    assert (gained.points.low, gained.points.high) == pytest.approx((21, 39), abs=1)
    # Two seeds that agree to the item: Student's t with 99 degrees of freedom.
    assert gained.p_value == pytest.approx(ttest_1samp([1.0] * 30 + [0.0] * 70, 0).pvalue)
    assert (gained.level, gained.seeds, gained.by_seed) == ("seeds and items", 2, (30.0, 30.0))
    assert (gained.gained, gained.lost) == (60, 0), "summed over seeds"

    close = hybrid.against("baseline_lora")
    assert close is not None and close.points.estimate == pytest.approx(2) and close.verdict == "undecided"
    mixed = pure.against("base")
    assert mixed is not None and mixed.points.estimate == pytest.approx(-2)
    assert mixed.points.low < 0 < mixed.points.high and mixed.verdict == "undecided"
    # 2 gained, 4 lost: 2 * (1 + 6 + 15) / 64.
    assert mixed.p_value == pytest.approx(2 * 22 / 64)


def test_verdicts_never_name_a_winner_inside_the_noise(path: Path) -> None:
    lines = {line.split(":")[0]: line for line in load_comparison(path).verdicts}
    assert set(lines) == {"baseline_lora", "hybrid_grit", "pure_grit"}
    assert "better than base (+30.0 points" in lines["baseline_lora"]
    assert "undecided against baseline_lora (+2.0 points" in lines["hybrid_grit"]
    assert "undecided against base (-2.0 points" in lines["pure_grit"]
    assert "the interval contains zero" in lines["pure_grit"]
    assert "worse than baseline_lora" in lines["pure_grit"] and "better" not in lines["pure_grit"]


def test_other_items_are_not_compared(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "project")
    for seed in (0, 1):
        edit(tree / f"scores/baseline_lora/{seed}/scores.json", test_items_sha256=sha("others"))
    ingest(tree, tmp_path / "c.db")
    comparison = load_comparison(tmp_path / "c.db")
    assert comparison.rows[1].differences == ()
    assert "not comparable with base" in comparison.verdicts[0]
    assert "–" in run("--db", str(tmp_path / "c.db")).output


# --- the command ------------------------------------------------------------------------------------------


def test_table_in_a_pipe_is_whole_and_plain(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "evaluation.compare_all", "--db", str(path)],
        capture_output=True, text=True, cwd=ROOT, check=True, encoding="utf-8",
        env={"PATH": "/usr/bin", "NO_COLOR": "1", "COLUMNS": "40", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    row = next(line for line in lines if "baseline_lora_model" in line)
    values = [cell.strip() for cell in row.split("│")[1:-1]]
    assert values[:3] == ["baseline_lora_model", "2", "70.0"]
    assert values[3].startswith("+30.0 [+2") and values[3].endswith("]")
    assert values[4:] == ["80.0", "100.0", "-16.7 [too few]", "99.0", "plain AdamW"]
    assert "\x1b" not in done.stdout and "…" not in done.stdout
    assert sum(line.startswith(("baseline_lora: ", "hybrid_grit: ", "pure_grit: ")) for line in lines) == 3
    assert any("decode equally fast" in line and "noise" in line for line in lines)


def test_json_csv_and_markdown_say_the_same(path: Path) -> None:
    content: dict[str, Any] = json.loads(run("--db", str(path), "--format", "json").output)
    records = list(csv.DictReader(io.StringIO(run("--db", str(path), "--format", "csv").output)))
    text = run("--db", str(path), "--format", "md").output
    assert [row["arm"] for row in content["rows"]] == [record["arm"] for record in records]
    for row, record in zip(content["rows"][1:], records[1:], strict=True):
        points = row["differences"][0]["points"]
        assert float(record["delta_aqi_points"]) == points["estimate"]
        assert float(record["delta_aqi_low"]) == points["low"] <= points["estimate"]
        assert record["verdict"] == row["differences"][0]["verdict"]
        shown = f"{points['estimate']:+.1f} [{points['low']:+.1f}, {points['high']:+.1f}]"
        assert f"| {row['model_name']} | {len(row['seeds'])} | {row['accuracy']:.1f} | {shown} |" in text
    assert content["runs"][0]["packages"] == {"peft": "0.21.2", "torch": "2.13.0"}
    assert content["verdicts"] == list(load_comparison(path).verdicts)


def test_report_holds_metrics_parity_and_provenance(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "report.md"
    assert run("--db", str(path), "--report", str(target)).exit_code == 0
    text = target.read_text(encoding="utf-8")
    assert "| retention | retention/addition | – | – | 0.8 | 0.8 | 0.8 | 0.5 |" in text
    assert "| test | aqi_mae | AQI points | lower | 4.5 |" in text
    assert "| hf/base+adapter_gguf | – | 99.0 | 99.0 | 99.0 |" in text
    assert "| base | 0 | abc123 | no | llama_cpp 0.3.36 | cpu: Some CPU | 3.11.7 | 2026-11-21T03:30" in text
    assert "torch 2.13.0" in text and "undecided against base" in text
    write_report(target, load_comparison(path))
    assert target.read_text(encoding="utf-8") == text, "the same results make the same report"
    assert [p.name for p in target.parent.iterdir()] == ["report.md"]


def test_nan_metrics_are_shown_as_such(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "project")
    scores = tree / "scores/baseline_lora/0/scores.json"
    metrics = json.loads(scores.read_text(encoding="utf-8"))["metrics"]
    metrics[1]["value"] = float("nan")
    edit(scores, metrics=metrics)
    ingest(tree, tmp_path / "c.db")
    content = json.loads(run("--db", str(tmp_path / "c.db"), "--format", "json").output)
    assert content["rows"][1]["metrics"]["test/aqi_mae"] == "nan"
    assert any("could not be computed" in note for note in content["notes"])


def test_svg_is_a_picture_of_the_table(path: Path, tmp_path: Path) -> None:
    assert run("--db", str(path), "--svg", str(tmp_path / "t.svg")).exit_code == 0
    assert "url(" not in (tmp_path / "t.svg").read_text().replace("url(#", "")  # nothing from a network
    tree = ElementTree.parse(tmp_path / "t.svg")
    assert tree.getroot().tag.endswith("svg")
    words = "".join(tree.getroot().itertext()).replace("\xa0", " ")
    assert "baseline_lora_model" in words and "undecided" in words


def test_a_report_that_cannot_be_written_is_an_error_in_words(path: Path) -> None:
    done = run("--db", str(path), "--report", str(path / "report.md"))
    assert done.exit_code == 1 and "name another" in done.output


def test_nothing_to_compare_names_the_command(tmp_path: Path) -> None:
    missing = run("--db", str(tmp_path / "none.db"))
    assert missing.exit_code == 2 and "dvc repro" in missing.output
    (tmp_path / "project").mkdir()
    ingest(tmp_path / "project", tmp_path / "empty.db")
    empty = run("--db", str(tmp_path / "empty.db"))
    assert empty.exit_code == 2 and "dvc repro" in empty.output
    (tmp_path / "text.db").write_text("hello " * 500, encoding="utf-8")
    assert run("--db", str(tmp_path / "text.db")).exit_code == 1


def test_the_command_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "scipy", "pandas", "alembic", "pydantic")
    code = f"import sys, evaluation.compare_all; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


# --- what is served -----------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """baseline_lora in three precisions with two seeds: q8_0 loses items 0 and 1 once each and gains item 80 twice."""
    tree = make_tree(tmp_path / "project")
    f16 = [i < 70 for i in range(100)]
    for seed in (0, 1):
        q8 = [(right and i != seed) or i == 80 for i, right in enumerate(f16)]
        q4 = [i < 50 for i in range(100)]
        rows = {"f16": (f16, 1.0), "q8_0": (q8, 0.9 + seed / 50), "q4_K_M": (q4, 0.25)}
        make_quantized(tree, "baseline_lora", seed, rows=rows)
    quantized = tree / "quantized/baseline_lora/1/quantized.json"
    content = json.loads(quantized.read_text(encoding="utf-8"))["rows"]
    edit(quantized, rows=[*content[:2], {**content[2], "fallbacks": 13}])
    lost = {"rendered": None, "counted": None, "answered": None, "equal_to_merged": None, "perturbed_noticed": None}
    refused = verification("ollama", "adapter", prompts=0, **lost, first_difference="not supported by this server")
    blind = verification("llama_cpp", "adapter", perturbed_noticed=False)
    old = verification("ollama", "merged", rendered=None, counted=None)
    make_verified(tree, "baseline_lora", rows=[verification("llama_cpp", "merged"), blind, old, refused])
    make_verified(tree, "base", rows=[verification("llama_cpp", "merged")])
    scores = tree / "scores/baseline_lora/0/scores.json"
    speed = [row for row in json.loads(scores.read_text(encoding="utf-8"))["speed"] if row["phase"] == "decode"]
    timed = [("load", None, (200, 300, 250)), ("ttft", 4, (80, 40, 60)), ("prefill", 1000, (500, 250, 125))]
    speed += [
        {"arm": "baseline_lora", "phase": p, "repetition": r, "tokens": n, "nanoseconds": ms * 1_000_000}
        for p, n, times in timed
        for r, ms in enumerate(times)
    ]
    edit(scores, speed=speed)
    ingest(tree, tmp_path / "c.db")
    return tmp_path / "c.db"


def section(text: str, title: str) -> list[list[str]]:
    """Cells of the table below a heading, the header first."""
    block = text.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in block.splitlines() if line.startswith("| ") and "---" not in line]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def test_precisions_worked_out_by_hand(served: Path) -> None:
    f16, q8, q4 = load_comparison(served).precisions
    assert [row.type for row in (f16, q8, q4)] == ["f16", "q8_0", "q4_K_M"] and q8.seeds == (0, 1)
    assert f16.accuracy is not None and f16.accuracy.estimate == pytest.approx(70)
    theirs = binomtest(70, 100).proportion_ci(method="wilson")
    assert (f16.accuracy.low, f16.accuracy.high) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=1e-3)
    assert (f16.delta, f16.p_value, f16.gained, f16.lost) == (None, None, 0, 0)
    # Seeds are averaged per item: -0.5 for items 0 and 1, +1 for item 80.
    assert q8.delta is not None and q8.delta.estimate == pytest.approx(0.0)
    assert q8.delta.low < 0 < q8.delta.high and (q8.gained, q8.lost) == (1, 2)
    assert q8.p_value == 1.0 and q8.answers_equal == pytest.approx(91)
    # 20 of 100 items lost: standard error 4 points.
    assert q4.delta is not None and q4.delta.estimate == pytest.approx(-20) and (q4.gained, q4.lost) == (0, 20)
    assert (q4.delta.low, q4.delta.high) == pytest.approx((-28, -12), abs=1)
    assert q4.p_value == pytest.approx(2 / 2**20)
    assert (q8.megabytes, q8.bits_per_weight, q8.fallbacks, q4.fallbacks, q4.tensors) == (8.5, 8.5, 0, 13, 20)


def test_a_precision_of_one_seed_is_held_against_that_seeds_f16(tmp_path: Path) -> None:
    """f16 is right on 70 items with seed 0 and on 50 with seed 1; q8_0, measured with seed 1 alone, on 45."""
    tree = make_tree(tmp_path / "project")
    f16 = {seed: [i < right for i in range(100)] for seed, right in ((0, 70), (1, 50))}
    make_quantized(tree, "baseline_lora", 0, rows={"f16": (f16[0], 1.0)})
    make_quantized(tree, "baseline_lora", 1, rows={"f16": (f16[1], 1.0), "q8_0": ([i < 45 for i in range(100)], 0.8)})
    quantized = tree / "quantized/baseline_lora/0/quantized.json"
    rows = json.loads(quantized.read_text(encoding="utf-8"))["rows"]
    edit(quantized, rows=[{**rows[0], "bytes": 20_000_000}])
    ingest(tree, tmp_path / "c.db")
    both, one = load_comparison(tmp_path / "c.db").precisions
    assert (both.seeds, one.seeds) == ((0, 1), (1,))
    assert both.accuracy is not None and both.accuracy.estimate == pytest.approx(60) and both.megabytes == 18
    assert one.accuracy is not None and one.accuracy.estimate == pytest.approx(45) and one.answers_equal == 80
    assert one.delta is not None and one.delta.estimate == pytest.approx(-5) and (one.gained, one.lost) == (0, 5)
    text = run("--db", str(tmp_path / "c.db"), "--format", "md").output
    _, first, second = section(text, "Quantization")
    assert (first[2], second[2]) == ("0, 1", "1") and "lines with other seeds are not to be held" in text


def test_the_report_shows_what_is_served(served: Path) -> None:
    text = run("--db", str(served), "--format", "md").output
    head, f16, q8, q4 = section(text, "Quantization")
    assert head[:5] == ["Model", "Type", "Which seeds", "Size MB", "Bits per weight"]
    assert f16[:5] == ["baseline_lora_model", "f16", "0, 1", "16.00", "16.00"]
    assert f16[6:] == ["–", "–", "100.0", "0 of 20"]
    assert q8[1] == "q8_0" and q8[5].startswith("70.0 [60.") and q8[7:] == ["1, 2", "91.0", "0 of 20"]
    assert q4[6].startswith("-20.0 [-2") and q4[-1] == "13 of 20"
    assert "Fallback tensors have rows" in text and "lines with other seeds" not in text

    _, base, merged, blind, old, refused = section(text, "Served as trained")
    assert base == ["base_model", "0", "llama_cpp 0.3.36", "merged", "20", "100.0", "100.0", "100.0", "–", "–", "–"]
    assert merged[3] == "merged" and merged[8:10] == ["–", "–"]
    assert blind[7:10] == ["95.0", "95.0", "NO"]
    assert blind[10] == "prompt 3: token 2 \\| differs Likely cause: scale", "a model's words cannot end a cell"
    assert old[4:8] == ["20", "not told", "not told", "100.0"]
    assert refused[2:6] == ["ollama 0.32.0", "adapter", "not supported", "–"] and "by this server" in refused[10]

    phases = {(row[0], row[2]): row[3:] for row in section(text, "Speed by phase")[1:]}
    # load has no tokens: one for each repetition (the other seed took 1 s); ttft is a sum over 4 requests.
    assert phases["baseline_lora_model", "load"] == ["ms", "275.00 [200.00, 1000.00]", "87.5", "4"]
    assert phases["baseline_lora_model", "ttft"] == ["ms", "15.00 [10.00, 20.00]", "75.0", "3"]
    assert phases["baseline_lora_model", "prefill"] == ["tokens/s", "4000 [2000, 8000]", "75.0", "3"]
    assert phases["base_model", "decode"][0] == "tokens/s" and ("base_model", "ttft") not in phases


def test_the_command_prints_what_is_served(served: Path) -> None:
    lines = run("--db", str(served)).output.splitlines()
    q4 = next(line for line in lines if "q4_K_M" in line)
    assert [cell.strip() for cell in q4.split("│")[1:5]] == ["baseline_lora_model", "q4_K_M", "0, 1", "4.50"]
    assert any("not supported" in line for line in lines) and any("│" in line and " NO " in line for line in lines)
    assert any(line.startswith("baseline_lora_model seed 0, llama_cpp 0.3.36, adapter: prompt 3") for line in lines)
    assert not any("…" in line for line in lines)
    content = json.loads(run("--db", str(served), "--format", "json").output)
    assert [row["type"] for row in content["precisions"]] == ["f16", "q8_0", "q4_K_M"]
    assert len(content["served"]) == 5 and content["runs"][0]["serving_mode"] == "merged"
    assert {row["phase"] for row in content["phases"]} == {"load", "ttft", "prefill", "decode"}


def test_results_without_precisions_have_no_such_sections(path: Path) -> None:
    text = run("--db", str(path), "--format", "md").output
    assert "## Quantization" not in text and "## Served as trained" not in text
    assert "Fallback" not in run("--db", str(path)).output


def test_json_has_words_for_numbers_that_json_does_not_have(path: Path) -> None:
    whole = load_comparison(path)
    row = replace(whole.rows[1], accuracy=math.nan, accuracy_by_seed=(70.0, math.inf), metrics={("a", "b"): -math.inf})
    content = json.loads(as_json(replace(whole, rows=(row,), runs=whole.runs * 2)), parse_constant=pytest.fail)
    found = content["rows"][0]
    assert (found["accuracy"], found["accuracy_by_seed"], found["metrics"]) == ("nan", [70.0, "inf"], {"a/b": "-inf"})
    assert content["runs"] == [*whole.runs, *whole.runs], "each once, none cut in two"
