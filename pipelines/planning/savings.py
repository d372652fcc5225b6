"""What single changes of settings would save in the stages that do not fit, or fit barely."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pipelines.planning.memory import TrainingMemory
from pipelines.planning.needs import DISK, Case, Row, base_rows, measure_rows
from pipelines.planning.serving import evaluate_rows, export_rows, quantize_rows
from pipelines.planning.verdicts import MARGIN, Verdict, needed_by

# Stage → section and key of the one setting that makes it smaller, and the stage's rows.
_LEVERS: dict[str, tuple[str, str, Callable[[Case, TrainingMemory, str], list[Row]]]] = {
    "prepare_base": ("prepare_base", "batch_size", lambda case, _, arm: base_rows(case, arm)),
    "measure": ("measure", "batch_size", measure_rows),
    "export": ("export", "parity_arithmetic", export_rows),
    "evaluate": ("evaluate", "parallel", evaluate_rows),
    "quantize": ("evaluate", "parallel", quantize_rows),
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
    """What would save memory in a stage that does not train LoRA: the difference to a plan with one setting changed.

    Args:
        case: What is planned.
        rows: Of the plan as it is.
        memory: Of the arm that needs the most.
        arm: That arm.
        resource: That is short: RAM or GPU memory.
        stage: That needs it.
    """
    section, key, rows_of = _LEVERS[stage]
    value = getattr(getattr(case.params, section), key)
    less = "f16" if key == "parity_arithmetic" else max(1, value // 2)
    if less != value:
        smaller = getattr(case.params, section).model_copy(update={key: less})
        changed = replace(case, params=case.params.model_copy(update={section: smaller}))
        saved = needed_by(resource, rows)[stage] - needed_by(resource, rows_of(changed, memory, arm))[stage]
        if saved > 0:
            return [Saving(stage, f"{section}.{key}: {less}", saved)]
    return [Saving(stage, "no setting makes this smaller: it holds whole models; take a smaller base", 0)]


def advice(case: Case, rows: list[Row], memories: dict[str, TrainingMemory], verdicts: list[Verdict]) -> list[Saving]:
    """Savings for the stages whose memory does not fit, or barely; for training those of its largest arm."""
    short: list[tuple[str, str]] = []
    for verdict in verdicts:
        if verdict.resource != DISK and verdict.free is not None:
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
