"""The page of a task with credit between 0 and 1, in a database that has other tasks too."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from db.ingest import ingest
from evaluation.comparison import Choice, load_comparison
from evaluation.page import write_page
from evaluation.page.samples import DISPUTED
from tests.evaluation import page_tree
from tests.evaluation.page_browser import draw_all, opened
from tests.evaluation.page_report import Report, page_data, report, rows_of
from tests.evaluation.task_tree import ALPACA, ITEMS, add_precisions, add_task, credits_of

ARMS = {"base": 0.0, "baseline_lora": 0.05, "pure_grit": 0.2}


@pytest.fixture(scope="module")
def alpaca() -> Iterator[Report]:
    """AQI was there before; Alpaca is on the disk."""
    with TemporaryDirectory(prefix="page-tasks-") as folder:
        root = Path(folder)
        page_tree.make_page_tree(root)
        ingest(root, root / "outputs/centralized.db")
        for place in root.iterdir():
            if place.name != "outputs":
                shutil.rmtree(place)
        add_task(root, ALPACA, day=23)
        rows = {kind: credits_of("pure_grit", 0, shift) for kind, shift in (("f16", 0.2), ("q4_K_M", 0.17))}
        add_precisions(root, ALPACA, "pure_grit", rows)
        yield Report(root)


def words(text: str) -> str:
    """What a reader sees."""
    return html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)))


def part(text: str, title: str) -> str:
    return text.split(f'<section id="{title}"')[1].split("</section>")[0]


def test_head_and_words_are_the_tasks_own(alpaca: Report) -> None:
    byline = alpaca.text.split('<p class="byline">')[1].split("</p>")[0]
    assert "Task: alpaca, judged by ROUGE-L." in byline
    seen = words(alpaca.text)
    assert "points of ROUGE-L" in seen and "ROUGE-L minus that of base, points" in seen
    assert "ROUGE-L by precision, percent" in seen and "ΔROUGE-L > 0 against base" in seen
    others = part(alpaca.text, "all-data-sets-in-this-database")
    assert "AQI" not in words(alpaca.text.replace(others, "")) and "Air Quality" not in seen
    assert "accuracy gain" not in seen and "better and worse against f16" in seen
    full = report("full")
    assert "Task: aqi, judged by AQI category accuracy." in full.text and "accuracy gain" in full.text
    assert "Air Quality Index" in full.text and "gained and lost against f16" in full.text


def test_the_other_tasks_have_a_section_where_there_are_any(alpaca: Report) -> None:
    found = part(alpaca.text, "all-data-sets-in-this-database")
    lines = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", found)][1:]
    assert [(" ".join(words(line[0]).split()), words(line[1]).strip()) for line in lines] == [
        *[("alpaca ROUGE-L, on disk", arm) for arm in ARMS],
        *[("aqi AQI accuracy", arm) for arm in page_tree.RIGHT],
    ]
    assert words(lines[3][3]).startswith("33.3 ["), "the base has 40 of 120 right"
    told = next(row for row in alpaca.comparison.tasks if (row.task, row.arm) == ("aqi", "pure_grit"))
    for cell, found in zip(lines[-1][4:6], (told.to_base, told.to_baseline), strict=True):
        assert found is not None and words(cell).split()[0] == f"{found.points.estimate:+.1f}"
        assert f"{found.verdict}, p = {found.p_holm:.2g}" in words(cell)
    assert "data sets in this database" not in report("full").text


def test_every_metric_is_in_the_page_with_unit_and_direction(alpaca: Report) -> None:
    for made in (alpaca, report("full")):
        found = words(part(made.text, "intervals")).split("All metrics")[1]
        keys = {key for row in made.comparison.rows for key in row.metrics if key[0] != "parity"}
        assert all(name in found and split in found for split, name in keys)
    rows = re.findall(r"<tr>(.*?)</tr>", part(alpaca.text, "intervals"))
    (line,) = [words(row).split() for row in rows if "alpaca_unparseable" in row]
    assert line == ["alpaca_unparseable", "test", "share", "lower", "0.1", "0.1", "0.1"]
    (spread,) = [words(row) for row in re.findall(r"<tr>(.*?)</tr>", report("full").text) if ">update_norm<" in row]
    assert "4.05 (4 to 4.1)" in spread


def test_samples_say_how_much_credit_an_answer_got(alpaca: Report) -> None:
    samples = alpaca.data["samples"]
    assert [model["arm"] for model in samples["models"]] == list(ARMS) and samples["disputed"] == DISPUTED
    given = [credits_of(arm, 0, shift) for arm, shift in ARMS.items()]
    for at, item in enumerate(samples["items"]):
        own = [credit[at] for credit in given]
        assert item["right"] == "".join({0.0: "0", 1.0: "1"}.get(value, "p") for value in own)
        assert ("credit" in item) == ("p" in item["right"])
        assert "credit" not in item or item["credit"] == pytest.approx(own, abs=5e-4)
    assert {mark for item in samples["items"] for mark in item["right"]} == {"0", "1", "p"}
    assert "shows its credit, from 0 to 1" in words(alpaca.text)
    old = report("full")
    assert not any("credit" in item for item in old.data["samples"]["items"]) and "its credit" not in old.text


def test_a_task_that_is_not_on_the_disk_has_its_own_page(alpaca: Report, tmp_path: Path) -> None:
    comparison = load_comparison(alpaca.database, Choice(task="aqi"))
    write_page(tmp_path / "aqi.html", alpaca.database, comparison)
    text = (tmp_path / "aqi.html").read_text(encoding="utf-8")
    assert "Not the results on the disk, which are of alpaca" in words(text)
    own, full = page_data(text), report("full").data
    assert own["samples"] == full["samples"] and own["slots"] == full["slots"] == alpaca.data["slots"]
    assert own["datasets"].keys() == full["datasets"].keys() >= {"curves", "differences", "scatter"}
    for name in full["datasets"]:
        assert rows_of(own["datasets"][name]) == rows_of(full["datasets"][name]), name


def test_the_browser_of_answers_shows_credit_and_finds_by_it(browser: Any, alpaca: Report) -> None:
    given = [credits_of(arm, 0, shift) for arm, shift in ARMS.items()]
    apart = sum(max(own) - min(own) >= DISPUTED for own in zip(*given, strict=True))
    in_part = sum(0 < value < 1 for value in given[2])
    assert 0 < in_part < ITEMS
    with opened(browser, alpaca.file) as page:
        draw_all(page)
        first = page.locator(".sample").first.locator(".answer")
        assert first.count() == 3
        for at, credit in enumerate(given):
            sign = {0.0: "✗", 1.0: "✓"}.get(credit[0], f"{credit[0]:.2f}")
            assert first.nth(at).locator(".mark").inner_text() == sign
        mark = page.locator(".mark-right-in-part .mark").first
        assert mark.get_attribute("aria-label") == f"right in part: {mark.inner_text()}"
        count = page.locator("[data-part='count']")
        page.locator("[data-part='outcomes'] select").nth(2).select_option("p")
        assert count.inner_text() == f"{in_part} of {ITEMS} items"
        page.locator("[data-part='outcomes'] select").nth(2).select_option("")
        page.get_by_label("Only where models disagree").check()
        assert count.inner_text() == f"{apart} of {ITEMS} items"
        assert page.deeds.messages == [] and page.deeds.requests == []
