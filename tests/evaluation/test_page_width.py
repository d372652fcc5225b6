"""What must not be cut off in the report: the main table on a screen, every table on paper."""

from __future__ import annotations

from typing import Any

from tests.evaluation.page_browser import draw_all, opened
from tests.evaluation.page_report import report


def test_the_main_table_is_whole_on_a_screen(browser: Any) -> None:
    odd = report("odd")
    assert any(row.delta_speed_interval for row in odd.comparison.rows)  # the widest line
    with opened(browser, odd.file) as page:
        box = page.locator(".box[aria-labelledby^='arms-compared']")
        assert box.evaluate("(b) => b.scrollWidth - b.clientWidth") <= 1
        assert page.deeds.messages == []


def test_a_sheet_of_paper_has_everything(browser: Any) -> None:
    """A4 between margins is 180 mm wide; what is folded or in colour is there too."""
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
