"""Chapter: how far apart safe and unsafe prompts lie in each model's hidden states."""

import math

from evaluation.report.arms import ArmRow
from evaluation.report.blocks import Section, Table, Text, arm_cell
from evaluation.report.comparison import Comparison
from evaluation.report.results import ScoredRun
from evaluation.report.text import counted, interval, significant
from evaluation.statistics.intervals import ALPHA, Interval

SPLIT = "alignment"
INDEX, DELTA, NULL = "alignment_index", "delta_alignment_index", "alignment_null"
"""The index with a bootstrap interval over prompts; above its own mean under shuffled labels, minus the same of the
base; and its mean and 95% range under shuffled labels."""
CLUSTER_INDICES = ("calinski_harabasz", "xie_beni")


def measured(run: ScoredRun, name: str) -> Interval | None:
    """One of the above; None where it was not measured, as the difference from the base is not for the base."""
    middle = f"{name}_mean" if name == NULL else name
    values = [run.metrics.get((SPLIT, each)) for each in (middle, f"{name}_low", f"{name}_high")]
    estimate, low, high = values
    return None if estimate is None or low is None or high is None else Interval(estimate, low, high)


def in_words(row: ArmRow) -> str:
    """Whether an arm's index differs from the base's; empty where no difference was measured.

    Seeds share prompts and base, so their p-values depend on each other: twice their mean is a p-value whatever the
    dependence is (Rüschendorf 1982; Vovk & Wang 2020).
    """
    shifts = [shift.estimate for run in row.runs if (shift := measured(run, DELTA))]
    delta, mean_p = (row.metrics.get((SPLIT, name)) for name in (DELTA, "delta_alignment_p_value"))
    if not shifts or delta is None:
        return ""
    seeds = counted(len(shifts), "seed")
    if mean_p is None or not math.isfinite(mean_p):
        why = "stage measure gave no p-value" if mean_p is None else "not finite for every seed"
        return f"{row.arm}: not compared with base, {why} ({seeds})."
    p_value = mean_p if len(shifts) == 1 else min(1.0, 2 * mean_p)
    if p_value > ALPHA:
        outcome = "cannot be distinguished from base"
    elif len({shift > 0 for shift in shifts}) > 1:
        outcome = "differs from base, but the seeds disagree about the direction"
    else:
        outcome = f"the prompts lie significantly {'further apart' if delta > 0 else 'closer together'} than in base"
    return f"{row.arm}: {outcome}, p = {p_value:.2g} ({seeds}, over prompts alone)."


def alignment(comparison: Comparison) -> Section | None:
    runs = [(run, index) for run in comparison.runs if (index := measured(run, INDEX))]
    if not runs:
        return None
    words = (
        "How far apart safe and unsafe prompts lie in the model's hidden states (arXiv 2506.13901), scaled by the "
        "base; higher is further apart. A model separates them where its index exceeds what shuffled labels give: p is "
        "the share of shuffles that separate at least as well. Δ is the arm minus the base, each above its own mean "
        "under shuffled labels, so it is not the difference of two indices in the table. p of Δ is the larger one of "
        "a permutation test and a bootstrap; over several seeds, twice their mean. It is not corrected for several "
        "arms."
    )
    if comparison.primary.air:
        words += " This is unrelated to the Air Quality Index that the arms learn to predict."
    others = [name for name in CLUSTER_INDICES if comparison.has(SPLIT, name)]
    table = Table(
        "Alignment Quality Index by run; bootstrap intervals over prompts",
        ("Arm", "Seed", "Index [95%]", "Shuffled labels [95%]", "p", "Δ to base [95%]", "p of Δ",
         *(name.replace("_", " ") for name in others)),
        [(arm_cell(run.arm), str(run.seed), interval(index, digits=3), interval(measured(run, NULL), digits=3),
          _significant(run, "alignment_p_value", 2), interval(measured(run, DELTA), sign=True, digits=3),
          _significant(run, "delta_alignment_p_value", 2), *(_significant(run, name, 3) for name in others))
         for run, index in runs],
    )  # fmt: skip
    conclusions = (Text(sentence) for row in comparison.rows if (sentence := in_words(row)))
    return Section("Alignment Quality Index", (Text(words), *conclusions, table))


def _significant(run: ScoredRun, name: str, digits: int) -> str:
    return significant(run.metrics.get((SPLIT, name)), digits)
