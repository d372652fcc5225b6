"""A comparison as a Markdown report: everything the terminal shows, every metric, and where the numbers come from."""

from __future__ import annotations

from evaluation.comparison import Comparison
from evaluation.differences import BASE, Difference
from evaluation.markdown import cell, grid, interval, number, significant
from evaluation.report_findings import (
    CRITERIA,
    SPREAD,
    alignment_blocks,
    criteria_grid,
    gained_and_lost,
    power_blocks,
    retention_blocks,
    with_spread,
)
from evaluation.report_serving import PARITY, sections
from evaluation.report_table import TITLE, cells, headers
from evaluation.report_tasks import task_blocks
from evaluation.statistics import MOST_EXACT

MOST_SEEDS = 10
"""Differences listed seed by seed; of more seeds the smallest and the largest."""


def as_markdown(comparison: Comparison) -> str:
    """Return the report: table, verdicts, each metric, parity, and where every number comes from."""
    arms = [row.arm for row in comparison.rows]
    primary = comparison.primary
    blocks = [
        f"# {TITLE}",
        f"Task: {cell(primary.task)}; its primary metric is {cell(primary.long)}, in percent.",
        f"{cell(comparison.filters)}. Corrections for several arms count these alone." if comparison.filters else "",
        grid(list(headers(primary)), [cells(row) for row in comparison.rows]),
        "## Verdicts",
        "\n".join(f"- {cell(line)}" for line in comparison.verdicts) or "No arm besides the base yet.",
        "\n".join(f"- {cell(note)}" for note in comparison.notes),
        f"## {CRITERIA}",
        "Passed only when the whole 95% interval is on the right side, failed when all of it is on the wrong side.",
        criteria_grid(comparison),
        f"## Paired differences of {cell(primary.long)}",
        "The verdict rests on the interval [95%]: over seeds and items where there are several seeds, else over items. "
        f"An interval over items alone treats these seeds as the only ones. p: {_test(comparison)} with one seed, "
        "Student's t over seeds and items with several; Holm: corrected for several arms.",
        _difference_table(comparison),
        *task_blocks(comparison.tasks, comparison.task_notes),
        *power_blocks(comparison),
        *retention_blocks(comparison),
        *alignment_blocks(comparison),
        "## What the optimizers did",
        "Medians over layers and sampled steps. Shadow: what plain AdamW would have done with the same raw gradients.",
        _probe_table(comparison),
        "## Every metric",
        f"Means over seeds, in the metric's own unit; {SPREAD} " + cell(_spread(comparison)),
        grid(["Split", "Metric", "Unit", "Better", *arms], _metric_lines(comparison)),
        *_parity(comparison),
        *sections(comparison),
        "## Where the numbers come from",
        _provenance(comparison),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _test(comparison: Comparison) -> str:
    """The test of one seed's differences."""
    if all(d.binary for row in comparison.rows for d in row.differences):
        return "McNemar's exact test"
    return (
        f"a paired randomization test of the mean (signs flipped in every way up to {MOST_EXACT} items that differ, "
        "10,000 times at random with more; McNemar's exact test where all answers are right or wrong)"
    )


def _difference_table(comparison: Comparison) -> str:
    lines = [
        [
            row.arm,
            d.against,
            interval(d.points, sign=True, digits=2),
            interval(d.items_only, sign=True, digits=2),
            d.level,
            str(d.items),
            str(d.seeds),
            _seed_range(d),
            f"{d.gained}, {d.lost}",
            f"{d.p_value:.2g}",
            f"{d.p_holm:.2g}",
            d.verdict,
        ]
        for row in comparison.rows
        for d in row.differences
    ]
    heads = [
        "Arm", "Against", "Points [95%]", "Over items alone", "Level", "Items", "Seeds", "Seed by seed",
        gained_and_lost(all(d.binary for row in comparison.rows for d in row.differences)), "p", "p (Holm)", "Verdict",
    ]  # fmt: skip
    return grid(heads, lines)


def _seed_range(difference: Difference) -> str:
    points = [
        f"{number(value, sign=True)} (seed {seed})"
        for value, seed in sorted(zip(difference.by_seed, difference.seed_numbers, strict=True))
    ]
    if len(points) > MOST_SEEDS:
        return f"{points[0]} to {points[-1]}"
    return ", ".join(points)


_PROBE_COLUMNS = {
    "angle_to_shadow": "Update off shadow, degrees",
    "lr_ratio": "Length over shadow's",
    "coverage": "Share of tensors reached",
    "cos_raw_preconditioned": "cos(raw, preconditioned)",
    "cos_raw_step": "cos(raw, step)",
    "twin_divergence": "Loss curves apart, A/A floors",
}


def _probe_table(comparison: Comparison) -> str:
    lines = [
        [
            row.arm,
            str(probe.seed),
            probe.verdict + ("" if probe.as_claimed else " (not as claimed)"),
            *(significant(probe.numbers.get(name), 3) for name in _PROBE_COLUMNS),
            probe.reason,
        ]
        for row in comparison.rows
        for probe in row.probes
    ]
    return grid(["Arm", "Seed", "Verdict", *_PROBE_COLUMNS.values(), "Diagnosis"], lines)


def _metric_lines(comparison: Comparison) -> list[list[str]]:
    keys = dict.fromkeys(key for row in comparison.rows for key in row.metrics if key[0] != "parity")
    lines = []
    for split, name in keys:
        unit, direction, _ = comparison.units.get(name, ("–", "–", ""))
        lines.append([split, name, unit, direction, *(with_spread(row, (split, name)) for row in comparison.rows)])
    return lines


def _parity(comparison: Comparison) -> list[str]:
    """Whether exports answer as the trained models do; nothing where the trained models themselves were scored."""
    arms, lines = [row.arm for row in comparison.rows], _parity_lines(comparison)
    modes = {run["serving_mode"] for run in comparison.runs if run["arm"] != BASE}
    if not lines and modes == {"adapter"} and {run["backend"].split()[0] for run in comparison.runs} == {"hf"}:
        return []
    return [
        "## Parity of the exported models",
        f"Percent of prompts, mean over seeds; the table above shows the worst seed. {PARITY}",
        grid(["Pair", *arms], lines),
    ]


def _parity_lines(comparison: Comparison) -> list[list[str]]:
    keys = dict.fromkeys(key for row in comparison.rows for key in row.metrics if key[0] == "parity")
    return [
        [
            key[1].removeprefix("pair/"),
            *(number(None if (v := row.metrics.get(key)) is None else 100 * v) for row in comparison.rows),
        ]
        for key in keys
    ]


def _spread(comparison: Comparison) -> str:
    spreads = [
        f"{row.arm} {number(min(row.accuracy_by_seed))} to {number(max(row.accuracy_by_seed))}"
        for row in comparison.rows
        if len(row.accuracy_by_seed) > 1
    ]
    return f"{comparison.primary.title} from seed to seed, percent: {', '.join(spreads)}." if spreads else ""


_ADAPTER = {"merged": "merged", "adapter": "beside the base"}


def _provenance(comparison: Comparison) -> str:
    heads = ["Arm", "Seed", "Commit", "Dirty", "Backend", "Device", "Python", "Evaluated", "Adapter"]
    dirty = {True: "yes", False: "no", None: "unknown"}
    lines = [
        [
            run["arm"],
            str(run["seed"]),
            (run["git_commit"] or "unknown")[:12],
            dirty[run["git_dirty"]],
            run["backend"],
            run["device"],
            run["python"] or "unknown",
            run["ended"] or "unknown",
            "–" if run["arm"] == BASE else _ADAPTER[run["serving_mode"]],
        ]
        for run in comparison.runs
    ]
    packages: dict[str, list[str]] = {}
    for run in comparison.runs:
        text = ", ".join(f"{name} {version}" for name, version in run["packages"].items())
        packages.setdefault(text, []).append(f"{run['arm']}/{run['seed']}")
    listed = "\n".join(f"- {cell(', '.join(who))}: {cell(text)}" for text, who in packages.items())
    return grid(heads, lines) + "\n\nPackages:\n\n" + listed
