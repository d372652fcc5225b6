"""A comparison as a terminal table, Markdown, CSV, JSON and SVG; and files that appear whole."""

from __future__ import annotations

import os
from pathlib import Path

from evaluation.comparison import Comparison
from evaluation.report_data import as_csv, as_json
from evaluation.report_markdown import as_markdown
from evaluation.report_table import cells, headers, print_table, rich_table, svg

__all__ = [
    "as_csv",
    "as_json",
    "as_markdown",
    "cells",
    "headers",
    "print_table",
    "rich_table",
    "svg",
    "write_atomically",
    "write_report",
]


def write_report(path: str | Path, comparison: Comparison) -> None:
    """Write the Markdown report in one step: a reader sees the old one or the new one."""
    write_atomically(Path(path), as_markdown(comparison))


def write_atomically(path: Path, text: str) -> None:
    """Write a text file beside its place and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
