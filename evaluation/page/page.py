"""From the database to one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from db.session import open_session
from evaluation.comparison import Comparison
from evaluation.differences import BASE
from evaluation.page import intervals, provenance, quality, serving, tasks, training, verdict
from evaluation.page.blocks import Section, panels
from evaluation.page.context import Context
from evaluation.page.data import load
from evaluation.page.samples import collect
from evaluation.page.words import seeds_text
from evaluation.report import write_atomically

TITLE = "Which way of fine-tuning is better, and how sure is that?"
_HERE = Path(__file__).parent
_SLOTS = {BASE: 0, "baseline_lora": 1, "hybrid_grit": 2, "pure_grit": 3}
"""Colours of the known arms, as numbered in style.css; others take the rest in turn."""
_OTHER_SLOTS = (4, 5, 6, 7, 8, 9, 10, 11)


def write_page(path: str | Path, url_or_path: str | Path, comparison: Comparison) -> None:
    """Write the report in one step: a reader sees the old file or the new one.

    Args:
        path: The HTML file.
        url_or_path: The database from which the comparison was made.
        comparison: What the page is about; runs that are not part of it are left out.

    Raises:
        DatabaseError: The database cannot be read.
        OSError: The file cannot be written.
    """
    write_atomically(Path(path), render(url_or_path, comparison))


def render(url_or_path: str | Path, comparison: Comparison) -> str:
    """Return the page; the same database gives the same text."""
    with open_session(url_or_path) as session:
        data = load(session, comparison)
        context = Context(comparison, data, collect(session, data.drawn))
        sections = _sections(context)
    slots = slots_of(tuple(dict.fromkeys((*context.arms, *(row.arm for row in comparison.tasks)))))
    script, library = (_HERE / "page.js").read_text(encoding="utf-8"), _library()
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    content = {
        "slots": slots,
        "charts": [
            {
                "id": chart.id,
                "panel": panel.id,
                "arms": list(context.trained if chart.data == "differences" else panel.arms or context.arms),
                "spec": chart.spec,
                "data": chart.data,
                "where": chart.where,
                "canvas": chart.canvas,
            }
            for panel in panels(sections)
            for chart in panel.charts
        ],
        "datasets": {name: dataset.packed() for name, dataset in context.datasets.items()},
        "samples": context.samples.packed,
    }
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    return environment.get_template("template.html.j2").render(
        title=TITLE,
        byline=_byline(context),
        sections=sections,
        slots=slots,
        policy=_policy([library, script], style),
        style=_code(style, "style"),
        library=_code(library, "script"),
        script=_code(script, "script"),
        data=_json(content),
        footer="Made from the project's database; nothing in this file loads anything from elsewhere.",
    )


def _sections(context: Context) -> tuple[Section, ...]:
    found = (
        verdict.verdict(context),
        intervals.intervals(context),
        intervals.power(context),
        training.loss(context),
        training.probes(context),
        training.spectra(context),
        quality.retention(context),
        quality.alignment(context),
        serving.speed(context),
        serving.exports(context),
        tasks.tasks(context),
        provenance.samples(context),
        provenance.provenance(context),
    )
    return tuple(section for section in found if section is not None)


def slots_of(arms: tuple[str, ...]) -> dict[str, int]:
    """A colour for every arm; known arms have the same one in every report."""
    free = [*_OTHER_SLOTS, *(slot for arm, slot in _SLOTS.items() if arm not in arms)]
    others = [arm for arm in arms if arm not in _SLOTS]
    return {arm: _SLOTS[arm] if arm in _SLOTS else free[others.index(arm) % len(free)] for arm in arms}


def _byline(context: Context) -> str:
    runs = context.data.runs
    seeds: dict[str, list[int]] = {}
    for run in runs:
        if run.arm != BASE:
            seeds.setdefault(run.arm, []).append(run.seed)
    ended = max((run.ended or run.started) for run in runs)
    parts = [f"{len(context.trained)} arms" if len(context.trained) != 1 else "1 arm"]
    told = {arm: seeds_text(own) for arm, own in seeds.items()}
    if len({tuple(sorted(own)) for own in seeds.values()}) > 1:
        parts[0] += f": {', '.join(f'{arm} ({words})' for arm, words in told.items())}"
    elif told:
        parts[0] += f" with {next(iter(told.values()))}"
    if BASE in context.arms:
        parts.append("the untouched base")
    text = " and ".join(parts) + f", evaluated until {ended:%Y-%m-%d %H:%M} UTC."
    primary = context.comparison.primary
    text += f" Task: {primary.task}, judged by {primary.long}."
    if context.comparison.filters:
        text += f" {context.comparison.filters}."
    commits = sorted({run.git_commit[:10] for run in runs if run.git_commit})
    if commits:
        text += f" Commit {', '.join(commits)}."
    if any(run.git_dirty for run in runs):
        text += " Some stages ran on changed files."
    return text


@cache
def _library() -> str:
    """Vega, Vega-Lite, Vega-Embed and its interpreter as one script."""
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version))


def _policy(scripts: list[str], style: str) -> str:
    """A content security policy under which only these scripts run, and nothing is loaded.

    No 'unsafe-eval': charts are drawn by Vega's interpreter. A text that got into the page as markup could therefore
    neither run nor send anything.
    """
    hashes = " ".join(_digest(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src {_digest(style)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _code(text: str, tag: str) -> Markup:
    """A script or style as it is.

    Raises:
        ValueError: It would end its element too early.
    """
    if f"</{tag}" in text.lower() or "<!--" in text or "\r" in text:
        raise ValueError(
            f"expected a {tag} without </{tag}, <!-- and carriage returns, came one with; escape them in it"
        )
    return Markup(text)  # noqa: S704 - our own files, no data


def _json(content: Any) -> Markup:
    """JSON that cannot end its script element, whatever texts it holds."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)  # noqa: S704 - escaped above
