"""How much an arm loses where the same questions are typed as other people would type them."""

from collections.abc import Mapping, Sequence

import numpy as np

from db.queries import RunFacts
from evaluation.paraphrase import plain
from evaluation.report.blocks import Block, Section, Table, Text, arm_cell
from evaluation.report.comparison import Report
from evaluation.report.text import interval, number
from evaluation.statistics.differences import Pairs, difference
from evaluation.statistics.intervals import aligned

Credits = Mapping[int, Mapping[str, float]]


def robustness(report: Report) -> Section | None:
    comparison, results = report.comparison, report.results
    tables = (
        _table(report, results.answers, f"{comparison.primary.title} on test items"),
        _table(report, results.retained, "Retention items"),
    )
    blocks: list[Block] = [table for table in tables if table]
    if not blocks:
        return None
    lead = (
        "The same questions typed as other people would: with a newline behind, as echo leaves one, with a blank, "
        "another mark or in other words; new wordings were never trained on. Where the whole interval lies below "
        "zero, an arm has learnt a form."
    )
    return Section("Robustness", (Text(lead), *blocks))


def _table(report: Report, asked: Credits, what: str) -> Table | None:
    """Plain and otherwise typed questions, pair by pair."""
    again, rows, forms = report.results.asked_again, [], list[str]()
    for arm in report.comparison.arms:
        runs = [run for run in report.results.runs if run.arm == arm and run.id in again and run.id in asked]
        if pairs := _pairs(runs, asked, again):
            by_form = _by_form(runs, asked, again)
            forms = forms or list(by_form)
            own, other = 100 * pairs.own.mean(), 100 * pairs.other.mean()
            lost = interval(difference(pairs).points, sign=True)
            changes = (number(by_form.get(form), sign=True) for form in forms)
            rows.append((arm_cell(arm), number(float(other)), number(float(own)), lost, *changes))
    if not rows:
        return None
    headers = ("Arm", "As asked, %", "Typed otherwise, %", "Δ, points", *(f"Δ {form}" for form in forms))
    return Table(f"{what}, typed otherwise: means over seeds, in brackets 95% intervals", headers, rows)


def _pairs(runs: Sequence[RunFacts], asked: Credits, again: Credits) -> Pairs | None:
    found = [
        {key: (credit, own[plain(key)[0]]) for key, credit in again[run.id].items() if plain(key)[0] in own}
        for run in runs
        for own in [asked[run.id]]
    ]
    if not found or not all(found):
        return None
    own, other = (aligned([{key: pair[side] for key, pair in one.items()} for one in found]) for side in (0, 1))
    return Pairs("plain", tuple(run.seed for run in runs), own, other) if own.size else None


def _by_form(runs: Sequence[RunFacts], asked: Credits, again: Credits) -> dict[str, float]:
    """Mean change of each form, points."""
    changes: dict[str, list[float]] = {}
    for run in runs:
        for key, credit in again[run.id].items():
            item, form = plain(key)
            if item in asked[run.id]:
                changes.setdefault(form, []).append(credit - asked[run.id][item])
    return {form: float(100 * np.mean(own)) for form, own in changes.items()}
