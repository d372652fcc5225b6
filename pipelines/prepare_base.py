"""Stage prepare_base: models/base/, the embedded model or a reference to one that lies elsewhere."""

import json
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.backends.hf import HfBackend
from evaluation.tasks import Item, general, render
from pipelines.base_model import fingerprint, load_reference, reference_for
from pipelines.config import ConfigError, load_params
from pipelines.outputs import exclusive, staged
from pipelines.prompt import read_chat_template
from pipelines.runinfo import RunRecord, artifact, hash_inputs, key_of, package_versions, read_jsonl, write_json
from pipelines.schema import Params, PrepareBase
from pipelines.schema_common import CHAT
from pipelines.stage import BASE, DATA, TRAINERS_CODE, main_for, split_files
from trainers.embedded_base import EmbeddedSettings, train_embedded_base

if TYPE_CHECKING:
    from pipelines.schema_vision import VisionParams

RETENTION = DATA / "retention.jsonl"
_ANSWER_TOKENS = 24


def retention_accuracy(backend: HfBackend, items: list[Item]) -> dict[str, float]:
    """Share of right answers per general task, the model asked greedily; it is closed afterwards."""
    right: dict[str, list[bool]] = defaultdict(list)
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
    return train_embedded_base(settings, examples, folder, checkpoints)


def _name_embedded(folder: Path) -> None:
    """Write base.json beside a model that this stage trained."""
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


def run(params: "Params | VisionParams") -> None:
    """Write models/base."""
    section, template = params.prepare_base, params.prompt.template
    if template == CHAT and section.source == "embedded":
        raise ConfigError(
            "prompt.template: the embedded base has no chat template; expected a text with {prompt}, or another "
            "prepare_base.source"
        )
    shown = {"prepare_base": section.model_dump(), "prompt": params.prompt.model_dump()}
    with exclusive(Path("checkpoints/base.lock"), "prepare_base"), staged(BASE) as folder:
        record = RunRecord(
            "prepare_base", params=shown, inputs=hash_inputs(*split_files("retention")), prompt_template=template
        )
        if section.source == "embedded":
            if isinstance(section, PrepareBase):
                record.extra = _embedded(section, template, folder)
                backend = HfBackend(str(folder), template)
            else:
                from pipelines import vision_base

                record.extra = vision_base.train_base(section, template, folder)
                backend = vision_base.opened(folder, template)
            _name_embedded(folder)
            accuracy = retention_accuracy(backend, [Item.from_json(row) for row in read_jsonl(RETENTION)])
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
            if not isinstance(section, PrepareBase):
                from pipelines import vision_base

                vision_base.check_processor(load_reference(folder)[0])
            if template == CHAT:
                content["chat"] = read_chat_template(params.prompt, load_reference(folder)[0])
                write_json(folder / "base.json", content)
            record.extra = content
            print(json.dumps(content))
        record.write(folder)


if __name__ == "__main__":
    main_for("prepare_base", lambda: run(load_params()))
