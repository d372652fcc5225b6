"""Sections about what is served: speed by phase, exported files, parity, precisions, servers."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.differences import BASE
from evaluation.markdown import interval, number
from evaluation.page import charts
from evaluation.page.blocks import MOST_ROWS, Block, Cell, Chart, Details, Panel, Section, Table, Text
from evaluation.page.columns import spread
from evaluation.page.context import Context, arm_cell, confidence_text
from evaluation.report_serving import PARITY, SERVED_HEADERS, precision_cells, precision_headers, served_cells
from evaluation.serving import PhaseRow
from evaluation.statistics import LEVEL

_PHASES = {
    "load": "Load",
    "ttft": "Time to first token",
    "prefill": "Prefill",
    "decode": "Decode",
}
_TRAINED = ("adapter", "base_model", "dataset")
"""Kinds of files that no export makes."""
_SHORT = 12
"""Characters of a hash that are shown."""


def speed(context: Context) -> Section | None:
    """How fast each arm's model answers."""
    phases = context.comparison.phases
    if not phases:
        return None
    data = context.dataset("speed", "kind", "label", "arm", "phase", "low", "value", "high")
    for row in phases:
        kind = "weak" if row.confidence < 100 * LEVEL else "interval"
        data.add(kind, row.arm, row.arm, row.phase, row.value.low, row.value.estimate, row.value.high)
    drawn = []
    for phase, title in _PHASES.items():
        own = [row for row in phases if row.phase == phase]
        if own:
            kinds = {str(row[0]) for row in data.rows if row[3] == phase}
            drawn.append(
                Chart(
                    id=f"speed-{phase}",
                    title=f"{title}, {own[0].unit}{_confidence(own)}",
                    label=f"{title} of each arm's model in {own[0].unit}, median with interval",
                    spec=charts.intervals(context.arms, own[0].unit, lines=len(own), kinds=kinds),
                    data="speed",
                    where={"phase": phase},
                )
            )
    rows = tuple(
        (
            arm_cell(row.arm),
            Cell(row.backend),
            Cell(_PHASES[row.phase]),
            Cell(f"{interval(row.value, digits=2 if row.unit == 'ms' else 0)} {row.unit}"),
            Cell(number(row.confidence)),
            Cell(str(row.repetitions)),
        )
        for row in phases
    )
    caption = "Medians over the repetitions of all seeds; intervals from their order"
    weak = "Dashed: too few repetitions for 95% confidence; the title says how much the interval has."
    note = weak if "weak" in data.levels("kind") else ""
    headers = ("Arm", "Backend", "Phase", "Median [interval]", "Confidence %", "Repetitions")
    return Section(
        "Speed by phase",
        (
            Text(f"{_modes(context)} One request at a time; lower is better in ms, higher in tokens/s."),
            Panel("speed", tuple(drawn), note=note),
            Details("The numbers, with their confidence", (Table(caption, headers, rows, frozenset({1, 2})),)),
        ),
    )


def _confidence(rows: Sequence[PhaseRow]) -> str:
    """What a chart's title says where its intervals have less than the usual confidence."""
    found = sorted({row.confidence for row in rows if row.confidence < 100 * LEVEL})
    if not found:
        return ""
    if len(found) == 1:
        return f"; {confidence_text(found[0])}{'s' if found[0] > 0 else ''}"
    return f"; intervals of {found[-1]:.0f}% confidence at most"


def _modes(context: Context) -> str:
    """How the models were served, and what that means for their speed."""
    modes: dict[str, list[str]] = {}
    for run in context.comparison.runs:
        if run["arm"] != BASE and run["arm"] not in modes.setdefault(run["serving_mode"], []):
            modes[run["serving_mode"]].append(run["arm"])
    told = []
    if "merged" in modes:
        told.append(
            f"Merged into the base: {', '.join(modes['merged'])}. Merged models of one shape decode equally fast, "
            "since they run the same arithmetic: a difference there is noise of the machine."
        )
    if "adapter" in modes:
        told.append(
            f"With an adapter beside the base: {', '.join(modes['adapter'])}. An adapter is arithmetic of its own at "
            "every token, which costs time."
        )
    return " ".join(told)


def exports(context: Context) -> Section | None:
    """Files that were made, and whether they answer as the trained models do."""
    parts = (_parity(context), _served(context), _precisions(context), _files(context))
    blocks = tuple(block for part in parts for block in part)
    title = "Exports and parity" if _exported(context) or any(parts[:-1]) else "Files"
    return Section(title, blocks) if blocks else None


def _exported(context: Context) -> bool:
    """Whether there is more than what training itself left."""
    return any(file.kind not in _TRAINED for file in context.data.artifacts)


def _parity(context: Context) -> list[Block]:
    found = (key for row in context.comparison.rows for key in row.metrics if key[0] == "parity")
    keys = list(dict.fromkeys(found))
    if not keys:
        return []
    names = {"token_ids_equal": "Same token ids", "greedy_equal": "All ways answer alike"}
    rows = tuple(
        (
            arm_cell(row.arm),
            Cell(number(row.parity)),
            *(Cell(number(None if (v := row.metrics.get(key)) is None else 100 * v)) for key in keys),
        )
        for row in context.comparison.rows
        if row.arm != BASE
    )
    headers = ("Arm", "Worst seed", *(names.get(key[1], key[1].removeprefix("pair/")) for key in keys))
    blocks: list[Block] = [
        Table("Parity of the exported models: percent of prompts answered alike, mean over seeds", headers, rows)
    ]
    told = [
        Text(f"{run.arm} seed {run.seed}: " + "; ".join(f"{k}: {v!r}" for k, v in difference.items()), "note")
        for run in context.data.runs
        if (difference := run.parity_first_difference)
    ]
    blocks.append(Text(PARITY.replace("`", ""), "note"))
    if told:
        title = "First prompts on which an export differed from the trained model"
        blocks.append(Details(title, tuple(spread(told, MOST_ROWS))))
    return blocks


def _served(context: Context) -> list[Block]:
    served = context.comparison.served
    rows = tuple(
        (
            arm_cell(row.arm, row.seed),
            *(Cell(text, tone="bad" if text == "NO" else "") for text in served_cells(row)[2:]),
            Cell(row.first_difference or "–"),
        )
        for row in served
    )
    if not rows:
        return []
    asked = [row for row in served if row.prompts]
    alike = sum(row.answered == 100 for row in asked)
    headers = ("Run", *SERVED_HEADERS[2:], "First difference")
    caption = "Served as trained: percent of prompts on which the backend does as training did"
    table = Table(caption, headers, rows, frozenset({1, 2, len(headers) - 1}))
    return [Details(f"Served as trained: {alike} of {len(asked)} answer every prompt as training did", (table,))]


def _precisions(context: Context) -> list[Block]:
    found = context.comparison.precisions
    if not found:
        return []
    rows = tuple((arm_cell(row.arm), *map(Cell, precision_cells(row)[1:])) for row in found)
    counts = "gained and lost" if all(row.binary for row in found) else "better and worse"
    caption = f"Other precisions on the same test items; {counts} against f16"
    primary = context.comparison.primary
    table = Table(caption, ("Arm", *precision_headers(context.comparison)[1:]), rows, frozenset({1}))
    data = context.dataset("precisions", "kind", "label", "arm", "low", "value", "high")
    for row in found:
        if row.accuracy is not None:
            bounds = row.accuracy
            data.add("interval", f"{row.arm} {row.type}", row.arm, bounds.low, bounds.estimate, bounds.high)
    if not data.rows:
        return [table]
    drawn = Chart(
        id="precisions",
        title=f"{primary.title} by precision, percent",
        label=f"{primary.title} of every arm's model in every precision, percent, with 95% interval",
        spec=charts.intervals(context.arms, f"{primary.title}, %", lines=len(data.rows)),
        data="precisions",
    )
    return [table, Panel("precisions", (drawn,), wide=True)]


def _files(context: Context) -> list[Block]:
    runs = {run.id: run for run in context.data.drawn}
    files = sorted(context.data.artifacts, key=lambda file: list(runs).index(file.run_id))
    rows = tuple(
        (
            arm_cell(runs[file.run_id].arm, runs[file.run_id].seed),
            Cell(file.kind),
            Cell(f"{file.bytes:,}"),
            Cell(file.sha256[:_SHORT], title=file.sha256),
            Cell((file.parent_sha256 or "–")[:_SHORT], title=file.parent_sha256 or ""),
            Cell(file.path),
        )
        for file in files
    )
    if not rows:
        return []
    table = Table("Files with their hashes; made from: the hash of the file it was made of",
                  ("Run", "Kind", "Bytes", "sha256", "Made from", "File"), rows, frozenset({1, 3, 4, 5}))  # fmt: skip
    shown, everything = len(context.data.drawn), len(context.data.runs)
    which = "All" if shown == everything else f"Of {shown} of {everything} runs:"
    kind = "exported files" if _exported(context) else "files"
    return [Details(f"{which} {len(rows)} {kind}, their sizes and hashes", (table,))]
