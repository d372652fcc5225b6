"""The report as one HTML file: what stands in it is what the comparison says. `test_page_browser` opens it."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
from altair.vegalite.v6.schema.core import load_schema

from db.queries import Choice
from evaluation.report import browser as browser_module
from evaluation.report import html as page_module
from evaluation.report import sections
from evaluation.report.arms import ArmRow
from evaluation.report.blocks import Dataset, slug, spread, thin
from evaluation.report.comparison import Comparison, load_report
from evaluation.report.criteria import KEPT
from evaluation.report.html import packed, rounded, write_page
from evaluation.report.sections import headline
from evaluation.report.text import seeds_text
from evaluation.statistics.differences import Difference
from evaluation.statistics.intervals import Interval, Outcome
from evaluation.statistics.power import PowerRow
from tests.evaluation import page_tree
from tests.evaluation.page_report import (
    STYLE,
    Report,
    contrast,
    page_data,
    palette,
    part,
    report,
    rows_of,
    table,
    words,
)

ARMS = {"base": 0.0, "baseline_lora": 0.05, "pure_grit": 0.2}
"""Arm → its shift in the task with credit."""


@pytest.fixture(scope="module")
def odd() -> Report:
    return report("odd")


@pytest.fixture(scope="module")
def alpaca() -> Report:
    return report("tasks")


def page_of(made: Report, folder: Path, choice: Choice | None = None, baseline: str | None = None) -> str:
    write_page(folder / "page.html", load_report(made.database, choice, baseline, detail=True))
    return (folder / "page.html").read_text(encoding="utf-8")


# Numbers


def test_every_chart_keeps_to_the_schema_and_names_known_columns(full: Report) -> None:
    schema, data = load_schema(), full.data
    assert len(data["charts"]) >= 20
    for chart in data["charts"]:
        jsonschema.Draft7Validator(schema).validate(chart["spec"])
        columns = set(data["datasets"][chart["panel"]])
        used = set(re.findall(r'"field": "(\w+)"', json.dumps(chart["spec"])))
        assert used - {"zero"} <= columns, chart["id"]
        assert set(chart["where"]) <= columns


def test_differences_are_those_of_the_comparison(full: Report) -> None:
    told, drawn = words(full.text.split("<main>")[1]), rows_of(full.data["datasets"]["differences"])
    lines = {row[0].split()[0]: row for row in table(full.text, "arms-compared")}
    for row in full.comparison.rows:
        for at, against in enumerate(("base", "baseline_lora")):
            if d := row.against(against):
                shown = f"{d.points.estimate:+.1f} [{d.points.low:+.1f}, {d.points.high:+.1f}]"
                assert lines[row.arm][2 + at] == f"{shown} {d.outcome} p = {d.p_holm:.2g}"
                assert f"{against} ({d.points.estimate:+.1f} points, 95% interval [{d.points.low:+.1f}," in told
                own = [r for r in drawn if (r["arm"], r["against"]) == (row.arm, against)]
                whole = next(r for r in own if r["kind"] == "interval")
                bounds = [d.points.low, d.points.estimate, d.points.high]
                assert [whole[k] for k in ("low", "value", "high")] == pytest.approx(bounds, rel=1e-4)
                assert [r["value"] for r in own if r["kind"] == "seed"] == pytest.approx(d.by_seed, rel=1e-4)
    assert "pure_grit beats baseline_lora by 25.0 points" in told
    assert "Whether hybrid_grit is better or worse than baseline_lora is undecided" in told


def test_criteria_and_power_are_those_of_the_comparison(full: Report) -> None:
    judged, reasons = table(full.text, "success-criteria"), table(full.text, "why-each-criterion")
    arms = judged[0][1:]
    assert full.comparison.criteria and full.comparison.power
    for criterion in full.comparison.criteria:
        cell = next(row for row in judged if row[0].startswith(criterion.name))[1 + arms.index(criterion.arm)]
        assert cell.split()[0] == criterion.outcome
        if e := criterion.estimate:
            sign = "" if criterion.name == KEPT else "+"  # a share is no change
            told = f"{criterion.outcome} {e.estimate:{sign}.1f} [{e.low:{sign}.1f}, {e.high:{sign}.1f}]"
            weak = f" {criterion.confidence:.0f}% interval" if criterion.confidence < 95 else ""
            assert cell == told + weak
        assert [criterion.arm, criterion.outcome, criterion.why] in [row[1:] for row in reasons]
    assert {c.confidence < 95 for c in full.comparison.criteria} == {True, False}
    needed = table(full.text, "test-items-needed")
    for power in full.comparison.power:
        row = next(row for row in needed if row[:2] == [power.arm, power.against])
        assert row[2:4] == [f"{power.items_now:,}", str(power.seeds_now)]
        assert row[3 + power.points].startswith("no number" if power.items is None else f"{power.items:,}")


def test_every_metric_is_in_the_page_with_unit_and_direction(full: Report, alpaca: Report) -> None:
    for made in (alpaca, full):
        found = {(row[1], row[0]): row[2:] for row in table(made.text, "every-metric")}
        assert {key for row in made.comparison.rows for key in row.metrics if key[0] != "parity"} < found.keys()
        if made is alpaca:
            assert found["test", "alpaca_unparseable"] == ["share", "lower", "0.1", "0.1", "0.1"]
        else:
            assert found["weights", "update_norm"][3] == "4.05 (4 to 4.1)"


def test_a_weak_interval_is_drawn_and_called_so(full: Report) -> None:
    phases = {row.phase: row for row in full.comparison.phases if row.arm == "pure_grit"}
    drawn = [row for row in rows_of(full.data["datasets"]["speed"]) if row["arm"] == "pure_grit"]
    assert {row["phase"]: row["kind"] for row in drawn} == {
        phase: "weak" if row.confidence < 95 else "interval" for phase, row in phases.items()
    }
    title = re.search(r"<figcaption>(Decode.*?)</figcaption>", full.text)
    assert title and ("% interval" in title[1] or "% confidence" in title[1])


# Sentences


def difference(low: float, middle: float, high: float, p: float, outcome: Outcome) -> Difference:
    points = Interval(middle, low, high)
    return Difference("base", points, 500, p, p, outcome, "seeds and items", points, 2, (4, 6), (middle, middle), 9, 3)


def arm(name: str, *differences: Difference) -> ArmRow:
    return ArmRow(name, name, (4, 6), None, (), None, None, None, None, differences, {})


def lead(*rows: ArmRow) -> str:
    return " ".join(headline(Comparison(rows=rows, outcomes=(), notes=(), units={}, runs=())))


def test_the_lead_says_what_the_intervals_allow() -> None:
    told = lead(arm("base"), arm("x", difference(0.5, 6, 12, 0.08, "undecided")))
    assert told.startswith("That x differs from base is not shown") and "p = 0.08" in told and "+0.5, +12.0" in told
    told = lead(arm("base"), arm("x", difference(-0.5, 6, 12, 0.08, "undecided")))
    assert told.startswith(
        "Whether x is better or worse than base is undecided: +6.0 [-0.5, +12.0] points with a 95% int"
    )
    better = difference(2, 6, 9, 0.01, "better")
    told = lead(arm("base"), arm("x", better), arm("y", better))
    assert "x and y beat base: +6.0 [+2.0, +9.0] and +6.0 [+2.0, +9.0] points of AQI accuracy" in told
    assert "pure_grit is not compared with base: there is no run of base here." in lead(arm("pure_grit"))


def test_arms_worse_than_the_base_and_without_a_partner_are_named(odd: Report) -> None:
    told = words(part(odd, "findings"))
    assert re.search(r"worse than base: [^.]*\.\d \[-\d+\.\d, -\d+\.\d\]", told) and "(120 items, 3 seeds)" in told
    assert "pure_grit beats baseline_lora by 41.7 points" in told
    why = "no run of baseline_lora has the same seed, items and backend"
    assert f"hybrid_grit is not compared with baseline_lora: {why}." in told
    cards = dict(re.findall(r"<h3>(.*?)</h3>(.*?)</ul>", part(odd, "findings"), re.DOTALL))
    assert "not comparable with baseline_lora" in cards["hybrid_grit"]
    assert "not comparable" not in cards["pure_grit"] + cards["baseline_lora"]
    row = next(row for row in table(odd.text, "success-criteria") if row[0].startswith("above the baseline"))
    assert "undecided not comparable" in row and "not measured" not in " ".join(row)


def test_a_failed_probe_is_in_lead_card_and_main_table(odd: Report) -> None:
    told = part(odd, "findings")
    assert "pure_grit did not train as it claims: the probe found unstable (seeds 3, 5, 7)." in told
    cards = dict(re.findall(r"<h3>(.*?)</h3>(.*?)</ul>", told, re.DOTALL))
    assert '<span class="badge tone-bad">✗</span> not as claimed: the probe found unstable' in cards["pure_grit"]
    assert "the losses are not finite" in cards["pure_grit"] and "not as claimed" not in cards["hybrid_grit"]
    line = next(row for row in table(odd.text, "arms-compared") if row[0].startswith("pure_grit"))
    assert line[-1] == "unstable! not as claimed"


def test_what_limits_the_data_is_not_folded_away(full: Report) -> None:
    open_text = words(re.sub(r"<details>.*?</details>", "", part(full, "findings"), flags=re.DOTALL))
    methods = [note for note in full.comparison.notes if note.startswith(("Δ speed:", "Differences over"))]
    assert len(methods) == 2 and len(full.comparison.notes) > 2
    assert [note in open_text for note in full.comparison.notes] == [
        note not in methods for note in full.comparison.notes
    ]


def test_losses_that_were_lost_and_numbers_that_are_none_are_words(odd: Report, full: Report) -> None:
    told = words(part(odd, "loss-curves"))
    assert "pure_grit: training loss not finite from step 4 (seeds 3, 5, 7); loss on held-out items not finite" in told
    assert "hybrid_grit:" not in told
    assert not re.search(r"\b(nan|inf)\b", words(odd.text.split("application/json")[0].split("<main>")[1]))
    note = "since not measured or not finite: pure_grit."
    assert note in words(part(odd, "retention-and-forgetting")) and note in words(part(odd, "alignment-quality-index"))
    assert not any("since not measured" in words(chapter) for chapter in full.text.split("<section")[1:])


def test_seeds_are_named_and_not_counted(odd: Report, full: Report) -> None:
    ticks = [r for r in rows_of(odd.data["datasets"]["differences"]) if r["kind"] == "seed" and r["arm"] == "pure_grit"]
    assert {row["seed"] for row in ticks} == {"3", "5", "7"}
    byline = odd.text.split('<p class="byline">')[1].split("</p>")[0]
    assert "baseline_lora (seeds 3, 5, 7), hybrid_grit (seed 2), pure_grit (seeds 3, 5, 7)" in byline
    first = [re.search(r'data-part="seed"><option value="(.*?)"', made.text) for made in (odd, full)]
    assert [found and found[1] for found in first] == ["", "0"], "all seeds where an arm lacks the first"
    assert seeds_text([5, 3, 3]) == "seeds 3, 5" and seeds_text(range(10)) == "seeds 0 to 9"
    assert seeds_text(range(0, 20, 2)) == "10 seeds from 0 to 18" and seeds_text([2]) == "seed 2"


def test_only_merged_models_are_said_to_be_equally_fast() -> None:
    def told(**modes: str) -> str:
        runs = [{"arm": name, "serving_mode": mode} for name, mode in modes.items()]
        return sections.modes(SimpleNamespace(runs=runs))  # type: ignore[arg-type]

    assert "equally fast" in told(base="merged", x="merged") and "beside" not in told(x="merged")
    assert "equally fast" not in told(base="merged", x="adapter") and "beside the base: x." in told(x="adapter")


def test_no_number_says_what_it_would_take() -> None:
    row = PowerRow("x", "base", 1, None, 500, 3, "why")
    rows = (row, replace(row, points=2, seeds=9), replace(row, points=3, items=1200))
    section = sections.power(Comparison(rows=(), outcomes=(), notes=(), units={}, runs=(), power=rows))
    assert section is not None
    (line,) = section.blocks[1].rows  # type: ignore[union-attr]
    assert [cell.hint or cell.text for cell in line[4:]] == ["needs more seeds", "9 seeds would", "1,200"]


# What is there and what is not


def test_the_same_database_gives_the_same_file(full: Report, tmp_path: Path) -> None:
    assert page_of(full, tmp_path) == full.text


def test_a_part_that_was_not_measured_has_no_section(base_only: Report) -> None:
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", base_only.text.split("<script")[0])
    assert titles == ["Findings", "Arms compared", "Retention and forgetting", "Speed by phase", "Files",
                      "Sample browser", "Where the numbers come from"]  # fmt: skip
    assert "nothing to compare" in base_only.text


def test_runs_outside_the_comparison_are_left_out(full: Report, tmp_path: Path) -> None:
    text = page_of(full, tmp_path, Choice(arms=("base", "baseline_lora"), seeds=(0,)))
    assert page_data(text)["samples"]["models"] == [{"arm": "base", "seed": "0"}, {"arm": "baseline_lora", "seed": "0"}]
    byline = text.split('<p class="byline">')[1].split("</p>")[0]
    assert (
        "Only arms base, baseline_lora; seeds 0" in byline and "Only" not in full.text.split('class="byline">')[1][:300]
    )
    assert "pure_grit" not in text.split("application/json")[0]


def test_the_base_as_baseline_has_one_column(full: Report, tmp_path: Path) -> None:
    text = page_of(full, tmp_path, baseline="base")
    assert text.count("Δ to base, points</th>") == 1 == full.text.count("Δ to base, points</th>")


def test_too_many_samples_keep_the_disputed_ones(full: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = full.data["samples"]["items"]
    disputed = {i["id"] for i in everything if {"0", "1"} <= set(i["right"])}
    assert 0 < len(disputed) < len(everything)
    size = sum(len(i["prompt"] + i["truth"]) + sum(len(a) for a in i["answers"] if a) for i in everything)
    monkeypatch.setattr(browser_module, "MOST_CHARACTERS", int(size * 0.9))
    text = page_of(full, tmp_path)
    kept = {i["id"] for i in page_data(text)["samples"]["items"]}
    assert disputed <= kept and len(kept) < len(everything)
    assert f"{len(kept)} of {len(everything)} items are in this file" in text


def test_no_text_of_a_model_is_markup(evil: Report) -> None:
    assert evil.text.count("<script") == 3 and evil.text.count("</script") == 3
    own = evil.text.split("</script>")[0]  # without the library
    assert "<img" not in own and "<b onmouse" not in own and "\u2028" not in own
    assert evil.data["samples"]["items"][0]["answers"][0] == page_tree.EVIL[0]


def test_it_asks_the_network_for_nothing(full: Report) -> None:
    policy = html.unescape(full.text.split('Content-Security-Policy" content="')[1].split('">')[0])
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", full.text)


# Tasks


# Pure parts


def test_thin_and_spread_keep_ends_and_peaks() -> None:
    line = [(step, float(step % 7)) for step in range(1000)]
    assert thin(line[:300], 300) == [(s, None, v, None) for s, v in line[:300]]
    short = thin(line, 100)
    assert len(short) == 100
    assert np.mean([value for _, _, value, _ in short]) == pytest.approx(np.mean([v for _, v in line]))
    assert {low for _, low, _, _ in short} == {0.0} and {high for *_, high in short} == {6.0}
    names = [str(i) for i in range(100)]
    assert spread(names, 5) == ["0", "25", "50", "74", "99"] and spread(names[:3], 5) == ["0", "1", "2"]


def test_a_dataset_packs_texts_as_codes_and_numbers_short_and_finite() -> None:
    data = Dataset(("arm", "x"))
    for name, x in (("b", 1.23456789), ("a", float("inf")), ("b", None), ("b", 2.0)):
        data.add(name, x)
    assert packed(data) == {"arm": {"levels": ["b", "a"], "codes": [0, 1, 0, 0]}, "x": [1.2346, None, None, 2]}
    assert rounded(1e-30) == 1e-30 and rounded(float("nan")) is None
    with pytest.raises(ValueError, match="expected 2 values"):
        data.add("a")


def test_known_arms_have_one_colour_in_every_report() -> None:
    assert page_module.slots_of(("base", "pure_grit", "x")) == {"base": 0, "pure_grit": 3, "x": 4}
    many = page_module.slots_of(("base", *"abcdefghijk"))
    assert len(set(many.values())) == len(many) and all(f"--arm-{slot}:" in STYLE for slot in many.values())
    assert slug("Success criteria: 95% (Δ)") == "success-criteria-95"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_from_their_background(scheme: str) -> None:
    colours: dict[str, Any] = palette(scheme)
    for ground in ("--paper", "--panel"):
        for name, colour in colours.items():
            if re.fullmatch(r"--arm-\d+", name):
                assert contrast(colour, colours[ground]) >= 3, (name, ground)
            elif name in ("--ink", "--muted", "--accent", "--good", "--bad", "--open"):
                assert contrast(colour, colours[ground]) >= 4.5, (name, ground)
    for tone in ("good", "bad", "open"):
        assert contrast(colours[f"--{tone}"], colours[f"--{tone}-soft"]) >= 4.5
