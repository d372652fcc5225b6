"""The form of verdict.json."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from db.columns import FINAL_STEP
from db.records import Count, Name, Record, refuse_repeats, spelled


class ReadingRecord(Record):
    """One number of a verdict."""

    name: Name
    layer: str
    step: Annotated[int, Field(ge=FINAL_STEP, lt=2**63)]
    value: Annotated[float, BeforeValidator(spelled)]
    unit: str
    threshold: float | None
    verdict: Literal["pass", "fail", "inconclusive", "skipped"]
    diagnosis: str


class VerdictRecord(Record):
    """`verdict.json`: whether an arm's updates are what it claims."""

    form: Literal[1] = Field(alias="schema")
    arm: Name
    seed: Count
    verdict: Literal["effective", "no_effect", "unstable"]
    diagnosis: Name
    reason: str
    as_claimed: bool
    readings: list[ReadingRecord]

    @model_validator(mode="after")
    def _consistent(self) -> VerdictRecord:
        refuse_repeats("readings", ((r.name, r.layer, r.step) for r in self.readings))
        return self
