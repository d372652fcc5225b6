"""Which runs are held against each other, and their answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

BASE = "base"
BASELINE = "baseline_lora"

Answers = Mapping[int, Mapping[str, bool]]
"""Run id -> item id -> answered correctly."""


class RunLike(Protocol):
    """What pairing needs to know of a run; rows of table `run` and tuples of its columns both have it."""

    @property
    def id(self) -> int:
        """Of the row."""
        ...

    @property
    def arm(self) -> str:
        """The way of training."""
        ...

    @property
    def seed(self) -> int:
        """Of the training."""
        ...

    @property
    def backend_name(self) -> str:
        """What ran the model."""
        ...

    @property
    def test_items_sha256(self) -> str:
        """Content of the scored items."""
        ...

    @property
    def reference_run_id(self) -> int | None:
        """The base run to compare with."""
        ...


@dataclass(frozen=True)
class Pairs:
    """Answers of an arm and of its reference to the same items, seed by seed.

    Attributes:
        against: The reference.
        seeds: Of the arm's runs, S of them.
        own: Right (1) or wrong (0), shape [S, I].
        other: The same of the reference; against the base all rows come from its one run.
    """

    against: str
    seeds: tuple[int, ...]
    own: NDArray[np.float64]
    other: NDArray[np.float64]

    @property
    def differences(self) -> NDArray[np.float64]:
        """Return own - other: 1 gained, -1 lost, shape [S, I]."""
        return self.own - self.other


def pair(runs: Sequence[RunLike], against: str, others: Sequence[RunLike], answers: Answers) -> Pairs | None:
    """Hold an arm's runs against another arm's.

    Against the base every run is paired with the base run it refers to; else runs with equal seed, items and backend
    are paired, since equal seeds share the order of the data and the first weights.

    Args:
        runs: The arm's, one for each seed.
        against: The other arm.
        others: Its runs.
        answers: Of all of them; a run without answers is left out.

    Returns:
        None where no run has a partner, or the pairs share no item.
    """
    partners = _partners(against, others)
    found = [
        (run.seed, answers[run.id], answers[partner.id])
        for run in runs
        if (partner := partners.get(_key(run, against))) is not None and answers.get(run.id) and answers.get(partner.id)
    ]
    if not found:
        return None
    both = [part for _, own, other in found for part in (own, other)]
    items = common_items(both)
    if not items:
        return None
    rows = answer_rows(both, items)
    return Pairs(against, tuple(seed for seed, _, _ in found), rows[0::2], rows[1::2])


def common_items(answers: Sequence[Mapping[str, bool]]) -> list[str]:
    """Return the items that all have, sorted."""
    first = answers[0].keys()
    different = {id(own): own for own in answers[1:]}.values()  # the base stands there once for each seed
    rest = [own.keys() for own in different if own.keys() != first]  # most often none
    return sorted(set(first).intersection(*rest))


def answer_rows(answers: Sequence[Mapping[str, bool]], items: Sequence[str]) -> NDArray[np.float64]:
    """Right (1) or wrong (0), shape [answers, items]."""
    pick = itemgetter(*items)  # far quicker than asking item by item
    return np.array([pick(own) for own in answers], dtype=np.float64).reshape(len(answers), len(items))


def _key(run: RunLike, against: str) -> object:
    return run.reference_run_id if against == BASE else (run.seed, run.test_items_sha256, run.backend_name)


def _partners(against: str, others: Sequence[RunLike]) -> dict[object, RunLike]:
    return {other.id if against == BASE else _key(other, against): other for other in others}
