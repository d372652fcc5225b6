"""The blocks that sections are made of: plain data, which page, Markdown and terminal lay out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

Tone = Literal["", "good", "bad", "open"]
"""The color of a word: good and bad are settled, open is undecided. The word alone says the same."""
TONES: Mapping[str, Tone] = {
    "better": "good", "worse": "bad", "undecided": "open", "pass": "good", "fail": "bad", "effective": "good",
    "unstable": "bad",
}  # fmt: skip

_SENTENCE = 32
"""Characters of a cell beyond which its column wraps."""
_NUMBER = re.compile(r"[-+]?\d")


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


@dataclass(frozen=True)
class Cell:
    text: str
    tone: Tone = ""
    arm: str = ""  # draws this arm's color before the text; empty: none
    title: str = ""  # the full text where it is shortened, such as a hash; shown on hover
    hint: str = ""  # smaller lines below


def arm_cell(arm: str, seed: int | None = None) -> Cell:
    return Cell(arm if seed is None else f"{arm} · seed {seed}", arm=arm)


@dataclass(frozen=True)
class Table:
    """Lines under headers; the first cell of a line is its header. A plain string is a cell."""

    caption: str
    headers: Sequence[str]
    lines: Iterable[Sequence[object]]
    page_only: Collection[str] = ()  # headers of the columns that a terminal leaves out
    kind: str = "table"

    @cached_property
    def rows(self) -> list[list[Cell]]:
        return [[cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in line] for line in self.lines]

    @cached_property
    def styles(self) -> list[str]:
        """How each column is set: numbers right (empty), `words` left; `long` words wrap."""

        def style(column: int) -> str:
            texts = [row[column].text for row in self.rows]
            long = any(len(text) > _SENTENCE for text in texts)
            if column and not long and (any(map(_NUMBER.match, texts)) or not any(text.strip("–") for text in texts)):
                return ""
            return "words long" if long and column else "words"

        return list(map(style, range(len(self.headers))))


@dataclass(frozen=True)
class Text:
    """A paragraph; `note` is set smaller, `lead` larger."""

    text: str
    style: Literal["", "lead", "note"] = ""
    kind: str = "text"


@dataclass
class Dataset:
    """Rows of charts; a column holds texts, or numbers and None."""

    names: tuple[str, ...]
    rows: list[tuple[str | float | None, ...]] = field(default_factory=list)

    def add(self, *row: str | float | None) -> None:
        if len(row) != len(self.names):
            raise ValueError(f"expected {len(self.names)} values ({', '.join(self.names)}), got {len(row)}")
        self.rows.append(row)

    def column(self, name: str) -> list[str | float | None]:
        at = self.names.index(name)
        return [row[at] for row in self.rows]

    def levels(self, name: str) -> list[str]:
        """The different texts of a column, in the order of their first row."""
        return list(dict.fromkeys(str(value) for value in self.column(name)))


@dataclass(frozen=True)
class Control:
    """A choice above charts: only rows with this value in the column are drawn; the first option at the start."""

    column: str
    label: str
    options: tuple[tuple[str, str], ...]  # (value, label)


@dataclass(frozen=True)
class Chart:
    """A chart of those rows of its panel's dataset that have the values of `where`."""

    id: str
    title: str  # shown above it, with the unit
    # function of `evaluation.report.charts` that draws it, with its options besides the arms
    draw: Literal["intervals", "lines", "scatter"]
    options: Mapping[str, Any]
    where: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What a screen reader says of it."""
        axes = [f"{self.options[name]} {way}" for name, way in (("x_title", "across"), ("y_title", "up"))
                if name in self.options]  # fmt: skip
        return ", ".join((f"{self.title}: {self.draw} for each arm", *axes))


@dataclass(frozen=True)
class Panel:
    """Charts that share their data, their arms, and their controls."""

    id: str
    data: Dataset
    charts: tuple[Chart, ...]
    controls: tuple[Control, ...] = ()
    note: str = ""
    kind: str = "panel"

    @cached_property
    def arms(self) -> list[str]:
        """In the order of their colors, shapes and dashes."""
        return self.data.levels("arm")

    @property
    def columns(self) -> int:
        """Charts side by side where there is room, so that none stands alone in a row."""
        return {1: 1, 2: 2, 4: 2}.get(len(self.charts), 3)

    @property
    def legend(self) -> bool:
        """Whether to name the arms above the charts; intervals have names beside them."""
        return any(chart.draw != "intervals" for chart in self.charts)

    @property
    def dashed(self) -> Mapping[str, bool]:
        """Every other arm's line is dashed, so that lines which coincide stay visible."""
        lines = all(chart.draw == "lines" for chart in self.charts)
        return {arm: (len(self.arms) - at) % 2 == 1 for at, arm in enumerate(self.arms)} if lines else {}


def missing_note(arms: Iterable[str], data: Dataset) -> str:
    """Name the arms that a chart does not show."""
    missing = [arm for arm in arms if arm not in data.levels("arm")]
    return f"Not shown, because not measured or not finite: {', '.join(missing)}." if missing else ""


@dataclass(frozen=True)
class Details:
    summary: str
    blocks: tuple[Block, ...]
    kind: str = "details"


@dataclass(frozen=True)
class Browser:
    """The browser of answers, which the page's script fills in."""

    splits: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[str, ...]
    one_seed: bool  # start with the first seed, which every arm has; else with all seeds
    # disputed (the distance of credits from which on models disagree), models [{arm, seed}], items [{id, split, task,
    # prompt, truth, answers, right}]: for each model its answer or null, and one of 1, 0, p (right in part) and - (not
    # asked). Items with an answer that is right in part have credit too
    packed: Mapping[str, Any]
    kind: str = "browser"


Block = Table | Text | Panel | Details | Browser


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...]
    brief: int = 0  # place among the sections that a terminal shows; 0: it does not
    folded: bool = False  # on the page: only its title is shown until it is opened

    @property
    def id(self) -> str:
        return slug(self.title)


def walk(blocks: Iterable[Block]) -> Iterable[Block]:
    for block in blocks:
        yield block
        if isinstance(block, Details):
            yield from walk(block.blocks)
