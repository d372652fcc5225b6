"""The report in a real browser: it works, asks the network for nothing, and runs nothing that a model said."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from evaluation.report.browser import DISPUTED
from tests.evaluation import page_tree
from tests.evaluation.page_browser import draw_all, opened
from tests.evaluation.page_report import Report, contrast, hexed, luminance, palette, report
from tests.evaluation.task_tree import ITEMS, credits_of


def test_it_opens_without_an_error_or_a_request_and_draws_every_chart(browser: Any, full: Report) -> None:
    with opened(browser, full.file) as page:
        draw_all(page)
        states = page.eval_on_selector_all("[data-chart]", "all => all.map(p => [p.dataset.chart, p.dataset.state])")
        assert dict(states) == {chart["id"]: "drawn" for chart in full.data["charts"]}
        marks = page.eval_on_selector_all(
            "[data-chart]", "all => all.map(p => p.querySelectorAll('svg, canvas').length)"
        )
        assert set(marks) == {1}
        page.reload()
        draw_all(page)
        assert page.deeds.messages == [] and page.deeds.requests == []


@pytest.mark.parametrize("width", [1280, 390])
def test_drawing_moves_nothing(browser: Any, full: Report, width: int) -> None:
    where = """() => [...document.querySelectorAll("main section[id], figcaption, [data-part='disputed']")]
        .map((e) => Math.round(e.getBoundingClientRect().top + scrollY))"""
    with opened(browser, full.file, width=width) as page:
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        before = page.evaluate(where)
        draw_all(page)
        assert len(before) > len(full.data["charts"]) and page.evaluate(where) == before
        during = page.evaluate(
            """async (where) => {
                const seen = [], look = new Function(`return (${where})()`);
                const watch = new MutationObserver(() => seen.push(look()));
                watch.observe(document.querySelector("main"), { childList: true, subtree: true });
                document.querySelector("[data-panel='spectra'] select[data-column]").dispatchEvent(new Event("change"));
                for (let frame = 0; frame < 40; frame++) {
                    await new Promise((go) => requestAnimationFrame(go));
                    seen.push(look());
                }
                return seen;
            }""",
            where,
        )
        assert len(during) > 40 and all(places == before for places in during)


def test_an_interval_is_drawn_where_it_lies(browser: Any, full: Report) -> None:
    with opened(browser, full.file) as page:
        drawn(page, "difference-1")
        rules, points = (
            page.eval_on_selector_all(
                f"[data-chart='difference-1'] g.{kind}.role-mark > *",
                """all => all.map((m) => m.getBoundingClientRect())
                .map((b) => [b.left, b.right, (b.top + b.bottom) / 2, b.width])""",
            )
            for kind in ("mark-rule", "mark-symbol")
        )
    zero = next(left for left, _, _, width in rules if width < 3)
    shown = {
        (round(p, 1), *bar[:2])
        for p in [(left + right) / 2 for left, right, _, _ in points]
        for bar in rules
        if bar[3] >= 3 and bar[0] < p < bar[1] and any(abs(bar[2] - y) < 2 for *_, y, _ in points)
    }
    for arm in ("hybrid_grit", "pure_grit"):
        found = next(row.against("baseline_lora") for row in full.comparison.rows if row.arm == arm)
        assert found is not None
        d = found.points
        shares = [(point - left) / (right - left) for point, left, right in shown]
        assert any(share == pytest.approx((d.estimate - d.low) / (d.high - d.low), abs=0.02) for share in shares)
        zeros = [(zero - left) / (right - left) for _, left, right in shown]
        assert any(share == pytest.approx(-d.low / (d.high - d.low), abs=0.02) for share in zeros)


def test_the_filter_shows_the_disagreements_that_the_data_have(browser: Any, full: Report) -> None:
    marks: dict[tuple[str, str], set[bool]] = {}
    seeds = {run.id: run.seed for run in full.report.results.runs}
    for run_id, samples in full.report.results.samples.items():
        for sample in samples if seeds[run_id] == 0 else ():
            marks.setdefault((sample.split, sample.item_id), set()).add(sample.correct)
    expected = sum(len(right) == 2 for right in marks.values())
    assert 20 < expected < len(marks)
    with opened(browser, full.file) as page:
        assert counted(page) == len(marks) and page.locator(".sample").count() == 20
        page.get_by_label("Only where models disagree").check()
        assert counted(page) == expected
        shown = list_of_pages(page)
        assert len(shown) == expected == len(set(shown))
        signs = page.eval_on_selector_all(".sample", "all => all.map(s => s.querySelectorAll('.mark-right').length)")
        assert all(0 < right < 4 for right in signs)
        assert page.deeds.messages == []


def test_search_seed_task_and_outcome_narrow_the_items(browser: Any, full: Report) -> None:
    with opened(browser, full.file) as page:
        search = page.get_by_role("searchbox")
        search.fill("pm2.5 IS 117")
        assert counted(page) == 1 and "PM2.5 is 117" in page.locator(".sample").inner_text()
        search.fill("kept-001")  # an item's id, which no prompt has
        assert counted(page) == 0
        search.fill("no model ever said this")
        assert counted(page) == 0 and "No item matches" in page.locator("[data-part='pages']").inner_text()
        search.fill("")
        page.locator("[data-part='task']").select_option("sorting")
        assert counted(page) == page_tree.KEPT_ITEMS / 2
        page.locator("[data-part='task']").select_option("")
        page.locator("[data-part='split']").select_option("test")
        page.locator(".outcomes label", has_text="pure_grit").locator("select").select_option("0")
        assert counted(page) == page_tree.ITEMS - page_tree.RIGHT["pure_grit"]
        page.locator("[data-part='seed']").select_option("1")
        assert counted(page) == page_tree.ITEMS
        page.locator(".outcomes label", has_text="pure_grit").locator("select").select_option("0")
        assert counted(page) == page_tree.ITEMS - page_tree.RIGHT["pure_grit"] + 3


def test_a_choice_redraws_its_charts_only(browser: Any, full: Report) -> None:
    points = "[data-chart='spectrum-a'] g.mark-symbol.role-mark > path"
    with opened(browser, full.file) as page:
        draw_all(page)
        kept, before = drawing(page, "scatter-kept"), places(page, points)
        assert len(before) == 2 * len(page_tree.SEEDS) * 8  # arms, seeds, eigenvalues
        panel = page.locator("[data-panel='spectra']")
        panel.locator("[data-column='layer']").select_option(page_tree.LAYERS[0])
        page.wait_for_timeout(300)
        after = places(page, points)
        assert len(after) == len(before) and after != before
        panel.locator("[data-column='seed']").select_option("1")
        page.wait_for_function(
            f"() => document.querySelectorAll({json.dumps(points)}).length === {len(before) // len(page_tree.SEEDS)}"
        )
        assert drawing(page, "scatter-kept") == kept
        assert page.deeds.messages == []


def test_nothing_of_what_a_model_says_runs(browser: Any, evil: Report) -> None:
    with opened(browser, evil.file) as page:
        draw_all(page)
        page.get_by_role("searchbox").fill("script")
        assert counted(page) > 0
        page.get_by_role("searchbox").fill("")
        answers = page.eval_on_selector_all(".answer dd", "all => all.map(d => d.textContent)")
        for text in page_tree.EVIL[:6]:
            assert text in answers
        assert page.evaluate("window.pwned") is None
        assert page.locator("img, b").count() == 0
        assert page.locator("th, td", has_text=page_tree.EVIL_ARM).count() > 0
        assert page.locator(".card h3").inner_text() == page_tree.EVIL_ARM
        assert page.deeds.messages == [] and page.deeds.requests == []


def test_a_script_that_gets_in_cannot_run(browser: Any, full: Report) -> None:
    with opened(browser, full.file) as page:
        page.evaluate(
            """() => { const s = document.createElement('script'); s.textContent = 'window.pwned = 1';
            document.body.append(s); const i = document.createElement('img'); i.src = 'https://example.org/x.png';
            document.body.append(i); }"""
        )
        page.wait_for_timeout(100)
        assert page.evaluate("window.pwned") is None
        assert any("Content Security Policy" in message for message in page.deeds.messages)
        assert len([m for m in page.deeds.messages if "script" in m or "image" in m]) >= 2


@pytest.mark.parametrize(("name", "width"), [("full", 390), ("evil", 320)])
def test_a_phone_need_not_scroll_sideways(browser: Any, name: str, width: int) -> None:
    with opened(browser, report(name).file, width=width, height=800) as page:
        draw_all(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wide = page.evaluate(
            """(width) => [...document.querySelectorAll('main *')].filter((e) => !e.closest('.box, svg')
            && e.getBoundingClientRect().right > width + 1).map((e) => e.tagName + '.' + e.className)""",
            width,
        )
        assert wide == []


def test_dark_mode_is_dark_and_can_be_read(browser: Any, full: Report) -> None:
    with opened(browser, full.file, scheme="dark") as page:
        drawn(page, "difference-0")
        ground, ink = (
            page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
        )
        assert luminance(hexed(ground)) < 0.05 and contrast(hexed(ground), hexed(ink)) > 7
        dark = drawing(page, "difference-0")
        assert palette("dark")["--arm-3"] in dark
        page.emulate_media(color_scheme="light")
        page.wait_for_function(
            "(old) => document.querySelector(\"[data-chart='difference-0']\").innerHTML !== old", arg=dark
        )
        page.wait_for_function(
            "(colour) => document.querySelector(\"[data-chart='difference-0']\").innerHTML.includes(colour)",
            arg=palette("light")["--arm-3"],
        )


def test_it_can_be_used_without_seeing_it(browser: Any, full: Report) -> None:
    with opened(browser, full.file) as page:
        levels = page.eval_on_selector_all("h1, h2, h3", "all => all.map((h) => Number(h.tagName[1]))")
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(below - above <= 1 for above, below in pairwise(levels))
        assert page.locator("th:not([scope])").count() == 0
        assert page.locator("[data-chart]:not([aria-label])").count() == 0
        ids = page.eval_on_selector_all("[id]", "all => all.map((e) => e.id)")
        assert len(ids) == len(set(ids))
        for control in page.locator("select, input").all():
            assert control.evaluate("(e) => e.labels.length && e.labels[0].textContent.trim().length > 0")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the findings"
        box = page.get_by_label("Only where models disagree")
        box.focus()
        before = counted(page)
        page.keyboard.press("Space")
        assert counted(page) < before


def test_the_browser_of_answers_shows_credit_and_finds_by_it(browser: Any) -> None:
    given = [credits_of(arm, 0, shift) for arm, shift in (("base", 0.0), ("baseline_lora", 0.05), ("pure_grit", 0.2))]
    apart = sum(max(own) - min(own) >= DISPUTED for own in zip(*given, strict=True))
    in_part = sum(0 < value < 1 for value in given[2])
    assert 0 < in_part < ITEMS
    with opened(browser, report("tasks").file) as page:
        draw_all(page)
        first = page.locator(".sample").first.locator(".answer")
        assert first.count() == 3
        for at, credit in enumerate(given):
            sign = {0.0: "✗", 1.0: "✓"}.get(credit[0], f"{credit[0]:.2f}")
            assert first.nth(at).locator(".mark").inner_text() == sign
        mark = page.locator(".mark-right-in-part .mark").first
        assert mark.get_attribute("aria-label") == f"right in part: {mark.inner_text()}"
        page.locator("[data-part='outcomes'] select").nth(2).select_option("p")
        assert counted(page) == in_part
        page.locator("[data-part='outcomes'] select").nth(2).select_option("")
        page.get_by_label("Only where models disagree").check()
        assert counted(page) == apart
        assert page.deeds.messages == [] and page.deeds.requests == []


def test_a_sheet_of_paper_has_everything(browser: Any) -> None:
    with opened(browser, report("full").file, width=680) as page:
        draw_all(page)
        page.evaluate("document.querySelectorAll('details').forEach((d, i) => { d.open = i === 0; })")
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator("details:not([open])").count() == 0
        cut = page.eval_on_selector_all(
            "table", "all => all.map((t) => [t.getBoundingClientRect().right, t.getAttribute('aria-labelledby')])"
        )
        assert [name for right, name in cut if right > 681] == []
        for kind in (".swatch", ".stroke", ".badge"):
            assert page.locator(kind).first.evaluate("(e) => getComputedStyle(e).printColorAdjust") == "exact"
        for kind in ("figure", "tbody tr"):
            assert page.locator(kind).first.evaluate("(e) => getComputedStyle(e).breakInside") == "avoid"
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator("details[open]").count() == 1


def counted(page: Any) -> int:
    return int(page.locator("[data-part='count']").inner_text().split()[0])


def list_of_pages(page: Any) -> list[str]:
    found: list[str] = []
    while True:
        found += page.eval_on_selector_all(".sample .place", "all => all.map((p) => p.textContent)")
        on = page.get_by_role("button", name="Next")
        if on.get_attribute("aria-disabled") == "true":
            return found
        on.click()
        assert 0 <= page.locator(".sample").first.bounding_box()["y"] < 200, "the next page begins at its top"
        assert page.evaluate("document.activeElement.textContent") == "Next"


def drawn(page: Any, name: str) -> None:
    page.locator(f"[data-chart='{name}']").scroll_into_view_if_needed()
    page.wait_for_selector(f"[data-chart='{name}'][data-state='drawn']")


def drawing(page: Any, name: str) -> str:
    return str(page.locator(f"[data-chart='{name}']").inner_html())


def places(page: Any, selector: str) -> list[Any]:
    found = page.eval_on_selector_all(selector, "all => all.map((m) => m.ariaLabel || m.getAttribute('transform'))")
    return list(found)
