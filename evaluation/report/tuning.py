"""Chapter: what every arm was tuned over, with the same budget, and whether that was enough."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evaluation.report.blocks import Block, Cell, Chart, Dataset, Panel, Section, Table, Text, arm_cell
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
    blocks: list[Block] = [*map(Text, _words(comparison, tuned)), *_curves(tuned), table]
    return Section("Tuning", tuple(blocks))


def _words(comparison: Comparison, tuned: Tuned) -> Iterable[str]:
    one = next(iter(tuned.values()))
    grid = listed(f"{key} ({', '.join(map(str, values))})" for key, values in one["grid"].items())
    steps = f"{one['steps']} steps" if one["steps"] else "as many steps as training"
    yield (
        f"Every arm tried each combination of {grid}: {len(one['runs'])} runs of {steps} on seed {one['seed']}, which "
        "is not used in the comparison. The lowest evaluation loss won."
    )
    for arm, record in tuned.items():
        if border := record["at_border"]:
            yield f"{arm}: the best {listed(border)} is at the border of the grid, so a better value may lie beyond it."
    if untuned := [row.arm for row in comparison.trained if row.arm not in tuned]:
        yield f"Not tuned here: {listed(untuned)}."
    if len({str((record["grid"], record["seed"], record["steps"])) for record in tuned.values()}) > 1:
        yield "The arms were tuned over different grids, seeds or steps, so their budgets differ."


def _curves(tuned: Tuned) -> list[Panel]:
    """The best loss at each value of the first key with positive numbers, preferably learning_rate."""
    runs = [run for record in tuned.values() for run in record["runs"]]
    keys = sorted(next(iter(tuned.values()))["grid"], key=lambda key: key != "learning_rate")
    key = next((key for key in keys if all(_positive(run["settings"].get(key)) for run in runs)), None)
    if key is None:
        return []
    data = Dataset(("arm", "value", "nats"))
    for arm, record in tuned.items():
        for value in sorted({run["settings"][key] for run in record["runs"]}):
            best = _best([run for run in record["runs"] if run["settings"][key] == value])["evaluation_loss"]
            if best is not None:
                data.add(arm, value, best)
    title = key.replace("_", " ")
    options = {"x": "value", "x_title": f"{title} (log)", "y": "nats", "y_title": "nats per token", "detail": [],
               "points": True, "log_x": sorted({run["settings"][key] for run in runs})}  # fmt: skip
    chart = Chart("tuning", f"Lowest evaluation loss at each {title}", "lines", options)
    return [Panel("tuning", data, (chart,), note="Each point is the best over all other settings.")]


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0


def _best(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return min(runs, key=lambda run: math.inf if run["evaluation_loss"] is None else run["evaluation_loss"])
