"""The report as one HTML file: what stands in it. `test_page_browser` opens it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from altair.vegalite.v6.schema.core import load_schema

from evaluation.comparison import load_comparison
from evaluation.criteria import KEPT
from evaluation.page import page as page_module
from evaluation.page import samples as samples_module
from evaluation.page import write_page
from evaluation.page.blocks import slug
from evaluation.page.columns import Dataset, quantile, rounded, spread, thin
from evaluation.page.data import layer_name
from evaluation.report import as_json
from tests.evaluation import page_tree
from tests.evaluation.page_report import STYLE, Report, contrast, page_data, palette, rows_of

# What is in the file


def test_every_chart_keeps_to_the_schema_and_names_known_columns(full: Report) -> None:
    schema, data = load_schema(), full.data
    assert len(data["charts"]) >= 20
    for chart in data["charts"]:
        jsonschema.Draft7Validator(schema).validate(chart["spec"])
        columns = set(data["datasets"][chart["data"]])
        used = set(re.findall(r'"field": "(\w+)"', json.dumps(chart["spec"])))
        assert used - {"zero"} <= columns, chart["id"]
        assert set(chart["where"]) <= columns


def test_verdicts_are_those_of_the_comparison(full: Report) -> None:
    told = re.sub(r"<[^>]+>", " ", full.text.split("<main>")[1].split("application/json")[0])
    told = re.sub(r"\s+", " ", told)
    for row in json.loads(as_json(full.comparison))["rows"]:
        for d in row["differences"]:
            p = d["points"]
            word = "than" if d["verdict"] != "undecided" else "against"
            numbers = f"{p['estimate']:+.1f} points, 95% interval {p['low']:+.1f} to {p['high']:+.1f}"
            assert f"{d['verdict']} {word} {d['against']}: {numbers}" in told
            assert f"{p['estimate']:+.1f} [{p['low']:+.1f}, {p['high']:+.1f}]" in told
    assert "pure_grit beats baseline_lora by 25.0 points" in told
    assert "Whether hybrid_grit is better or worse than baseline_lora is undecided" in told


def test_the_pictures_have_the_numbers_of_the_comparison(full: Report) -> None:
    drawn = rows_of(full.data["datasets"]["differences"])
    for row in full.comparison.rows:
        for d in row.differences:
            own = [r for r in drawn if (r["arm"], r["against"]) == (row.arm, d.against)]
            whole = next(r for r in own if r["kind"] == "interval")
            assert [whole[k] for k in ("low", "value", "high")] == pytest.approx(
                [d.points.low, d.points.estimate, d.points.high], rel=1e-4
            )
            assert [r["value"] for r in own if r["kind"] == "seed"] == pytest.approx(d.by_seed, rel=1e-4)


def test_criteria_and_power_are_those_of_the_comparison(full: Report) -> None:
    judged = table(full.text, "success-criteria")
    assert full.comparison.criteria and full.comparison.power
    arms = judged[0][1:]
    for criterion in full.comparison.criteria:
        row = next(row for row in judged if row[0] == escaped(f"{criterion.name}{criterion.threshold}"))
        cell = row[1 + arms.index(criterion.arm)]
        assert re.match("pass|fail|undecided", cell) and cell.startswith(criterion.outcome)
        if criterion.estimate is not None:
            sign = "" if criterion.name == KEPT else "+"  # a share is no change
            e = criterion.estimate
            told = f"{e.estimate:{sign}.1f} [{e.low:{sign}.1f}, {e.high:{sign}.1f}]"
            assert cell.removeprefix(criterion.outcome).startswith(told)
        assert [criterion.arm, criterion.outcome, escaped(criterion.why)] in [
            row[1:] for row in table(full.text, "why-each-criterion")
        ]
    needed = table(full.text, "test-items-needed")
    for told in full.comparison.power:
        row = next(row for row in needed if row[:2] == [told.arm, told.against])
        assert row[2:4] == [f"{told.items_now:,}", str(told.seeds_now)]
        expected = "no number" if told.items is None else f"{told.items:,}"
        assert row[3 + told.points].startswith(expected)


def test_the_same_database_gives_the_same_file(full: Report, tmp_path: Path) -> None:
    write_page(tmp_path / "again.html", full.database, full.comparison)
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == full.text


def test_a_part_that_was_not_measured_has_no_section(base_only: Report) -> None:
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", base_only.text.split("<script")[0])
    assert titles == ["Verdict", "Intervals", "Retention and forgetting", "Speed by phase", "Exports and parity",
                      "Sample browser", "Provenance"]  # fmt: skip
    assert "nothing to compare" in base_only.text


def test_runs_outside_the_comparison_are_left_out(full: Report, tmp_path: Path) -> None:
    from evaluation.comparison import Choice

    some = load_comparison(full.database, Choice(arms=("base", "baseline_lora"), seeds=(0,)))
    write_page(tmp_path / "some.html", full.database, some)
    text = (tmp_path / "some.html").read_text(encoding="utf-8")
    assert page_data(text)["samples"]["models"] == [{"arm": "base", "seed": "0"}, {"arm": "baseline_lora", "seed": "0"}]
    byline = text.split('<p class="byline">')[1].split("</p>")[0]
    assert some.filters and some.filters in byline and "Only" not in full.text.split('class="byline">')[1][:300]
    assert "pure_grit" not in text.split("application/json")[0].split("Starts of stages")[0]


def test_curves_are_thinned_with_their_peaks(full: Report) -> None:
    curves = rows_of(full.data["datasets"]["curves"])
    own = [r for r in curves if (r["arm"], r["seed"], r["part"]) == ("pure_grit", "0", "train")]
    assert len(own) == 300
    losses = json.loads((full.file.parents[1] / "adapters/pure_grit/0/loss_history.json").read_text(encoding="utf-8"))
    known = [entry["loss"] for entry in losses if "loss" in entry]
    assert max(r["high"] for r in own) == pytest.approx(max(known), rel=1e-4)
    assert min(r["low"] for r in own) == pytest.approx(min(known), rel=1e-4)


def test_too_many_samples_keep_the_disputed_ones(full: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = full.data["samples"]["items"]
    disputed = {i["id"] for i in everything if {"0", "1"} <= set(i["right"])}
    assert 0 < len(disputed) < len(everything)
    size = sum(len(i["prompt"] + i["truth"]) + sum(len(a) for a in i["answers"] if a) for i in everything)
    monkeypatch.setattr(samples_module, "MOST_CHARACTERS", int(size * 0.9))
    write_page(tmp_path / "less.html", full.database, full.comparison)
    text = (tmp_path / "less.html").read_text(encoding="utf-8")
    kept = {i["id"] for i in page_data(text)["samples"]["items"]}
    assert disputed <= kept and len(kept) < len(everything)
    assert f"{len(kept)} of {len(everything)} items are in this file" in text


def test_no_text_of_a_model_is_markup(evil: Report) -> None:
    assert evil.text.count("<script") == 3 and evil.text.count("</script") == 3
    own = evil.text.split("</script>")[0]  # without the library
    assert "<img" not in own and "<b onmouse" not in own and "\u2028" not in own
    assert evil.data["samples"]["items"][0]["answers"][0] == page_tree.EVIL[0]


# Pure parts


def test_thin_keeps_short_lines_and_every_step_of_long_ones() -> None:
    line = [(step, float(step % 7)) for step in range(1000)]
    assert thin(line[:300]) == [(s, None, v, None) for s, v in line[:300]]
    short = thin(line, 100)
    assert len(short) == 100
    assert np.mean([value for _, _, value, _ in short]) == pytest.approx(np.mean([v for _, v in line]))
    assert {low for _, low, _, _ in short} == {0.0} and {high for *_, high in short} == {6.0}


def test_spread_has_both_ends() -> None:
    names = [str(i) for i in range(100)]
    assert spread(names, 5) == ["0", "25", "50", "74", "99"]
    assert spread(names, 1) == ["99"] and spread(names[:3], 5) == ["0", "1", "2"]


def test_quantiles_are_numpys() -> None:
    values = list(np.random.default_rng(0).normal(size=23))
    for share in (0, 0.1, 0.5, 0.9, 1):
        assert quantile(values, share) == pytest.approx(np.quantile(values, share))


@pytest.mark.parametrize(
    ("value", "short"),
    [(1.23456789, 1.2346), (float("nan"), None), (float("-inf"), None), (None, None), (7, 7), (2.0, 2), (1e-30, 1e-30)],
)
def test_numbers_are_short_and_finite(value: Any, short: Any) -> None:
    assert rounded(value) == short


def test_a_dataset_packs_texts_as_codes() -> None:
    data = Dataset(("arm", "x"))
    for arm, x in (("b", 1.0), ("a", float("inf")), ("b", 0.5)):
        data.add(arm, x)
    assert data.packed() == {"arm": {"levels": ["b", "a"], "codes": [0, 1, 0]}, "x": [1, None, 0.5]}
    with pytest.raises(ValueError, match="expected 2 values"):
        data.add("a")


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"),
        ("layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"),
        ("layer 2", "layer 2"),
        ("model.", "model."),
    ],
)
def test_a_layer_has_one_name(name: str, short: str) -> None:
    assert layer_name(name) == short


def test_known_arms_have_one_colour_in_every_report() -> None:
    assert page_module.slots_of(("base", "pure_grit", "x")) == {"base": 0, "pure_grit": 3, "x": 4}
    assert page_module.slots_of(("a", "baseline_lora", "b")) == {"a": 4, "baseline_lora": 1, "b": 5}
    many = page_module.slots_of(("base", *"abcdefghijk"))
    assert len(set(many.values())) == len(many) and all(f"--arm-{slot}:" in STYLE for slot in many.values())


def test_a_script_that_would_end_too_early_is_refused() -> None:
    with pytest.raises(ValueError, match="without </script"):
        page_module._code("let a = '</SCRIPT>'", "script")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_from_their_background(scheme: str) -> None:
    colours = palette(scheme)
    for ground in ("--paper", "--panel"):
        for name, colour in colours.items():
            if re.fullmatch(r"--arm-\d+", name):
                assert contrast(colour, colours[ground]) >= 3, (name, ground)
            elif name in ("--ink", "--muted", "--accent", "--good", "--bad", "--open"):
                assert contrast(colour, colours[ground]) >= 4.5, (name, ground)
    for tone in ("good", "bad", "open"):
        assert contrast(colours[f"--{tone}"], colours[f"--{tone}-soft"]) >= 4.5


def table(text: str, name: str) -> list[list[str]]:
    """The texts of a table's cells, header first; `name` is how its caption's id begins."""
    found = re.search(rf'<table aria-labelledby="{name}[^"]*">(.*?)</table>', text, re.DOTALL)
    assert found, name
    rows = re.findall(r"<tr>(.*?)</tr>", found[1], re.DOTALL)
    return [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;")


def test_slugs_are_ids() -> None:
    assert slug("Success criteria: 95% (Δ)") == "success-criteria-95"
