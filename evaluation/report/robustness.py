"""Chapter: how much an arm loses where the same questions are typed as other people would type them."""

from collections.abc import Collection, Sequence

from evaluation.paraphrase import SPLIT, plain
from evaluation.report.arms import RETAINED, TEST
from evaluation.report.blocks import Section, Table, Text, arm_cell
from evaluation.report.comparison import Comparison
from evaluation.report.results import ScoredRun
from evaluation.report.text import interval, number
from evaluation.statistics.differences import Pairs, difference
from evaluation.statistics.intervals import aligned


def robustness(comparison: Comparison) -> Section | None:
    splits = {TEST: f"{comparison.primary.title} on test items", RETAINED: "Retention items"}
    tables = [table for split, what in splits.items() if (table := _table(comparison, split, what))]
    words = (
        "The same questions as other people would type them: with a trailing newline (as echo leaves one), with a "
        "space, different punctuation or other words. New wordings were never trained on. Where the whole interval "
        "lies below zero, the arm has learned a form instead of a task."
    )
    return Section("Robustness", (Text(words), *tables)) if tables else None


def _table(comparison: Comparison, split: str, what: str) -> Table | None:
    """Plain and retyped questions, pair by pair, and the mean change of each form."""
    keys = (map(plain, run.answers(SPLIT)) for run in comparison.runs for items in [run.answers(split)] if items)
    forms = list(dict.fromkeys(form for of_run in keys for item, form in of_run))
    lines = []
    for row in comparison.rows:
        if pairs := _pairs(row.runs, split, forms):
            alone = (_pairs(row.runs, split, [form]) for form in forms)
            means = (number(float(100 * one.differences.mean()) if one else None, sign=True) for one in alone)
            as_asked, retyped = (number(float(100 * credit.mean())) for credit in (pairs.reference, pairs.credit))
            lines.append((arm_cell(row.arm), as_asked, retyped, interval(difference(pairs).points, sign=True), *means))
    headers = ("Arm", "As asked, %", "Retyped, %", "Δ, points", *(f"Δ {form}" for form in forms))
    caption = f"{what}, retyped: means over seeds with 95% intervals in brackets"
    return Table(caption, headers, lines) if lines else None


def _pairs(runs: Sequence[ScoredRun], split: str, forms: Collection[str]) -> Pairs | None:
    """Each retyped question paired with the plain one, on the items of a split."""
    retyped_credit, plain_credit = [], []
    for run in runs:
        retyped = {key: credit for key, credit in run.answers(SPLIT).items()
               if plain(key)[0] in run.answers(split) and plain(key)[1] in forms}  # fmt: skip
        retyped_credit.append(retyped)
        plain_credit.append({key: run.answers(split)[plain(key)[0]] for key in retyped})
    credit, reference = aligned(retyped_credit), aligned(plain_credit)
    return Pairs("plain", tuple(run.seed for run in runs), credit, reference) if credit.size else None
