"""Stage prepare_base: models/base/, the embedded Llama or a reference to a model that lies elsewhere."""

import json
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

from evaluation.backends.hf import HfBackend
from evaluation.tasks import Item, general, render
from pipelines.base_model import fingerprint, load_reference, reference_for
from pipelines.config import ConfigError, load_params
from pipelines.outputs import exclusive, staged
from pipelines.prompt import read_chat_template
from pipelines.runinfo import RunRecord, artifact, hash_inputs, key_of, package_versions, read_jsonl, write_json
from pipelines.schema import CHAT, Params, PrepareBase
from pipelines.stage import BASE, DATA, TRAINERS_CODE, main_for
from trainers.embedded_base import EmbeddedSettings, train_embedded_base

RETENTION = DATA / "retention.jsonl"
_ANSWER_TOKENS = 24


def retention_accuracy(model: Path, template: str, items: list[Item]) -> dict[str, float]:
    """Share of right answers per general task, the model asked greedily."""
    right: dict[str, list[bool]] = defaultdict(list)
    backend = HfBackend(str(model), template)
    for item in items:
        right[item.task].append(general.score(item, backend.generate(item.prompt, _ANSWER_TOKENS).text).correct)
    backend.close()
    return {task: sum(r) / len(r) for task, r in right.items()}


def _embedded(section: PrepareBase, template: str, folder: Path) -> dict[str, Any]:
    settings = EmbeddedSettings(**{name: getattr(section, name) for name in EmbeddedSettings.model_fields})
    questions = general.questions(section.seed, held_out=False)
    examples = [(render(template, p), a) for _, p, a in islice(questions, section.examples)]
    key = key_of([settings.model_dump(), examples, package_versions(), hash_inputs(TRAINERS_CODE)])
    checkpoints = Path("checkpoints/base") / key[:16]
    facts = train_embedded_base(settings, examples, folder, checkpoints)
    content = {
        "kind": "embedded",
        "location": BASE.as_posix(),
        "revision": None,
        "fingerprint": fingerprint(folder),
        "merge_location": None,
        "merge_revision": None,
        "trust_remote_code": False,
    }
    write_json(folder / "base.json", content)
    return facts


def run(params: Params) -> None:
    """Write models/base."""
    section, template = params.prepare_base, params.prompt.template
    if template == CHAT and section.source == "embedded":
        raise ConfigError(
            "prompt.template: the embedded base has no chat template; expected a text with {prompt}, or another "
            "prepare_base.source"
        )
    shown = {"prepare_base": section.model_dump(), "prompt": params.prompt.model_dump()}
    with exclusive(Path("checkpoints/base.lock"), "prepare_base"), staged(BASE) as folder:
        record = RunRecord("prepare_base", params=shown, inputs=hash_inputs(RETENTION), prompt_template=template)
        if section.source == "embedded":
            record.extra = _embedded(section, template, folder)
            items = [Item.from_json(row) for row in read_jsonl(RETENTION)]
            accuracy = retention_accuracy(folder, template, items)
            above = sorted(task for task, share in accuracy.items() if share > 0.8)
            record.extra |= {"retention": accuracy, "tasks_above_80": above}
            print(json.dumps({task: round(share, 3) for task, share in accuracy.items()}))
            if len(above) < section.min_tasks_above_80:
                raise ConfigError(
                    f"the trained base is above 80% in {len(above)} general tasks ({', '.join(above) or 'none'}), "
                    f"expected {section.min_tasks_above_80}; raise prepare_base.examples"
                )
            weights = folder / "model.safetensors"
            record.artifacts.append(artifact("base_model", weights, BASE / weights.name))
        else:
            content = reference_for(section)
            write_json(folder / "base.json", content)
            if template == CHAT:
                content["chat"] = read_chat_template(params.prompt, load_reference(folder)[0])
                write_json(folder / "base.json", content)
            record.extra = content
            print(json.dumps(content))
        record.write(folder)


if __name__ == "__main__":
    main_for("prepare_base", lambda: run(load_params()))
