"""The arms of one task, each held against the base and the baseline."""

from __future__ import annotations

from typing import NamedTuple

from db.queries_compare import RunFacts
from evaluation.arms import ArmRow, arm_row
from evaluation.differences import compare_pairs, find_pairs
from evaluation.facts import Facts, SpeedChange, speed_change
from evaluation.pairs import BASE, Pairs


class SideBySide(NamedTuple):
    """What the comparison is made of.

    Attributes:
        rows: Base first, the baseline next.
        runs: In the same order.
        pairs: (arm, against) -> their answers.
        changes: Arm -> change of its decode speed.
    """

    rows: tuple[ArmRow, ...]
    runs: tuple[RunFacts, ...]
    pairs: dict[tuple[str, str], Pairs]
    changes: dict[str, SpeedChange]

    @property
    def arms(self) -> tuple[str, ...]:
        """In the order of the rows."""
        return tuple(row.arm for row in self.rows)


def side_by_side(facts: Facts, baseline: str) -> SideBySide:
    """Compare all arms with the base and with the baseline."""
    arms = sorted(facts.by_arm, key=lambda arm: (arm != BASE, arm != baseline, arm))
    pairs = find_pairs(arms, facts.by_arm, facts.answers, baseline)
    found = compare_pairs(pairs)
    changes = {arm: speed_change(arm, facts) for arm in arms}
    return SideBySide(
        rows=tuple(arm_row(arm, facts, found.get(arm, ()), changes[arm]) for arm in arms),
        runs=tuple(run for arm in arms for run in facts.by_arm[arm]),
        pairs=pairs,
        changes=changes,
    )
