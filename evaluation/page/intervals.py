"""Sections with the numbers behind the verdict: the table of all arms, pictures of its intervals, and power."""

from __future__ import annotations

from evaluation.arms import ArmRow
from evaluation.differences import BASE
from evaluation.markdown import interval, number
from evaluation.page import charts
from evaluation.page.blocks import Block, Cell, Chart, Details, Panel, Section, Table, Text
from evaluation.page.context import TONES, Context, arm_cell
from evaluation.power import PowerRow
from evaluation.report_findings import with_spread


def intervals(context: Context) -> Section:
    """The table of all arms, and pictures of its intervals."""
    against = dict.fromkeys((BASE, context.comparison.baseline))
    title = context.comparison.primary.title
    headers = ("Arm", "Updates (probe)", f"{title}, %", *(f"Δ to {arm}, points" for arm in against),
               "Retention, %", "Decode, tokens/s")  # fmt: skip
    rows = tuple(_line(context, row) for row in context.comparison.rows)
    table = Table(
        "Arms compared with the untouched base: means over seeds, in brackets 95% intervals",
        headers,
        rows,
        frozenset({1}),
    )
    levels = {d.level for row in context.comparison.rows for d in row.differences}
    notes = []
    if "seeds and items" in levels:
        notes.append("The thin bars are about other seeds and other items; the broad pale ones about other items only.")
    if "items" in levels:
        notes.append("With one seed an interval is about other items only: other seeds may differ by more.")
    panel = _pictures(context, " ".join(notes))
    blocks: list[Block] = [panel, table] if panel else [table]
    return Section("Intervals", (*blocks, *_every_metric(context)))


def _every_metric(context: Context) -> tuple[Block, ...]:
    """Every final number of every arm, folded away; the parity of exports has a table of its own."""
    rows, units = context.comparison.rows, context.comparison.units
    keys = dict.fromkeys(key for row in rows for key in row.metrics if key[0] != "parity")
    if not keys:
        return ()
    lines = []
    for split, name in keys:
        unit, direction, meaning = units.get(name, ("–", "–", ""))
        start = (Cell(name, title=meaning), Cell(split), Cell(unit), Cell(direction))
        lines.append((*start, *(Cell(with_spread(row, (split, name))) for row in rows)))
    table = Table(
        "Every metric in its own unit: mean over seeds, in brackets the smallest and the largest of them",
        ("Metric", "Split", "Unit", "Better", *context.arms),
        tuple(lines),
        frozenset({1, 2, 3}),
    )
    return (Details("All metrics", (table,)),)


def _line(context: Context, row: ArmRow) -> tuple[Cell, ...]:
    accuracy = number(row.accuracy) if row.accuracy_interval is None else interval(row.accuracy_interval)
    retention = number(row.retention) if row.retention_interval is None else interval(row.retention_interval)
    share, speed = row.retention_share_interval, row.delta_speed_interval
    kept = "" if share is None else f"keeps {interval(share, digits=0)} %"
    change = f"{number(row.delta_speed, sign=True)} % to base, too few repetitions for an interval"
    if speed is not None:
        change = f"{interval(speed, sign=True)} % to base"
    wrong = any(not probe.as_claimed for probe in row.probes)
    return (
        Cell(row.arm, arm=row.arm, hint=f"{len(row.seeds)} seed{'s' if len(row.seeds) > 1 else ''}"),
        Cell(row.updates or "–", tone="bad" if wrong else "", hint="not as claimed" if wrong else ""),
        Cell(accuracy),
        *(_against(row, arm) for arm in dict.fromkeys((BASE, context.comparison.baseline))),
        Cell(retention, hint=kept if row.arm != BASE else ""),
        Cell(number(row.decode_speed, digits=0), hint="" if row.arm == BASE or row.delta_speed is None else change),
    )


def _against(row: ArmRow, arm: str) -> Cell:
    found = row.against(arm)
    if found is None:
        return Cell("–")
    tone = TONES[found.verdict] if found.verdict != "undecided" else ""
    return Cell(interval(found.points, sign=True), tone=tone, hint=f"{found.verdict}, p = {found.p_holm:.2g}")


def _pictures(context: Context, note: str) -> Panel | None:
    """Intervals of the differences from the base and from the baseline."""
    data = context.dataset("differences", "kind", "against", "label", "arm", "seed", "low", "value", "high")
    for row in context.comparison.rows:
        for d in row.differences:
            start = (d.against, row.arm, row.arm)
            data.add("interval", *start, "", d.points.low, d.points.estimate, d.points.high)
            if d.level == "seeds and items":
                data.add("inner", *start, "", d.items_only.low, d.items_only.estimate, d.items_only.high)
            for seed, point in zip(d.seed_numbers, d.by_seed, strict=True) if len(d.by_seed) > 1 else ():
                data.add("seed", *start, str(seed), None, point, None)
    title = context.comparison.primary.title
    drawn = tuple(
        Chart(
            id=f"difference-{number_}",
            title=f"{title} minus that of {against}, points",
            label=f"Difference of {title} from {against} in percentage points with 95% intervals, one line an arm",
            spec=charts.intervals(context.trained, "points", zero=True, kinds=set(data.levels("kind")),
                                  lines=len({row[3] for row in data.rows if row[1] == against})),
            data="differences",
            where={"against": against},
        )
        for number_, against in enumerate(data.levels("against"))
    )  # fmt: skip
    ticks = " Ticks are single seeds." if any(row[0] == "seed" for row in data.rows) else ""
    return (
        Panel("differences", drawn, note=f"{note}{ticks} An interval that holds zero decides nothing.")
        if drawn
        else None
    )


def power(context: Context) -> Section | None:
    """How many items would be needed to see small differences."""
    found = {(row.arm, row.against, row.points): row for row in context.comparison.power}
    if not found:
        return None
    sizes = sorted({points for _, _, points in found})
    rows = []
    for arm, against in dict.fromkeys((arm, against) for arm, against, _ in found):
        known = [found.get((arm, against, points)) for points in sizes]
        now = next(row for row in known if row is not None)
        start = (arm_cell(arm), Cell(against), Cell(f"{now.items_now:,}"), Cell(str(now.seeds_now)))
        rows.append((*start, *map(_needed, known)))
    plural = [f"{points} point{'s' if points > 1 else ''}" for points in sizes]
    headers = ("Arm", "Against", "Items now", "Seeds now", *(f"Items for {size}" for size in plural))
    reasons = tuple(
        (arm_cell(row.arm), Cell(row.against), Cell(str(row.points)), Cell(row.why)) for row in found.values()
    )
    why = Table("What these numbers rest on", ("Arm", "Against", "Points", "Why"), reasons, frozenset({1, 3}))
    return Section(
        "Power",
        (
            Text(
                "How many test items would show a difference of that size with 80% power at α = 0.05, two-sided, if "
                "the seeds stay as many as now. No number: with these seeds no number of items is enough. The numbers "
                "rest on estimates from these data; with two or three seeds read them as an order of magnitude."
            ),
            Table("Test items needed to see a difference", headers, tuple(rows), frozenset({1})),
            Details("What these numbers rest on", (why,)),
        ),
    )


def _needed(row: PowerRow | None) -> Cell:
    if row is None:
        return Cell("–")
    if row.items is not None:
        return Cell(f"{row.items:,}")
    return Cell("no number", hint=f"{row.seeds} seeds would" if row.seeds else "takes more seeds and items")
