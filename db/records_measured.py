"""The form of measured.json: forgetting, the size of the update, drift, alignment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from db.records import Count, MetricDefRecord, MetricRecord, Name, Record, refuse_repeats, refuse_strange_shares


class LayerRecord(Record):
    """One number of one layer; a null value means that it could not be computed."""

    name: Name
    split: Name
    layer: Name
    value: float | None


class MeasuredRecord(Record):
    """`measured.json`: what was measured inside one model, after training."""

    form: Literal[1] = Field(alias="schema")
    arm: Name
    seed: Count
    metrics: list[MetricRecord]
    metric_defs: dict[Name, MetricDefRecord]
    layers: list[LayerRecord]

    @model_validator(mode="after")
    def _consistent(self) -> MeasuredRecord:
        refuse_repeats("metrics", ((metric.name, metric.split) for metric in self.metrics))
        refuse_repeats("layers", ((row.name, row.split, row.layer) for row in self.layers))
        refuse_strange_shares([*self.metrics, *self.layers], self.metric_defs)
        return self
