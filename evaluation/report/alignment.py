"""Chapter: how far apart safe and unsafe prompts lie in each model's hidden states."""

import math
from collections.abc import Sequence

from evaluation.report.arms import CLUSTER_INDICES, ArmRow
from evaluation.report.blocks import Chart, Dataset, Panel, Section, Table, Text, arm_cell, missing_note
from evaluation.report.text import counted, interval, significant
from evaluation.statistics.intervals import ALPHA


def in_words(row: ArmRow) -> str:
    """Whether an arm's index differs from the base's; empty where no difference was measured.

    Seeds share prompts and base, so their p-values depend on each other: twice their mean is a p-value whatever the
    dependence is (Rüschendorf 1982; Vovk & Wang 2020).
    """
    shifts = [measured.delta.estimate for measured in row.alignment if measured.delta is not None]
    delta, mean_p = (row.metrics.get(("alignment", f"delta_alignment_{name}")) for name in ("index", "p_value"))
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


def alignment(rows: Sequence[ArmRow], conclusions: Sequence[str], *, air: bool) -> Section | None:
    """`air`: the task is air quality, whose index shares its letters with this one."""
    runs = [(row, measured) for row in rows for measured in row.alignment]
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
    if air:
        words += " This is unrelated to the Air Quality Index that the arms learn to predict."
    data = Dataset(("kind", "label", "arm", "seed", "low", "value", "high"))
    for row, measured in runs:
        label = row.arm if len(row.seeds) == 1 else f"{row.arm} · {measured.seed}"
        for kind, value in (("band", measured.null), ("interval", measured.index)):
            if value and math.isfinite(measured.index.estimate):
                data.add(kind, label, row.arm, str(measured.seed), value.low, value.estimate, value.high)
    title = "Alignment Quality Index with 95% intervals; gray: range under shuffled labels"
    options = {"x_title": "index", "lines": len(data.levels("label")), "kinds": ("band", "interval"),
               "band": "95% under shuffled labels"}  # fmt: skip
    note = missing_note([row.arm for row in rows], data)
    panel = Panel("alignment", data, (Chart("alignment", title, "intervals", options),), note=note)
    others = [name for name in CLUSTER_INDICES if any(name in measured.others for _, measured in runs)]
    table = Table(
        "Alignment Quality Index by run; bootstrap intervals over prompts",
        ("Arm", "Seed", "Index [95%]", "Shuffled labels [95%]", "p", "Δ to base [95%]", "p of Δ",
         *(name.replace("_", " ") for name in others)),
        [(arm_cell(row.arm), str(m.seed), interval(m.index, digits=3), interval(m.null, digits=3),
          significant(m.p_value, 2), interval(m.delta, sign=True, digits=3), significant(m.delta_p_value, 2),
          *(significant(m.others.get(name), 3) for name in others)) for row, m in runs],
    )  # fmt: skip
    return Section("Alignment Quality Index", (Text(words), *map(Text, conclusions), panel, table))
