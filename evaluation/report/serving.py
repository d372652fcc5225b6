"""What is served: the models in other precisions, servers against training, phases of a request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np
from sqlalchemy import Row

from db.queries import RunFacts
from evaluation.measure import speed
from evaluation.report.results import Results, Rows
from evaluation.statistics.intervals import Interval, aligned, bootstrap_mean, is_binary, mean_test, share_interval

REFERENCE = "f16"
PHASES = ("load", "ttft", "prefill", "decode")
"""Of a request, in their order."""
_Measured = tuple[RunFacts, Row[Any], Mapping[str, Mapping[str, float]]]
"""A run, one of its precisions, and precision → item id → credit."""


@dataclass(frozen=True)
class PrecisionRow:
    """A model in one precision, over the seeds that were measured in it."""

    arm: str
    model_name: str
    type: str
    seeds: tuple[int, ...]  # every number is about these alone, so f16's own row may be about more
    megabytes: float  # size of the file, millions of bytes, mean
    bits_per_weight: float  # of the tensors, bits
    accuracy: Interval | None  # primary metric of the task, percent; None where the seeds share no items
    items: int
    # the same minus that of f16 with the same seeds on the same items, percentage points; None for f16 itself, and
    # where no seed has both
    delta: Interval | None
    gained: int  # items with more credit here than in f16
    lost: int
    # exact sign test of gained against lost; signs flipped at random where credits lie between 0 and 1
    p_value: float | None
    answers_equal: float  # items answered with the same text as in f16, percent
    fallbacks: int  # tensors in another format than asked for (rows no multiple of its block), most of all seeds
    tensors: int
    tensor_types: dict[str, int]  # type → number of tensors, of the first seed; their sum is `tensors`
    binary: bool = True  # whether all answers are right or wrong, none in between


@dataclass(frozen=True)
class ServedRow:
    """A run in one mode on one backend, asked in one form and held against training; shares of prompts in percent."""

    arm: str
    seed: int
    model_name: str
    backend: str
    mode: str
    form: str  # plain, newline or second, see db.tables.Verification
    prompts: int  # asked; 0 where the backend does not support the mode
    rendered: float | None  # rendered as in training; None with prompts: the server does not tell
    counted: float | None  # read as the same tokens; likewise
    answered: float | None  # answered greedily as by Hugging Face
    tied: float | None  # otherwise, where two tokens all but tie; None in results from before this was looked at
    equal_to_merged: float | None  # answered as in mode merged
    perturbed_noticed: bool | None  # whether another adapter scale changed an answer
    first_difference: str | None  # where and why the first prompt differs, in words


@dataclass(frozen=True)
class PhaseRow:
    arm: str
    model_name: str
    backend: str
    phase: str
    unit: str
    # median over the repetitions of all seeds, with an interval from their order; in `unit`, ms for each request or
    # tokens/s
    value: Interval
    confidence: float  # of the interval, percent; with fewer than six repetitions below 95
    repetitions: int


def precision_rows(results: Results, runs: Sequence[RunFacts]) -> list[PrecisionRow]:
    measured: dict[str, list[_Measured]] = {}
    for run in runs:
        for row in results.quantizations.get(run.id, ()):
            measured.setdefault(row.type, []).append((run, row, results.quantized_answers.get(run.id, {})))
    return [_precision(name, seeds) for name, seeds in measured.items()]


def _precision(name: str, seeds: Sequence[_Measured]) -> PrecisionRow:
    own = aligned([found[name] for _, _, found in seeds]).mean(axis=0)
    both = [(found[name], found[REFERENCE]) for _, _, found in seeds if REFERENCE in found]
    credit = aligned([row for kind in zip(*both, strict=True) for row in kind])
    gains = (credit[: len(both)] - credit[len(both) :]).mean(axis=0) if credit.size else np.zeros(0)
    compared = name != REFERENCE and gains.size > 0
    credits = [found[kind].values() for _, _, found in seeds for kind in (name, REFERENCE) if kind in found]
    binary = is_binary(np.fromiter(chain.from_iterable(credits), dtype=np.float64))
    run, first, _ = seeds[0]
    return PrecisionRow(
        arm=run.arm,
        model_name=run.model_name,
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


def served_rows(results: Results, run: RunFacts) -> list[ServedRow]:
    shares = ("rendered", "counted", "answered", "tied", "equal_to_merged")
    return [
        ServedRow(
            arm=run.arm,
            seed=run.seed,
            model_name=run.model_name,
            backend=f"{row.backend} {row.backend_version}",
            mode=row.mode,
            form=row.form,
            prompts=row.prompts,
            perturbed_noticed=row.perturbed_noticed,
            first_difference=row.first_difference,
            **{name: None if (share := getattr(row, name)) is None else 100 * share for name in shares},
        )
        # Merged before adapter for each backend, each asked as in training first.
        for row in sorted(
            results.verifications.get(run.id, ()),
            key=lambda row: (row.backend, row.mode != "merged", row.form == "second", row.form == "newline"),
        )
    ]


def phase_rows(runs: Sequence[RunFacts], timings: Rows) -> list[PhaseRow]:
    first = runs[0]
    own = [dict(t._mapping) for run in runs for t in timings.get(run.id, ()) if t.arm == run.arm]
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
