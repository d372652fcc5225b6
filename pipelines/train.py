"""Stage train: adapters/<arm>/<seed>/, one LoRA adapter; on several devices through `accelerate launch`."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import islice, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from db.files import (
    artifact,
    exclusive,
    finish_run,
    hash_inputs,
    key_of,
    package_versions,
    read_json,
    read_jsonl,
    sha256,
    staged,
    start_run,
)
from evaluation.tasks import Item, general, render
from pipelines.base_model import load_reference, resolved
from pipelines.code import code_hash
from pipelines.params import (
    ADAPTER,
    ConfigError,
    PipelineError,
    StageParams,
    check_arm,
    env_threads,
    explain,
    overridden,
    unique,
)
from pipelines.prompt import Form, Prompt, literal, prompt_text
from pipelines.stage import BASE, DATA, TEXTS, adapter_dir, command, die_with_parent, split_files
from trainers import arms
from trainers.callbacks import TRACKERS
from trainers.run import RANKS, Arm, TrainingJob
from trainers.run import run as train
from trainers.settings import Section, Seed, TrainSettings
from trainers.theirs import CONFIG, WEIGHTS, adopt
from trainers.words import suggest

TUNED = Path("tuned")
_NOT_TUNABLE = {"max_steps", "epochs", "max_length", "overlong", "eval_steps", "save_steps", "devices"}


class Tune(Section):
    """Section tune: the settings that every arm tries before it is trained."""

    grid: dict[str, list[Any]]  # key of section train → values; {} = off
    seed: Seed
    steps: Annotated[int, Field(ge=1, description="optimizer steps")] | None  # per trial; null: as in section train

    @field_validator("grid")
    @classmethod
    def _values_differ(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        lines = [
            f"{key}: expected different values, got {values}"
            for key, values in grid.items()
            if not values or any(values.count(v) > 1 for v in values)
        ]
        lines += [
            f"{key}: expected no such key: tries would not be comparable, or not be what is trained"
            for key in grid
            if key in _NOT_TUNABLE
        ]
        if any(isinstance(value, str) for value in grid.get("peft", [])):
            lines.append("peft: expected mappings, because DVC does not watch files that are tried")
        if lines:
            raise ValueError("\n".join(lines))
        return grid

    @property
    def tries(self) -> list[dict[str, Any]]:
        return (
            [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())] if self.grid else []
        )


def setting_errors(schema: type[BaseModel], settings: dict[str, Any]) -> list[Any]:
    """Pydantic's errors, if any."""
    try:
        schema(**settings)
    except ValidationError as error:
        return list(error.errors())
    return []


class Params(StageParams):
    report_to: list[str]  # no stage depends on it: it changes no adapter
    train: TrainSettings
    prompt: Prompt
    tune: Tune

    @field_validator("report_to")
    @classmethod
    def _trackers_exist(cls, names: list[str]) -> list[str]:
        lines = [f"unknown tracker {name!r}{suggest(name, TRACKERS)}" for name in names if name not in TRACKERS]
        missing = [TRACKERS[name] for name in names if name in TRACKERS and find_spec(name) is None]
        if missing:
            lines.append(f"{', '.join(missing)} is not installed; run `pip install {' '.join(missing)}`")
        if lines:
            raise ValueError("\n".join(lines))
        return unique(names)

    @model_validator(mode="after")
    def _every_arm_can_be_tuned(self) -> Self:
        lines: list[str] = []
        if self.tune.grid and self.tune.seed in self.matrix.seeds:
            lines.append(f"tune.seed: expected a seed outside of the matrix {self.matrix.seeds}, got {self.tune.seed}")
        existing = [
            arm for arm in self.matrix.arms if self.code_of(arm) in arms.names()
        ]  # stage check names the others
        for arm, values in product(existing, self.tune.tries):
            schema: type[TrainSettings] = arms.load(self.code_of(arm)).settings
            settings = overridden(overridden(self.train.model_dump(), self.arms.get(arm, {})), values)
            lines += explain(setting_errors(schema, settings), schema, "tune.grid")
            if self.tune.steps is not None and self.tune.steps <= settings["warmup_steps"]:
                lines.append(f"tune.steps: expected more than {arm}'s warm-up of {settings['warmup_steps']}")
        if lines:
            raise ValueError("\n".join(dict.fromkeys(lines)))
        return self

    def train_for(self, arm: str, values: Mapping[str, Any] | None = None) -> TrainSettings:
        """An arm's settings; `values` replaces what stage tune chose for it."""
        schema: type[TrainSettings] = arms.load(self.code_of(arm)).settings
        settings = overridden(self.train.model_dump(), self.arms.get(arm, {}))
        return schema(**overridden(settings, dict(self.tuned(arm).get("chosen", {}) if values is None else values)))

    def tuned(self, arm: str) -> dict[str, Any]:
        """The result of stage tune; empty if it is off or has not run."""
        file = TUNED / arm / "tuned.json"
        on = self.tune.grid and ADAPTER not in self.arms.get(arm, {})
        return dict(read_json(file)) if on and file.is_file() else {}

    def files_of(self, arm: str, seed: int) -> list[Path]:
        """The files in theirs/ that an arm uses: an adapter, or a PEFT configuration."""
        adapter, peft = self.adapter_of(arm, seed), self.train_for(arm, {}).peft
        if adapter:
            return [adapter / CONFIG, adapter / WEIGHTS]
        return [Path(peft)] if isinstance(peft, str) else []


def load_arm(name: str, params: Params) -> Arm:
    """The arm of that name; a variant runs the code of its original."""
    check_arm(name, params)
    arm: Arm = arms.load(params.code_of(name))
    return arm if arm.name == name else replace(arm, name=name, title=f"{arm.title}, variant {name}")


def training_code(arm: str) -> str:
    return code_hash("trainers.run", f"trainers.arms.{arm}")


def examples(split: str, template: str) -> list[tuple[str, ...]]:
    """Rendered prompts and answers, alternating, of every item of a split."""
    form = Form(template)
    return [form.parts(Item.from_json(row)) for row in read_jsonl(DATA / f"{split}.jsonl")]


def training_items(settings: TrainSettings, template: str, seed: int) -> list[tuple[str, ...]]:
    """The training split, plus general questions as `replay` asks, drawn with a seed that no base is trained with."""
    items = examples("train", template)
    count = round(len(items) * settings.replay / (1 - settings.replay))
    questions = islice(general.questions(-1 - seed, held_out=False), count)
    return items + [(render(literal(template), prompt), answer) for _, prompt, answer in questions]


def base_texts() -> list[tuple[str, bool]]:
    """(text, whether it is complete) from stage base_texts."""
    return [(row["text"], row["ended"]) for row in read_jsonl(TEXTS / "texts.jsonl")]


def inputs_of_training(params: Params, arm: str, seed: int) -> dict[str, str]:
    files = [*split_files("train", "valid"), BASE / "base.json", TEXTS / "texts.jsonl"]
    return hash_inputs(*files, *params.files_of(arm, seed))


def key_of_run(params: Params, arm: str, seed: int, settings: Mapping[str, Any]) -> str:
    """A hash of everything that decides a run, so that a checkpoint is only used by the run that wrote it."""
    code = training_code(params.code_of(arm))
    inputs = inputs_of_training(params, arm, seed)
    return key_of([arm, seed, settings, inputs, load_reference()[1], package_versions(), code])


def job_of(params: Params, settings: TrainSettings, seed: int, output: Path, checkpoints: Path) -> TrainingJob:
    prompt_text(params.prompt)  # refuses a system message that differs from prepare_base's
    template = params.prompt.template
    return TrainingJob(
        base=load_reference()[0],
        settings=resolved(settings),
        seed=seed,
        train=training_items(settings, template, seed),
        valid=examples("valid", template),
        output=output,
        checkpoints=checkpoints,
        texts=base_texts(),
        images=DATA,
    )


def devices_for(settings: TrainSettings) -> int:
    """How many devices of this machine train a run; without a GPU, how many processes on the CPU."""
    if settings.devices == 1:
        return 1
    import torch

    visible = torch.cuda.device_count()
    count = max(1, visible) if settings.devices == "all" else settings.devices
    if 0 < visible < count:
        raise ConfigError(f"train.devices: expected at most {visible}, the number of visible GPUs, got {count}")
    if settings.batch_size % count:
        raise ConfigError(f"train.batch_size: expected a multiple of the {count} devices, got {settings.batch_size}")
    return count


def launch(arm: str, seed: int, devices: int) -> None:
    """Run this stage in one process per device, each with its share of the CPU threads."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options: dict[str, Any] = {
        "num_processes": devices, "num_machines": 1, "main_process_port": 0,
        "mixed_precision": "no", "dynamo_backend": "no",  # the Trainer has its own
        "num_cpu_threads_per_process": max(1, env_threads() // devices),
        "gpu_ids": "all",  # the visible ones, whatever accelerate's own configuration says
    }  # fmt: skip
    os.environ[RANKS] = str(devices)
    words = ["--multi_gpu", *(f"--{name}={value}" for name, value in options.items())]
    try:
        launch_command(launch_command_parser().parse_args([*words, "--module", "pipelines.train", arm, str(seed)]))
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"killed by signal {-failure.exitcode}" if failure.exitcode < 0 else "failed with the error above"
        raise PipelineError(f"device {rank} of {devices}: {how}") from None


def rank() -> int | None:
    """The number of this process within a launch, otherwise None."""
    return int(os.environ["RANK"]) if RANKS in os.environ else None


def run(params: Params, arm_name: str, seed: int) -> None:
    arm, tuned, template = load_arm(arm_name, params), params.tuned(arm_name), prompt_text(params.prompt)
    foreign = params.adapter_of(arm_name, seed)
    if params.tune.grid and not tuned and not foreign:
        raise ConfigError(f"{TUNED / arm_name}: no result of stage tune found; run `dvc repro tune`")
    settings, (reference, base_fingerprint) = resolved(params.train_for(arm_name)), load_reference()
    if not foreign and rank() is None and (devices := devices_for(settings)) > 1:
        launch(arm_name, seed, devices)
        return
    used = {
        "train": {"adapter": str(foreign)} if foreign else settings.model_dump(),
        "prompt": params.prompt.model_dump(),
        **({"tuned": tuned} if tuned else {}),
    }
    key, inputs = key_of_run(params, arm_name, seed, used), inputs_of_training(params, arm_name, seed)
    kept = Path("checkpoints") / arm_name / str(seed)
    if rank():  # only the first process writes anything that stays
        with TemporaryDirectory() as scratch:
            train(arm, job_of(params, settings, seed, Path(scratch), kept / key[:16]))
        return
    out = adapter_dir(arm_name, seed)
    with exclusive(kept.with_name(f"{seed}.lock"), f"train {arm_name} seed {seed}"), staged(out) as folder:
        record = start_run("train", params=used, inputs=inputs, arm=arm_name, seed=seed, prompt_template=template)
        job = job_of(params, settings, seed, folder, kept / key[:16])
        job = replace(job, report_to=params.report_to, logs=Path("logs") / arm_name / str(seed))
        summary = adopt(arm, job, foreign) if foreign else train(arm, job)
        embedded = BASE / "model.safetensors"
        parent = sha256(embedded) if embedded.is_file() else base_fingerprint
        record.artifacts.append(artifact("adapter", folder / WEIGHTS, out / WEIGHTS, parent=parent))
        record.extra = {**summary, "base": asdict(reference)}
        finish_run(record, folder)
    shutil.rmtree(kept, ignore_errors=True)
    print(json.dumps(summary))


if __name__ == "__main__":
    if rank() is not None:
        die_with_parent()  # the launch
    if rank():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # it would repeat the output of the first process
    command("train", Params, run)
