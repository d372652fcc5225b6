"""The whole plan: rows, what is needed of each resource, whether this machine has it, and what would save how much."""

from dataclasses import dataclass, field
from typing import Any

from pipelines.planning import needs
from pipelines.planning.machine import Machine
from pipelines.planning.memory import TrainingMemory
from pipelines.planning.needs import DISK, GPU, HUB_DISK, RAM, Case, Row
from pipelines.planning.savings import Saving, advice
from pipelines.planning.serving import evaluate_rows, export_rows, quantize_rows
from pipelines.planning.verdicts import Verdict, verdict_on

_SLOW_ON_CPU = 500_000_000
"""Parameters from which a note says that training on a CPU is slow."""


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
            "verdicts": [{**vars(v), "fits": v.fits, "barely": v.barely} for v in self.verdicts],
            "savings": [vars(s) for s in self.savings],
            "notes": self.notes,
        }


def notes_of(case: Case, parameters: int, *, gpu_here: bool) -> list[str]:
    """What else is to be known."""
    params = case.params
    notes = [
        f"items: {case.lengths.train} tokens ({case.lengths.origin})",
        f"shape of the base: {case.base.origin}",
        "stages run one after the other; stage probe trains the first steps again and needs no more than train",
        "disk is planned for a whole run from nothing, though files of earlier runs may be there already, and held "
        "against what is free now",
    ]
    precise = any(
        case.settings(a).precision == "bf16" or case.settings(a).optimizer == "adamw_8bit" for a in case_arms(case)
    )
    if not case.on_gpu and (parameters > _SLOW_ON_CPU or precise):
        notes.append("no GPU is used: training works on a CPU, but a model and settings like these are slow there")
    if case.on_gpu and not gpu_here:
        notes.append("planned for a GPU, and this machine has none")
    if case.on_gpu:
        notes.append(
            "llama.cpp is planned in RAM: it uses a GPU only where it was built for it, and needs about as much there"
        )
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
    for rows_of in (needs.measure_rows, export_rows, evaluate_rows, quantize_rows):
        rows += rows_of(case, memories[largest], largest)
    downloads = DISK if machine.hub_disk is None else HUB_DISK
    rows += needs.disk_rows(case, memories, doubled=doubled, downloads=downloads)
    verdicts = [verdict_on(RAM, rows, machine.ram)]
    if case.on_gpu:
        verdicts.append(verdict_on(GPU, rows, machine.gpu, machine.gpu_name))
    verdicts.append(verdict_on(DISK, rows, machine.disk))
    if any(row.resource == HUB_DISK for row in rows):
        verdicts.append(verdict_on(HUB_DISK, rows, machine.hub_disk))
    savings = advice(case, rows, memories, verdicts)
    parameters = memories[largest].weights.parameters
    notes = notes_of(case, parameters, gpu_here=machine.gpu is not None)
    return Plan(case, rows, verdicts, memories, savings, notes)
