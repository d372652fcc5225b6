"""Stage prepare_base: models/base/, the embedded model or a reference to a model elsewhere."""

import json
import shutil
from collections import defaultdict
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

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
    write_json,
)
from evaluation import vision as visual
from evaluation.paraphrase import varied
from evaluation.tasks import Item, general, render
from export import gguf_base
from export.engines.engine import Engine
from export.engines.hf import HfEngine
from export.template import from_tokenizer
from pipelines.base_model import PrepareBase, fingerprint, load_reference, reference_for
from pipelines.code import code_hash
from pipelines.params import ConfigError, StageParams, load_params
from pipelines.prompt import CHAT, Prompt
from pipelines.stage import BASE, DATA, cli, main_for, split_files
from trainers import gguf_file
from trainers.embedded_base import EmbeddedSettings, train_base
from trainers.models import faster_precision, load_tokenizer
from trainers.pictures import load_processor
from trainers.settings import BaseReference

CHECKPOINTS = Path("checkpoints/base")
PICTURES = Path("checkpoints/base-pictures")  # drawn anew by every start, so they need not survive a kill
_ANSWER_TOKENS = 24


class Params(StageParams):
    prepare_base: PrepareBase
    prompt: Prompt


def read_chat_template(prompt: Prompt, reference: BaseReference) -> dict[str, Any]:
    """What base.json stores of the base's chat template; ExportError if it cannot be served."""
    return {**asdict(from_tokenizer(load_tokenizer(reference), prompt.system)), "asked_system": prompt.system}


def retention_accuracy(engine: Engine, items: list[Item]) -> dict[str, float]:
    """Fraction of right greedy answers per general task."""
    right: dict[str, list[bool]] = defaultdict(list)
    for place, answer in engine.generate_many([item.prompt for item in items], _ANSWER_TOKENS):
        right[items[place].task].append(general.score(items[place], answer.text).correct)
    return {task: sum(r) / len(r) for task, r in right.items()}


def _train(section: PrepareBase, template: str, folder: Path) -> dict[str, Any]:
    settings = EmbeddedSettings(**section.model_dump(include=set(EmbeddedSettings.model_fields)))
    shutil.rmtree(PICTURES, ignore_errors=True)
    PICTURES.mkdir(parents=True)
    if settings.vision is None:
        questions = general.questions(section.seed, held_out=False)
        pairs = [(prompt, answer) for _, prompt, answer in islice(questions, section.examples)]
    else:
        pairs = visual.training_examples(section.examples, section.seed, settings.vision.image_size, PICTURES)
    items = [Item(str(number), general.NAME, *pair) for number, pair in enumerate(pairs)]
    items = varied(items, general, section.vary, section.seed)
    examples = [(render(template, item.prompt), item.completion) for item in items]
    parts = [
        settings.model_dump(),
        examples,
        hash_inputs(PICTURES),
        package_versions(),
        code_hash("trainers.embedded_base"),
    ]
    facts = train_base(settings, examples, folder, CHECKPOINTS / key_of(parts)[:16], PICTURES)
    shutil.rmtree(PICTURES)
    shutil.rmtree(CHECKPOINTS, ignore_errors=True)  # including what other settings left there
    pictures = settings.vision is not None
    content = {"kind": "embedded", "pictures": pictures, "fingerprint": fingerprint(folder)}
    write_json(folder / "base.json", content | asdict(BaseReference(BASE.as_posix())))
    return facts


def _unpack(section: PrepareBase, folder: Path) -> dict[str, Any]:
    """A GGUF file's model in `folder`, and the content of base.json."""
    file = gguf_file.locate(section.source)
    items = [Item.from_json(row) for row in read_jsonl(DATA / "retention.jsonl")]
    texts = dict.fromkeys(text for item in items for text in (item.prompt, item.completion))
    facts = gguf_base.unpack(file, folder, [*texts])
    marks = {"source": section.source, "source_mark": gguf_file.mark(file), "fingerprint": sha256(file), "gguf": facts}
    return {"kind": "gguf", "pictures": False, **marks, **asdict(BaseReference(BASE.as_posix()))}


def run(params: Params) -> None:
    section, template = params.prepare_base, params.prompt.template
    if template == CHAT and section.source == "embedded":
        raise ConfigError(
            "prompt.template: the embedded base has no chat template. Expected a text with {prompt}, or another "
            "prepare_base.source"
        )
    used = {"prepare_base": section.model_dump(), "prompt": params.prompt.model_dump()}
    with exclusive(Path("checkpoints/base.lock"), "prepare_base"), staged(BASE) as folder:
        record = start_run(
            "prepare_base", params=used, inputs=hash_inputs(*split_files("retention")), prompt_template=template
        )
        if section.source == "embedded":
            record.extra = _train(section, template, folder)
            items = [Item.from_json(row) for row in read_jsonl(DATA / "retention.jsonl")]
            pictures = None if section.vision is None else DATA
            with HfEngine(str(folder), template, pictures=pictures, parallel=16) as engine:
                accuracy = retention_accuracy(engine, items)
            above = sorted(task for task, share in accuracy.items() if share > 0.8)
            record.extra |= {"retention": accuracy, "tasks_above_80": above}
            print(json.dumps({task: round(share, 3) for task, share in accuracy.items()}))
            if len(above) < section.min_tasks_above_80:
                raise ConfigError(
                    f"expected {section.min_tasks_above_80} general tasks in which the trained base is above 80%, got "
                    f"{len(above)} ({', '.join(above) or 'none'}); raise prepare_base.examples"
                )
            weights = folder / "model.safetensors"
            record.artifacts.append(artifact("base_model", weights, BASE / weights.name))
        else:
            content = _unpack(section, folder) if gguf_file.is_gguf(section.source) else reference_for(section)
            write_json(folder / "base.json", content)
            reference, _ = load_reference(folder)
            from transformers import AutoConfig

            text = AutoConfig.from_pretrained(reference.merge_from, **reference.merge_kwargs).get_text_config()
            content["precision"], ratio = faster_precision(text.hidden_size)
            print(f"{content['precision']} is the faster precision here: fp32 takes {ratio:.2f} times as long as bf16")
            if section.vision is not None:
                load_processor(reference, DATA)  # refuses a base that takes no pictures
            if template == CHAT:
                content["chat"] = read_chat_template(params.prompt, reference)
                write_json(folder / "base.json", content)
            record.extra = content
            print(json.dumps(content))
        finish_run(record, folder)


if __name__ == "__main__":
    cli(lambda: main_for("prepare_base", lambda: run(load_params(Params))))
