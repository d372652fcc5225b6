"""Sentences that stand under a comparison: a verdict for each arm, and what limits the reading."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from db.queries_compare import RunFacts
from evaluation.arms import ArmRow
from evaluation.differences import BASE, BASELINE, in_words
from evaluation.primary import Primary


def verdict_line(row: ArmRow, baseline: str = BASELINE) -> str:
    """Say in a sentence what the data allow to say about an arm."""
    parts = [in_words(difference) for difference in row.differences]
    if row.against(BASE) is None:
        parts.insert(0, "not comparable with base: no base run with the same items and backend")
    if row.against(baseline) is None and row.arm != baseline and baseline != BASE:
        parts.append(f"not comparable with {baseline}: no run of it with the same seed, items and backend")
    return f"{row.arm}: {'; '.join(parts)}."


def notes(rows: Sequence[ArmRow], runs: Sequence[RunFacts], shown: Primary, on_disk: Sequence[str]) -> list[str]:
    """What limits the reading, one sentence each.

    Args:
        rows: Of all arms.
        runs: Behind them.
        shown: The task that they are about.
        on_disk: Names of the tasks of all current runs.
    """
    found = [*_of_tasks(shown, on_disk)] if runs else []
    if sum(row.arm != BASE for row in rows):
        told = (
            "Δ speed: median over the paired repetitions of all seeds, against the base timed in the same process, not "
            "against the base's own row."
        )
        modes = {run.serving_mode for run in runs if run.arm != BASE}
        if "merged" in modes:
            told += (
                " Merged LoRA models of one shape decode equally fast, so differences between them are noise of the "
                "machine."
            )
        if "adapter" in modes:
            told += " An adapter beside the base is arithmetic of its own at every token, which costs time."
        found.append(told)
    if any(row.delta_speed is not None and row.delta_speed_interval is None and row.arm != BASE for row in rows):
        found.append("Δ speed without an interval: fewer than six paired repetitions give none of 95%.")
    found += _of_differences(rows)
    for row in rows:
        found += [f"{row.arm} seed {p.seed}: {p.verdict}: {p.reason}" for p in row.probes if not p.as_claimed]
    if any(run.git_dirty for run in runs):
        found.append("Some stages ran on changed files (dirty): those numbers have no commit of their own.")
    bad = [row.arm for row in rows if any(not math.isfinite(value) for value in row.metrics.values())]
    if bad:
        found.append(f"Some metrics of {', '.join(bad)} could not be computed (not finite).")
    return found


def _of_tasks(shown: Primary, on_disk: Sequence[str]) -> Iterable[str]:
    """Whether these are all results that are on the disk."""
    if shown.task not in on_disk:
        there = f"which are of {' and '.join(on_disk)}" if on_disk else "of which none is finished"
        yield (
            f"Not the results on the disk, {there}: shown is, from the database, the latest finished run of each arm "
            f"and seed of {shown.task}."
        )
    elif len(on_disk) > 1:
        yield (
            f"The results on the disk are of several tasks ({', '.join(on_disk)}), as while one replaces another: "
            f"shown are those of {shown.task} alone."
        )


def notes_of_others(task: str, counts: Mapping[str, int]) -> list[str]:
    """Say which runs of a task are not seeds of the arms that are shown.

    Args:
        task: Its name.
        counts: Arm -> number of its runs that are left out; see `db.queries_compare.left_out`.
    """
    if not counts:
        return []
    told = ", ".join(f"{count} of {arm}" for arm, count in counts.items())
    return [
        f"Finished runs of {task} that are left out: {told}. They have another base (models/base.json: the model, its "
        "place, its prompt template) than the newest run, or other settings or data of training than the newest run of "
        "their arm, so they are no seeds of one arm."
    ]


def _of_differences(rows: Sequence[ArmRow]) -> Iterable[str]:
    """How differences were judged."""
    differences = [difference for row in rows for difference in row.differences]
    levels = {difference.level for difference in differences}
    if "seeds and items" in levels:
        yield (
            "Differences over several seeds: the interval and the p-value are about other seeds and other items "
            "(crossed random effects, Student's t); the interval over items alone treats these seeds as the only ones."
        )
    if "items" in levels:
        exact = all(difference.binary for difference in differences if difference.level == "items")
        test = "McNemar's exact test" if exact else "a paired randomization test (signs flipped)"
        yield f"Differences of one seed: bootstrap over items and {test}; nothing is known of other seeds."
    if not all(difference.binary for difference in differences):
        yield "Answers get credit from 0 to 1, not only right or wrong; the numbers are means of it, in percent."
    if any(difference.seeds == 2 for difference in differences):
        yield "With two seeds intervals are wider than need be: two hardly tell how much seeds vary."
