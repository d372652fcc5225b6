"""Chapters with the numbers behind the findings: differences, every metric, and the items that it would take."""

import math

from evaluation.report.arms import ArmRow
from evaluation.report.blocks import TONES, Block, Cell, Section, Table, Text, arm_cell
from evaluation.report.comparison import Comparison
from evaluation.report.results import Key
from evaluation.report.text import counted, interval, number, significant
from evaluation.statistics.differences import Difference
from evaluation.statistics.intervals import MOST_EXACT
from evaluation.statistics.power import PowerRow

_MOST_SEEDS = 10
"""Differences listed seed by seed; with more seeds, the smallest and the largest."""


def every_number(comparison: Comparison) -> Section | None:
    blocks = (*_differences(comparison), *_metrics(comparison))
    return Section("Every number", blocks) if blocks else None


def _differences(comparison: Comparison) -> list[Block]:
    differences = [(row.arm, d) for row in comparison.rows for d in row.differences]
    if not differences:
        return []
    headers = ("Arm", "Against", "Points [95%]", "Over seeds alone", "Level", "Items", "Seeds",
               "Seed by seed", "Items better, worse", "p", "p (Holm)",
               "Outcome")  # fmt: skip
    lines = [
        (arm_cell(arm), d.against, interval(d.points, sign=True, digits=2),
         interval(d.seeds_only, sign=True, digits=2), d.level, str(d.items), str(d.seeds), _by_seed(d),
         f"{d.gained}, {d.lost}", f"{d.p_value:.2g}", f"{d.p_holm:.2g}", Cell(d.outcome, tone=TONES[d.outcome]))
        for arm, d in differences
    ]  # fmt: skip
    words = (
        "The outcome rests on the 95% interval: over seeds and items where there are several seeds, otherwise over "
        "items. An interval over seeds alone takes these "
        "items as the only ones; it is a check with plain Student's t. p with one seed: McNemar's exact test where all "
        f"answers are right or wrong, else a paired randomization test of the mean (all sign flips up to {MOST_EXACT} "
        "differing items, 10,000 at random beyond); with several, Student's t over seeds and items. Holm: corrected "
        "for several arms."
    )
    return [Table(f"Paired differences of {comparison.primary.long}", headers, lines), Text(words, "note")]


def _by_seed(difference: Difference) -> str:
    by_seed = sorted(zip(difference.by_seed, difference.seed_numbers, strict=True))
    points = [f"{number(value, sign=True)} (seed {seed})" for value, seed in by_seed]
    return f"{points[0]} to {points[-1]}" if len(points) > _MOST_SEEDS else ", ".join(points)


def _metrics(comparison: Comparison) -> list[Block]:
    """Every final number of every arm."""
    lines = []
    for key in dict.fromkeys(key for row in comparison.rows for key in row.metrics):
        unit, direction, meaning = comparison.units.get(key[1], ("–", "–", ""))
        start = (Cell(key[1], title=meaning), key[0], unit, direction)
        lines.append((*start, *(_with_range(row, key) for row in comparison.rows)))
    caption = "Every metric in its own unit: mean over seeds, with the smallest and largest seed in brackets"
    table = Table(caption, ("Metric", "Split", "Unit", "Better", *comparison.arms), lines)
    return [table] if lines else []


def _with_range(row: ArmRow, key: Key) -> str:
    """A metric's mean, and its range over the seeds where the rounded numbers differ."""
    value = row.metrics.get(key)
    ends = [significant(end) for end in row.ranges.get(key, ())]
    finite = value is not None and math.isfinite(value)  # seeds that are not all finite have no range
    return f"{significant(value)} ({ends[0]} to {ends[1]})" if finite and len({*ends}) > 1 else significant(value)


def power(comparison: Comparison) -> Section | None:
    rows = comparison.power
    if not rows:
        return None
    by_size = {(row.arm, row.against, row.points): row for row in rows}
    sizes = sorted({row.points for row in rows})
    lines = []
    for arm, against in dict.fromkeys((row.arm, row.against) for row in rows):
        of_arm = [by_size[arm, against, points] for points in sizes]
        lines.append(
            (arm_cell(arm), against, f"{of_arm[0].items_now:,}", str(of_arm[0].seeds_now), *map(_items, of_arm))
        )
    headers = ("Arm", "Against", "Items now", "Seeds now", *(f"Items for {counted(size, 'point')}" for size in sizes))
    words = (
        "Test items that would reveal a true difference of that size with 80% power at α = 0.05, two-sided, without "
        "correction for several arms, and with as many seeds as now. The numbers rest on the variation seen here; "
        "with two or three seeds they are orders of magnitude. With one seed they say when an arm would be ahead on "
        "such items; showing that it is better takes more seeds."
    )
    table = Table("Test items needed to see a difference", headers, lines)
    return Section("How many items it would take", (Text(words), table), brief=3)


def _items(row: PowerRow) -> Cell:
    if row.items is not None:
        return Cell(f"{row.items:,}")
    return Cell("no number", hint=f"{row.seeds} seeds would" if row.seeds else "needs more seeds")
