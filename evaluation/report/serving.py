"""What is served: whether it answers as trained, speed by phase, other precisions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np

from db.records import REFERENCE
from evaluation.measure.speed import summary
from evaluation.report.arms import ArmRow
from evaluation.report.blocks import Cell, Section, Table, Text, arm_cell
from evaluation.report.comparison import Comparison
from evaluation.report.results import ScoredRun
from evaluation.report.text import interval, number, percent, seeds_text
from evaluation.statistics.intervals import Interval, aligned, bootstrap_mean, is_binary, mean_test, share_interval

PHASES = {"load": "Load", "ttft": "Time to first token", "prefill": "Prefill", "decode": "Decode"}
"""Of a request, in their order, with titles."""


@dataclass(frozen=True)
class PrecisionRow:
    """A model in one precision, over the seeds that were measured in it."""

    arm: str
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


def precision_rows(runs: Iterable[ScoredRun]) -> list[PrecisionRow]:
    """An arm's runs in each precision that any of them was measured in."""
    measured: dict[str, list[tuple[ScoredRun, Any]]] = {}
    for run in runs:
        for row in run.quantizations:
            measured.setdefault(row.type, []).append((run, row))
    return [_precision(name, seeds) for name, seeds in measured.items()]


def _precision(name: str, seeds: Sequence[tuple[ScoredRun, Any]]) -> PrecisionRow:
    credits, rows = [run.quantized for run, _ in seeds], [row for _, row in seeds]
    by_item = aligned([credit[name] for credit in credits]).mean(axis=0)
    both = [(credit[name], credit[REFERENCE]) for credit in credits if REFERENCE in credit]
    credit = aligned([of_seed for kind in zip(*both, strict=True) for of_seed in kind])
    gains = (credit[: len(both)] - credit[len(both) :]).mean(axis=0) if credit.size else np.zeros(0)
    compared = name != REFERENCE and gains.size > 0
    values = chain.from_iterable(of[kind].values() for of in credits for kind in (name, REFERENCE) if kind in of)
    binary = is_binary(np.fromiter(values, dtype=np.float64))
    return PrecisionRow(
        arm=seeds[0][0].arm,
        type=name,
        seeds=tuple(run.seed for run, _ in seeds),
        megabytes=fmean(row.bytes for row in rows) / 1e6,
        bits_per_weight=fmean(row.bits_per_weight for row in rows),
        accuracy=share_interval(by_item, binary=binary).scaled(100) if by_item.size else None,
        items=by_item.size,
        delta=bootstrap_mean(gains).scaled(100) if compared else None,
        gained=int((gains > 0).sum()),
        lost=int((gains < 0).sum()),
        p_value=mean_test(gains, binary=binary) if compared else None,
        answers_equal=100 * fmean(row.answers_equal_to_f16 for row in rows),
        fallbacks=max(row.fallbacks for row in rows),
        tensors=sum(rows[0].tensor_types.values()),
    )


def verified(run: ScoredRun) -> list[Any]:
    """How a run was served: merged before adapter for each backend, the files alone first."""
    order = ("rendered", "plain", "newline", "second")
    return sorted(run.verifications, key=lambda row: (row.backend, row.mode != "merged", order.index(row.form)))


def phase_rows(row: ArmRow) -> list[dict[str, Any]]:
    """The median of each phase over the repetitions of all seeds; `evaluation.measure.speed.summary` explains it."""
    timed = [dict(t._mapping) for run in row.runs for t in run.timings if t.arm == row.arm]
    return sorted(summary(timed), key=lambda phase: [*PHASES].index(phase["phase"]))


# Chapters


def served(comparison: Comparison) -> Section | None:
    """Whether exports answer as the trained models do: the files alone, and what is served."""
    rows = [(run, row) for run in comparison.runs for row in verified(run)]
    if not rows:
        return None
    headers = ("Arm", "Backend", "Mode", "Asked", "Prompts", "Rendered %", "Tokens %", "Answers %", "Ties %",
               "Adapter = merged %", "Perturbed adapter noticed")  # fmt: skip
    replies = [row for _, row in rows if row.prompts]
    alike = sum((row.answered or 0) + (row.tied or 0) > 1 - 1e-8 for row in replies)
    words = (
        f"{alike} of {len(replies)} answer every prompt as the trained model does, or differ only where two tokens tie "
        "and rounding decides. Shares of prompts on which the backend matches training: the rendered text, the token "
        "ids (Ollama: their number), and the greedy answer of Hugging Face. Prompts are asked plainly, with a trailing "
        "newline, and as the second question of a conversation; rendered: the files alone are given the text itself, "
        "with export.parity_arithmetic: f32 without the rounding of the engine. Not reported: the server is too old "
        "to say."
    )
    notes = (
        Text(f"{run.arm} seed {run.seed}, {_backend(row)}, {row.mode}, {row.form}: {row.first_difference}", "note")
        for run, row in rows
        if row.first_difference
    )
    table = Table("Served as trained, percent of prompts", headers, [_served_line(run, row) for run, row in rows])
    return Section("Served as trained", (Text(words), table, *notes), brief=5)


def _backend(row: Any) -> str:
    return f"{row.backend} {row.backend_version}"


def _served_line(run: ScoredRun, row: Any) -> tuple[object, ...]:
    def reported(share: float | None) -> str:
        return "not reported" if row.prompts and share is None else percent(share)

    return (
        Cell(run.arm, arm=run.arm, hint=f"seed {run.seed}"), _backend(row), row.mode, row.form,
        str(row.prompts) if row.prompts else "not supported", reported(row.rendered), reported(row.counted),
        percent(row.answered), percent(row.tied), percent(row.equal_to_merged),
        {True: "yes", False: Cell("NO", tone="bad"), None: "–"}[row.perturbed_noticed],
    )  # fmt: skip


def speed(comparison: Comparison) -> Section | None:
    lines = []
    for row in comparison.rows:
        backend = f"{row.runs[0].backend_name} {row.runs[0].backend_version}"
        for phase in phase_rows(row):
            median = Interval(phase["median"], phase["low"], phase["high"])
            words = f"{interval(median, digits=2 if phase['unit'] == 'ms' else 0)} {phase['unit']}"
            lines.append((arm_cell(row.arm), backend, PHASES[phase["phase"]], words, percent(phase["confidence"]),
                          str(phase["repetitions"])))  # fmt: skip
    if not lines:
        return None
    caption = "Medians over the repetitions of all seeds, without the warm-up, with intervals from order statistics"
    headers = ("Arm", "Backend", "Phase", "Median [interval]", "Confidence %", "Repetitions")
    words = (
        "Requests run one at a time. The intervals describe one process each, so medians of two processes cannot be "
        "compared; an arm is compared with the base that takes turns with it in one process."
    )
    return Section("Speed by phase", (Text(words), Table(caption, headers, lines)))


def precisions(comparison: Comparison) -> Section | None:
    """The models in other precisions."""
    rows, title = [each for row in comparison.rows for each in precision_rows(row.runs)], comparison.primary.title
    if not rows:
        return None
    headers = ("Arm", "Type", "Size, MB", "Bits per weight", f"{title}, % [95%]", "Δ to f16, points [95%]",
               "Items better, worse", "Same answer as f16, %", "Fallback tensors")  # fmt: skip
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
        f"bits per weight the tensors'. Items are better or worse than with f16; the difference is "
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
    table = Table("Other precisions on the same test items", headers, lines)
    return Section("Quantization", (Text(" ".join(words)), table), brief=4)
