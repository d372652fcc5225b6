"""The first section: what may be said about each arm, what limits it, and the success criteria."""

from __future__ import annotations

from evaluation.arms import ArmRow
from evaluation.comparison import Comparison
from evaluation.criteria import GAIN, KEPT, Criterion
from evaluation.differences import BASE, Difference
from evaluation.markdown import interval, number
from evaluation.page.blocks import Block, Card, Cards, Cell, Details, Fact, Section, Table, Text
from evaluation.page.context import TONES, Context, arm_cell, confidence_text, verdict_cell
from evaluation.page.words import headline, parted_notes, partners, seeds_text, why_alone, why_undecided
from evaluation.statistics import LEVEL

_SIGNS = {"better": "▲ better", "worse": "▼ worse", "undecided": "◇ undecided"}


def verdict(context: Context) -> Section:
    """What the data allow to say, in sentences, and the criteria."""
    rows = [row for row in context.comparison.rows if row.arm != BASE]
    if not rows:
        return Section(
            "Verdict", (Text("No arm besides the base was scored yet, so there is nothing to compare.", "lead"),)
        )
    comparison = context.comparison
    limits, methods = parted_notes(comparison)
    blocks: list[Block] = [Text(part, "lead") for part in headline(comparison)]
    blocks += [Text(note, "note") for note in limits]
    blocks += [Cards(tuple(Card(row.arm, _facts(comparison, row)) for row in rows)), *_criteria(context)]
    if methods:
        blocks.append(Details("How the numbers are to be read", tuple(Text(note, "note") for note in methods)))
    return Section("Verdict", tuple(blocks))


def _facts(comparison: Comparison, row: ArmRow) -> tuple[Fact, ...]:
    """What the probes say against the arm, then one fact for each arm that it ought to be compared with."""
    facts = [
        Fact("✗ not as claimed", "bad", f"the probe found {verdict}, {seeds_text(seeds)}: {reason.rstrip('.')}.")
        for (verdict, reason), seeds in _wrong(row).items()
    ]
    for against in partners(comparison, row.arm):
        found = row.against(against)
        alone = Fact("◇ not comparable", "open", f"with {against}: {why_alone(comparison, against)}.")
        facts.append(_fact(found) if found else alone)
    return tuple(facts)


def _wrong(row: ArmRow) -> dict[tuple[str, str], list[int]]:
    """Verdict and reason of the first seed with this verdict -> seeds, where an arm did not do what it claims."""
    found: dict[str, tuple[str, list[int]]] = {}
    for probe in row.probes:
        if not probe.as_claimed:
            found.setdefault(probe.verdict, (probe.reason, []))[1].append(probe.seed)
    return {(verdict, reason): seeds for verdict, (reason, seeds) in found.items()}


def _fact(difference: Difference) -> Fact:
    points, decided = difference.points, difference.verdict != "undecided"
    sentence = (
        f"{'than' if decided else 'against'} {difference.against}: {number(points.estimate, sign=True)} points, "
        f"95% interval {number(points.low, sign=True)} to {number(points.high, sign=True)}"
    )
    if not decided:
        sentence += f", {why_undecided(difference)}"
    seeds = f"{difference.seeds} seeds" if difference.seeds > 1 else "1 seed, another may differ"
    sentence += f". {difference.items:,} items, {seeds}; p = {difference.p_holm:.2g} after Holm's correction."
    return Fact(_SIGNS[difference.verdict], TONES[difference.verdict], sentence)


def _criteria(context: Context) -> list[Block]:
    """Criteria by arm, and folded away why each was judged so."""
    found = context.comparison.criteria
    if not found:
        return []
    judged = {(criterion.name, criterion.threshold, criterion.arm): criterion for criterion in found}
    arms = [arm for arm in context.trained if any(criterion.arm == arm for criterion in found)]
    rows = [
        (Cell(_named(context, name), hint=threshold), *(_outcome(judged.get((name, threshold, arm))) for arm in arms))
        for name, threshold in dict.fromkeys((name, threshold) for name, threshold, _ in judged)
    ]
    table = Table("Success criteria: pass or fail only where the whole 95% interval is on one side",
                  ("Criterion", *arms), tuple(rows), frozenset(range(1, len(arms) + 1)))  # fmt: skip
    reasons = tuple(
        (
            Cell(_named(context, criterion.name)),
            arm_cell(criterion.arm),
            verdict_cell(criterion.outcome),
            Cell(criterion.why),
        )
        for criterion in found
    )
    why = Table(
        "Why each criterion was judged so", ("Criterion", "Arm", "Outcome", "Why"), reasons, frozenset({1, 2, 3})
    )
    return [table, Details("Why each criterion was judged so", (why,))]


def _named(context: Context, name: str) -> str:
    """A criterion's name; not every task's primary metric is an accuracy."""
    return name if context.comparison.primary.air or name != GAIN else "gain"


def _outcome(criterion: Criterion | None) -> Cell:
    if criterion is None:
        return Cell("–")
    estimate = criterion.estimate
    unit = {"percent": "%"}.get(criterion.unit, criterion.unit)
    if estimate is None:
        hint = "not comparable" if criterion.unit == "points" else "not measured"
    else:  # a share of what the base knows is no change, so it has no sign
        hint = f"{interval(estimate, sign=criterion.name != KEPT)} {unit}"
        if criterion.confidence < 100 * LEVEL:
            hint += f", {confidence_text(criterion.confidence)}"
    return Cell(criterion.outcome, tone=TONES[criterion.outcome], hint=hint)
