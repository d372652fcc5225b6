"""What single changes of settings would save in the stages that do not fit, or fit barely."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.planning.memory import TrainingMemory
from pipelines.planning.needs import DISK, HUB_DISK, Case, Row, base_rows, measure_rows
from pipelines.planning.serving import evaluate_rows, export_rows, quantize_rows
from pipelines.planning.verdicts import MARGIN, Verdict, needed_by

Value = int | str
_WORTH = 0.01
"""Share of what a stage needs that a change must save to be named; tables of bits a weight are no more exact."""


@dataclass(frozen=True)
class _Lever:
    """A setting that can make a stage smaller.

    Attributes:
        section, key: Of params.yaml.
        less: What it would be set to in a case, the mildest change first; one that saves less than `_WORTH` is skipped.
        price: What else changes, in words.
    """

    section: str
    key: str
    less: Callable[[Case, Any], Sequence[Value]]
    price: str = ""


def _half(case: Case, value: Any) -> Sequence[Value]:
    return [value // 2] if value > 1 else []


def _half_a_text(case: Case, value: Any) -> Sequence[Value]:
    return [value // 2] if value // 2 >= 8 else []  # the least that section measure takes


def _half_a_context(case: Case, value: Any) -> Sequence[Value]:
    """Only what still holds the longest item and a whole answer."""
    return [value // 2] if value // 2 >= max(32, case.lengths.train + case.params.evaluate.max_tokens) else []


_CONTEXT = _Lever("export", "num_ctx", _half_a_context, "shorter conversations")
_PARALLEL = _Lever("evaluate", "parallel", _half)
# Stage → the settings that make it smaller, and the stage's rows.
_LEVERS: dict[str, tuple[list[_Lever], Callable[[Case, TrainingMemory, str], list[Row]]]] = {
    "prepare_base": ([_Lever("prepare_base", "batch_size", _half)], lambda case, _, arm: base_rows(case, arm)),
    "measure": (
        [
            _Lever("measure", "batch_size", _half),
            _Lever("measure", "max_tokens", _half_a_text, "longer texts are cut off"),
        ],
        measure_rows,
    ),
    "export": ([_Lever("export", "parity_arithmetic", lambda *_: ["f16"]), _CONTEXT], export_rows),
    "evaluate": (
        [
            _PARALLEL,
            _Lever("export", "quantization", lambda *_: ["q8_0", "q4_K_M"], "served and scored so"),
            _CONTEXT,
        ],
        evaluate_rows,
    ),
    "quantize": ([_PARALLEL, _CONTEXT], quantize_rows),
}


@dataclass(frozen=True)
class Saving:
    """A change of settings and the bytes that a stage would then need less; a sentence and 0 where none helps."""

    stage: str
    change: str
    bytes: int


def savings_of(case: Case, arm: str, now: TrainingMemory) -> list[Saving]:
    """What single changes of section train would save of the tensors of an arm, the largest saving first."""
    settings = case.settings(arm)
    changes: list[tuple[str, dict[str, Any]]] = []
    if settings.batch_size > 1:
        half = settings.batch_size // 2
        more = settings.gradient_accumulation * settings.batch_size // half
        changes.append(
            (
                f"train.batch_size: {half} with gradient_accumulation: {more}",
                {"batch_size": half, "gradient_accumulation": more},
            )
        )
    if not settings.gradient_checkpointing:
        changes.append(("train.gradient_checkpointing: true", {"gradient_checkpointing": True}))
    if settings.quantize_base == "none":
        changes.append(("train.quantize_base: nf4", {"quantize_base": "nf4"}))
    shorter = min(settings.max_length, case.lengths.train) // 2
    if shorter >= 8:
        too = " with train.overlong: leave_out" if settings.overlong == "refuse" else ""
        changes.append((f"train.max_length: {shorter}{too} (longer items left out)", {"max_length": shorter}))
    stage = f"train {arm}"
    found = [Saving(stage, words, now.peak - case.training(arm, **change).peak) for words, change in changes]
    return sorted((s for s in found if s.bytes > 0), key=lambda s: -s.bytes)


def other_savings(
    case: Case, rows: list[Row], memory: TrainingMemory, arm: str, resource: str, stage: str
) -> list[Saving]:
    """What would save memory in a stage that does not train LoRA: differences to plans with one setting changed.

    Args:
        case: What is planned.
        rows: Of the plan as it is.
        memory: Of the arm that needs the most.
        arm: That arm.
        resource: That is short: RAM or GPU memory.
        stage: That needs it.

    Returns:
        The largest saving first; one sentence where none of the stage's settings helps.
    """
    levers, rows_of = _LEVERS[stage]
    before, found = needed_by(resource, rows)[stage], []
    for lever in levers:
        section = getattr(case.params, lever.section)
        for less in lever.less(case, getattr(section, lever.key)):
            smaller = case.params.model_copy(update={lever.section: section.model_copy(update={lever.key: less})})
            changed = rows_of(replace(case, params=smaller), memory, arm)
            saved = before - needed_by(resource, changed).get(stage, 0)
            if saved > before * _WORTH:
                price = f" ({lever.price})" if lever.price else ""
                found.append(Saving(stage, f"{lever.section}.{lever.key}: {less}{price}", saved))
                break
    none = "no setting makes this smaller: it holds whole models; take a smaller base"
    return sorted(found, key=lambda saving: -saving.bytes) or [Saving(stage, none, 0)]


def advice(case: Case, rows: list[Row], memories: dict[str, TrainingMemory], verdicts: list[Verdict]) -> list[Saving]:
    """Savings for the stages whose memory does not fit, or barely; for training those of its largest arm."""
    short: list[tuple[str, str]] = []
    for verdict in verdicts:
        if verdict.resource not in (DISK, HUB_DISK) and verdict.free is not None:
            by_stage = needed_by(verdict.resource, rows)
            short += [(verdict.resource, stage) for stage, size in by_stage.items() if size * MARGIN > verdict.free]
    training = [stage.removeprefix("train ") for _, stage in short if stage.startswith("train ")]
    found: list[Saving] = []
    if training:
        arm = max(training, key=lambda arm: memories[arm].peak)
        found += savings_of(case, arm, memories[arm])
    largest = max(memories, key=lambda arm: memories[arm].peak)
    for resource, stage in short:
        if not stage.startswith("train "):
            found += other_savings(case, rows, memories[largest], largest, resource, stage)
    return list(dict.fromkeys(found))
