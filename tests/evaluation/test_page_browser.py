"""The report in a real browser: it works, asks the network for nothing, and runs nothing that a model said."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from evaluation.report.browser import DISPUTED
from tests.evaluation import page_tree
from tests.evaluation.page_report import report
from tests.evaluation.task_tree import credits_of

pytestmark = pytest.mark.full
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A running headless browser; playwright's own, where the machine has none, would need a download."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium; install it with `apt-get install chromium`, or name it in CHROMIUM")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield found
        found.close()


@contextmanager
def opened(browser: Any, name: str, *, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
    """A report in a new window; `page.deeds` are warnings, errors, dialogs, and requests beyond its own file."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, url, deeds = context.new_page(), report(name).file.resolve().as_uri(), []
    page.deeds = deeds
    page.on("console", lambda said: said.type in ("error", "warning") and deeds.append(said.text))
    page.on("pageerror", lambda error: deeds.append(f"uncaught: {error}"))
    page.on("request", lambda asked: asked.url.split("#")[0] != url and deeds.append(f"request: {asked.url}"))
    page.on("dialog", lambda dialog: (deeds.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.goto(url)
    try:
        yield page
    finally:
        context.close()


def draw_all(page: Any) -> None:
    """Unfold and scroll through the whole page, until every chart is drawn."""
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    for place in page.query_selector_all("[data-chart]"):
        place.scroll_into_view_if_needed()
        page.wait_for_function("(place) => place.dataset.state !== undefined", arg=place, timeout=20_000)
    page.evaluate("scrollTo(0, 0)")


def unfold_samples(page: Any) -> None:
    page.get_by_role("link", name="Sample browser").click()


def counted(page: Any) -> int:
    return int(page.locator("[data-part='count']").inner_text().split()[0])


def test_it_opens_without_an_error_or_a_request_and_draws_every_chart(browser: Any) -> None:
    with opened(browser, "full") as page:
        draw_all(page)
        found = page.eval_on_selector_all(
            "[data-chart]",
            "all => all.map(p => [p.dataset.chart, p.dataset.state, p.querySelectorAll('svg, canvas').length])",
        )
        assert found == [[chart["id"], "drawn", 1] for chart in report("full").data["charts"]]
        assert page.deeds == []


def test_filter_search_seed_task_and_outcome_narrow_the_items(browser: Any) -> None:
    runs = report("full").comparison.runs
    marks: dict[tuple[str, str], set[bool]] = {}
    for run in (run for run in runs if run.seed == 0):
        for sample in run.samples:
            marks.setdefault((sample.split, sample.item_id), set()).add(sample.correct)
    expected, wrong = sum(len(right) == 2 for right in marks.values()), page_tree.ITEMS - page_tree.RIGHT["pure_grit"]
    with opened(browser, "full") as page:
        unfold_samples(page)
        assert counted(page) == len(marks) and page.locator(".sample").count() == 20
        page.get_by_label("Only where models disagree").check()
        shown, on = [], page.get_by_role("button", name="Next")
        while True:
            shown += page.eval_on_selector_all(".sample .place", "all => all.map((p) => p.textContent)")
            signs = page.eval_on_selector_all(
                ".sample", "all => all.map(s => s.querySelectorAll('.mark-right').length)"
            )
            assert all(0 < right < 4 for right in signs)
            if on.get_attribute("aria-disabled") == "true":
                break
            on.click()
            assert 0 <= page.locator(".sample").first.bounding_box()["y"] < 200, "the next page begins at its top"
            assert page.evaluate("document.activeElement.textContent") == "Next"
        assert 20 < len(shown) == len(set(shown)) == expected == counted(page) < len(marks)
        page.get_by_label("Only where models disagree").uncheck()
        search = page.get_by_role("searchbox")
        search.fill("pm2.5 IS 117")
        assert counted(page) == 1 and "PM2.5 is 117" in page.locator(".sample").inner_text()
        search.fill("no model ever said this")
        assert counted(page) == 0 and "No item matches" in page.locator("[data-part='pages']").inner_text()
        search.fill("")
        page.locator("[data-part='task']").select_option("sorting")
        assert counted(page) == page_tree.KEPT_ITEMS / 2
        page.locator("[data-part='task']").select_option("")
        page.locator("[data-part='split']").select_option("test")
        for seed, more in (("0", 0), ("1", 3)):
            page.locator("[data-part='seed']").select_option(seed)
            assert counted(page) == page_tree.ITEMS
            page.locator(".outcomes label", has_text="pure_grit").locator("select").select_option("0")
            assert counted(page) == wrong + more
        assert page.deeds == []


def test_no_text_of_a_model_is_executed(browser: Any) -> None:
    with opened(browser, "evil") as page:
        draw_all(page)
        page.get_by_role("searchbox").fill("script")
        assert counted(page) > 0
        page.get_by_role("searchbox").fill("")
        answers = page.eval_on_selector_all(".answer dd", "all => all.map(d => d.textContent)")
        assert set(page_tree.EVIL[:6]) <= set(answers)
        assert page.evaluate("window.pwned") is None and page.locator("img, b").count() == 0
        assert page.locator("th, td", has_text=page_tree.EVIL_ARM).count() > 0
        assert page.deeds == []
        # Were it to run after all, the page's policy would stop it.
        page.evaluate(
            """() => { const s = document.createElement('script'); s.textContent = 'window.pwned = 1';
            document.body.append(s); const i = document.createElement('img'); i.src = 'https://example.org/x.png';
            document.body.append(i); }"""
        )
        page.wait_for_timeout(100)
        assert page.evaluate("window.pwned") is None
        assert len([said for said in page.deeds if "Content Security Policy" in said]) >= 2


@pytest.mark.parametrize(("name", "width"), [("full", 390), ("evil", 320)])
def test_a_phone_does_not_scroll_sideways(browser: Any, name: str, width: int) -> None:
    with opened(browser, name, width=width) as page:
        draw_all(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wide = f"""[...document.querySelectorAll('main *')].filter((e) => !e.closest('.box, svg')
            && e.getBoundingClientRect().right > {width + 1}).map((e) => e.tagName + '.' + e.className)"""
        assert page.evaluate(wide) == []


def test_it_works_with_keyboard_and_screen_reader(browser: Any) -> None:
    with opened(browser, "full") as page:
        levels = page.eval_on_selector_all("h1, h2, h3", "all => all.map((h) => Number(h.tagName[1]))")
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(below - above <= 1 for above, below in pairwise(levels))
        assert page.locator("th:not([scope]), [data-chart]:not([aria-label])").count() == 0
        ids = page.eval_on_selector_all("[id]", "all => all.map((e) => e.id)")
        assert len(ids) == len(set(ids))
        for control in page.locator("select, input").all():
            assert control.evaluate("(e) => e.labels.length && e.labels[0].textContent.trim().length > 0")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the findings"
        unfold_samples(page)
        page.get_by_label("Only where models disagree").focus()
        before = counted(page)
        page.keyboard.press("Space")
        assert counted(page) < before


def test_the_browser_of_answers_shows_credit_and_finds_by_it(browser: Any) -> None:
    given = [credits_of(arm, 0, shift) for arm, shift in (("base", 0.0), ("baseline_lora", 0.05), ("pure_grit", 0.2))]
    apart = sum(max(own) - min(own) >= DISPUTED for own in zip(*given, strict=True))
    with opened(browser, "tasks") as page:
        unfold_samples(page)
        signs = page.locator(".sample").first.locator(".answer .mark").all_inner_texts()
        assert signs == [{0.0: "✗", 1.0: "✓"}.get(credit[0], f"{credit[0]:.2f}") for credit in given]
        page.locator("[data-part='outcomes'] select").nth(2).select_option("p")
        assert counted(page) == sum(0 < value < 1 for value in given[2]) > 0
        page.locator("[data-part='outcomes'] select").nth(2).select_option("")
        page.get_by_label("Only where models disagree").check()
        assert counted(page) == apart and page.deeds == []
