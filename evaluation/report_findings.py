"""Sections of the report about what was found: criteria, power, retention and forgetting, alignment."""

from __future__ import annotations

import math

from evaluation.arms import CLUSTER_INDICES, AlignmentRow, ArmRow
from evaluation.comparison import Comparison
from evaluation.criteria import Criterion
from evaluation.differences import BASE
from evaluation.markdown import cell, grid, interval, number, significant
from evaluation.power import PowerRow
from evaluation.statistics import ALPHA, LEVEL

CRITERIA = "Success criteria"
CRITERIA_HEADERS = ["Arm", "Asked for", "Estimate [95%]", "Unit", "Outcome", "Why"]
POWER = "How many items it would take"
POWER_HEADERS = ["Arm", "Against", "Difference, points", "Items needed", "Items now", "Seeds now", "Why"]
SPREAD = "in brackets the smallest and the largest of the seeds, where these differ."
RETENTION = "Retention and forgetting"
ALIGNMENT = "Alignment Quality Index"

_MEASURES = {
    ("general", "perplexity"): "Perplexity",
    ("general", "loss"): "Loss there, nats per token",
    ("weights", "update_norm"): "Length of the update, ‖ΔW‖_F",
    ("weights", "update_norm_relative"): "The same over ‖W‖_F",
    ("weights", "effective_rank"): "Effective rank of the update",
    ("weights", "stable_rank"): "Stable rank of the update",
    ("weights", "rank"): "Rank allotted",
    ("hidden", "drift_relative"): "Drift of the hidden states, relative",
    ("hidden", "drift_cosine"): "Drift of the hidden states, 1 - cosine",
}


def criterion_cells(criterion: Criterion) -> list[str]:
    """One line of the table of criteria."""
    estimate = interval(criterion.estimate, sign=criterion.unit == "points" or "speed" in criterion.name)
    if criterion.estimate is not None and criterion.confidence < 100 * LEVEL:
        estimate += f" ({criterion.confidence:.0f}% interval)"
    return [
        criterion.arm,
        criterion.threshold,
        estimate,
        criterion.unit,
        criterion.outcome,
        criterion.why,
    ]


def gained_and_lost(binary: bool) -> str:
    """Header of the items that speak for an arm and against it."""
    return "Gained, lost" if binary else "Items better, worse"


def with_spread(row: ArmRow, key: tuple[str, str]) -> str:
    """An arm's mean of a metric, and its range over the seeds where the written numbers differ."""
    value = row.metrics.get(key)
    ends = [significant(end) for end in row.ranges.get(key, ())]
    known = value is not None and math.isfinite(value)  # of seeds that are not all finite there is no range
    return f"{significant(value)} ({ends[0]} to {ends[1]})" if known and len({*ends}) > 1 else significant(value)


def criteria_grid(comparison: Comparison) -> str:
    """Table of criteria in Markdown."""
    return grid(CRITERIA_HEADERS, [criterion_cells(criterion) for criterion in comparison.criteria])


def power_cells(row: PowerRow) -> list[str]:
    """One line of the table of powers."""
    needed = "no number is enough" if row.items is None else str(row.items)
    return [row.arm, row.against, str(row.points), needed, str(row.items_now), str(row.seeds_now), row.why]


def power_blocks(comparison: Comparison) -> list[str]:
    """Section of Markdown; none where nothing was compared."""
    if not comparison.power:
        return []
    return [
        f"## {POWER}",
        "Items needed to see a true difference of 1, 2 or 3 points with 80% power (two-sided, α = 0.05, without the "
        "correction for several arms), judged from the variation seen here. With two or three seeds that variation is "
        "known to within a factor of a few only: read the numbers as orders of magnitude.",
        grid(POWER_HEADERS, [power_cells(row) for row in comparison.power]),
    ]


def retention_blocks(comparison: Comparison) -> list[str]:
    """What was kept and what it cost: retention accuracy, perplexity, size of the updates; none if not measured."""
    rows = comparison.rows
    lines = []
    if any(row.retention is not None for row in rows):
        lines.append(["Retention accuracy, % [95%]", *(_retained(row) for row in rows)])
        lines.append(["Kept of the base's, % [95%]", *(_kept(row) for row in rows)])
    tasks = dict.fromkeys(
        key for row in rows for key in row.metrics if key[0] == "retention" and key[1].startswith("retention/")
    )
    for key in tasks:
        values = [row.metrics.get(key) for row in rows]
        shares = [number(None if value is None else 100 * value) for value in values]
        lines.append([f"Task {key[1].removeprefix('retention/')}, %", *shares])
    for key, name in _MEASURES.items():
        if any(key in row.metrics for row in rows):
            found = [row.metrics.get(key) for row in rows]
            lines.append([name, *map(significant, found)])
    if not lines:
        return []
    words = (
        "Means over seeds. The base is the model before training. Kept: retention accuracy over the base's, on the "
        "same items."
    )
    if any(key in row.metrics for row in rows for key in _MEASURES):
        words += (
            " Perplexity is of the texts that measure.text names: of the answers of the retention questions unless it "
            "names others; the base's with the adapter off. Update and drift are measured against the base, so it has "
            "none."
        )
    return [f"## {RETENTION}", words, grid(["Measure", *(row.arm for row in rows)], lines)]


def _retained(row: ArmRow) -> str:
    return number(row.retention) if row.retention_interval is None else interval(row.retention_interval)


def _kept(row: ArmRow) -> str:
    return "100.0" if row.arm == BASE and row.retention is not None else interval(row.retention_share_interval)


def alignment_blocks(comparison: Comparison) -> list[str]:
    """How far apart safe and unsafe prompts lie in the hidden states; none where it was not measured."""
    found = [(row.arm, measured) for row in comparison.rows for measured in row.alignment]
    if not found:
        return []
    heads = ["Arm", "Seed", "Index [95%]", "Shuffled labels [95%]", "p", "Δ to base [95%]", "p of Δ"]
    return [
        f"## {ALIGNMENT}",
        "Separation of safe from unsafe prompts in the hidden states, normalised by constants of the base; higher is "
        "further apart. Intervals resample prompts; p is the share of shuffled labels that separate as well. Δ is the "
        "index above its own mean under shuffled labels, arm minus base, so it is not the difference of two indices "
        "of the table. Its verdict rests on a p-value of its own (shuffled labels in both models, and bootstrap: the "
        "larger one; over several seeds twice their mean), not corrected for several arms."
        + (" Not to be confused with the accuracy on the air quality index above." if comparison.primary.air else ""),
        grid(
            [*heads, *(name.replace("_", " ") for name in CLUSTER_INDICES)],
            [_alignment_cells(arm, measured) for arm, measured in found],
        ),
        "\n".join(line for row in comparison.rows if (line := _alignment_words(row))),
    ]


def _alignment_cells(arm: str, measured: AlignmentRow) -> list[str]:
    return [
        arm,
        str(measured.seed),
        interval(measured.index, digits=3),
        interval(measured.null, digits=3),
        significant(measured.p_value, 2),
        interval(measured.delta, sign=True, digits=3),
        significant(measured.delta_p_value, 2),
        *(significant(measured.others.get(name), 3) for name in CLUSTER_INDICES),
    ]


def _alignment_words(row: ArmRow) -> str:
    """Whether the arm differs from the base; empty where no difference was measured.

    Seeds share prompts and base, so their p-values depend on each other: twice their mean is a p-value whatever the
    dependence is (Rüschendorf 1982; Vovk & Wang 2020).
    """
    seeds = sum(measured.delta is not None for measured in row.alignment)
    delta, mean_p = (row.metrics.get(("alignment", f"delta_alignment_{name}")) for name in ("index", "p_value"))
    if not seeds or delta is None:
        return ""
    several = f"{seeds} seeds" if seeds > 1 else "1 seed"
    if mean_p is None or not math.isfinite(mean_p):
        why = "no p-value was measured, see stage measure" if mean_p is None else "not finite for every seed"
        return f"- {cell(row.arm)}: no verdict against base: {why} ({several})."
    p_value = mean_p if seeds == 1 else min(1.0, 2 * mean_p)
    if p_value > ALPHA:
        verdict = "undecided against base"
    elif len({measured.delta.estimate > 0 for measured in row.alignment if measured.delta is not None}) > 1:
        verdict = "changed against base, but the seeds disagree about the direction"
    else:
        verdict = f"significantly {'further apart' if delta > 0 else 'closer together'} than in base"
    return f"- {cell(row.arm)}: {verdict}, p = {p_value:.2g} ({several}, over prompts alone)."
