"""What each stage of a run needs: rows of bytes of RAM, GPU memory and disk."""

import configparser
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipelines.planning.bases import Base
from pipelines.planning.blank import blank_model, weigh
from pipelines.planning.lengths import Lengths
from pipelines.planning.memory import TrainingMemory, training_memory
from pipelines.planning.passes import passes_of
from pipelines.planning.sizes import FP32, HALF, gguf_bytes
from pipelines.schema import Params
from trainers import BUILDS_ON
from trainers.settings import TrainSettings

RAM, GPU, DISK = "RAM", "GPU memory", "disk"
HUB_DISK = "HF_HOME's disk"
"""Where that is another one than the project's."""


@dataclass(frozen=True)
class Row:
    """One line of the plan.

    Attributes:
        stage: As in dvc.yaml; with the arm where it matters.
        what: What the bytes are.
        bytes: How many.
        resource: RAM, GPU memory, disk or HF_HOME's disk.
        kept: Of disk: whether it stays after the stage.
    """

    stage: str
    what: str
    bytes: int
    resource: str
    kept: bool = False


@dataclass(frozen=True)
class Case:
    """What is planned.

    Attributes:
        params: The whole of params.yaml.
        base: The base model's shape.
        lengths: Tokens of the longest items.
        on_gpu: Whether models run on a GPU.
        process: Arm → bytes of its training process without tensors; None: not measured.
    """

    params: Params
    base: Base
    lengths: Lengths
    on_gpu: bool
    process: Callable[[str], int | None]

    def settings(self, arm: str) -> TrainSettings:
        """Section train for an arm; a base that lies in 4 bit is trained in 4 bit."""
        settings = self.params.train_for(arm)
        return settings.model_copy(update={"quantize_base": "nf4"}) if self.base.in_4_bit else settings

    def training(self, arm: str, **changes: Any) -> TrainingMemory:
        """What an arm needs in tensors, with some of its settings changed."""
        code = self.params.code_of(arm)
        settings = self.settings(arm).model_copy(update=changes)
        return training_memory(
            self.base.config,
            settings,
            tokens=min(self.lengths.train, settings.max_length),
            valid_tokens=min(self.lengths.valid, settings.max_length),
            on_gpu=self.on_gpu,
            grit="grit" in BUILDS_ON.get(code, ()),
            unsloth=code == "hybrid_grit",
        )


def training_rows(case: Case, arm: str) -> tuple[list[Row], TrainingMemory]:
    """RAM, or GPU memory and RAM, of stage train; stage probe trains the first steps again and needs no more."""
    memory = case.training(arm)
    stage, place = f"train {arm}", GPU if case.on_gpu else RAM
    weights = memory.weights
    words = "4-bit" if case.settings(arm).quantize_base == "nf4" else "frozen"
    rows = [Row(stage, f"base, {weights.parameters:,} parameters, {words}", weights.base, place)]
    names = {"adapter": f"adapter, {weights.lora:,} parameters"}
    rows += [Row(stage, names.get(name, name), size, place) for name, size in memory.kept.items() if size]
    largest = max(memory.passes, memory.evaluation, memory.step)
    if largest == memory.passes:
        rows += [Row(stage, f"passes: {kind}", size, place) for kind, size in memory.kinds.items() if size]
    else:
        name = "evaluation pass" if largest == memory.evaluation else "optimizer step"
        rows.append(Row(stage, name, largest, place))
    if (own := case.process(arm)) is not None:
        rows.append(Row(stage, "process with its packages (measured)", own, RAM))
    return rows, memory


def process_row(case: Case, stage: str, arm: str) -> list[Row]:
    """RAM of a stage's process without tensors, as measured of training; empty where it was not measured."""
    own = case.process(arm)
    return [] if own is None else [Row(stage, "process with its packages (as training)", own, RAM)]


def base_rows(case: Case, arm: str) -> list[Row]:
    """RAM of stage prepare_base, where it trains the embedded base: all weights, in float32."""
    section, place = case.params.prepare_base, GPU if case.on_gpu else RAM
    if section.source != "embedded":
        return []
    settings = case.params.train.model_copy(
        update={"precision": section.precision, "gradient_checkpointing": False, "gradient_accumulation": 1}
    )
    config, tokens = case.base.config, case.lengths.general or section.context
    made = passes_of(
        config, blank_model, settings, batch=section.batch_size, tokens=tokens, train=True, fused_head=False
    )
    own = weigh(blank_model(config)).lora * FP32
    return [
        Row("prepare_base", "weights and AdamW's moments", 3 * own, place),
        Row("prepare_base", f"passes, {tokens} tokens", made.peak, place),
        *process_row(case, "prepare_base", arm),
    ]


def measure_rows(case: Case, memory: TrainingMemory, arm: str) -> list[Row]:
    """RAM or GPU memory of stage measure: whole logits and all hidden states, with the adapter on and off."""
    section, config, place = case.params.measure, case.base.config.get_text_config(), GPU if case.on_gpu else RAM
    settings = case.settings(arm)
    tokens = min(section.max_tokens, getattr(config, "max_position_embeddings", section.max_tokens))
    size = HALF if case.on_gpu and settings.precision == "bf16" else FP32
    items = section.batch_size * tokens
    hidden = 2 * (config.num_hidden_layers + 1) * items * config.hidden_size * size
    # The logits of a batch, and of one text at a time the two copies in float32 that its loss makes.
    logits = config.vocab_size * (items * size + 2 * tokens * FP32)
    return [
        Row("measure", "base and adapter", memory.weights.base + FP32 * memory.weights.lora, place),
        Row("measure", f"logits, {tokens} tokens at most", logits, place),
        Row("measure", "hidden states, adapter on and off", hidden, place),
        *process_row(case, "measure", arm),
    ]


def copies_in_cache(project: Path) -> bool:
    """Whether DVC's cache holds a second copy of every output: unless it links, or the file system copies on write."""
    config = configparser.ConfigParser()
    config.read([project / ".dvc" / "config", project / ".dvc" / "config.local"], encoding="utf-8")
    kinds = [k.strip(" '\"") for k in config.get("cache", "type", fallback="reflink,copy").split(",")]
    if kinds[0] in ("hardlink", "symlink"):
        return False
    return "reflink" not in kinds or not _reflinks(project)


def _reflinks(folder: Path) -> bool:
    from dvc_objects.fs.system import reflink

    with tempfile.TemporaryDirectory(dir=folder) as name:
        source = Path(name) / "source"
        source.write_bytes(b"0" * 4096)
        try:
            reflink(str(source), str(source.with_name("copy")))
        except OSError:
            return False
    return True


def checkpoints(settings: TrainSettings) -> int:
    """How many an arm has on the disk at once: what the Trainer keeps (trainers/arguments.py), and the next one.

    It is written before the oldest is removed.
    """
    return (3 if settings.keeps_best else 2) + 1


def disk_rows(case: Case, memories: dict[str, TrainingMemory], *, doubled: bool, downloads: str = DISK) -> list[Row]:
    """Disk of a whole run from nothing, but for weights that are downloaded: what stays, and the most for a while.

    Args:
        case: What is planned.
        memories: Arm → what its training needs.
        doubled: Whether DVC's cache holds a copy of every output.
        downloads: Disk that downloads from the hub go to: DISK or HUB_DISK.
    """
    params = case.params
    weights = next(iter(memories.values())).weights
    size = partial(gguf_bytes, parameters=weights.parameters, row=case.base.config.get_text_config().hidden_size)
    served, f16, seeds = size(params.export.quantization), size("f16"), len(params.matrix.seeds)
    half = weights.parameters * HALF
    rows = []
    if case.base.to_download:
        got = weigh_in_4_bit(case) if case.base.in_4_bit else half
        rows.append(Row("prepare_base", "download of the base", got, downloads, kept=True))
    if case.base.merged_to_download:
        rows.append(Row("export", "download of the weights to merge into", half, downloads, kept=True))
    kept = [Row("prepare_base", "embedded base in fp16", half, DISK, kept=True)] * (
        params.prepare_base.source == "embedded"
    )
    for arm, memory in memories.items():
        adapter = FP32 * memory.weights.lora
        kept.append(
            Row(
                f"train {arm}",
                f"adapters of {seeds} runs" if seeds > 1 else "adapter",
                seeds * adapter,
                DISK,
                kept=True,
            )
        )
        kept.append(
            Row(
                f"export {arm}",
                f"GGUF of model and adapter, {seeds} runs" if seeds > 1 else "GGUF of model and adapter",
                seeds * (served + adapter),
                DISK,
                True,
            )
        )
    plain = params.export.quantization == "f16"
    kept.append(Row("export base", "GGUF" if plain else "GGUF, served and f16", served + (not plain) * f16, DISK, True))
    if doubled:
        kept.append(Row("all", "second copy in DVC's cache", sum(row.bytes for row in kept), DISK, kept=True))
    rows += kept
    for arm, m in memories.items():
        states = 3 * FP32 * m.weights.lora + m.kept["optimizer state"] + m.kept["GRIT"]  # adapter, the probe's moments
        count = checkpoints(case.settings(arm))
        rows.append(Row(f"train {arm}", f"{count} checkpoints, until it ends", count * states, DISK))
    made = max((size(name) for name in params.quantize.types), default=0)
    exact = params.export.parity_arithmetic == "f32"
    files, words = (
        half + f16 + exact * size("f32"),
        "merged model, f16 and f32 GGUF" if exact else "merged model, f16 GGUF",
    )
    return [
        *rows,
        Row("export", f"{words}, until it ends", files, DISK),
        Row("quantize", "models in other precisions, until it ends", made + (not plain) * (f16 + half), DISK),
    ]


def weigh_in_4_bit(case: Case) -> int:
    """Bytes of the base's files in 4 bit: what is not quantized is there in 16 bit."""
    from pipelines.planning.blank import with_adapter

    settings = case.params.train.model_copy(update={"quantize_base": "nf4"})
    return weigh(with_adapter(case.base.config, settings, torch.bfloat16, prepared=False)).base
