"""Stage train: adapters/<arm>/<seed>/, one LoRA adapter."""

import json
import shutil
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

from db.files import (
    artifact,
    exclusive,
    finish_run,
    hash_inputs,
    key_of,
    package_versions,
    read_jsonl,
    sha256,
    staged,
    start_run,
)
from evaluation.tasks import Item, general, render
from pipelines.base_model import load_reference
from pipelines.code import code_hash
from pipelines.params import StageParams, check_arm, overridden
from pipelines.prompt import Prompt, literal, prompt_text
from pipelines.stage import BASE, DATA, TEXTS, adapter_dir, command, split_files
from trainers import arms
from trainers.run import Arm, TrainingJob
from trainers.run import run as train
from trainers.settings import TrainSettings
from trainers.theirs import CONFIG, WEIGHTS, adopt


class Params(StageParams):
    train: TrainSettings
    prompt: Prompt

    def train_for(self, arm: str) -> TrainSettings:
        settings: type[TrainSettings] = arms.load(self.code_of(arm)).settings
        return settings(**overridden(self.train.model_dump(), self.arms.get(arm, {})))

    def files_of(self, arm: str, seed: int) -> list[Path]:
        """What the arm takes from theirs/: an adapter, or a PEFT configuration."""
        adapter, peft = self.adapter_of(arm, seed), self.train_for(arm).peft
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


def examples(split: str, template: str) -> list[tuple[str, str]]:
    """(rendered prompt, completion) of every item of a split."""
    items = [Item.from_json(row) for row in read_jsonl(DATA / f"{split}.jsonl")]
    text = literal(template)
    return [(render(text, item.prompt), item.completion) for item in items]


def training_items(settings: TrainSettings, template: str, seed: int) -> list[tuple[str, str]]:
    """Those of the data, and general questions as `replay` says, of a seed that no base is trained with."""
    own = examples("train", template)
    more = round(len(own) * settings.replay / (1 - settings.replay))
    drawn = islice(general.questions(-1 - seed, held_out=False), more)
    return own + [(render(literal(template), prompt), answer) for _, prompt, answer in drawn]


def base_texts() -> list[tuple[str, bool]]:
    """(text, whether it came to an end) of stage base_texts."""
    return [(row["text"], row["ended"]) for row in read_jsonl(TEXTS / "texts.jsonl")]


def run(params: Params, arm_name: str, seed: int) -> None:
    arm, settings, template = load_arm(arm_name, params), params.train_for(arm_name), prompt_text(params.prompt)
    reference, base_fingerprint = load_reference()
    theirs = params.adapter_of(arm_name, seed)
    files = [*split_files("train", "valid"), BASE / "base.json", TEXTS / "texts.jsonl"]
    inputs = hash_inputs(*files, *params.files_of(arm_name, seed))
    trained = {"adapter": str(theirs)} if theirs else settings.model_dump()
    shown = {"train": trained, "prompt": params.prompt.model_dump()}
    # A checkpoint is used only by the very run that it belongs to.
    code = training_code(params.code_of(arm_name))
    key = key_of([arm_name, seed, shown, inputs, base_fingerprint, package_versions(), code])
    kept = Path("checkpoints") / arm_name / str(seed)
    out = adapter_dir(arm_name, seed)
    with exclusive(kept.with_name(f"{seed}.lock"), f"train {arm_name} seed {seed}"), staged(out) as folder:
        record = start_run("train", params=shown, inputs=inputs, arm=arm_name, seed=seed, prompt_template=template)
        job = TrainingJob(
            base=reference,
            settings=settings,
            seed=seed,
            train=training_items(settings, template, seed),
            valid=examples("valid", template),
            output=folder,
            checkpoints=kept / key[:16],
            texts=base_texts(),
            logs=Path("logs") / arm_name / str(seed),
            images=DATA,
        )
        summary = adopt(arm, job, theirs) if theirs else train(arm, job)
        weights, own = folder / "adapter_model.safetensors", BASE / "model.safetensors"
        parent = sha256(own) if own.is_file() else base_fingerprint
        record.artifacts.append(artifact("adapter", weights, out / weights.name, parent=parent))
        record.extra = {**summary, "base": asdict(reference)}
        finish_run(record, folder)
    shutil.rmtree(kept, ignore_errors=True)
    print(json.dumps(summary))


if __name__ == "__main__":
    command("train", Params, run)
