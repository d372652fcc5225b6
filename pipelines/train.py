"""Stage train: adapters/<arm>/<seed>/, one LoRA adapter; on several devices by `accelerate launch`."""

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

from pydantic import Field, field_validator, model_validator

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
from pipelines.base_model import load_reference
from pipelines.code import code_hash
from pipelines.params import ADAPTER, ConfigError, StageParams, check_arm, overridden, own_threads, unique
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


class LaunchError(RuntimeError):
    """A training on several devices that failed on one of them."""


class Tune(Section):
    """Section tune: what every arm tries before it is trained, the same for each."""

    grid: dict[str, list[Any]]  # key of section train → values; {} = off
    seed: Seed
    steps: Annotated[int, Field(ge=1, description="optimizer steps")] | None  # of one try; null = as section train says

    @field_validator("grid")
    @classmethod
    def _worth_it(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if wrong := [key for key, values in grid.items() if not values or any(values.count(v) > 1 for v in values)]:
            raise ValueError("\n".join(f"{key}: expected values, each once, got {grid[key]}" for key in wrong))
        return grid

    @property
    def tries(self) -> list[dict[str, Any]]:
        return (
            [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())] if self.grid else []
        )


class Params(StageParams):
    report_to: list[str]  # no stage depends on it: it changes no adapter
    train: TrainSettings
    prompt: Prompt
    tune: Tune

    @field_validator("report_to")
    @classmethod
    def _trackers(cls, names: list[str]) -> list[str]:
        lines = [f"unknown tracker {name!r}{suggest(name, TRACKERS)}" for name in names if name not in TRACKERS]
        missing = [TRACKERS[name] for name in names if name in TRACKERS and find_spec(name) is None]
        if missing:
            lines.append(f"expected {', '.join(missing)} to be installed; run `pip install {' '.join(missing)}`")
        if lines:
            raise ValueError("\n".join(lines))
        return unique(names)

    @model_validator(mode="after")
    def _tuned_elsewhere(self) -> Self:
        if self.tune.grid and self.tune.seed in self.matrix.seeds:
            raise ValueError(
                f"tune.seed: expected one that is not compared ({self.matrix.seeds}), got {self.tune.seed}"
            )
        return self

    def train_for(self, arm: str, own: Mapping[str, Any] | None = None) -> TrainSettings:
        """An arm's settings; `own` in the place of what stage tune chose for it."""
        settings: type[TrainSettings] = arms.load(self.code_of(arm)).settings
        entry = overridden(self.train.model_dump(), self.arms.get(arm, {}))
        return settings(**overridden(entry, dict(self.tuned(arm).get("chosen", {}) if own is None else own)))

    def tuned(self, arm: str) -> dict[str, Any]:
        """What stage tune found; empty where it is off, or has not run."""
        file = TUNED / arm / "tuned.json"
        own = self.arms.get(arm, {})
        return dict(read_json(file)) if self.tune.grid and ADAPTER not in own and file.is_file() else {}

    def files_of(self, arm: str, seed: int) -> list[Path]:
        """What the arm takes from theirs/: an adapter, or a PEFT configuration."""
        adapter, peft = self.adapter_of(arm, seed), self.train_for(arm, {}).peft
        if adapter:
            return [adapter / CONFIG, adapter / WEIGHTS]
        return [Path(peft)] if isinstance(peft, str) else []


def load_arm(name: str, params: Params) -> Arm:
    """The arm of that name; a variant runs the code of the arm that it is one of."""
    check_arm(name, params)
    arm: Arm = arms.load(params.code_of(name))
    return arm if arm.name == name else replace(arm, name=name, title=f"{arm.title}, variant {name}")


def training_code(arm: str) -> str:
    return code_hash("trainers.run", f"trainers.arms.{arm}")


def examples(split: str, template: str) -> list[tuple[str, ...]]:
    """Rendered prompts and answers, in turn, of every item of a split."""
    form = Form(template)
    return [form.parts(Item.from_json(row)) for row in read_jsonl(DATA / f"{split}.jsonl")]


def training_items(settings: TrainSettings, template: str, seed: int) -> list[tuple[str, ...]]:
    """Those of the data, and general questions as `replay` says, of a seed that no base is trained with."""
    own = examples("train", template)
    more = round(len(own) * settings.replay / (1 - settings.replay))
    drawn = islice(general.questions(-1 - seed, held_out=False), more)
    return own + [(render(literal(template), prompt), answer) for _, prompt, answer in drawn]


def base_texts() -> list[tuple[str, bool]]:
    """(text, whether it came to an end) of stage base_texts."""
    return [(row["text"], row["ended"]) for row in read_jsonl(TEXTS / "texts.jsonl")]


def inputs_of_training(params: Params, arm: str, seed: int) -> dict[str, str]:
    files = [*split_files("train", "valid"), BASE / "base.json", TEXTS / "texts.jsonl"]
    return hash_inputs(*files, *params.files_of(arm, seed))


def key_of_run(params: Params, arm: str, seed: int, shown: Mapping[str, Any]) -> str:
    """A checkpoint is used only by the very run that it belongs to."""
    code = training_code(params.code_of(arm))
    inputs = inputs_of_training(params, arm, seed)
    return key_of([arm, seed, shown, inputs, load_reference()[1], package_versions(), code])


def job_of(params: Params, settings: TrainSettings, seed: int, output: Path, checkpoints: Path) -> TrainingJob:
    prompt_text(params.prompt)  # refuses a system message that prepare_base did not know
    template = params.prompt.template
    return TrainingJob(
        base=load_reference()[0],
        settings=settings,
        seed=seed,
        train=training_items(settings, template, seed),
        valid=examples("valid", template),
        output=output,
        checkpoints=checkpoints,
        texts=base_texts(),
        images=DATA,
    )


def devices_for(settings: TrainSettings) -> int:
    """How many devices of this machine a run is trained on; where it has no GPU, as many processes on the CPU."""
    if settings.devices == 1:
        return 1
    import torch

    there = torch.cuda.device_count()
    count = max(1, there) if settings.devices == "all" else settings.devices
    if 0 < there < count:
        raise ConfigError(f"train.devices: expected at most {there}, the GPUs that are visible, got {count}")
    if settings.batch_size % count:
        raise ConfigError(f"train.batch_size: expected a multiple of the {count} devices, got {settings.batch_size}")
    return count


def launch(arm: str, seed: int, devices: int) -> None:
    """Run this stage in a process a device, each with its share of the CPU threads."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options: dict[str, Any] = {"num_processes": devices, "num_machines": 1, "main_process_port": 0}
    options |= {"mixed_precision": "no", "dynamo_backend": "no"}  # the Trainer has its own
    options |= {"num_cpu_threads_per_process": max(1, own_threads() // devices)}
    options |= {"gpu_ids": "all"}  # those that are visible, and not those of accelerate's own configuration
    os.environ[RANKS] = str(devices)
    words = ["--multi_gpu", *(f"--{name}={value}" for name, value in options.items())]
    try:
        launch_command(launch_command_parser().parse_args([*words, "--module", "pipelines.train", arm, str(seed)]))
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"killed by signal {-failure.exitcode}" if failure.exitcode < 0 else "ended by the error above"
        raise LaunchError(f"device {rank} of {devices}: {how}") from None


def rank() -> int | None:
    """The number of this process in a launch; None outside of one."""
    return int(os.environ["RANK"]) if RANKS in os.environ else None


def run(params: Params, arm_name: str, seed: int) -> None:
    arm, tuned, template = load_arm(arm_name, params), params.tuned(arm_name), prompt_text(params.prompt)
    theirs = params.adapter_of(arm_name, seed)
    if params.tune.grid and not tuned and not theirs:
        raise ConfigError(f"{TUNED / arm_name}: expected what stage tune chose, found nothing; run `dvc repro tune`")
    settings, (reference, base_fingerprint) = params.train_for(arm_name), load_reference()
    if not theirs and rank() is None and (devices := devices_for(settings)) > 1:
        launch(arm_name, seed, devices)
        return
    shown = {
        "train": {"adapter": str(theirs)} if theirs else settings.model_dump(),
        "prompt": params.prompt.model_dump(),
        **({"tuned": tuned} if tuned else {}),
    }
    key, inputs = key_of_run(params, arm_name, seed, shown), inputs_of_training(params, arm_name, seed)
    kept = Path("checkpoints") / arm_name / str(seed)
    out = adapter_dir(arm_name, seed)
    if rank():  # the first one alone writes anything that stays
        with TemporaryDirectory() as folder:
            job = job_of(params, settings, seed, Path(folder), kept / key[:16])
            train(arm, job)
        return
    with exclusive(kept.with_name(f"{seed}.lock"), f"train {arm_name} seed {seed}"), staged(out) as folder:
        record = start_run("train", params=shown, inputs=inputs, arm=arm_name, seed=seed, prompt_template=template)
        job = job_of(params, settings, seed, folder, kept / key[:16])
        job = replace(job, report_to=params.report_to, logs=Path("logs") / arm_name / str(seed))
        summary = adopt(arm, job, theirs) if theirs else train(arm, job)
        weights, own = folder / "adapter_model.safetensors", BASE / "model.safetensors"
        parent = sha256(own) if own.is_file() else base_fingerprint
        record.artifacts.append(artifact("adapter", weights, out / weights.name, parent=parent))
        record.extra = {**summary, "base": asdict(reference)}
        finish_run(record, folder)
    shutil.rmtree(kept, ignore_errors=True)
    print(json.dumps(summary))


if __name__ == "__main__":
    if rank() is not None:
        die_with_parent()  # it does not outlive the launch
    if rank():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # its words would be those of the first once more
    command("train", Params, run)
