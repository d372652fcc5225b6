"""Chromium for the tests of the page, and what a page did while it was open."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str | None:
    """The browser's path; installs Debian's package where GRIT_TEST_INSTALL=1 allows it."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and os.environ.get("GRIT_TEST_INSTALL") == "1" and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run(command, check=True, capture_output=True, timeout=400)
        found = shutil.which("chromium")
    return found


@contextmanager
def chromium() -> Iterator[Any]:
    """A running headless browser; FileNotFoundError where this machine has none."""
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    if path is None:
        raise FileNotFoundError(
            "expected Chromium, came none; install it with `apt-get install chromium`, name it in CHROMIUM, or let the "
            "tests install it as root with GRIT_TEST_INSTALL=1"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Deeds:
    """What a page did: messages in the console, errors, requests beyond its own file."""

    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def watch(self, page: Any, own: str) -> None:
        page.on(
            "console", lambda m: self.messages.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: self.messages.append(f"uncaught: {error}"))
        page.on("requestfailed", lambda request: self.messages.append(f"failed: {request.url}"))
        page.on("request", lambda r: self.requests.append(r.url) if r.url.split("#")[0] != own else None)
        page.on("dialog", lambda dialog: (self.messages.append(f"dialog: {dialog.message}"), dialog.dismiss()))


@contextmanager
def opened(browser: Any, file: Path, *, width: int = 1280, height: int = 900, scheme: str = "light") -> Iterator[Any]:
    """The file in a new window; yields the page, whose `deeds` are what it did."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page, url = context.new_page(), file.resolve().as_uri()
    page.deeds = Deeds()
    page.deeds.watch(page, url)
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
