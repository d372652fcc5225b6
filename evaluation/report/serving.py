"""What is served: whether it answers as trained, speed by phase, other precisions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np
from sqlalchemy import Row

from db.records import Run
from db.runs import BASE
from evaluation.measure.speed import summary
from evaluation.report.arms import ArmRow
from evaluation.report.blocks import Block, Cell, Details, Section, Table, Text, arm_cell, interval_panel
from evaluation.report.results import Results, Rows
from evaluation.report.text import interval, number, percent, seeds_text
from evaluation.statistics.intervals import Interval, aligned, bootstrap_mean, is_binary, mean_test, share_interval

REFERENCE = "f16"
PHASES = ("load", "ttft", "prefill", "decode")
"""Of a request, in their order."""
_Measured = tuple[Run, Row[Any], Mapping[str, Mapping[str, float]]]
"""A run, one of its precisions, and precision → item id → credit."""


@dataclass(frozen=True)
class PrecisionRow:
    """A model in one precision, over the seeds that were measured in it."""

    arm: str
    model_name: str
    type: str
    seeds: tuple[int, ...]  # every number covers only these, so the row of f16 may cover more
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
    """A run in one mode on one backend, asked in one form and compared with training; shares of prompts in percent."""

    arm: str
    seed: int
    model_name: str
    backend: str
    mode: str
    form: str  # plain, newline or second, see db.tables.Verification
    prompts: int  # asked; 0 where the backend does not support the mode
    rendered: float | None  # rendered as in training; None although there are prompts: the server does not report it
    counted: float | None  # with the same token ids; None as above
    answered: float | None  # answered greedily as by Hugging Face
    tied: float | None  # different, where two tokens nearly tie; None in results from before this was checked
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


def precision_rows(results: Results, runs: Sequence[Run]) -> list[PrecisionRow]:
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


def served_rows(results: Results, run: Run) -> list[ServedRow]:
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


def phase_rows(runs: Sequence[Run], timings: Rows) -> list[PhaseRow]:
    first = runs[0]
    measured = [dict(t._mapping) for run in runs for t in timings.get(run.id, ()) if t.arm == run.arm]
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
        for row in sorted(summary(measured), key=lambda row: PHASES.index(row["phase"]))
    ]


# Chapters

_PHASE_TITLES = dict(zip(PHASES, ("Load", "Time to first token", "Prefill", "Decode"), strict=True))


def _files(rows: Sequence[ArmRow], runs: Sequence[Run]) -> Details | None:
    """Whether the exported files alone answer as Hugging Face does, and the first prompts on which one did not."""
    keys = list(dict.fromkeys(key for row in rows for key in row.metrics if key[0] == "parity"))
    if not keys:
        return None
    names = {"token_ids_equal": "Same token ids", "greedy_equal": "All ways answer alike"}
    lines = [(arm_cell(row.arm), number(row.parity), *(percent(row.metrics.get(key)) for key in keys)) for row in rows]
    headers = ("Arm", "Worst seed", *(names.get(key[1], key[1].removeprefix("pair/")) for key in keys))
    differences = (
        Text(f"{run.arm} seed {run.seed}: " + "; ".join(f"{k}: {v!r}" for k, v in first.items()), "note")
        for run in runs
        if (first := run.parity_first_difference)
    )
    return Details(
        "The exported files, before anything is served",
        (
            Table("Percent of prompts on which all ways to run a model answer alike, mean over seeds", headers, lines),
            Text("With export.parity_arithmetic: f32, this leaves out the rounding of the engine.", "note"),
            *differences,
        ),
    )


def served(rows: Sequence[ServedRow], trained: Sequence[ArmRow], runs: Sequence[Run]) -> Section | None:
    """Whether exports answer as the trained models do: what is served, and the files alone."""
    files = _files(trained, runs)
    if not rows:
        return Section("Served as trained", (files,)) if files else None
    headers = ("Arm", "Backend", "Mode", "Asked", "Prompts", "Rendered %", "Tokens %", "Answers %", "Ties %",
               "Adapter = merged %", "Perturbed adapter noticed")  # fmt: skip
    asked = [row for row in rows if row.prompts]
    alike = sum((row.answered or 0) + (row.tied or 0) > 100 - 1e-6 for row in asked)
    words = (
        f"{alike} of {len(asked)} give the trained model's answer to every prompt, or differ only where two tokens tie "
        "and rounding decides. Shares of prompts on which the backend matches training: the rendered text, the token "
        "ids (Ollama: their number), and the greedy answer of Hugging Face. Prompts are asked plainly, with a trailing "
        "newline, and as the second question of a conversation. Not reported: the server is too old to say."
    )
    notes = (
        Text(f"{row.arm} seed {row.seed}, {row.backend}, {row.mode}, {row.form}: {row.first_difference}", "note")
        for row in rows
        if row.first_difference
    )
    table = Table("Served as trained, percent of prompts", headers, map(_served_line, rows))
    return Section("Served as trained", (Text(words), table, *notes, *([files] if files else ())), brief=5)


def _served_line(row: ServedRow) -> tuple[object, ...]:
    def reported(share: float | None) -> str:
        return "not reported" if row.prompts and share is None else number(share)

    return (
        Cell(row.arm, arm=row.arm, hint=f"seed {row.seed}"), row.backend, row.mode, row.form,
        str(row.prompts) if row.prompts else "not supported", reported(row.rendered), reported(row.counted),
        number(row.answered), number(row.tied), number(row.equal_to_merged),
        {True: "yes", False: Cell("NO", tone="bad"), None: "–"}[row.perturbed_noticed],
    )  # fmt: skip


def speed(phases: Sequence[PhaseRow], rows: Sequence[ArmRow], modes: Mapping[str, str]) -> Section | None:
    """Speed by phase; `modes` has the serving mode of each trained arm."""
    if not phases:
        return None
    blocks: list[Block] = [Text(f"{modes_in_words(modes)} Requests run one at a time.".strip())]
    title = "Decoding speed relative to the base timed beside it, percent"
    note = (
        "Paired: arm and base take turns in one process. The intervals in the table describe one process each, so "
        "medians of two processes cannot be compared."
    )
    changes = ((row.arm, row.arm, row.delta_speed_interval) for row in rows if row.arm != BASE)
    blocks += interval_panel("speed", title, changes, "percent", note)
    lines = [
        (arm_cell(row.arm), row.backend, _PHASE_TITLES[row.phase],
         f"{interval(row.value, digits=2 if row.unit == 'ms' else 0)} {row.unit}", number(row.confidence),
         str(row.repetitions))
        for row in phases
    ]  # fmt: skip
    caption = "Medians over the repetitions of all seeds, without the warm-up, with intervals from order statistics"
    headers = ("Arm", "Backend", "Phase", "Median [interval]", "Confidence %", "Repetitions")
    return Section("Speed by phase", (*blocks, Table(caption, headers, lines)))


def modes_in_words(modes: Mapping[str, str]) -> str:
    """How the models were served, and what that means for their speed; `modes` has each trained arm's."""
    merged, adapter = (", ".join(arm for arm, mode in modes.items() if mode == one) for one in ("merged", "adapter"))
    sentences = (
        f"Merged into the base: {merged}. Merged models of one shape run the same arithmetic, so any difference in "
        "their decoding speed is noise." if merged else "",
        f"With a separate adapter: {adapter}. An adapter adds arithmetic to every token, which costs time."
        if adapter else "",
    )  # fmt: skip
    return " ".join(filter(None, sentences))


def precisions(rows: Sequence[PrecisionRow], title: str) -> Section | None:
    """The models in other precisions; `title` names the primary metric."""
    if not rows:
        return None
    counts, change = _counts(rows)
    headers = ("Arm", "Type", "Size, MB", "Bits per weight", f"{title}, % [95%]", "Δ to f16, points [95%]",
               counts, "Same answer as f16, %", "Fallback tensors")  # fmt: skip
    lines = [
        (Cell(row.arm, arm=row.arm, hint=seeds_text(row.seeds)), row.type, number(row.megabytes, digits=2),
         number(row.bits_per_weight, digits=2), interval(row.accuracy), interval(row.delta, sign=True),
         "–" if row.delta is None else f"{row.gained}, {row.lost}", number(row.answers_equal),
         f"{row.fallbacks} of {row.tensors}")
        for row in rows
    ]  # fmt: skip
    items = ", ".join(str(n) for n in sorted({row.items for row in rows}))
    words = [
        f"Each model in other precisions, on the same {items} test items, served by llama.cpp. Size is the file's, "
        f"bits per weight the tensors'. {counts}: items that {change} compared with f16. The difference is "
        "paired by item; an interval of zero width means that no item changed, not that none could."
    ]
    if any(len({row.seeds for row in rows if row.arm == arm}) > 1 for arm in {row.arm for row in rows}):
        words.append(
            "Each line covers its own seeds, and its difference is to f16 with the same seeds: do not compare lines "
            "with different seeds."
        )
    if any(row.fallbacks for row in rows):
        words.append(
            "Fallback tensors have rows that are not a multiple of the format's block, so llama.cpp stored them in a "
            "larger type: the file is larger than the type's name suggests."
        )
    blocks: list[Block] = [Text(" ".join(words)), Table("Other precisions on the same test items", headers, lines)]
    heading = f"{title} minus that of f16 on the same items, points"
    deltas = ((f"{row.arm} {row.type}", row.arm, row.delta) for row in rows)
    blocks += interval_panel("precisions", heading, deltas, "points")
    return Section("Quantization", tuple(blocks), brief=4)


def _counts(rows: Sequence[PrecisionRow]) -> tuple[str, str]:
    """What the counts of changed items are called, and what these items do."""
    if all(row.binary for row in rows):
        return "Gained, lost", "turned right or wrong"
    return "Items better, worse", "got more or less credit"
