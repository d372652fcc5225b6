"""The report hides nothing that decides: verdicts against the base, failed probes, lost losses, weak intervals."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evaluation.arms import ArmRow
from evaluation.comparison import Comparison, load_comparison
from evaluation.differences import Difference
from evaluation.page import blocks as blocks_module
from evaluation.page import charts, intervals, serving, write_page
from evaluation.page import data as data_module
from evaluation.page.blocks import Cell, Table
from evaluation.page.context import figures
from evaluation.page.words import headline, parted_notes, seeds_text
from evaluation.power import PowerRow
from evaluation.statistics import Interval, Verdict
from tests.evaluation import page_tree
from tests.evaluation.page_report import Report, report, rows_of


@pytest.fixture(scope="module")
def odd() -> Report:
    return report("odd")


def words(text: str) -> str:
    """What a reader sees of a part of the page."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text)).strip()


def part(made: Report, title: str) -> str:
    """The markup of a section."""
    return made.text.split(f'<section id="{title}"')[1].split("</section>")[0]


def lead(made: Report) -> str:
    return " ".join(map(words, re.findall(r'<p class="lead">(.*?)</p>', made.text, re.DOTALL)))


def difference(low: float, middle: float, high: float, p: float, verdict: Verdict, **other: Any) -> Difference:
    points = Interval(middle, low, high)
    same = Difference("base", points, 500, p, p, verdict, "seeds and items", points, 2, (4, 6), (middle, middle), 9, 3)
    return replace(same, **other)


def arm(name: str, *differences: Difference) -> ArmRow:
    return ArmRow(name, name, (4, 6), None, (), None, None, None, None, differences, {})


def comparison(*rows: ArmRow) -> Comparison:
    return Comparison(rows=rows, verdicts=(), notes=(), units={}, runs=())


# The lead


def test_arms_worse_than_the_base_are_named_with_interval_items_and_seeds(odd: Report) -> None:
    told = lead(odd)
    for row in odd.comparison.rows[1:]:
        found = row.against("base")
        assert found is not None and found.verdict == "worse"
        sentence = next(s for s in re.split(r"(?<=\))\. ", told) if "worse than base" in s and row.arm in s)
        p = found.points
        numbers = [f"{p.estimate:+.1f} [{p.low:+.1f}, {p.high:+.1f}]", f"{-p.high:.1f} to {-p.low:.1f}"]
        assert any(n in sentence for n in numbers) and f"(120 items, {found.seeds} seed" in sentence
    assert "pure_grit beats baseline_lora by 41.7 points" in told


def test_what_excludes_zero_by_chance_is_not_said_to_allow_both() -> None:
    base = arm("base")
    [told] = headline(comparison(base, arm("x", difference(0.5, 6, 12, 0.08, "undecided"))))[:1]
    assert told.startswith("That x differs from base is not shown") and "p = 0.08" in told and "+0.5, +12.0" in told
    [told] = headline(comparison(base, arm("x", difference(-0.5, 6, 12, 0.08, "undecided"))))[:1]
    assert told.startswith(
        "Whether x is better or worse than base is undecided: +6.0 [-0.5, +12.0] points with a 95% int"
    )


def test_arms_of_one_verdict_share_a_sentence() -> None:
    better = difference(2, 6, 9, 0.01, "better")
    told = " ".join(headline(comparison(arm("base"), arm("x", better), arm("y", better))))
    assert "x and y beat base: +6.0 [+2.0, +9.0] and +6.0 [+2.0, +9.0] points of AQI accuracy" in told


def test_without_a_base_the_reason_is_that_it_has_no_run() -> None:
    told = " ".join(headline(comparison(arm("pure_grit"))))
    assert "pure_grit is not compared with base: there is no run of base here." in told and "same items" not in told


def test_an_arm_without_a_partner_is_named_in_lead_card_and_criteria(odd: Report) -> None:
    why = "no run of baseline_lora has the same seed, items and backend"
    assert f"hybrid_grit is not compared with baseline_lora: {why}." in lead(odd)
    cards = {
        name: words(rest) for name, rest in re.findall(r"<h3>(.*?)</h3>(.*?)</ul>", part(odd, "verdict"), re.DOTALL)
    }
    assert f"not comparable with baseline_lora: {why}" in cards["hybrid_grit"]
    assert "not comparable" not in cards["pure_grit"] + cards["baseline_lora"]
    row = re.search(r"<tr><th[^>]*>above the baseline.*?</tr>", part(odd, "verdict"))
    assert row and "not comparable" in row[0] and "not measured" not in row[0]


# What speaks against an arm


def test_a_failed_probe_is_in_lead_card_and_main_table(odd: Report) -> None:
    assert "pure_grit did not train as it claims: the probe found unstable (seeds 3, 5, 7)." in lead(odd)
    cards = dict(re.findall(r"<h3>(.*?)</h3>(.*?)</ul>", part(odd, "verdict"), re.DOTALL))
    assert '<span class="badge tone-bad">✗ not as claimed</span>' in cards["pure_grit"]
    assert "the losses are not finite" in cards["pure_grit"] and "not as claimed" not in cards["hybrid_grit"]
    assert re.search(r'<td class="words tone-bad">unstable!<span class="hint">not as claimed', part(odd, "intervals"))


def test_what_limits_the_data_is_not_folded_away(full: Report) -> None:
    limits, methods = parted_notes(full.comparison)
    assert any("With two seeds intervals are wider" in note for note in limits) and len(methods) == 2
    open_text = re.sub(r"<details>.*?</details>", "", part(full, "verdict"), flags=re.DOTALL)
    told = words(open_text).replace("&#39;", "'")
    assert all(note in told for note in limits) and not any(note in told for note in methods)


def test_losses_that_were_lost_are_named(odd: Report) -> None:
    told = words(part(odd, "loss-curves"))
    assert "pure_grit: training loss not finite from step 4 (seeds 3, 5, 7); loss on held-out items not finite" in told
    assert "hybrid_grit:" not in told
    legend = re.search(r'<ul class="legend">(.*?)</ul>', part(odd, "loss-curves"))
    assert legend and "pure_grit" in legend[1]


def test_numbers_that_are_none_are_words(odd: Report, full: Report) -> None:
    assert not re.search(r"\b(nan|inf)\b", words(odd.text.split("application/json")[0].split("<main>")[1]))
    assert figures(float("nan")) == figures(float("inf")) == "not finite" and figures(None) == "–"
    note = "since not measured or not finite: pure_grit."
    assert note in words(part(odd, "retention-and-forgetting")) and note in words(part(odd, "alignment-quality-index"))
    assert not any("since not measured" in words(chapter) for chapter in full.text.split("<section")[1:])


# Confidence


def test_a_weak_interval_is_called_what_it_is(full: Report) -> None:
    weak = [c for c in full.comparison.criteria if c.confidence < 95]
    strong = [c for c in full.comparison.criteria if c.confidence >= 95 and c.estimate]
    assert weak and strong
    found = part(full, "verdict").split("Why each criterion")[0]
    assert found.count(f"%, {weak[0].confidence:.0f}% interval</span>") == len(weak)
    phases = {row.phase: row for row in full.comparison.phases if row.arm == "pure_grit"}
    drawn = [row for row in rows_of(full.data["datasets"]["speed"]) if row["arm"] == "pure_grit"]
    for row in drawn:
        assert row["kind"] == ("weak" if phases[row["phase"]].confidence < 95 else "interval")
    assert {row["kind"] for row in drawn} >= {"weak"}
    title = re.search(r"<figcaption>(Decode.*?)</figcaption>", full.text)
    assert title and ("% interval" in title[1] or "% confidence" in title[1])


# Seeds


def test_ticks_and_byline_name_seeds_and_not_positions(odd: Report) -> None:
    ticks = [r for r in rows_of(odd.data["datasets"]["differences"]) if r["kind"] == "seed" and r["arm"] == "pure_grit"]
    assert {row["seed"] for row in ticks} == {"3", "5", "7"}
    byline = odd.text.split('<p class="byline">')[1].split("</p>")[0]
    assert "baseline_lora (seeds 3, 5, 7), hybrid_grit (seed 2), pure_grit (seeds 3, 5, 7)" in byline


@pytest.mark.parametrize(
    ("seeds", "told"),
    [([2], "seed 2"), ([5, 3, 3], "seeds 3, 5"), (range(10), "seeds 0 to 9"),
     (range(0, 20, 2), "10 seeds from 0 to 18")],
)  # fmt: skip
def test_many_seeds_are_a_range(seeds: Any, told: str) -> None:
    assert seeds_text(seeds) == told


def test_the_browser_starts_with_all_seeds_where_an_arm_lacks_the_first(odd: Report, full: Report) -> None:
    first = [re.search(r'data-part="seed"><option value="(.*?)"', made.text) for made in (odd, full)]
    assert [found and found[1] for found in first] == ["", "0"]


# Size


def test_a_table_is_styled_once_and_has_so_many_rows_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(Table, "_style", lambda self, column: calls.append(column) or "words")
    table = Table("t", ("a", "b"), tuple((Cell(str(i)), Cell("x")) for i in range(10_000)))
    for _ in range(100):
        assert table.styles == ("words", "words")
    assert calls == [0, 1]
    assert len(table.shown) == blocks_module.MOST_ROWS
    assert (table.shown[0][0].text, table.shown[-1][0].text) == ("0", "9999")


def test_what_is_left_out_of_a_large_report_is_said(
    odd: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "MOST_ROWS", 3)
    monkeypatch.setattr(data_module, "MOST_RUNS", 4)
    write_page(tmp_path / "few.html", odd.database, odd.comparison)
    text = (tmp_path / "few.html").read_text(encoding="utf-8")
    runs = sum(map(len, page_tree.ODD_SEEDS.values())) + 1
    assert f"3 of {runs} rows, evenly spaced" in text
    assert f"Shown are 4 of {runs} runs, the first seeds of each arm." in text
    assert f"Of 4 of {runs} runs: " in text
    assert "rows, evenly spaced" not in odd.text and "Shown are" not in odd.text.split("<script")[0]


# Tables and legends


def test_the_base_as_baseline_has_one_column(full: Report, tmp_path: Path) -> None:
    write_page(tmp_path / "base.html", full.database, load_comparison(full.database, baseline="base"))
    text = (tmp_path / "base.html").read_text(encoding="utf-8")
    assert text.count("Δ to base, points</th>") == 1 == full.text.count("Δ to base, points</th>")


def test_no_number_says_what_it_would_take() -> None:
    row = PowerRow("x", "base", 1, None, 500, 3, "why")
    assert intervals._needed(row).hint == "takes more seeds and items"
    assert intervals._needed(replace(row, seeds=9)).hint == "9 seeds would"
    assert intervals._needed(replace(row, items=1200)) == Cell("1,200")


def test_only_merged_models_are_said_to_be_equally_fast(full: Report) -> None:
    def told(**modes: str) -> str:
        runs = tuple({"arm": name, "serving_mode": mode} for name, mode in modes.items())
        return serving._modes(SimpleNamespace(comparison=SimpleNamespace(runs=runs)))  # type: ignore[arg-type]

    assert "equally fast" in told(base="merged", x="merged") and "beside" not in told(x="merged")
    assert "equally fast" not in told(base="merged", x="adapter") and "beside the base: x." in told(x="adapter")
    assert '<span class="hint">merged</span>' in part(full, "provenance")


def test_a_legend_shows_the_dashes_of_the_lines(full: Report) -> None:
    arms = ("base", "x", "y")
    spec = charts.lines(arms, "step", "step", "loss", "loss", detail=["seed"])
    scale = next(
        layer["encoding"]["strokeDash"]["scale"] for layer in spec["layer"] if "strokeDash" in layer["encoding"]
    )
    drawn = {name: dash != [1, 0] for name, dash in zip(scale["domain"], scale["range"], strict=True)}
    assert drawn == charts.dashed(arms) and set(drawn.values()) == {True, False}
    legend = re.search(r'<ul class="legend">(.*?)</ul>', part(full, "loss-curves"))
    assert legend
    found = re.findall(r'<i class="stroke( dashed)? arm-\d+"></i><span>(\w+)', legend[1])
    items = {name: dash for dash, name in found}
    assert {name: bool(dash) for name, dash in items.items()} == charts.dashed(list(items)) and len(items) == 3
