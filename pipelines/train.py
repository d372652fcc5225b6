"""Stage train: adapters/<arm>/<seed>/, one LoRA adapter."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from evaluation.tasks import Item, render
from export.files import sha256
from pipelines.base_model import describe, load_reference
from pipelines.config import arm_code, check_arm, load_params
from pipelines.outputs import exclusive, staged
from pipelines.prompt import literal, prompt_text
from pipelines.runinfo import RunRecord, artifact, hash_inputs, key_of, package_versions, read_jsonl
from pipelines.schema_common import CommonParams
from pipelines.stage import BASE, DATA, TRAINERS_CODE, adapter_dir, cli, main_for, split_files
from trainers.common import Arm, TrainingJob
from trainers.common import run as train


def load_arm(name: str, params: CommonParams) -> Arm:
    """The arm of that name, its packages loaded; a variant runs the code of the arm that it is one of.

    Raises:
        ConfigError: no such arm.
    """
    check_arm(name, params)
    arm: Arm = importlib.import_module(params.registry.arms[params.code_of(name)]).ARM
    return arm if arm.name == name else replace(arm, name=name, title=f"{arm.title}, variant {name}")


def base_weights(fingerprint: str) -> str:
    """Hash of the base's weights where they lie in models/base, else the reference's fingerprint."""
    weights = BASE / "model.safetensors"
    return sha256(weights) if weights.is_file() else fingerprint


def examples(split: str, template: str) -> list[tuple[str, str]]:
    """(rendered prompt, completion) of every item of a split."""
    items = [Item.from_json(row) for row in read_jsonl(DATA / f"{split}.jsonl")]
    text = literal(template)
    return [(render(text, item.prompt), item.completion) for item in items]


def run(params: CommonParams, arm_name: str, seed: int) -> None:
    """Train one arm with one seed."""
    arm, settings, template = load_arm(arm_name, params), params.train_for(arm_name), prompt_text(params.prompt)
    reference, base_fingerprint = load_reference()
    inputs = hash_inputs(*split_files("train", "valid"), BASE / "base.json")
    shown = {"train": settings.model_dump(), "prompt": params.prompt.model_dump()}
    # A checkpoint is used only by the very run that it belongs to.
    code = [hash_inputs(TRAINERS_CODE), arm_code(params.code_of(arm_name), params.registry)]
    key = key_of([arm_name, seed, shown, inputs, base_fingerprint, package_versions(), code])
    kept = Path("checkpoints") / arm_name / str(seed)
    out = adapter_dir(arm_name, seed)
    with exclusive(kept.with_name(f"{seed}.lock"), f"train {arm_name} seed {seed}"), staged(out) as folder:
        record = RunRecord("train", params=shown, inputs=inputs, arm=arm_name, seed=seed, prompt_template=template)
        result = train(
            arm,
            TrainingJob(
                base=reference,
                settings=settings,
                seed=seed,
                train=examples("train", template),
                valid=examples("valid", template),
                output=folder,
                checkpoints=kept / key[:16],
                logs=Path("logs") / arm_name / str(seed),
                images=DATA,
            ),
        )
        weights = folder / "adapter_model.safetensors"
        record.artifacts.append(artifact("adapter", weights, out / weights.name, parent=base_weights(base_fingerprint)))
        record.extra = {**result.summary, "base": describe(reference)}
        record.write(folder)
    shutil.rmtree(kept, ignore_errors=True)
    print(json.dumps(result.summary))


def main(
    arm: Annotated[str, typer.Option(help="baseline_lora, …")],
    seed: Annotated[int, typer.Option(help="of LoRA's start and the order of items")],
) -> None:
    """Train one arm with one seed."""
    main_for("train", lambda: run(load_params(), arm, seed), arm, seed)


if __name__ == "__main__":
    cli(main)
