"""The whole plan: rows, what is needed of each resource, whether this machine has it, and what would save how much."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from pipelines.planning import needs
from pipelines.planning.machine import Machine
from pipelines.planning.memory import TrainingMemory
from pipelines.planning.needs import DISK, GPU, RAM, Case, Row

_SLOW_ON_CPU = 500_000_000
"""Parameters from which a note says that training on a CPU is slow."""


@dataclass(frozen=True)
class Verdict:
    """What is needed of one resource, and what is there.

    Attributes:
        resource: RAM, GPU memory or disk.
        needed: Bytes at the worst moment.
        stage: When that is.
        free: Bytes that this machine has; None where it has no such thing.
    """

    resource: str
    needed: int
    stage: str
    free: int | None

    @property
    def fits(self) -> bool:
        """Whether there is enough."""
        return self.free is not None and self.needed <= self.free


@dataclass(frozen=True)
class Saving:
    """A change of settings and the bytes that a stage would then need less; a sentence and 0 where none helps."""

    stage: str
    change: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """See the module's docstring.

    Attributes:
        case: What was planned.
        rows: Bytes by stage.
        verdicts: By resource.
        savings: Changes that save memory in the stages that do not fit.
        notes: What else is to be known, a sentence each.
    """

    case: Case
    rows: list[Row]
    verdicts: list[Verdict]
    memories: dict[str, TrainingMemory]
    savings: list[Saving] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether this machine has all of it."""
        return all(verdict.fits for verdict in self.verdicts)

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON; sizes are bytes."""
        case = self.case
        return {
            "schema": 1,
            "profile": case.params.profile,
            "fits": self.fits,
            "base": {"origin": case.base.origin, "in_4_bit": case.base.in_4_bit},
            "tokens": {"train": case.lengths.train, "valid": case.lengths.valid, "origin": case.lengths.origin},
            "on_gpu": case.on_gpu,
            "rows": [vars(row) for row in self.rows],
            "training": {
                arm: {
                    "parameters": m.weights.parameters,
                    "trained_parameters": m.weights.lora,
                    "base": m.weights.base,
                    "kept": m.kept,
                    "passes": m.passes,
                    "passes_by_kind": m.kinds,
                    "evaluation": m.evaluation,
                    "optimizer_step": m.step,
                    "tensors_at_peak": m.peak,
                    "process": case.process(arm),
                }
                for arm, m in self.memories.items()
            },
            "verdicts": [{**vars(v), "fits": v.fits} for v in self.verdicts],
            "savings": [vars(s) for s in self.savings],
            "notes": self.notes,
        }


def needed_by(resource: str, rows: list[Row]) -> dict[str, int]:
    """Stage → bytes of a resource that it needs for itself."""
    by_stage: dict[str, int] = defaultdict(int)
    for row in rows:
        if row.resource == resource and not row.kept:
            by_stage[row.stage] += row.bytes
    return by_stage


def verdict_on(resource: str, rows: list[Row], free: int | None) -> Verdict:
    """Stages run one after the other: memory is that of the largest, disk what stays and the largest of the rest."""
    by_stage = needed_by(resource, rows)
    stage, most = max(by_stage.items(), key=lambda item: item[1], default=("", 0))
    kept = sum(row.bytes for row in rows if row.resource == resource and row.kept)
    return Verdict(resource, most + kept, stage, free)


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
        changes.append((f"train.max_length: {shorter} (longer items left out)", {"max_length": shorter}))
    stage = f"train {arm}"
    found = [Saving(stage, words, now.peak - case.training(arm, **change).peak) for words, change in changes]
    return sorted((s for s in found if s.bytes > 0), key=lambda s: -s.bytes)


def other_savings(case: Case, rows: list[Row], stage: str) -> list[Saving]:
    """What would save memory in a stage that does not train LoRA: half of what its batch or its caches take."""
    params = case.params
    halves = {
        "prepare_base": ("prepare_base.batch_size", params.prepare_base.batch_size, "passes"),
        "measure": ("measure.batch_size", params.measure.batch_size, "logits"),
        "evaluate": ("evaluate.parallel", params.evaluate.parallel, "keys"),
        "quantize": ("evaluate.parallel", params.evaluate.parallel, "keys"),
    }
    if stage not in halves or halves[stage][1] == 1:
        return [Saving(stage, "no setting makes this smaller: it holds the whole model; take a smaller base", 0)]
    key, value, what = halves[stage]
    part = sum(row.bytes for row in rows if row.stage == stage and row.what.startswith(what))
    return [Saving(stage, f"{key}: {value // 2}", round(part * (1 - value // 2 / value)))]


def advice(case: Case, rows: list[Row], memories: dict[str, TrainingMemory], verdicts: list[Verdict]) -> list[Saving]:
    """Savings for the stages that need more memory than there is; for training those of its largest arm."""
    short: list[str] = []
    for verdict in verdicts:
        if verdict.resource != DISK and verdict.free is not None:
            short += [stage for stage, size in needed_by(verdict.resource, rows).items() if size > verdict.free]
    training = [stage.removeprefix("train ") for stage in short if stage.startswith("train ")]
    found: list[Saving] = []
    if training:
        arm = max(training, key=lambda arm: memories[arm].peak)
        found += savings_of(case, arm, memories[arm])
    for stage in dict.fromkeys(stage for stage in short if not stage.startswith("train ")):
        found += other_savings(case, rows, stage)
    return found


def notes_of(case: Case, parameters: int, *, gpu_here: bool) -> list[str]:
    """What else is to be known."""
    params = case.params
    notes = [
        f"items: {case.lengths.train} tokens ({case.lengths.origin})",
        f"shape of the base: {case.base.origin}",
        "stages run one after the other; stage probe trains the first steps again and needs no more than train",
    ]
    precise = any(
        case.settings(a).precision == "bf16" or case.settings(a).optimizer == "adamw_8bit" for a in case_arms(case)
    )
    if not case.on_gpu and (parameters > _SLOW_ON_CPU or precise):
        notes.append("no GPU is used: training works on a CPU, but a model and settings like these are slow there")
    if case.on_gpu and not gpu_here:
        notes.append("planned for a GPU, and this machine has none")
    if case.on_gpu and any(params.code_of(arm) == "hybrid_grit" for arm in case_arms(case)):
        notes.append("Unsloth's fused kernels are not simulated: hybrid_grit is planned as if it used torch's")
    if params.evaluate.backend in ("auto", "ollama"):
        notes.append(
            "an Ollama server that answers keeps copies of the models of its own, in its folder and its memory"
        )
    if case.process(case_arms(case)[0]) is None:
        notes.append("the processes' own share of RAM was not measured and is not in the sums")
    return notes


def case_arms(case: Case) -> list[str]:
    """The arms of the matrix."""
    return case.params.matrix.arms


def make(case: Case, machine: Machine, *, doubled: bool) -> Plan:
    """Plan a run.

    Args:
        case: What is planned.
        machine: What there is.
        doubled: Whether DVC's cache holds a copy of every output.
    """
    rows: list[Row] = []
    memories: dict[str, TrainingMemory] = {}
    for arm in case_arms(case):
        of_arm, memories[arm] = needs.training_rows(case, arm)
        rows += of_arm
    largest = max(memories, key=lambda arm: memories[arm].peak)
    rows = needs.base_rows(case, largest) + rows
    rows += needs.measure_rows(case, memories[largest], largest)
    rows += needs.export_rows(case, memories[largest], largest)
    rows += needs.disk_rows(case, memories, doubled=doubled)
    verdicts = [verdict_on(RAM, rows, machine.ram)]
    if case.on_gpu:
        verdicts.append(verdict_on(GPU, rows, machine.gpu))
    verdicts.append(verdict_on(DISK, rows, machine.disk))
    savings = advice(case, rows, memories, verdicts)
    parameters = memories[largest].weights.parameters
    notes = notes_of(case, parameters, gpu_here=machine.gpu is not None)
    return Plan(case, rows, verdicts, memories, savings, notes)
