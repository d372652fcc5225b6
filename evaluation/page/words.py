"""Sentences about arms: what is told apart from what, what cannot be, and what the probes say against an arm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from evaluation.arms import ArmRow
from evaluation.comparison import Comparison
from evaluation.differences import BASE, Difference
from evaluation.markdown import number
from evaluation.statistics import ALPHA

_MOST_SEEDS = 6
"""Seeds that are listed one by one."""
_METHOD = ("Δ speed:", "Differences over several seeds:")
"""How notes begin that explain a method; all others limit what these data show."""


def listed(names: Iterable[str]) -> str:
    """Names as they stand in a sentence: a, b and c."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def seeds_text(seeds: Iterable[int]) -> str:
    """Seeds by number; many as a range or a count."""
    found = sorted(set(seeds))
    if len(found) <= _MOST_SEEDS:
        return f"seed{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"
    unbroken = found[-1] - found[0] == len(found) - 1
    return f"seeds {found[0]} to {found[-1]}" if unbroken else f"{len(found)} seeds from {found[0]} to {found[-1]}"


def headline(comparison: Comparison) -> tuple[str, ...]:
    """Paragraphs: what holds against the baseline, what against the base, and what speaks against the arms.

    Every verdict comes with its interval, items and seeds; arms without a partner and arms whose probe contradicts
    them are named.
    """
    rows = [row for row in comparison.rows if row.arm != BASE]
    title = comparison.primary.title
    found = [" ".join(_against(rows, arm, title)) for arm in dict.fromkeys((comparison.baseline, BASE))]
    wrong = [sentence for row in rows if (sentence := unclaimed(row))]
    return tuple(filter(None, [*found, " ".join(_missing(comparison)), " ".join(wrong)]))


def _against(rows: Sequence[ArmRow], against: str, title: str) -> list[str]:
    """One sentence for all arms that have the same verdict, items and seeds."""
    groups: dict[tuple[str, bool, int, int], list[tuple[str, Difference]]] = {}
    for row in rows:
        if found := row.against(against):
            key = (found.verdict, found.points.crosses_zero, found.items, found.seeds)
            groups.setdefault(key, []).append((row.arm, found))
    order = ["better", "worse", "undecided"]
    return [
        _sentence(group, against, title)
        for _, group in sorted(groups.items(), key=lambda item: order.index(item[0][0]))
    ]


def _sentence(group: Sequence[tuple[str, Difference]], against: str, title: str) -> str:
    first = group[0][1]
    names, one = listed(arm for arm, _ in group), len(group) == 1
    seeds = f"{first.seeds} seeds" if first.seeds > 1 else "1 seed, another may differ"
    data = f"({first.items:,} items, {seeds})"
    numbers = listed(_numbers(found) for _, found in group)
    if first.verdict == "undecided":
        if first.points.crosses_zero:
            start = f"Whether {names} {'is' if one else 'are'} better or worse than {against} is undecided:"
        else:
            start = f"That {names} {'differs' if one else 'differ'} from {against} is not shown, since chance is not "
            start += f"ruled out (p = {listed(f'{found.p_holm:.2g}' for _, found in group)}):"
        return f"{start} {numbers} points with {'a 95% interval' if one else '95% intervals'} {data}."
    if one:
        word = "beats" if first.verdict == "better" else "is worse than"
        by, low, high = (number(abs(first.points.estimate)), *_bounds(first))
        return f"{names} {word} {against} by {by} points of {title}, 95% interval {low} to {high} {data}."
    word = "beat" if first.verdict == "better" else "are worse than"
    return f"{names} {word} {against}: {numbers} points of {title} with 95% intervals {data}."


def _bounds(found: Difference) -> tuple[str, str]:
    """The interval of the distance between two arms that are told apart: the smaller bound first."""
    low, high = sorted((abs(found.points.low), abs(found.points.high)))
    return number(low), number(high)


def _numbers(found: Difference) -> str:
    points = found.points
    low, high = number(points.low, sign=True), number(points.high, sign=True)
    return f"{number(points.estimate, sign=True)} [{low}, {high}]"


def partners(comparison: Comparison, arm: str) -> tuple[str, ...]:
    """Arms with which an arm ought to be compared."""
    return tuple(dict.fromkeys(other for other in (BASE, comparison.baseline) if other != arm))


def why_alone(comparison: Comparison, against: str) -> str:
    """Why an arm has no difference from another."""
    if all(row.arm != against for row in comparison.rows):
        return f"there is no run of {against} here"
    seed = "" if against == BASE else "seed, "
    return f"no run of {against} has the same {seed}items and backend"


def _missing(comparison: Comparison) -> Iterable[str]:
    rows = [row for row in comparison.rows if row.arm != BASE]
    for against in dict.fromkeys((comparison.baseline, BASE)):
        alone = [row.arm for row in rows if row.arm != against and row.against(against) is None]
        if alone:
            verb = "is" if len(alone) == 1 else "are"
            yield f"{listed(alone)} {verb} not compared with {against}: {why_alone(comparison, against)}."


def unclaimed(row: ArmRow) -> str:
    """What the probes say against an arm's claim; empty where all agree with it or none ran."""
    wrong = [probe for probe in row.probes if not probe.as_claimed]
    if not wrong:
        return ""
    words = listed(dict.fromkeys(probe.verdict for probe in wrong))
    seeds = seeds_text(probe.seed for probe in wrong)
    return f"{row.arm} did not train as it claims: the probe found {words} ({seeds})."


def why_undecided(difference: Difference) -> str:
    """What keeps a difference from a verdict, as a clause."""
    if difference.points.crosses_zero:
        return "which contains zero"
    if difference.p_value >= ALPHA:
        return f"but the test does not rule out chance (p = {difference.p_value:.2g})"
    return "but not after the correction for several arms"


def parted_notes(comparison: Comparison) -> tuple[list[str], list[str]]:
    """The comparison's notes: what limits these data, and how things were computed; what cards say is in neither."""
    told = {f"{row.arm} seed {probe.seed}: {probe.verdict}: " for row in comparison.rows for probe in row.probes}
    notes = [note for note in comparison.notes if ": ".join([*note.split(": ")[:2], ""]) not in told]
    return [n for n in notes if not n.startswith(_METHOD)], [n for n in notes if n.startswith(_METHOD)]
