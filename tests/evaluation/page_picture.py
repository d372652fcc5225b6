"""Takes the picture of the report for the README: `python tests/evaluation/page_picture.py FILE.html PICTURE.png`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from page_browser import chromium, draw_all, opened


def main() -> None:
    """Open the page, draw all charts, save what one window shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1280, help="px")
    parser.add_argument("--height", type=int, default=1500, help="px; 0: the whole page")
    parser.add_argument("--scheme", choices=["light", "dark"], default="light")
    parser.add_argument("--section", help="id of the section to show, for example sample-browser")
    told = parser.parse_args()
    with chromium() as browser, opened(
        browser, told.file, width=told.width, height=told.height or 900, scheme=told.scheme
    ) as page:  # fmt: skip
        draw_all(page)
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = false; })")
        if told.section:
            page.evaluate("(id) => document.getElementById(id).scrollIntoView({ behavior: 'instant' })", told.section)
        page.wait_for_timeout(300)
        told.picture.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=told.picture, full_page=told.height == 0)
    print(f"{told.picture}: {told.picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
