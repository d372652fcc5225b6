"""The schema of section prepare_data, and what all sections share."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from evaluation.epa import POLLUTANTS
from evaluation.sources import FILES, HUB
from evaluation.tasks import is_recipe, load, names
from trainers.settings import Section

Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
_ON_HUB = re.compile(rf"{HUB}[^/@\s]+/[^/@\s]+(@\S+)?")


VISION_TASKS = ("aqi_vision",)
"""Tasks whose items have pictures."""


def suggest(word: str, known: Any) -> str:
    """The end of an error message: what may have been meant, and what there is."""
    names = [str(k) for k in known]
    close = difflib.get_close_matches(word, names, n=1)
    return (f"; did you mean {close[0]!r}?" if close else ".") + f" Available: {', '.join(names)}"


def known(kind: str, names: list[str], all_of_them: Any) -> list[str]:
    """The names, or a ValueError with every one that is unknown."""
    unknown = [f"unknown {kind} {name!r}{suggest(name, all_of_them)}" for name in names if name not in all_of_them]
    if unknown:
        raise ValueError("; ".join(unknown))
    return names


class Column(Section):
    """A column of the user's file and the unit it is in."""

    column: str
    unit: str | None = None


class PrepareData(Section):
    """Section prepare_data."""

    task: str
    source: str
    hub_split: str | None
    hub_test_split: str | None
    hub_subset: str | None
    delimiter: Annotated[str, Field(min_length=1, max_length=1)]
    columns: dict[str, str | Column | None]
    max_chars: Positive | None
    trust_given_aqi: bool
    seed: Seed
    train_items: Positive | None
    valid_items: Positive
    test_items: Positive
    pollutants: list[str] = Field(min_length=1)
    max_pollutants: Positive
    retention_items_per_task: Positive

    @field_validator("task")
    @classmethod
    def _task(cls, task: str) -> str:
        if task in VISION_TASKS:
            raise ValueError(f"{task} is a task of the vision pipeline, whose settings are those of vlm/params.yaml")
        return known("task", [task], [name for name in names() if name not in VISION_TASKS])[0]

    @field_validator("source")
    @classmethod
    def _source(cls, source: str) -> str:
        if not source.strip():
            raise ValueError("expected generated, hub, hub:org/name, a file or a folder, got nothing")
        if source.startswith(HUB) and not _ON_HUB.fullmatch(source):
            raise ValueError("expected hub:org/name or hub:org/name@revision, as on the data set's page")
        return source

    @field_validator("pollutants")
    @classmethod
    def _pollutants(cls, keys: list[str]) -> list[str]:
        return known("pollutant", keys, POLLUTANTS)

    @model_validator(mode="after")
    def _mapping(self) -> "PrepareData":
        own = "hub:org/name, a file or a folder"
        problems = []
        refused: dict[str, str] = {}
        if is_recipe(load(self.task)):
            if self.source == "generated":
                problems.append(f"source: expected hub, {own}, got 'generated', as only aqi generates its items")
        else:
            refused = dict.fromkeys(("hub_test_split", "max_chars"), f"{self.task} has no use for it, recipes have")
            if self.source == "hub":
                problems.append(f"source: expected generated, {own}, got 'hub'; {self.task} has no data set there")
            problems += [
                f"columns.{name}: expected a column, got null; leave {name} out"
                for name, column in self.columns.items()
                if column is None
            ]
            if self.source not in ("generated", "hub") and not self.columns:
                problems.append("columns: a source of your own needs a mapping, e.g. {pm25: PM2.5_ugm3}")
            if self.source == "generated" and self.train_items is None:
                problems.append("train_items: expected a number, got null; generated items have no end")
        if self.source == "generated" or Path(self.source).suffix.lower() in FILES:
            whole = f"{self.source} has no splits or subsets"
            refused |= dict.fromkeys(("hub_split", "hub_subset", "hub_test_split"), whole)
        problems += [
            f"{name}: expected null, got {value!r}; {why}"
            for name, why in refused.items()
            if (value := getattr(self, name)) is not None
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self
