"""The tables of what happened inside a model: numbers for each layer, and spectra of the Fisher factors."""

from __future__ import annotations

from sqlalchemy import JSON, CheckConstraint, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from db.columns import FINAL_STEP, LARGEST_INT, Base, OfRun, typed_value_rules


class LayerMetric(OfRun, Base):
    """One number of one layer: measured after training, or sampled while it ran.

    Apart from `metric`, because a run has a few dozen metrics and may have a hundred thousand of these.
    """

    __tablename__ = "layer_metric"
    __table_args__ = (
        UniqueConstraint("run_id", "name", "split", "layer", "step"),
        CheckConstraint("name <> '' AND split <> '' AND layer <> ''", name="named"),
        CheckConstraint(f"step BETWEEN {FINAL_STEP} AND {LARGEST_INT}", name="step"),
        *typed_value_rules(),
    )

    name: Mapped[str] = mapped_column(comment="see metric_def; of split probe: angles in degrees, cosines and ratios")
    split: Mapped[str] = mapped_column(
        comment="weights, hidden, alignment: measured; probe, grit: logged while training"
    )
    layer: Mapped[str] = mapped_column(comment="module (layers.0.self_attn.q_proj) or hidden layer (layer 2)")
    step: Mapped[int] = mapped_column(comment="optimizer step; -1: of the finished run")
    value: Mapped[float | None] = mapped_column(comment="NULL unless value_kind is finite")
    value_kind: Mapped[str] = mapped_column(comment="finite, nan, inf, -inf: SQLite would turn NaN into NULL")


class Spectrum(OfRun, Base):
    """The eigenvalues of one Fisher factor of one layer at one step."""

    __tablename__ = "spectrum"
    __table_args__ = (
        UniqueConstraint("run_id", "layer", "factor", "step"),
        CheckConstraint("layer <> ''", name="named"),
        CheckConstraint("factor IN ('a', 'g')", name="factor"),
        CheckConstraint(f"step BETWEEN 0 AND {LARGEST_INT}", name="step"),
        CheckConstraint("length(CAST(eigenvalues AS TEXT)) > 2", name="eigenvalues_known"),
    )

    layer: Mapped[str]
    factor: Mapped[str] = mapped_column(comment="a: of A's outputs (precondition B); g: of gradients there (for A)")
    step: Mapped[int] = mapped_column(comment="optimizer step")
    eigenvalues: Mapped[list[float]] = mapped_column(
        JSON(none_as_null=True),
        comment="largest first, perhaps only the largest ones; squares of activations (a) or gradients (g) a token",
    )
