"""What every arm tried before it was trained, on one budget, and whether that was enough."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.report.blocks import Block, Cell, Chart, Dataset, Panel, Section, Table, Text, arm_cell
from evaluation.report.comparison import Report
from evaluation.report.text import listed, significant


def tuning(report: Report) -> Section | None:
    found = {run.arm: report.results.tuned[run.id] for run in report.results.runs if run.id in report.results.tuned}
    if not found:
        return None
    blocks: list[Block] = [Text(_lead(found))]
    blocks += [Text(warning) for warning in _warnings(report, found)]
    if panel := _curves(report, found):
        blocks.append(panel)
    rows = [
        (
            arm_cell(arm), str(len(one["runs"])), f"{sum(run['seconds'] for run in one['runs']):.0f}",
            _settings(one["chosen"]), significant(_best(one["runs"])["evaluation_loss"]),
            Cell(listed(one["at_border"]) or "none", tone="bad" if one["at_border"] else ""),
        )
        for arm, one in found.items()
    ]  # fmt: skip
    headers = ("Arm", "Tries", "Seconds, all", "Chosen", "Evaluation loss", "At the border")
    blocks.append(Table("What each arm was tuned over", headers, rows))
    return Section("Tuning", tuple(blocks))


def _lead(found: Mapping[str, Mapping[str, Any]]) -> str:
    one = next(iter(found.values()))
    grid = listed(f"{key} ({', '.join(map(str, values))})" for key, values in one["grid"].items())
    steps = f"{one['steps']} steps" if one["steps"] else "as many steps as the arms are trained with"
    return (
        f"Every arm was tried with each combination of {grid}: {len(one['runs'])} runs of {steps} on seed "
        f"{one['seed']}, which is not compared. The lowest evaluation loss was chosen."
    )


def _warnings(report: Report, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    said = [
        f"{arm}: the best value of {listed(one['at_border'])} lies at the border of what was tried; a better one may "
        "lie beyond."
        for arm, one in found.items()
        if one["at_border"]
    ]
    if untuned := [row.arm for row in report.comparison.trained if row.arm not in found]:
        said.append(f"Not tuned here: {listed(untuned)}.")
    if len({str((one["grid"], one["seed"], one["steps"])) for one in found.values()}) > 1:
        said.append("The arms were not tuned over the same grid, seed and steps, so their budgets differ.")
    return said


def _curves(report: Report, found: Mapping[str, Mapping[str, Any]]) -> Panel | None:
    """Of the first key with positive numbers, learning_rate before all others: the best loss at each value."""
    keys = [
        key
        for key in sorted(next(iter(found.values()))["grid"], key=lambda key: key != "learning_rate")
        if all(isinstance(run["settings"].get(key), int | float) and run["settings"][key] > 0
               for one in found.values() for run in one["runs"])
    ]  # fmt: skip
    if not keys:
        return None
    data = Dataset(("arm", "value", "nats"))
    for arm, one in found.items():
        for value in sorted({run["settings"][keys[0]] for run in one["runs"]}):
            best = _best([run for run in one["runs"] if run["settings"][keys[0]] == value])["evaluation_loss"]
            if best is not None:
                data.add(arm, value, best)
    title = keys[0].replace("_", " ")
    drawn = Chart(
        "tuning", f"Evaluation loss over {title}", f"The lowest evaluation loss at each {title}, one line for each arm",
        "lines",
        {"x": "value", "x_title": f"{title} (log)", "y": "nats", "y_title": "nats per token", "detail": [],
         "points": True, "log_x": sorted({row[1] for row in data.rows})},
    )  # fmt: skip
    arms = tuple(arm for arm in report.comparison.arms if arm in found)
    return Panel("tuning", data, (drawn,), arms, note="At each value the best of all other settings.", wide=True)


def _best(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return min(runs, key=lambda run: math.inf if run["evaluation_loss"] is None else run["evaluation_loss"])


def _settings(chosen: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in chosen.items())
