"""The tables of what is served: precisions, whether each server answers as it was trained, and how fast."""

from __future__ import annotations

from typing import Any

from sqlalchemy import CheckConstraint, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from db.columns import SHA256, Base, OfRun, count_rule, flag, share_rule


class Quantization(OfRun, Base):
    """A run's merged model in one precision; f16 is what the others are held against."""

    __tablename__ = "quantization"
    __table_args__ = (
        UniqueConstraint("run_id", "type"),
        CheckConstraint("type <> ''", name="named"),
        CheckConstraint("bits_per_weight > 0 AND bits_per_weight <= 64", name="bits_per_weight"),
        CheckConstraint("correct <= n", name="correct_of_n"),
        CheckConstraint("type <> 'f16' OR answers_equal_to_f16 = 1", name="f16_equals_itself"),
        count_rule("bytes"),
        count_rule("correct"),
        count_rule("n"),
        count_rule("fallbacks"),
        share_rule("category_accuracy"),
        share_rule("answers_equal_to_f16"),
        share_rule("credit"),
    )

    type: Mapped[str] = mapped_column(comment="llama.cpp's name: f16, bf16, q8_0, q4_K_M, …")
    bytes: Mapped[int] = mapped_column(comment="of the whole file, bytes")
    bits_per_weight: Mapped[float] = mapped_column(comment="of the tensors alone, bits")
    tensor_types: Mapped[dict[str, Any]] = mapped_column(comment="type of a tensor to number of tensors, read back")
    category_accuracy: Mapped[float] = mapped_column(comment="share of the test items answered correctly")
    correct: Mapped[int] = mapped_column(comment="test items answered correctly")
    n: Mapped[int] = mapped_column(comment="test items")
    answers_equal_to_f16: Mapped[float] = mapped_column(comment="share of the test items answered with the same text")
    fallbacks: Mapped[int] = mapped_column(
        comment="tensors in another format than asked for, since their rows are no multiple of its block"
    )
    credit: Mapped[float] = mapped_column(comment="mean credit of the test items")


class QuantizedSample(OfRun, Base):
    """One test item answered by the model in one precision; paired intervals need the items."""

    __tablename__ = "quantized_sample"
    __table_args__ = (
        UniqueConstraint("run_id", "type", "item_id"),
        CheckConstraint("type <> '' AND item_id <> ''", name="named"),
        share_rule("credit"),
    )

    type: Mapped[str] = mapped_column(comment="as in quantization")
    item_id: Mapped[str]
    correct: Mapped[bool] = mapped_column(flag("correct"))
    answer: Mapped[str] = mapped_column(comment="the model's text, unshortened")
    credit: Mapped[float] = mapped_column(comment="0 to 1, as in sample")


class Verification(OfRun, Base):
    """Whether one backend in one mode answers as the trained model does."""

    __tablename__ = "verification"
    __table_args__ = (
        UniqueConstraint("run_id", "backend", "mode"),
        CheckConstraint("backend <> '' AND backend_version <> ''", name="named"),
        CheckConstraint("mode IN ('merged', 'adapter')", name="mode"),
        CheckConstraint(
            "(prompts > 0) = (answered IS NOT NULL) AND (prompts > 0 OR (rendered IS NULL AND counted IS NULL))",
            name="asked_or_unsupported",
        ),
        CheckConstraint("length(gguf_sha256) = 64", name="gguf_sha256"),
        CheckConstraint("length(adapter_sha256) = 64", name="adapter_sha256"),
        count_rule("prompts"),
        share_rule("rendered"),
        share_rule("counted"),
        share_rule("answered"),
        share_rule("equal_to_merged"),
    )

    backend: Mapped[str] = mapped_column(comment="llama_cpp or ollama")
    backend_version: Mapped[str]
    mode: Mapped[str] = mapped_column(comment="merged GGUF, or base with GGUF adapter")
    prompts: Mapped[int] = mapped_column(comment="0: this backend does not support the mode")
    rendered: Mapped[float | None] = mapped_column(
        comment="share of the prompts rendered as in training; NULL with prompts: the server does not tell"
    )
    counted: Mapped[float | None] = mapped_column(
        comment="share read as the tokens that training had; NULL with prompts: the server does not tell"
    )
    answered: Mapped[float | None] = mapped_column(comment="share answered greedily as by Hugging Face")
    equal_to_merged: Mapped[float | None] = mapped_column(
        comment="share answered as in mode merged; NULL: not compared"
    )
    perturbed_noticed: Mapped[bool | None] = mapped_column(
        flag("perturbed_noticed"), comment="another adapter scale changed an answer; NULL: not tried"
    )
    first_difference: Mapped[str | None] = mapped_column(comment="where and why the first prompt differs")
    gguf_sha256: Mapped[str] = mapped_column(SHA256, comment="of the exported model or base")
    adapter_sha256: Mapped[str | None] = mapped_column(SHA256, comment="of the exported adapter")
    server_digest: Mapped[str | None] = mapped_column(comment="the server's digest of the model")
    stored_sha256: Mapped[str | None] = mapped_column(comment="of the weights as the server keeps them")


class Speed(OfRun, Base):
    """One timed phase. An arm's run also times the base, alternately in the same process.

    load: until the model is ready; ttft: from a request to its first token; prefill: evaluating prompts; decode:
    answers, token by token.
    """

    __tablename__ = "speed"
    __table_args__ = (
        UniqueConstraint("run_id", "arm", "phase", "repetition"),
        CheckConstraint("arm <> ''", name="named"),
        CheckConstraint("phase IN ('load', 'ttft', 'prefill', 'decode')", name="phase"),
        count_rule("repetition"),
        count_rule("tokens"),
        count_rule("nanoseconds"),
    )

    arm: Mapped[str] = mapped_column(comment="the run's own arm, or base: machines drift, so deltas stay here")
    phase: Mapped[str]
    repetition: Mapped[int]
    tokens: Mapped[int | None] = mapped_column(comment="tokens; NULL: not measured")
    nanoseconds: Mapped[int | None] = mapped_column(comment="ns; NULL: not measured")
