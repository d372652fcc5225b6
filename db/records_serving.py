"""The forms of quantized.json, quantized_samples.jsonl and verify.json."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from db.records import Count, Name, Record, Sha256, Share, refuse_repeats
from db.values import SAME_MEAN

REFERENCE = "f16"
"""The precision that the others are held against."""


class PrecisionRecord(Record):
    """A model in one precision; size in bytes, shares from 0 to 1."""

    type: Name
    bytes: Count
    bits_per_weight: Annotated[float, Field(gt=0, le=64)]
    tensor_types: dict[Name, Count]
    category_accuracy: Share
    correct: Count
    n: Annotated[Count, Field(ge=1)]
    answers_equal_to_f16: Share
    fallbacks: Count
    credit: Share | None = None

    @property
    def worth(self) -> float:
        """Mean credit of the test items; results from before there was any have right and wrong answers only."""
        return self.category_accuracy if self.credit is None else self.credit

    @model_validator(mode="after")
    def _consistent(self) -> PrecisionRecord:
        if abs(self.correct / self.n - self.category_accuracy) > SAME_MEAN:
            raise ValueError(f"category_accuracy {self.category_accuracy} is not {self.correct} of {self.n}")
        if self.fallbacks > sum(self.tensor_types.values()):
            raise ValueError(f"{self.fallbacks} fallbacks among {sum(self.tensor_types.values())} tensors")
        return self


class QuantizedRecord(Record):
    """`quantized.json`: one arm with one seed in several precisions, f16 first."""

    form: Literal[1] = Field(alias="schema")
    arm: Name
    seed: Count
    rows: list[PrecisionRecord]

    @model_validator(mode="after")
    def _consistent(self) -> QuantizedRecord:
        refuse_repeats("rows of the type", (row.type for row in self.rows))
        first = self.rows[0].type if self.rows else "nothing"
        if first != REFERENCE:
            raise ValueError(f"rows: expected {REFERENCE} first, which the others are held against, came {first}")
        if self.rows[0].answers_equal_to_f16 != 1:
            raise ValueError(f"rows: {REFERENCE} must equal itself, came {self.rows[0].answers_equal_to_f16}")
        return self


class QuantizedSampleRecord(Record):
    """One line of `quantized_samples.jsonl`: one test item answered in one precision."""

    type: Name
    item_id: Name
    correct: bool
    answer: str
    credit: Share | None = None

    @property
    def worth(self) -> float:
        """Credit from 0 to 1, as of `SampleRecord`."""
        return float(self.correct) if self.credit is None else self.credit


class VerificationRecord(Record):
    """One backend in one mode; shares are of the prompts.

    Without prompts, the backend does not support the mode, and there are no shares. An older server answers, but does
    not tell what text or how many tokens it read: then `rendered` or `counted` is null.
    """

    backend: Name
    backend_version: Name
    mode: Literal["merged", "adapter"]
    prompts: Count
    rendered: Share | None
    counted: Share | None
    answered: Share | None
    equal_to_merged: Share | None
    perturbed_noticed: bool | None
    first_difference: str | None
    gguf_sha256: Sha256
    adapter_sha256: Sha256 | None
    server_digest: str | None
    stored_sha256: str | None

    @model_validator(mode="after")
    def _consistent(self) -> VerificationRecord:
        if (self.answered is None) != (self.prompts == 0):
            raise ValueError(f"answered: expected a share exactly where prompts were asked, came "
                             f"{self.answered} of {self.prompts} prompts")  # fmt: skip
        for name in ("rendered", "counted"):
            if (share := getattr(self, name)) is not None and self.prompts == 0:
                raise ValueError(f"{name}: expected no share where no prompt was asked, came {share}")
        return self


class VerifyRecord(Record):
    """`verify.json`: whether the servers answer as the trained model does."""

    form: Literal[1] = Field(alias="schema")
    arm: Name
    seed: Count
    model_name: Name
    rows: list[VerificationRecord]

    @model_validator(mode="after")
    def _consistent(self) -> VerifyRecord:
        refuse_repeats("rows of", ((row.backend, row.mode) for row in self.rows))
        return self
