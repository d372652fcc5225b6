"""What is served, from the database: the models in other precisions, servers against training, phases of a request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

import numpy as np

from db.models import Quantization, Verification
from db.queries_compare import RunFacts, Timing
from evaluation import speed
from evaluation.statistics import (
    Interval,
    bootstrap_mean,
    is_binary,
    mean_test,
    paired_differences,
    share_interval,
)

REFERENCE = "f16"
PHASES = ("load", "ttft", "prefill", "decode")
"""Of a request, in their order."""


@dataclass(frozen=True)
class PrecisionRow:
    """A model in one precision, over the seeds that were measured in it.

    Attributes:
        seeds: Those; every number is about them alone, so f16's own row may be about more.
        megabytes: Size of the file, millions of bytes, mean.
        bits_per_weight: Of the tensors, bits.
        accuracy: Primary metric of the task, percent; None where the seeds share no items.
        delta: The same minus that of f16 with the same seeds on the same items, percentage points; None for f16 itself,
            and where no seed has both.
        gained: Items that are right here and wrong in f16 (that have more credit here).
        lost: Items that are wrong here and right in f16.
        p_value: Exact sign test of gained against lost; signs flipped at random where credits lie between 0 and 1.
        answers_equal: Items answered with the same text as in f16, percent.
        fallbacks: Tensors in another format than asked for (rows no multiple of its block), most of all seeds.
        tensors: Number of tensors.
        tensor_types: Type -> number of tensors, of the first seed.
        binary: Whether all answers are right or wrong, none in between.
    """

    arm: str
    model_name: str
    type: str
    seeds: tuple[int, ...]
    megabytes: float
    bits_per_weight: float
    accuracy: Interval | None
    items: int
    delta: Interval | None
    gained: int
    lost: int
    p_value: float | None
    answers_equal: float
    fallbacks: int
    tensors: int
    tensor_types: dict[str, int]
    binary: bool = True


@dataclass(frozen=True)
class ServedRow:
    """A run in one mode on one backend, held against what training had.

    Attributes:
        prompts: Asked; 0 where the backend does not support the mode.
        rendered: Prompts rendered as in training, percent; None with prompts: the server does not tell.
        counted: Prompts read as the same tokens, percent; None with prompts: the server does not tell.
        answered: Prompts answered greedily as by Hugging Face, percent.
        equal_to_merged: Prompts answered as in mode merged, percent.
        perturbed_noticed: Whether another adapter scale changed an answer.
        first_difference: Where and why the first prompt differs, in words.
    """

    arm: str
    seed: int
    model_name: str
    backend: str
    mode: str
    prompts: int
    rendered: float | None
    counted: float | None
    answered: float | None
    equal_to_merged: float | None
    perturbed_noticed: bool | None
    first_difference: str | None


@dataclass(frozen=True)
class PhaseRow:
    """One phase of a request to an arm's model.

    Attributes:
        unit: ms for each request, or tokens/s.
        value: Median over the repetitions of all seeds, in `unit`, with an interval from their order.
        confidence: Of the interval, percent; with fewer than six repetitions below 95.
        repetitions: Number of them.
    """

    arm: str
    model_name: str
    backend: str
    phase: str
    unit: str
    value: Interval
    confidence: float
    repetitions: int


def precision_rows(
    runs: Sequence[RunFacts],
    quantizations: Mapping[int, Sequence[Quantization]],
    answers: Mapping[int, dict[str, dict[str, float]]],
) -> list[PrecisionRow]:
    """Precisions of one arm, f16 first.

    Args:
        runs: The arm's runs, one for each seed.
        quantizations: Run id -> its precisions.
        answers: Run id -> precision -> item id -> credit.
    """
    measured = [(run, {row.type: row for row in quantizations.get(run.id, ())}) for run in runs]
    types = dict.fromkeys(name for _, rows in measured for name in rows)
    return [
        _precision(name, [(run, rows[name], answers.get(run.id, {})) for run, rows in measured if name in rows])
        for name in types
    ]


def _precision(name: str, seeds: list[tuple[RunFacts, Quantization, dict[str, dict[str, float]]]]) -> PrecisionRow:
    own = paired_differences([(found[name], dict.fromkeys(found[name], 0.0)) for _, _, found in seeds])
    gains = paired_differences([(found[name], found[REFERENCE]) for _, _, found in seeds if REFERENCE in found])
    compared = name != REFERENCE and gains.size > 0
    credits = [found[kind].values() for _, _, found in seeds for kind in (name, REFERENCE) if kind in found]
    binary = is_binary(np.fromiter(chain.from_iterable(credits), dtype=np.float64))
    first = seeds[0][1]
    return PrecisionRow(
        arm=seeds[0][0].arm,
        model_name=seeds[0][0].model_name,
        type=name,
        seeds=tuple(run.seed for run, _, _ in seeds),
        megabytes=fmean(row.bytes for _, row, _ in seeds) / 1e6,
        bits_per_weight=fmean(row.bits_per_weight for _, row, _ in seeds),
        accuracy=share_interval(own, binary=binary).scaled(100) if own.size else None,
        items=own.size,
        delta=bootstrap_mean(gains).scaled(100) if compared else None,
        gained=int((gains > 0).sum()),
        lost=int((gains < 0).sum()),
        p_value=mean_test(gains, binary=binary) if compared else None,
        answers_equal=100 * fmean(row.answers_equal_to_f16 for _, row, _ in seeds),
        fallbacks=max(row.fallbacks for _, row, _ in seeds),
        tensors=sum(first.tensor_types.values()),
        tensor_types=dict(first.tensor_types),
        binary=binary,
    )


def served_rows(run: RunFacts, verified: Iterable[Verification]) -> list[ServedRow]:
    """What was verified of a run."""
    return [
        ServedRow(
            arm=run.arm,
            seed=run.seed,
            model_name=run.model_name,
            backend=f"{row.backend} {row.backend_version}",
            mode=row.mode,
            prompts=row.prompts,
            rendered=_percent(row.rendered),
            counted=_percent(row.counted),
            answered=_percent(row.answered),
            equal_to_merged=_percent(row.equal_to_merged),
            perturbed_noticed=row.perturbed_noticed,
            first_difference=row.first_difference,
        )
        for row in verified
    ]


def phase_rows(runs: Sequence[RunFacts], timings: Mapping[int, Sequence[Timing]]) -> list[PhaseRow]:
    """Phases of a request to one arm's model, over its seeds and in the order of a request.

    Args:
        runs: The arm's runs, one for each seed.
        timings: Run id -> its timed phases.
    """
    first = runs[0]
    own = [
        {"arm": arm, "phase": phase, "tokens": tokens, "nanoseconds": ns}
        for run in runs
        for arm, phase, _, tokens, ns in timings.get(run.id, ())
        if arm == run.arm
    ]
    return [
        PhaseRow(
            arm=first.arm,
            model_name=first.model_name,
            backend=f"{first.backend_name} {first.backend_version}",
            phase=row["phase"],
            unit=row["unit"],
            value=Interval(row["median"], row["low"], row["high"]),
            confidence=100 * row["confidence"],
            repetitions=row["repetitions"],
        )
        for row in sorted(speed.summary(own), key=lambda row: PHASES.index(row["phase"]))
    ]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
