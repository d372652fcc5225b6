"""Chapter: what every arm was tuned over, with the same budget, and whether that was enough."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evaluation.report.blocks import Cell, Section, Table, Text, arm_cell
from evaluation.report.comparison import Comparison
from evaluation.report.text import listed, significant

Tuned = Mapping[str, Mapping[str, Any]]
"""Arm → its record of stage tune."""


def tuning(comparison: Comparison) -> Section | None:
    tuned: Tuned = {run.arm: run.tuned for run in comparison.runs if run.tuned}
    if not tuned:
        return None
    lines = [
        (
            arm_cell(arm), str(len(record["runs"])), f"{sum(run['seconds'] for run in record['runs']):.0f}",
            ", ".join(f"{key} {value}" for key, value in record["chosen"].items()),
            significant(_best(record["runs"])["evaluation_loss"]),
            Cell(listed(record["at_border"]) or "none", tone="bad" if record["at_border"] else ""),
        )
        for arm, record in tuned.items()
    ]  # fmt: skip
    headers = ("Arm", "Tries", "Seconds, all", "Chosen", "Evaluation loss", "At the border")
    table = Table("What each arm was tuned over", headers, lines)
    return Section("Tuning", (*map(Text, _words(comparison, tuned)), table))


def _words(comparison: Comparison, tuned: Tuned) -> Iterable[str]:
    one = next(iter(tuned.values()))
    grid = listed(f"{key} ({', '.join(map(str, values))})" for key, values in one["grid"].items())
    steps = f"{one['steps']} steps" if one["steps"] else "as many steps as training"
    yield (
        f"Every arm tried each combination of {grid}: {len(one['runs'])} runs of {steps} on seed {one['seed']}, which "
        "is not used in the comparison. The lowest evaluation loss won."
    )
    if untuned := [row.arm for row in comparison.trained if row.arm not in tuned]:
        yield f"Not tuned here: {listed(untuned)}."
    if len({str((record["grid"], record["seed"], record["steps"])) for record in tuned.values()}) > 1:
        yield "The arms were tuned over different grids, seeds or steps, so their budgets differ."


def _best(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return min(runs, key=lambda run: math.inf if run["evaluation_loss"] is None else run["evaluation_loss"])
