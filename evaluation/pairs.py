"""Which runs are held against each other, and their answers side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics import is_binary

BASE = "base"
BASELINE = "baseline_lora"

Answers = Mapping[int, Mapping[str, float]]
"""Run id -> item id -> credit from 0 to 1: 1 for a right answer, 0 for a wrong one, between them where a task gives
credit for parts."""


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
        own: Credit: right (1), wrong (0) or in between, shape [S, I].
        other: The same of the reference; against the base all rows come from its one run.
    """

    against: str
    seeds: tuple[int, ...]
    own: NDArray[np.float64]
    other: NDArray[np.float64]

    @property
    def differences(self) -> NDArray[np.float64]:
        """Return own - other: above 0 gained, below lost; shape [S, I]."""
        return self.own - self.other

    @property
    def binary(self) -> bool:
        """Whether all answers are right or wrong, none in between."""
        return is_binary(self.own, self.other)


@dataclass(frozen=True)
class Sheet:
    """Answers of all runs that have the same items.

    Attributes:
        items: Their ids, sorted.
        row: Run id -> its row in `credit`.
        credit: Of each answer, shape [runs, items].
    """

    items: tuple[str, ...]
    row: Mapping[int, int]
    credit: NDArray[np.float64]


class Answered:
    """Answers as arrays, made once: each run is looked at by several comparisons, and there may be thousands."""

    def __init__(self, answers: Answers) -> None:
        """Sort runs by the items they have; a run without answers is left out."""
        orders: dict[tuple[str, ...], list[int]] = {}
        for run_id, own in answers.items():
            orders.setdefault(tuple(own), []).append(run_id)
        parts: dict[tuple[str, ...], list[tuple[list[int], NDArray[np.float64]]]] = {}
        for order, ids in orders.items():
            if not order:
                continue
            values = chain.from_iterable(answers[run_id].values() for run_id in ids)
            credit = np.fromiter(values, dtype=np.float64, count=len(ids) * len(order)).reshape(len(ids), len(order))
            by_name = sorted(range(len(order)), key=order.__getitem__)
            parts.setdefault(tuple(sorted(order)), []).append((ids, credit[:, by_name]))
        self._sheet: dict[int, Sheet] = {}
        for items, found in parts.items():
            ids = [run_id for some, _ in found for run_id in some]
            sheet = Sheet(items, {run_id: k for k, run_id in enumerate(ids)}, np.concatenate([r for _, r in found]))
            self._sheet.update(dict.fromkeys(ids, sheet))

    def __contains__(self, run_id: int) -> bool:
        """Whether the run answered anything."""
        return run_id in self._sheet

    def rows(self, run_ids: Sequence[int]) -> NDArray[np.float64]:
        """Credit on the items that all these runs have, ordered by id; shape [runs, items].

        Args:
            run_ids: Each has answers; one may come twice.
        """
        sheets = {id(sheet): sheet for sheet in map(self._sheet.__getitem__, run_ids)}.values()
        if len(sheets) == 1:
            (sheet,) = sheets
            return sheet.credit[list(map(sheet.row.__getitem__, run_ids))]
        common = sorted(set.intersection(*(set(sheet.items) for sheet in sheets))) if sheets else []
        columns = {id(sheet): _places(sheet.items, common) for sheet in sheets}
        found = np.empty((len(run_ids), len(common)))
        for k, run_id in enumerate(run_ids):
            sheet = self._sheet[run_id]
            found[k] = sheet.credit[sheet.row[run_id], columns[id(sheet)]]
        return found


def _places(items: Iterable[str], wanted: Iterable[str]) -> list[int]:
    place = {item: k for k, item in enumerate(items)}
    return [place[item] for item in wanted]


def pair(runs: Sequence[RunLike], against: str, others: Sequence[RunLike], answers: Answered) -> Pairs | None:
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
        (run.seed, run.id, partner.id)
        for run in runs
        if run.id in answers and (partner := partners.get(_key(run, against))) is not None and partner.id in answers
    ]
    if not found:
        return None
    seeds, own, other = zip(*found, strict=True)
    rows = answers.rows([*own, *other])
    return Pairs(against, seeds, rows[: len(own)], rows[len(own) :]) if rows.size else None


def _key(run: RunLike, against: str) -> object:
    return run.reference_run_id if against == BASE else (run.seed, run.test_items_sha256, run.backend_name)


def _partners(against: str, others: Sequence[RunLike]) -> dict[object, RunLike]:
    return {other.id if against == BASE else _key(other, against): other for other in others}
