"""The report as one HTML file that loads nothing from elsewhere and runs no script but its own."""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from db.runs import BASE
from evaluation.report import charts
from evaluation.report.blocks import Browser, Dataset, Panel, slug, walk
from evaluation.report.comparison import Comparison
from evaluation.report.provenance import byline
from evaluation.report.sections import TITLE, sections

DIGITS = 5
"""Significant digits of a number in a chart; a picture shows fewer."""
_HERE = Path(__file__).parent
_SLOTS = {BASE: 0, "baseline_lora": 1, "hybrid_grit": 2, "pure_grit": 3}
"""Colours of the known arms, as numbered in style.css; other arms take the rest in turn."""
_OTHER_SLOTS = range(4, 16)


def as_page(comparison: Comparison) -> str:
    """The page; the same database gives the same text."""
    chapters = sections(comparison)
    blocks = [block for section in chapters for block in walk(section.blocks)]
    panels = [block for block in blocks if isinstance(block, Panel)]
    slots = slots_of(tuple(dict.fromkeys((*comparison.arms, *(row.arm for row in comparison.tasks)))))
    content = {
        "slots": slots,
        "charts": [
            {
                "id": chart.id,
                "panel": panel.id,
                "arms": panel.arms,
                "spec": getattr(charts, chart.draw)(panel, **chart.options),
                "where": chart.where,
                "canvas": chart.options.get("x") == "step",  # many marks
            }
            for panel in panels
            for chart in panel.charts
        ],
        "datasets": {panel.id: packed(panel.data) for panel in panels},
        "samples": next((block.packed for block in blocks if isinstance(block, Browser)), None),
    }
    script, library = (_HERE / "page.js").read_text(encoding="utf-8"), _library()
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("template.html.j2").render(
        title=TITLE,
        byline=byline(comparison),
        sections=chapters,
        slots=slots,
        slug=slug,
        policy=_policy([library, script], style),
        style=_code(style, "style"),
        library=_code(library, "script"),
        script=_code(script, "script"),
        data=_json(content),
    )


def slots_of(arms: tuple[str, ...]) -> dict[str, int]:
    """A color for every arm; known arms have the same one in every report."""
    free = [*_OTHER_SLOTS, *(slot for arm, slot in _SLOTS.items() if arm not in arms)]
    others = [arm for arm in arms if arm not in _SLOTS]
    return {arm: _SLOTS[arm] if arm in _SLOTS else free[others.index(arm) % len(free)] for arm in arms}


def packed(data: Dataset) -> dict[str, Any]:
    """A dataset for JSON, column by column: texts as {levels, codes}, numbers as a list, NaN as null."""

    def column(values: Sequence[Any]) -> Any:
        if any(isinstance(value, str) for value in values):
            levels = {text: code for code, text in enumerate(dict.fromkeys(str(value) for value in values))}
            return {"levels": list(levels), "codes": [levels[str(value)] for value in values]}
        return [rounded(value) for value in values]

    return {name: column(data.column(name)) for name in data.names}


def rounded(value: float | None) -> float | int | None:
    """A number with `DIGITS` significant digits; None for NaN and infinities, which no axis can show."""
    if value is None or not math.isfinite(value):
        return None
    if isinstance(value, int):
        return value
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


@cache
def _library() -> str:
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version))


def _policy(scripts: list[str], style: str) -> str:
    """A policy under which only these scripts run and nothing is loaded, whatever markup got in.

    No 'unsafe-eval': charts are drawn by Vega's interpreter.
    """

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"

    return (
        f"default-src 'none'; script-src {' '.join(map(digest, scripts))}; style-src {digest(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _code(text: str, tag: str) -> Markup:
    """A script or style of our own, which must not end its element."""
    if f"</{tag}" in text.lower() or "<!--" in text or "\r" in text:
        raise ValueError(f"expected a {tag} without </{tag}, <!-- and carriage returns; escape them in it")
    return Markup(text)  # noqa: S704 - our own files, no data


def _json(content: Any) -> Markup:
    """JSON that cannot end its script element, whatever texts it holds."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)  # noqa: S704 - escaped above
