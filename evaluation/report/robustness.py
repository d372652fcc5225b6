"""Chapter: how much an arm loses where the same questions are typed as other people would type them."""

from collections.abc import Mapping, Sequence

import numpy as np

from db.records import Run
from evaluation.paraphrase import plain
from evaluation.report.blocks import Section, Table, Text, arm_cell
from evaluation.report.comparison import Report
from evaluation.report.text import interval, number
from evaluation.statistics.differences import Pairs, difference
from evaluation.statistics.intervals import aligned

Credits = Mapping[int, Mapping[str, float]]
"""Run id → item id → credit."""


def robustness(report: Report) -> Section | None:
    results = report.results
    asked = {f"{report.comparison.primary.title} on test items": results.answers, "Retention items": results.retained}
    tables = [table for what, answers in asked.items() if (table := _table(report, answers, what))]
    words = (
        "The same questions as other people would type them: with a trailing newline (as echo leaves one), with a "
        "space, different punctuation or other words. New wordings were never trained on. Where the whole interval "
        "lies below zero, the arm has learned a form instead of a task."
    )
    return Section("Robustness", (Text(words), *tables)) if tables else None


def _table(report: Report, asked: Credits, what: str) -> Table | None:
    """Plain and retyped questions, pair by pair, and the mean change of each form."""
    again, lines, forms = report.results.asked_again, [], list[str]()
    for arm in report.comparison.arms:
        runs = [run for run in report.results.runs if run.arm == arm and run.id in again and run.id in asked]
        changes: dict[str, list[float]] = {}
        for run in runs:
            for key, credit in again[run.id].items():
                item, form = plain(key)
                if item in asked[run.id]:
                    changes.setdefault(form, []).append(credit - asked[run.id][item])
        if pairs := _pairs(runs, asked, again):
            forms = forms or list(changes)
            means = (
                number(float(100 * np.mean(changes[form])) if form in changes else None, sign=True) for form in forms
            )
            plainly, retyped = (number(float(100 * credit.mean())) for credit in (pairs.reference, pairs.credit))
            lines.append((arm_cell(arm), plainly, retyped, interval(difference(pairs).points, sign=True), *means))
    headers = ("Arm", "As asked, %", "Retyped, %", "Δ, points", *(f"Δ {form}" for form in forms))
    caption = f"{what}, retyped: means over seeds with 95% intervals in brackets"
    return Table(caption, headers, lines) if lines else None


def _pairs(runs: Sequence[Run], asked: Credits, again: Credits) -> Pairs | None:
    credits = [
        {key: (credit, plainly[plain(key)[0]]) for key, credit in again[run.id].items() if plain(key)[0] in plainly}
        for run in runs
        for plainly in [asked[run.id]]
    ]
    if not credits or not all(credits):
        return None
    own, other = (aligned([{key: pair[side] for key, pair in one.items()} for one in credits]) for side in (0, 1))
    return Pairs("plain", tuple(run.seed for run in runs), own, other) if own.size else None
