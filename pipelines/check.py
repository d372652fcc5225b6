"""Stage check: refuses an unusable params.yaml before any work, and writes outputs/code/<stage>.

The whole of params.yaml is what all stages together read of it. outputs/code/<stage> is a hash of the code that a stage
can reach (for train one file per arm, for harness one per task, including files of theirs/ that they use). The stages
depend on these files instead of source files.
"""

import re
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError, model_validator

from db.files import hash_inputs, key_of, write_text
from export import ExportError, gguf, gguf_base
from pipelines import (
    base_texts,
    compare,
    evaluate,
    export,
    harness,
    measure,
    prepare_base,
    prepare_data,
    quantize,
    train,
    verify,
)
from pipelines.base_model import PrepareBase, fingerprint, local_folder
from pipelines.code import code_hash
from pipelines.params import (
    ADAPTER,
    NAME,
    PARAMS_FILE,
    THEIRS,
    VARIANT_OF,
    ConfigError,
    Distribute,
    Probe,
    explain,
    listed,
    load_yaml,
    overridden,
)
from pipelines.prompt import CHAT
from pipelines.stage import BASE_ARM, clear_errors, cli
from trainers import BASELINE, arms, gguf_file, theirs
from trainers.settings import TrainSettings
from trainers.words import suggest

CODE = Path("outputs/code")
SMOLVLM_FORM = "<|im_start|>User:{prompt}<end_of_utterance>\nAssistant: "
"""The user's turn and the start of the answer, as SmolVLM's chat template writes them."""


class Params(
    prepare_data.Params,
    prepare_base.Params,
    base_texts.Params,
    train.Params,
    export.Params,
    quantize.Params,
    verify.Params,
    evaluate.Params,
    measure.Params,
    harness.Params,
    compare.Params,
):
    """The whole of params.yaml, with the rules that span the sections of several stages."""

    model_config = ConfigDict(extra="forbid")

    profile: str
    probe: Probe
    distribute: Distribute

    @model_validator(mode="after")
    def _pictures(self) -> "Params":
        """Items, base and training all have pictures, or none of them has."""
        tower, size, task = self.prepare_base.vision, self.prepare_data.image_size, self.prepare_data.task
        have, shape = ("no pictures", "null") if size is None else ("pictures", "the shape of a vision tower")
        layers = "null" if tower is None else "those of a vision-language model"
        embedded = self.prepare_base.source == "embedded"
        rules = {
            f"prepare_base.vision: expected {shape}, because items of task {task} have {have}": (
                (tower is None) == (size is None)
            ),
            f"train.layers: expected {layers}, to match prepare_base.vision": (
                (tower is None) == (self.train.layers is None)
            ),
        }
        if tower is not None:
            rules |= {
                "evaluate.harness: expected [] with a base that takes pictures, because lm-eval asks in text alone "
                f"here, got {self.evaluate.harness}": not self.evaluate.harness,
                f"prepare_base.vision.image_size: expected prepare_data.image_size = {size}, the size of the pictures, "
                f"got {tower.image_size}": not embedded or tower.image_size == size,
                "prompt.template: chat is for text; a chat template puts pictures and the answer in places that no "
                f"text with {{prompt}} can express. Write out the base's form, e.g. for SmolVLM {SMOLVLM_FORM!r}": (
                    self.prompt.template != CHAT
                ),
                "evaluate.backend: expected 'hf', the one that supports adapters of vision-language models, got "
                f"{self.evaluate.backend!r}": self.evaluate.backend == "hf",
            }
        if problems := [problem for problem, is_fine in rules.items() if not is_fine]:
            raise ValueError("\n".join(problems))
        return self


def load_params(path: Path = PARAMS_FILE) -> Params:
    return parse_params(load_yaml(path), str(path))


def parse_params(raw: Any, source: str = str(PARAMS_FILE)) -> Params:
    """The whole of params.yaml; ConfigError lists every mistake with its key, what was expected and the value."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: expected sections, got {type(raw).__name__}")
    problems, params = _problems_of_arms(raw), None
    try:
        params = Params(**raw)
    except ValidationError as error:
        others = [e for e in error.errors() if e["loc"][:1] != ("arms",) or not isinstance(raw.get("arms"), dict)]
        problems = explain(others, Params) + problems
    if params is None or problems:
        raise listed(problems, source)
    return params


def _problems_of_arms(raw: dict[str, Any]) -> list[str]:
    """Unknown arms, unknown or wrong overrides, arms of the matrix without an entry.

    Not a validator, because each arm has its own schema and all mistakes of the file are listed at once.
    """
    entries, train_section, matrix = (raw.get(key) for key in ("arms", "train", "matrix"))
    if not isinstance(entries, dict):
        return []
    matrix = matrix if isinstance(matrix, dict) else {}
    train_section = train_section if isinstance(train_section, dict) else {}
    selected = names if isinstance(names := matrix.get("arms"), list) else []
    arm_names, problems, usable = arms.names(), list[str](), list(arms.names())
    for arm, entry in entries.items():
        where = f"arms.{arm}"
        if not isinstance(entry, dict):
            problems.append(f"{where}: expected keys of train: (or {{}}), got {entry!r}")
            continue
        if ADAPTER in entry:
            extra = [key for key in entry if key != ADAPTER]
            problems += [f"{where}.{key}: not allowed beside {ADAPTER}, whose training is over" for key in extra]
            if arm in selected:
                problems += _problems_of_adapter(f"{where}.{ADAPTER}", entry[ADAPTER], matrix.get("seeds"))
            entry = {VARIANT_OF: BASELINE}
        settings = overridden(train_section, entry)
        if isinstance(file := settings.get("peft"), str) and arm in selected and not _in_theirs(file):
            problems.append(f"{where}.peft: expected a file in {THEIRS}/, which DVC watches, got {file!r}")
        original = entry.get(VARIANT_OF)
        code = arm if original is None else original
        if original is None and arm not in arm_names:
            problems.append(
                f"{where}: unknown arm{suggest(str(arm), arm_names)}. A variant names its arm with {VARIANT_OF}:"
            )
        elif original is not None and (arm in arm_names or arm == BASE_ARM or not NAME.fullmatch(str(arm))):
            problems.append(f"{where}: expected a new name of lower-case letters, digits and _ for a variant")
        elif code not in arm_names:
            problems.append(f"{where}.{VARIANT_OF}: unknown arm {original!r}{suggest(str(original), arm_names)}")
        else:
            usable.append(arm)
        schema = arms.load(code).settings if code in arm_names else TrainSettings
        for error in train.setting_errors(schema, settings):
            # A combination is the arm's fault only if the arm is trained and section train is fine without it.
            key_of_arm = error["loc"] and error["loc"][0] in entry
            if key_of_arm or (
                not error["loc"] and arm in selected and not train.setting_errors(TrainSettings, train_section)
            ):
                problems += explain([error], schema, "arms", str(arm))
    problems += [f"matrix.arms: unknown arm {a!r}{suggest(str(a), usable)}" for a in selected if a not in usable]
    return problems + [
        f"arms.{a}: missing, but the matrix names this arm; write `{a}: {{}}` if it needs no settings"
        for a in selected
        if a in arm_names and a not in entries
    ]


def _problems_of_adapter(where: str, folder: Any, seeds: Any) -> list[str]:
    """Reasons to reject the adapters of an arm that was trained elsewhere."""
    if not _in_theirs(folder):
        return [f"{where}: expected a folder in {THEIRS}/, which DVC watches, got {folder!r}; copy it there"]
    folders = dict.fromkeys(folder.replace("{seed}", str(seed)) for seed in (seeds if isinstance(seeds, list) else []))
    return [f"{where}: {problem}" for folder in folders for problem in theirs.problems(Path(folder))]


def _in_theirs(path: Any) -> bool:
    return isinstance(path, str) and Path(path).resolve().is_relative_to(THEIRS.resolve())


def write_code_hashes(params: Params, pipeline: Path = Path("dvc.yaml"), folder: Path = CODE) -> None:
    """One file per stage of dvc.yaml, for train one per arm, for harness one per task: the hash of its code.

    That of prepare_base includes what is in the folder of a local base, which DVC does not watch.
    """
    modules = re.findall(r"python -m pipelines\.(\w+)", pipeline.read_text(encoding="utf-8"))
    stages = set(modules) - {"check", "train", "harness"}
    used = {"trainers.arms": (), "evaluation.tasks": (params.prepare_data.task,)}
    hashes = {stage: code_hash(f"pipelines.{stage}", plugins=used) for stage in stages}
    source = params.prepare_base.source
    if gguf_file.is_gguf(source):
        hashes["prepare_base"] = key_of([hashes["prepare_base"], gguf_file.mark(gguf_file.locate(source))])
    elif folder_of_base := local_folder(source) if source != "embedded" else None:
        hashes["prepare_base"] = key_of([hashes["prepare_base"], fingerprint(folder_of_base)])
    for arm in params.matrix.arms:
        module = f"trainers.arms.{params.code_of(arm)}"
        code = code_hash("pipelines.train", module, plugins={**used, "evaluation.tasks": ()})
        files = [file for seed in params.matrix.seeds for file in params.files_of(arm, seed)]
        hashes[f"train.{arm}"] = key_of([code, hash_inputs(*files)]) if files else code
    for task in params.evaluate.harness:
        code = code_hash("pipelines.harness", plugins={**used, "evaluation.tasks": ()})
        hashes[f"harness.{task}"] = key_of([code, hash_inputs(*harness.user_files(task))])
    for name, value in hashes.items():
        write_text(folder / name, f"{value}\n")


def check_base(section: PrepareBase) -> None:
    """Raises ConfigError for a base that could not be exported, instead of after hours of training.

    A base that cannot be read is left to stage prepare_base, which explains why.
    """
    if section.source == "embedded" or section.vision is not None:
        return
    key = "source" if section.merge_source is None else "merge_source"
    source, revision = section.merge_source or section.source, section.revision if key == "source" else None
    kwargs = {"revision": revision, "trust_remote_code": section.trust_remote_code}
    try:
        if gguf_file.is_gguf(source):
            gguf_base.check(gguf_file.locate(source))
            return
        gguf.check_base(str(local_folder(source, key) or source), kwargs)
    except ExportError as error:
        raise ConfigError(f"prepare_base.{key}: {source}: {error}") from error
    except (OSError, ValueError):
        return


def main() -> None:
    """Refuse an unusable params.yaml; write the hashes of the stages' code."""
    with clear_errors("check", code=2):
        params = load_params()
        check_base(params.prepare_base)
        write_code_hashes(params)


if __name__ == "__main__":
    cli(main)
