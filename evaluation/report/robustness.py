"""Chapter: how much an arm loses where the same questions are typed as other people would type them."""

from collections.abc import Sequence

import numpy as np

from evaluation.paraphrase import SPLIT, plain
from evaluation.report.arms import RETAINED, TEST
from evaluation.report.blocks import Section, Table, Text, arm_cell
from evaluation.report.comparison import Comparison
from evaluation.report.results import ScoredRun
from evaluation.report.text import interval, number
from evaluation.statistics.differences import Pairs, difference
from evaluation.statistics.intervals import aligned


def robustness(comparison: Comparison) -> Section | None:
    asked = {TEST: f"{comparison.primary.title} on test items", RETAINED: "Retention items"}
    tables = [table for split, what in asked.items() if (table := _table(comparison, split, what))]
    words = (
        "The same questions as other people would type them: with a trailing newline (as echo leaves one), with a "
        "space, different punctuation or other words. New wordings were never trained on. Where the whole interval "
        "lies below zero, the arm has learned a form instead of a task."
    )
    return Section("Robustness", (Text(words), *tables)) if tables else None


def _table(comparison: Comparison, split: str, what: str) -> Table | None:
    """Plain and retyped questions, pair by pair, and the mean change of each form."""
    lines, forms = [], list[str]()
    for row in comparison.rows:
        runs = [run for run in row.runs if run.answers(SPLIT) and run.answers(split)]
        changes: dict[str, list[float]] = {}
        for run in runs:
            for key, credit in run.answers(SPLIT).items():
                item, form = plain(key)
                if item in run.answers(split):
                    changes.setdefault(form, []).append(credit - run.answers(split)[item])
        if pairs := _pairs(runs, split):
            forms = forms or list(changes)
            means = (
                number(float(100 * np.mean(changes[form])) if form in changes else None, sign=True) for form in forms
            )
            plainly, retyped = (number(float(100 * credit.mean())) for credit in (pairs.reference, pairs.credit))
            lines.append((arm_cell(row.arm), plainly, retyped, interval(difference(pairs).points, sign=True), *means))
    headers = ("Arm", "As asked, %", "Retyped, %", "Δ, points", *(f"Δ {form}" for form in forms))
    caption = f"{what}, retyped: means over seeds with 95% intervals in brackets"
    return Table(caption, headers, lines) if lines else None


def _pairs(runs: Sequence[ScoredRun], split: str) -> Pairs | None:
    credits = [
        {key: (credit, asked[plain(key)[0]]) for key, credit in run.answers(SPLIT).items() if plain(key)[0] in asked}
        for run in runs
        for asked in [run.answers(split)]
    ]
    if not credits or not all(credits):
        return None
    own, other = (aligned([{key: pair[side] for key, pair in one.items()} for one in credits]) for side in (0, 1))
    return Pairs("plain", tuple(run.seed for run in runs), own, other) if own.size else None
