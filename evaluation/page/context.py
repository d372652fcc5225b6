"""What every section is built from, and how numbers are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from db.models import Run
from evaluation.comparison import Comparison
from evaluation.differences import BASE
from evaluation.markdown import significant
from evaluation.page.blocks import Cell, Control, Tone
from evaluation.page.columns import Dataset
from evaluation.page.data import PageData
from evaluation.page.samples import Samples

TONES: Mapping[str, Tone] = {
    "better": "good", "worse": "bad", "undecided": "open", "pass": "good", "fail": "bad", "effective": "good",
    "unstable": "bad", "finished": "good", "failed": "bad", "crashed": "bad", "running": "open",
}  # fmt: skip


@dataclass
class Context:
    """The comparison, what the database has besides, and the datasets that sections leave for the charts."""

    comparison: Comparison
    data: PageData
    samples: Samples
    datasets: dict[str, Dataset] = field(default_factory=dict)

    @property
    def arms(self) -> tuple[str, ...]:
        """Base first, in the order of the comparison."""
        return tuple(row.arm for row in self.comparison.rows)

    @property
    def trained(self) -> tuple[str, ...]:
        """All arms but the base."""
        return tuple(arm for arm in self.arms if arm != BASE)

    def dataset(self, name: str, *columns: str) -> Dataset:
        """Start a dataset for charts."""
        self.datasets[name] = Dataset(columns)
        return self.datasets[name]

    def final(self, run: Run, split: str, name: str) -> float | None:
        """A final number of a run, if it has it."""
        found = self.data.metrics.get(run.id, {}).get((split, name))  # NaN where it could not be computed
        return None if found is None else found.value

    def mean(self, arm: str, split: str, name: str) -> float | None:
        """A final number of an arm, mean over its seeds, if it has it."""
        return next(row.metrics.get((split, name)) for row in self.comparison.rows if row.arm == arm)

    def measured(self, split: str) -> bool:
        """Whether any arm has a final number of this split."""
        return any(key[0] == split for row in self.comparison.rows for key in row.metrics)


def arm_cell(arm: str, seed: int | str | None = None) -> Cell:
    """An arm's name with its colour, perhaps with a seed."""
    return Cell(arm if seed is None else f"{arm} · seed {seed}", arm=arm)


def verdict_cell(word: str) -> Cell:
    """A verdict in its colour."""
    return Cell(word, tone=TONES.get(word, ""))


def confidence_text(confidence: float) -> str:
    """What an interval is called that has less than the usual confidence; percent."""
    return f"{confidence:.0f}% interval" if confidence > 0 else "a single value"


def figures(value: float | None, digits: int = 3) -> str:
    """A number with some significant digits, or a dash where there is none."""
    return significant(value, digits)


def seeds_control(seeds: list[str]) -> tuple[Control, ...]:
    """A choice of seeds, where there are several."""
    if len(seeds) < 2:
        return ()
    return (Control("seed", "Seed", (("", "all"), *((seed, seed) for seed in seeds))),)
