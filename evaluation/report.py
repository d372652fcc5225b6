"""A comparison as a terminal table, Markdown, CSV, JSON and SVG."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from db.values import plain
from evaluation.comparison import ArmRow, Comparison
from evaluation.differences import BASE
from evaluation.markdown import cell, grid, interval, number
from evaluation.report_serving import sections

NARROWEST = 100
"""Columns of a pipe, at least: a truncated number is a wrong number."""

HEADERS = (
    "Model",
    "Seeds",
    "AQI\naccuracy %",
    "Δ AQI\npoints [95%]",
    "Retention\n%",
    "Decode\ntokens/s",
    "Δ speed\n%",
    "Parity\n%",
    "Updates\n(probe)",
)
_TITLE = "Arms compared with the untouched base"
_COLOURS = {"better": "green", "worse": "red"}


def cells(row: ArmRow) -> list[str]:
    """Return one arm's cells, in the order of `HEADERS`; a dash stands for a number that does not exist."""
    difference = row.against(BASE)
    delta = "–"
    if row.arm == BASE:
        delta = "0.0"
    elif difference is not None:
        delta = interval(difference.points, sign=True)
    return [
        row.model_name,
        str(len(row.seeds)),
        number(row.accuracy),
        delta,
        number(row.retention),
        number(row.decode_speed),
        "0.0" if row.arm == BASE else number(row.delta_speed, sign=True),
        number(row.parity),
        row.updates or "–",
    ]


def rich_table(comparison: Comparison) -> Table:
    """Build the terminal's table; where it does not fit, cells wrap and are never cut."""
    table = Table(title=_TITLE, title_justify="left")
    for position, header in enumerate(HEADERS):
        table.add_column(header, justify="left" if position == 0 else "right", overflow="fold")
    for row in comparison.rows:
        difference = row.against(BASE)
        colour = _COLOURS.get(difference.verdict, "") if difference else ""
        table.add_row(*(Text(cell, style=colour if at == 3 else "") for at, cell in enumerate(cells(row))))
    return table


def print_table(comparison: Comparison, console: Console) -> None:
    """Print the table, a verdict for each arm, and the notes; in a pipe, each on one line."""
    table = rich_table(comparison)
    piped = not console.is_terminal
    if piped:
        console.width = max(console.width, _width(console, table))
    console.print(table)
    for line in comparison.verdicts:
        console.print(Text(line), soft_wrap=piped)
    for note in comparison.notes:
        console.print(Text(f"Note: {note}", style="dim"), soft_wrap=piped)


def _width(console: Console, table: Table) -> int:
    needed = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    return max(NARROWEST, needed)


def svg(comparison: Comparison) -> str:
    """Return what the terminal shows as an SVG picture, for the README."""
    console = Console(record=True, width=NARROWEST, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.width = _width(console, rich_table(comparison))
    print_table(comparison, console)
    picture = console.export_svg(title="python -m evaluation.compare_all")
    # Rich asks a font server for its font; a local monospace one does, and the picture needs no network.
    return re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)


def as_json(comparison: Comparison) -> str:
    """Return everything as JSON; NaN and infinities are words, since JSON has no such numbers."""
    content = asdict(comparison)
    for row in content["rows"]:
        row["metrics"] = {f"{split}/{name}": value for (split, name), value in row["metrics"].items()}
    return json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False)


def as_csv(comparison: Comparison) -> str:
    """Return one line for each arm, with bounds and p-values in their own columns."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["model_name", "arm", "seeds", "aqi_accuracy_percent", "delta_aqi_points", "delta_aqi_low",
         "delta_aqi_high", "items", "p_value", "p_holm", "verdict", "retention_percent",
         "decode_tokens_per_second", "delta_speed_percent", "parity_percent", "updates"]
    )  # fmt: skip
    for row in comparison.rows:
        d = row.against(BASE)
        paired = [
            d.points.estimate, d.points.low, d.points.high, d.items, d.p_value, d.p_holm, d.verdict
        ] if d else [0.0 if row.arm == BASE else None, *[None] * 6]  # fmt: skip
        writer.writerow(
            [row.model_name, row.arm, len(row.seeds), row.accuracy, *paired, row.retention,
             row.decode_speed, row.delta_speed, row.parity, row.updates]
        )  # fmt: skip
    return out.getvalue()


def as_markdown(comparison: Comparison) -> str:
    """Return the report: table, verdicts, each metric, parity, and where every number comes from."""
    arms = [row.arm for row in comparison.rows]
    blocks = [
        f"# {_TITLE}",
        grid(list(HEADERS), [cells(row) for row in comparison.rows]),
        "## Verdicts",
        "\n".join(f"- {cell(line)}" for line in comparison.verdicts) or "No arm besides the base yet.",
        "\n".join(f"- {cell(note)}" for note in comparison.notes),
        "## Paired differences of AQI category accuracy",
        _difference_table(comparison),
        "## What the optimizers did",
        "Medians over layers and sampled steps. Shadow: what plain AdamW would have done with the same raw gradients.",
        _probe_table(comparison),
        "## Every metric",
        "Means over seeds, in the metric's own unit. " + cell(_spread(comparison)),
        grid(["Split", "Metric", "Unit", "Better", *arms], _metric_lines(comparison)),
        "## Parity of the exported models",
        "Percent of prompts, mean over seeds; the table above shows the worst seed.",
        grid(["Pair", *arms], _parity_lines(comparison)),
        *sections(comparison),
        "## Where the numbers come from",
        _provenance(comparison),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def write_report(path: str | Path, comparison: Comparison) -> None:
    """Write the Markdown report in one step: a reader sees the old one or the new one."""
    write_atomically(Path(path), as_markdown(comparison))


def write_atomically(path: Path, text: str) -> None:
    """Write a text file beside its place and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _difference_table(comparison: Comparison) -> str:
    lines = [
        [
            row.arm,
            d.against,
            interval(d.points, sign=True, digits=2),
            str(d.items),
            f"{d.p_value:.2g}",
            f"{d.p_holm:.2g}",
            d.verdict,
        ]
        for row in comparison.rows
        for d in row.differences
    ]
    heads = ["Arm", "Against", "Points [95%]", "Items", "p (exact sign test)", "p (Holm)", "Verdict"]
    return grid(heads, lines)


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
            *("–" if (v := probe.numbers.get(name)) is None else f"{v:.3g}" for name in _PROBE_COLUMNS),
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
        values = [row.metrics.get((split, name)) for row in comparison.rows]
        lines.append([split, name, unit, direction, *("–" if v is None else f"{v:.4g}" for v in values)])
    return lines


def _parity_lines(comparison: Comparison) -> list[list[str]]:
    keys = dict.fromkeys(key for row in comparison.rows for key in row.metrics if key[0] == "parity")
    return [
        [
            key[1].removeprefix("pair/"),
            *("–" if (v := row.metrics.get(key)) is None else f"{100 * v:.1f}" for row in comparison.rows),
        ]
        for key in keys
    ]


def _spread(comparison: Comparison) -> str:
    spreads = [
        f"{row.arm} {min(row.accuracy_by_seed):.1f} to {max(row.accuracy_by_seed):.1f}"
        for row in comparison.rows
        if len(row.accuracy_by_seed) > 1
    ]
    return f"AQI accuracy from seed to seed, percent: {', '.join(spreads)}." if spreads else ""


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
