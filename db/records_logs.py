"""The forms of what is logged while something runs: probe_ledger.jsonl, grit_log.jsonl, attempts/*.json.

Of the two logs of training only the fields that reach a table are read; their other fields are free.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BeforeValidator, Field, model_validator

from db.records import Count, Name, Record, spelled


def _object_or_none(value: Any) -> Any:
    """Records of other kinds have a count or a list of names under the same key."""
    return value if isinstance(value, dict) else None


Number = Annotated[float, BeforeValidator(spelled)]


class UnitRecord(Record):
    """One trained module in one sampled step. None: one of two vectors was zero, so there is no angle.

    Attributes:
        angle: Between the step made and the step that plain AdamW would have made, degrees.
        cos_raw_step: Cosine of the raw gradient and the step, sign turned.
        cos_raw_inner: Cosine of the raw gradient and the one that the innermost optimizer got.
        lr_ratio: Length of the step over the length of plain AdamW's.
    """

    angle: Number | None = None
    cos_raw_step: Number | None = None
    cos_raw_inner: Number | None = None
    lr_ratio: Number | None = None


class LedgerRecord(Record):
    """One line of `probe_ledger.jsonl`: a sampled step; the closing line has counts of events and no step."""

    step: Count | None = None
    units: dict[Name, UnitRecord] = Field(default_factory=dict)
    events: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> LedgerRecord:
        if (self.step is None) == (self.events is None):
            raise ValueError("expected either a `step` with its `units`, or the closing line with its `events`")
        return self


class GritLayer(Record):
    """One layer in a record of `grit_log.jsonl`; which fields there are depends on the record's kind.

    Attributes:
        r: Rank of the tensors.
        k: Directions kept of them, min(k_a, k_b).
        samples: Tokens that the statistics have seen.
        relative_change: Of ΔW by a reprojection, ‖ΔW' − ΔW‖ / ‖ΔW‖.
        effective_rank_a: exp of the entropy of the normalised eigenvalues; `_g`: of the other factor.
        condition_a: Largest over smallest eigenvalue.
        damping_share_a: Damping over mean eigenvalue.
        eigenvalues_a: Largest first.
    """

    r: Count | None = None
    base_r: Count | None = None
    k: Count | None = None
    k_a: Count | None = None
    k_b: Count | None = None
    final_k_a: Count | None = None
    final_k_b: Count | None = None
    samples: Number | None = None
    relative_change: Number | None = None
    effective_rank_a: Number | None = None
    effective_rank_g: Number | None = None
    condition_a: Number | None = None
    condition_g: Number | None = None
    damping_share_a: Number | None = None
    damping_share_g: Number | None = None
    eigenvalues_a: list[Number] | None = None
    eigenvalues_g: list[Number] | None = None


GritLayers = Annotated[dict[Name, GritLayer] | None, BeforeValidator(_object_or_none)]


class GritRecord(Record):
    """One line of `grit_log.jsonl`: kinds spectra, reprojection, final, and others that no table has."""

    kind: Name
    step: Count
    layers: GritLayers = None
    ranks: GritLayers = None
    spectra: GritLayers = None


class AttemptRecord(Record):
    """`attempts/<id>.json`: one start of one stage."""

    form: Literal[1] = Field(alias="schema")
    id: Name
    stage: Name
    arm: Name | None
    seed: Count | None
    status: Literal["running", "finished", "failed", "crashed"]
    error: str | None
    started: AwareDatetime
    ended: AwareDatetime | None
    host: Name
    pid: Count
    git_commit: str | None

    @model_validator(mode="after")
    def _consistent(self) -> AttemptRecord:
        if self.status in ("finished", "failed") and self.ended is None:
            raise ValueError(f"a {self.status} stage needs the time `ended`")
        if self.status == "running" and self.ended is not None:
            raise ValueError(f"a running stage has not `ended`, came {self.ended}")
        if self.ended is not None and self.ended < self.started:
            raise ValueError(f"`ended` {self.ended} lies before `started` {self.started}")
        return self
