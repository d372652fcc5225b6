"""Stage check: refuses a params.yaml that cannot be used, before any work, and writes outputs/code/<stage>.

The whole of params.yaml is what all stages read of it. outputs/code/<stage> is a hash of the code that the stage can
reach, for train one file an arm and for harness one a task, with what these take from theirs/: the stages depend on
these files in place of source files.
"""

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from db.files import hash_inputs, key_of, write_text
from export import ExportError, gguf
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
from pipelines.base_model import PrepareBase, local_folder
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
from trainers import BASELINE, arms, theirs
from trainers.settings import TrainSettings
from trainers.words import suggest

CODE = Path("outputs/code")
_NOT_TRIED = {"max_steps", "epochs", "max_length", "overlong", "eval_steps", "save_steps", "devices"}
SMOLVLM_FORM = "<|im_start|>User:{prompt}<end_of_utterance>\nAssistant: "
"""Turn of the user and start of the answer, as the chat template of SmolVLM writes them."""


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
    """The whole of params.yaml."""

    model_config = ConfigDict(extra="forbid")

    profile: str
    probe: Probe
    distribute: Distribute

    @model_validator(mode="after")
    def _tries(self) -> "Params":
        """Every arm can be trained with every try of section tune."""
        lines = dict.fromkeys(
            f"tune.grid.{key}: expected no such key, since tries would not be alike, or not be what is trained"
            for key in self.tune.grid
            if key in _NOT_TRIED
        )
        if any(isinstance(value, str) for value in self.tune.grid.get("peft", [])):
            lines["tune.grid.peft: expected mappings, since nobody watches files that are tried"] = None
        known = [arm for arm in self.matrix.arms if self.code_of(arm) in arms.names()]  # `_check_arms` names the others
        for arm, own in ((arm, own) for arm in known for own in self.tune.tries):
            schema: type[BaseModel] = arms.load(self.code_of(arm)).settings
            if unknown := [key for key in own if key not in schema.model_fields]:
                lines |= {
                    f"tune.grid.{key}: unknown key of {arm}{suggest(key, schema.model_fields)}": None for key in unknown
                }
                continue
            entry = overridden(overridden(self.train.model_dump(), self.arms.get(arm, {})), own)
            lines |= dict.fromkeys(explain(_errors(schema, entry), schema, "tune.grid"))
            if self.tune.steps is not None and self.tune.steps <= entry["warmup_steps"]:
                lines[f"tune.steps: expected more than {arm}'s warm-up of {entry['warmup_steps']}"] = None
        if lines:
            raise ValueError("\n".join(lines))
        return self

    @model_validator(mode="after")
    def _pictures(self) -> "Params":
        """Items, base and training have pictures, or none of them has."""
        tower, drawn = self.prepare_base.vision, self.prepare_data.image_size
        problems = []
        if (tower is None) != (drawn is None):
            problems.append(
                f"prepare_base.vision: expected {'null' if drawn is None else 'the shape of a vision tower'}, since "
                f"items of the task {self.prepare_data.task} have {'no ' if drawn is None else ''}pictures"
            )
        if (tower is None) != (self.train.layers is None):
            problems.append(
                f"train.layers: expected {'null' if tower is None else 'those of a vision-language model'}, as "
                f"prepare_base.vision says"
            )
        if tower is not None:
            if self.evaluate.harness:
                problems.append(
                    "evaluate.harness: expected [] with a base that takes pictures, since lm-eval asks here in text "
                    f"alone, got {self.evaluate.harness}"
                )
            if self.prepare_base.source == "embedded" and tower.image_size != drawn:
                problems.append(
                    f"prepare_base.vision.image_size: expected prepare_data.image_size = {drawn}, as pictures are "
                    f"drawn, got {tower.image_size}"
                )
            if self.prompt.template == CHAT:
                problems.append(
                    "prompt.template: chat is for text; chat templates put pictures and the answer in places of their "
                    "own, which no text with {prompt} stands for. Expected the base's form written out, e.g. for "
                    f"SmolVLM {SMOLVLM_FORM!r}"
                )
            if self.evaluate.backend != "hf":
                problems.append(
                    f"evaluate.backend: expected 'hf', which puts an adapter on a vision-language model, got "
                    f"{self.evaluate.backend!r}"
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_validator(mode="after")
    def _benchmarks(self) -> "Params":
        if lines := harness.problems(self.evaluate.harness):
            raise ValueError("\n".join(f"evaluate.harness: {line}" for line in lines))
        return self


def load_params(path: Path = PARAMS_FILE) -> Params:
    return parse_params(load_yaml(path), str(path))


def parse_params(raw: Any, source: str = str(PARAMS_FILE)) -> Params:
    """The whole of params.yaml; ConfigError lists every error with its key, what was expected and what came."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: expected sections, got {type(raw).__name__}")
    of_arms = _check_arms(raw)
    try:
        params = Params(**raw)
    except ValidationError as error:
        own = [e for e in error.errors() if e["loc"][:1] != ("arms",) or not isinstance(raw.get("arms"), dict)]
        raise listed(explain(own, Params) + of_arms, source) from None
    if of_arms:
        raise listed(of_arms, source)
    return params


def _check_arms(raw: dict[str, Any]) -> list[str]:
    """Errors in `arms:`: unknown arms, unknown or wrong overrides, arms of the matrix without an entry."""
    entries, train, matrix = raw.get("arms"), raw.get("train"), raw.get("matrix")
    if not isinstance(entries, dict):
        return []
    own_arms, lines, usable = arms.names(), [], list(arms.names())
    wanted = matrix.get("arms") if isinstance(matrix, dict) else None
    wanted = wanted if isinstance(wanted, list) else []
    train = train if isinstance(train, dict) else {}
    for arm, own in entries.items():
        if not isinstance(own, dict):
            lines.append(f"arms.{arm}: expected keys of train: (or {{}}), got {own!r}")
            continue
        if ADAPTER in own:
            more = [f"arms.{arm}.{key}: expected nothing beside {ADAPTER}, whose training is over" for key in own]
            lines += [line for line, key in zip(more, own, strict=True) if key != ADAPTER]
            lines += _theirs(str(arm), own[ADAPTER], (matrix or {}).get("seeds")) if arm in wanted else []
            own = {VARIANT_OF: BASELINE}
        whole = overridden(train, own)
        if isinstance(file := whole.get("peft"), str) and not _watched(file) and arm in wanted:
            lines.append(f"arms.{arm}.peft: expected a file in {THEIRS}/, which DVC watches, got {file!r}")
        of = own.get(VARIANT_OF)
        code = arm if of is None else of
        if of is None and arm not in own_arms:
            meant = suggest(str(arm), own_arms)
            lines.append(f"arms.{arm}: unknown arm{meant}; a variant of one says {VARIANT_OF}: and its name")
        elif of is not None and (arm in own_arms or arm == BASE_ARM or not NAME.fullmatch(str(arm))):
            expected = "a variant to have a new name of small letters, digits and _"
            lines.append(f"arms.{arm}: expected {expected}, got {arm!r}")
        elif code not in own_arms:
            lines.append(f"arms.{arm}.{VARIANT_OF}: unknown arm {of!r}{suggest(str(of), own_arms)}")
        else:
            usable.append(arm)
        settings = arms.load(code).settings if code in own_arms else TrainSettings
        for error in _errors(settings, whole):
            # What does not fit together is the arm's fault only where it is trained, and section train alone does fit.
            if error["loc"][0] in own if error["loc"] else arm in wanted and not _errors(TrainSettings, train):
                lines += explain([error], settings, "arms", str(arm))
    lines += [f"matrix.arms: unknown arm {a!r}{suggest(str(a), usable)}" for a in wanted if a not in usable]
    lines += [
        f"arms.{a}: missing; the matrix names this arm, write `{a}: {{}}` where it sets nothing of its own"
        for a in wanted
        if a in own_arms and a not in entries
    ]
    return lines


def _theirs(arm: str, given: Any, seeds: Any) -> list[str]:
    """What speaks against the adapters of an arm that was trained elsewhere."""
    where = f"arms.{arm}.{ADAPTER}"
    if not _watched(given):
        return [f"{where}: expected a folder in {THEIRS}/, which DVC watches, got {given!r}; copy it there"]
    folders = dict.fromkeys(given.replace("{seed}", str(seed)) for seed in (seeds if isinstance(seeds, list) else []))
    return [f"{where}: {line}" for folder in folders for line in theirs.problems(Path(folder))]


def _watched(given: Any) -> bool:
    return isinstance(given, str) and Path(given).resolve().is_relative_to(THEIRS.resolve())


def _errors(schema: type[BaseModel], content: dict[str, Any]) -> list[Any]:
    try:
        schema(**content)
    except ValidationError as error:
        return list(error.errors())
    return []


def write_code_hashes(params: Params, pipeline: Path = Path("dvc.yaml"), folder: Path = CODE) -> None:
    """One file for each stage of dvc.yaml, for train one for each arm, for harness for each task: its code's hash."""
    named = re.findall(r"python -m pipelines\.(\w+)", pipeline.read_text(encoding="utf-8"))
    stages = set(named) - {"check", "train", "harness"}
    used = {"trainers.arms": (), "evaluation.tasks": (params.prepare_data.task,)}
    hashes = {stage: code_hash(f"pipelines.{stage}", plugins=used) for stage in stages}
    for arm in params.matrix.arms:
        module = f"trainers.arms.{params.code_of(arm)}"
        code = code_hash("pipelines.train", module, plugins={**used, "evaluation.tasks": ()})
        files = [file for seed in params.matrix.seeds for file in params.files_of(arm, seed)]
        hashes[f"train.{arm}"] = key_of([code, hash_inputs(*files)]) if files else code
    for task in params.evaluate.harness:
        code = code_hash("pipelines.harness", plugins={**used, "evaluation.tasks": ()})
        hashes[f"harness.{task}"] = key_of([code, hash_inputs(*harness.own_files(task))])
    for name, value in hashes.items():
        write_text(folder / name, f"{value}\n")


def check_base(section: PrepareBase) -> None:
    """ConfigError for a base that could not be exported, hours of training later.

    One that cannot be read is left to stage prepare_base, which says why.
    """
    if section.source == "embedded" or section.vision is not None:
        return
    key = "source" if section.merge_source is None else "merge_source"
    source, revision = section.merge_source or section.source, section.revision if key == "source" else None
    kwargs = {"revision": revision, "trust_remote_code": section.trust_remote_code}
    try:
        gguf.check_base(str(local_folder(source, key) or source), kwargs)
    except ExportError as error:
        raise ConfigError(f"prepare_base.{key}: {source}: {error}") from error
    except (OSError, ValueError):
        return


def main() -> None:
    """Refuse a params.yaml that cannot be used; write the hashes of the stages' code."""
    with clear_errors("check", code=2):
        params = load_params()
        check_base(params.prepare_base)
        write_code_hashes(params)


if __name__ == "__main__":
    cli(main)
