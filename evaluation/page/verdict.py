"""The first sections: what may be said about each arm, criteria, the table with intervals, and power."""

from __future__ import annotations

from evaluation.arms import ArmRow
from evaluation.criteria import Criterion
from evaluation.differences import BASE, Difference
from evaluation.markdown import interval, number
from evaluation.page import charts
from evaluation.page.blocks import Block, Card, Cards, Cell, Chart, Details, Fact, Panel, Section, Table, Text
from evaluation.page.context import TONES, Context, arm_cell, verdict_cell
from evaluation.power import PowerRow
from evaluation.statistics import ALPHA

_SIGNS = {"better": "▲ better", "worse": "▼ worse", "undecided": "◇ undecided"}


def verdict(context: Context) -> Section:
    """What the data allow to say, in sentences, and the criteria."""
    rows = [row for row in context.comparison.rows if row.arm != BASE]
    if not rows:
        return Section(
            "Verdict", (Text("No arm besides the base was scored yet, so there is nothing to compare.", "lead"),)
        )
    cards = tuple(Card(row.arm, tuple(map(_fact, row.differences)) or (_incomparable(),)) for row in rows)
    blocks: list[Block] = [Text(headline(context), "lead"), Cards(cards), *_criteria(context)]
    if context.comparison.notes:
        blocks.append(
            Details("What limits the reading", tuple(Text(note, "note") for note in context.comparison.notes))
        )
    return Section("Verdict", tuple(blocks))


def headline(context: Context) -> str:
    """One or two sentences: which arms are told apart from the baseline, else from the base."""
    baseline = context.comparison.baseline
    rows = [row for row in context.comparison.rows if row.arm not in (BASE, baseline)]
    pairs = [(row.arm, found) for row in rows if (found := row.against(baseline))]
    against = baseline
    if not pairs:
        against = BASE
        rows = [row for row in context.comparison.rows if row.arm != BASE]
        pairs = [(row.arm, found) for row in rows if (found := row.against(BASE))]
    if not pairs:
        return "The arms did not answer the same items, so none can be compared."
    sentences = []
    for word, middle in (("better", "beats"), ("worse", "is worse than")):
        sentences += [
            f"{arm} {middle} {against} by {abs(found.points.estimate):.1f} points of AQI accuracy."
            for arm, found in pairs
            if found.verdict == word
        ]
    open_arms = [arm for arm, found in pairs if found.verdict == "undecided"]
    if open_arms:
        names = " and ".join(filter(None, [", ".join(open_arms[:-1]), open_arms[-1]]))
        sentences.append(f"Whether {names} {'is' if len(open_arms) == 1 else 'are'} better or worse than {against} is "
                         "undecided: the data allow both.")  # fmt: skip
    return " ".join(sentences)


def _fact(difference: Difference) -> Fact:
    points, decided = difference.points, difference.verdict != "undecided"
    sentence = (
        f"{'than' if decided else 'against'} {difference.against}: {number(points.estimate, sign=True)} points, "
        f"95% interval {number(points.low, sign=True)} to {number(points.high, sign=True)}"
    )
    if not decided:
        sentence += f", {_why_undecided(difference)}"
    seeds = f"{difference.seeds} seeds" if difference.seeds > 1 else "1 seed, another may differ"
    sentence += f". {difference.items} items, {seeds}; p = {difference.p_holm:.2g} after Holm's correction."
    return Fact(_SIGNS[difference.verdict], TONES[difference.verdict], sentence)


def _why_undecided(difference: Difference) -> str:
    if difference.points.crosses_zero:
        return "which contains zero"
    if difference.p_value >= ALPHA:
        return f"but the test does not rule out chance (p = {difference.p_value:.2g})"
    return "but not after the correction for several arms"


def _incomparable() -> Fact:
    return Fact("◇ not comparable", "open", "no other arm answered the same items through the same backend.")


def _criteria(context: Context) -> list[Block]:
    """Criteria by arm, and folded away why each was judged so."""
    found = context.comparison.criteria
    if not found:
        return []
    judged = {(criterion.name, criterion.threshold, criterion.arm): criterion for criterion in found}
    arms = [arm for arm in context.trained if any(criterion.arm == arm for criterion in found)]
    rows = [
        (Cell(name, hint=threshold), *(_outcome(judged.get((name, threshold, arm))) for arm in arms))
        for name, threshold in dict.fromkeys((name, threshold) for name, threshold, _ in judged)
    ]
    table = Table("Success criteria: pass or fail only where the whole 95% interval is on one side",
                  ("Criterion", *arms), tuple(rows), frozenset(range(1, len(arms) + 1)))  # fmt: skip
    reasons = tuple(
        (Cell(criterion.name), arm_cell(criterion.arm), verdict_cell(criterion.outcome), Cell(criterion.why))
        for criterion in found
    )
    why = Table(
        "Why each criterion was judged so", ("Criterion", "Arm", "Outcome", "Why"), reasons, frozenset({1, 2, 3})
    )
    return [table, Details("Why each criterion was judged so", (why,))]


def _outcome(criterion: Criterion | None) -> Cell:
    if criterion is None:
        return Cell("–")
    estimate = criterion.estimate
    unit = {"percent": "%"}.get(criterion.unit, criterion.unit)
    hint = "not measured" if estimate is None else f"{interval(estimate, sign=unit != '%')} {unit}"
    return Cell(criterion.outcome, tone=TONES[criterion.outcome], hint=hint)


def intervals(context: Context) -> Section:
    """The table of all arms, and pictures of its intervals."""
    headers = ("Arm", "Seeds", "AQI accuracy, %", "Δ to base, points", f"Δ to {context.comparison.baseline}, points",
               "Retention, %", "Decode, tokens/s", "Updates (probe)")  # fmt: skip
    rows = tuple(_line(context, row) for row in context.comparison.rows)
    table = Table(
        "Arms compared with the untouched base: means over seeds, in brackets 95% intervals",
        headers,
        rows,
        frozenset({7}),
    )
    levels = {d.level for row in context.comparison.rows for d in row.differences}
    notes = []
    if "seeds and items" in levels:
        notes.append("The thin bars are about other seeds and other items; the broad pale ones about other items only.")
    if "items" in levels:
        notes.append("With one seed an interval is about other items only: other seeds may differ by more.")
    panel = _pictures(context, " ".join(notes))
    return Section("Intervals", (panel, table) if panel else (table,))


def _line(context: Context, row: ArmRow) -> tuple[Cell, ...]:
    accuracy = number(row.accuracy) if row.accuracy_interval is None else interval(row.accuracy_interval)
    retention = number(row.retention) if row.retention_interval is None else interval(row.retention_interval)
    share, speed = row.retention_share_interval, row.delta_speed_interval
    kept = "" if share is None else f"keeps {interval(share, digits=0)} %"
    change = number(row.delta_speed, sign=True) if speed is None else interval(speed, sign=True)
    faster = "" if row.arm == BASE or row.delta_speed is None else f"{change} % to base"
    return (
        arm_cell(row.arm),
        Cell(str(len(row.seeds))),
        Cell(accuracy),
        _against(row, BASE),
        _against(row, context.comparison.baseline),
        Cell(retention, hint=kept if row.arm != BASE else ""),
        Cell(number(row.decode_speed, digits=0), hint=faster),
        Cell(row.updates or "–"),
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
            for number_, point in enumerate(d.by_seed if len(d.by_seed) > 1 else ()):
                data.add("seed", *start, str(number_), None, point, None)
    drawn = tuple(
        Chart(
            id=f"difference-{number_}",
            title=f"AQI accuracy minus that of {against}, points",
            label=f"Difference of AQI accuracy from {against} in percentage points with 95% intervals, one line an arm",
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
            Text("How many test items would show a difference of that size with 80% power at α = 0.05, two-sided."),
            Table("Test items needed to see a difference", headers, tuple(rows), frozenset({1})),
            Details("What these numbers rest on", (why,)),
        ),
    )


def _needed(row: PowerRow | None) -> Cell:
    if row is None:
        return Cell("–")
    if row.items is not None:
        return Cell(f"{row.items:,}")
    return Cell("no number", hint="" if row.seeds is None else f"{row.seeds} seeds would")
