"""What a section of the page is made of: plain data that the template lays out and escapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from evaluation.page.columns import spread

Tone = Literal["", "good", "bad", "open", "quiet"]
"""How a word is coloured: good and bad are settled, open is undecided; the word itself says the same."""

_SENTENCE = 32
"""Characters of a cell beyond which its column wraps."""
MOST_ROWS = 400
"""Of a table; nobody reads more, and ten thousand runs would make a file that no browser opens."""


def slug(text: str) -> str:
    """A text as an id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


@dataclass(frozen=True)
class Cell:
    """A table's cell.

    Attributes:
        text: Shown as it is.
        tone: Of a verdict.
        arm: Draws this arm's colour before the text; empty: none.
        title: The whole of a shortened text, such as a hash; shown when pointed at.
        hint: A second, smaller line.
    """

    text: str
    tone: Tone = ""
    arm: str = ""
    title: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under headers; the first cell of a row is its header. Of very many rows some are shown, evenly spaced.

    Attributes:
        words: Positions of columns that hold words, set left; all others hold numbers, set right.
    """

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: frozenset[int] = frozenset()
    kind: str = "table"

    @property
    def id(self) -> str:
        """The caption as a name."""
        return slug(self.caption)

    @cached_property
    def shown(self) -> tuple[tuple[Cell, ...], ...]:
        """The rows that are in the page."""
        return tuple(spread(self.rows, MOST_ROWS))

    @cached_property
    def styles(self) -> tuple[str, ...]:
        """How each column is set: numbers right, words left; sentences wrap and get room."""
        return tuple(map(self._style, range(len(self.headers))))

    def _style(self, column: int) -> str:
        if column != 0 and column not in self.words:
            return ""
        longest = max((len(row[column].text) for row in self.shown), default=0)
        return "words long" if longest > _SENTENCE and column else "words"


@dataclass(frozen=True)
class Text:
    """A paragraph; `note` is set smaller."""

    text: str
    style: Literal["", "lead", "note"] = ""
    kind: str = "text"


@dataclass(frozen=True)
class Fact:
    """One difference in words: what is compared, the verdict, and its numbers."""

    verdict: str
    tone: Tone
    sentence: str


@dataclass(frozen=True)
class Card:
    """What may be said about one arm."""

    arm: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Cards:
    """One card for each arm."""

    cards: tuple[Card, ...]
    kind: str = "cards"


@dataclass(frozen=True)
class Control:
    """A choice above charts: only rows with this value in the column are drawn.

    Attributes:
        column: Of the charts' data.
        options: (value, label); the first is chosen at the start.
    """

    column: str
    label: str
    options: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite chart of some rows of a dataset.

    Attributes:
        title: Shown above it, with the unit.
        label: What a screen reader says of it.
        spec: Vega-Lite; its data is named "rows" and put in by the page.
        data: Name of the dataset.
        where: Column -> value that rows must have.
        canvas: Draw on a canvas: many marks.
    """

    id: str
    title: str
    label: str
    spec: Mapping[str, Any]
    data: str
    where: Mapping[str, str] = field(default_factory=dict)
    canvas: bool = False


@dataclass(frozen=True)
class Panel:
    """Charts that share their controls and legend.

    Attributes:
        dashed: Arm -> whether its lines are dashed, so that the legend shows lines; empty: it shows dots.
    """

    id: str
    charts: tuple[Chart, ...]
    controls: tuple[Control, ...] = ()
    arms: tuple[str, ...] = ()
    note: str = ""
    wide: bool = False
    dashed: Mapping[str, bool] = field(default_factory=dict)
    kind: str = "panel"

    @property
    def columns(self) -> int:
        """Charts beside each other where there is room, so that no row has a single one."""
        if self.wide:
            return 1
        return 2 if len(self.charts) in (1, 2, 4) else 3


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away until asked for."""

    summary: str
    blocks: tuple[Block, ...]
    kind: str = "details"


@dataclass(frozen=True)
class Browser:
    """The sample browser, whose rows the page's script fills in.

    Attributes:
        one_seed: Start with the first seed, which every arm has; else with all seeds.
    """

    splits: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[str, ...]
    one_seed: bool = True
    kind: str = "browser"


Block = Table | Text | Cards | Panel | Details | Browser


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def id(self) -> str:
        """The heading as the target of a link."""
        return slug(self.title)


def panels(sections: tuple[Section, ...]) -> list[Panel]:
    """All panels, those in folded blocks too."""
    found: list[Panel] = []

    def walk(blocks: tuple[Block, ...]) -> None:
        for block in blocks:
            if isinstance(block, Panel):
                found.append(block)
            elif isinstance(block, Details):
                walk(block.blocks)

    for section in sections:
        walk(section.blocks)
    return found
