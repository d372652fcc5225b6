"""Reports with their databases, made once for all test modules, and helpers that read them."""

from __future__ import annotations

import atexit
import html
import json
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from db.ingest import ingest
from evaluation.report import html as page_module
from evaluation.report.comparison import load_comparison
from evaluation.report.html import as_page
from tests.evaluation import page_tree
from tests.evaluation.task_tree import make_three_tasks

STYLE = (Path(page_module.__file__).parent / "style.css").read_text(encoding="utf-8")
BUILDERS = {
    "full": page_tree.make_page_tree,
    "evil": page_tree.make_evil_tree,
    "base": lambda root: page_tree.add_arm(root, "base", 0, page_tree.RIGHT["base"]),
    "odd": page_tree.make_odd_tree,
    "tasks": make_three_tasks,
    "preserved": page_tree.make_preserved_tree,
}


class Report:
    def __init__(self, root: Path) -> None:
        self.root, self.database, self.file = root, root / "outputs/centralized.db", root / "outputs/report.html"
        ingest(root, self.database)
        self.comparison = load_comparison(self.database, detail=True)
        self.text = as_page(self.comparison)
        self.file.write_text(self.text, encoding="utf-8")

    @property
    def data(self) -> dict[str, Any]:
        return page_data(self.text)


@cache
def report(name: str) -> Report:
    """The report of one of `BUILDERS`; tests share it, so none may change its files."""
    folder = TemporaryDirectory(prefix="page-")
    BUILDERS[name](Path(folder.name))
    made = Report(Path(folder.name))
    atexit.register(folder.cleanup)
    return made


def page_data(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', text, re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def rows_of(dataset: dict[str, Any]) -> list[dict[str, Any]]:
    columns = {n: [c["levels"][i] for i in c["codes"]] if isinstance(c, dict) else c for n, c in dataset.items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def words(text: str) -> str:
    """The visible text of a part of the page."""
    shown = re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", shown))).strip()


def part(made: Report, title: str) -> str:
    return made.text.split(f'<section id="{title}"')[1].split("</section>")[0]


def table(text: str, name: str) -> list[list[str]]:
    """The texts of a table's cells, header first; `name` is how its caption's id begins."""
    found = re.search(rf'<table aria-labelledby="{name}[^"]*">(.*?)</table>', text, re.DOTALL)
    assert found, name
    rows = re.findall(r"<tr>(.*?)</tr>", found[1], re.DOTALL)
    return [[words(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows]


def palette(scheme: str) -> dict[str, str]:
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)", 1)
    shown = dark.split("* {", 1)[0] if scheme == "dark" else light
    return dict(re.findall(r"(--[\w-]+):\s*(#[0-9a-f]{6})\b", shown))
