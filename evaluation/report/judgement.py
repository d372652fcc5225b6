"""What can be concluded from a measurement, and the one place that puts it into words.

An outcome is better or worse only where the whole 95% interval lies on one side of its limit. For accuracies the
p-value, corrected for several arms, must agree. Terminal, Markdown, page, card and success criteria use these words.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from db.runs import BASE
from evaluation.report.arms import ArmRow
from evaluation.report.text import arms_in_words, counted, listed, seeds_text
from evaluation.statistics.differences import Difference
from evaluation.statistics.intervals import ALPHA, Interval, Outcome


class Judgement(NamedTuple):
    outcome: Outcome
    reason: str  # a clause that says why

    def noting(self, detail: str) -> "Judgement":
        return self._replace(reason=f"{self.reason}, {detail}")


def by_interval(found: Interval, limit: float = 0.0, unit: str = "", *, lower_is_better: bool = False) -> Judgement:
    """Judge an interval by the side of the limit on which all of it lies."""
    at = f"{limit:.0f}{unit}" if limit else "zero"
    side = "above" if found.low > limit else "below" if found.high < limit else ""
    if not side:
        return Judgement("undecided", f"the interval contains {at}")
    better = (side == "below") == lower_is_better
    return Judgement("better" if better else "worse", f"the whole interval is {side} {at}")


def by_difference(difference: Difference) -> Judgement:
    """Explain the outcome of a difference, which the statistics have decided."""
    corrected = f"p = {difference.p_holm:.2g} after correction for several arms"
    if difference.outcome != "undecided":
        return Judgement(difference.outcome, f"{by_interval(difference.points).reason}, and {corrected}")
    if side := difference.on_these_items:
        reason = f"{side} {difference.against} on these items ({corrected}), but one seed cannot settle it"
    elif difference.points.crosses_zero:
        reason = "the interval contains zero"
    elif difference.p_value >= ALPHA:
        reason = f"the interval excludes zero, but too few items differ: p = {difference.p_value:.2g}"
    else:
        reason = f"the interval excludes zero, but {corrected}"
    return Judgement("undecided", reason)


def compared(rows: Iterable[ArmRow], against: str, title: str) -> str:
    """What holds for these arms against another one: a sentence for all with the same outcome, the clear ones first."""
    pairs = [(row.arm, d) for row in rows if (d := row.against(against))]
    groups: dict[tuple[object, ...], list[tuple[str, Difference]]] = {}
    for arm, d in sorted(pairs, key=lambda pair: ("better", "worse", "undecided").index(pair[1].outcome)):
        key = (d.outcome, d.on_these_items, d.points.crosses_zero, d.items, d.seeds)
        groups.setdefault(key, []).append((arm, d))
    return " ".join(_sentence(group, against, title, every=1 < len(pairs) == len(group)) for group in groups.values())


def _sentence(group: Sequence[tuple[str, Difference]], against: str, title: str, *, every: bool) -> str:
    """What holds for a group of arms; `every`: for all that are compared with `against`."""
    first, one = group[0][1], len(group) == 1 or every
    subject, is_ = "Every arm" if every else listed(arm for arm, _ in group), "is" if one else "are"
    other = "the base" if against == BASE else against
    intervals = {1: "95% interval, ", 2: "95% intervals, "}.get(len(group), "")
    data = f"({intervals}{first.items:,} items, {counted(first.seeds, 'seed')})"
    if first.outcome == "better":
        claim = f"{subject} beat{'s' if one else ''} {other}"
    elif first.outcome == "worse":
        claim = f"{subject} {is_} worse than {other}"
    elif side := first.on_these_items:
        claim = f"{subject} {is_} {side} {other} on these items, but one seed cannot settle it"
    elif first.points.crosses_zero:
        claim = f"{subject} cannot be distinguished from {other}"
        claim = f"No arm is clearly better or worse than {other}" if every else claim
    else:
        chance = listed(f"{d.p_holm:.2g}" for _, d in group)
        claim = f"{subject} may differ from {other} by chance alone (p = {chance})"
    numbers = arms_in_words({arm: d.points for arm, d in group}, sign=True)
    return f"{claim}: {numbers} points of {title} {data}."


def like_with_like(rows: Iterable[ArmRow], arms: Mapping[str, ArmRow], baseline: str, title: str) -> Iterable[str]:
    """Where a difference from the baseline has several causes, and what the comparison with the fewest causes says.

    `arms` has every arm in the report.
    """
    groups: dict[str, list[ArmRow]] = {}
    for row in rows:
        if row.like is not None:
            groups.setdefault(row.like, []).append(row)
    for like, group in groups.items():
        words = f"{_set_apart(group, arms[baseline])}, so a difference from {baseline} has more than one cause."
        if control := arms.get(like):
            named = f"{like} ({control.preserve})" if control.preserve else like
            words += f" The like-with-like comparison is with {named}. {compared(group, like, title)}"
            if left := _set_apart(group, control):
                words += f" Yet {left}, which may also explain a difference."
        else:
            words += f" No arm here is {baseline} with everything else as in {listed(row.arm for row in group)}."
        yield words.strip()


def _set_apart(rows: Sequence[ArmRow], reference: ArmRow) -> str:
    """What sets arms apart besides their method: "a and b preserve the base and c does not"."""
    methods: dict[str, list[str]] = {}
    for row in rows:
        if row.preserve and not reference.preserve:
            methods.setdefault(row.preserve, []).append(row.arm)
    parts, verb = [], "preserves" if sum(map(len, methods.values())) == 1 else "preserve"
    if methods:
        names = listed(f"{listed(arms)} ({method})" for method, arms in sorted(methods.items()))
        parts.append(f"{names} {verb} the base")
    if libraries := [row.arm for row in rows if row.library not in ("", reference.library)]:
        parts.append(f"{listed(libraries)} {'trains' if len(libraries) == 1 else 'train'} on Unsloth")
    return listed([*parts, f"{reference.arm} does {('not', 'neither')[len(parts) > 1]}"]) if parts else ""


def not_compared(rows: Sequence[ArmRow], references: Iterable[str], present: Collection[str]) -> Iterable[str]:
    for against in references:
        if arms := [row.arm for row in rows if row.arm != against and row.against(against) is None]:
            why = f"no run of {against} has the same {'' if against == BASE else 'seed, '}items and backend"
            why = why if against in present else "it has no run here"
            yield f"{listed(arms)} cannot be compared with {against}: {why}."


def contradiction(row: ArmRow) -> str:
    """What the probe found that contradicts the arm's claim; empty where nothing does."""
    wrong = [probe for probe in row.probes if probe.as_claimed is False]
    if not wrong:
        return ""
    reasons = {probe.verdict: probe.reason.rstrip(".") for probe in reversed(wrong)}  # of the first seed
    verdicts, seeds = listed(dict.fromkeys(probe.verdict for probe in wrong)), seeds_text(probe.seed for probe in wrong)
    return f"{row.arm} did not train as it claims: the probe says {verdicts} ({seeds}): {'; '.join(reasons.values())}."
