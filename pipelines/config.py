"""Reading params.yaml: unknown keys get a "did you mean", and every error is listed at once."""

import hashlib
import re
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.schema import Params
from pipelines.schema_common import OF_ARMS, VARIANT_OF, CommonParams, Registry
from pipelines.schema_data import Column, suggest
from pipelines.stage import BASE_ARM
from trainers.settings import TrainSettings

if TYPE_CHECKING:
    from pipelines.schema_vision import VisionParams

PARAMS_FILE = Path("params.yaml")
# Names folders and models in Ollama.
_NAME = re.compile("[a-z][a-z0-9_]{0,39}")
# Always the same content: stages depend on it, so that the check comes first, and do not rerun because of it.
CHECKED = Path("outputs/params.checked")
# One file an arm with the hash of the code behind it: DVC cannot give the stages of one matrix different dependencies.
CODE = Path("outputs/code")


# Key at the top of params.yaml; without it, the pipeline is the one for text.
PIPELINE, VISION = "pipeline", "vision"


class ConfigError(ValueError):
    """params.yaml cannot be used; the message lists everything that is wrong with it."""


def schema_of(raw: dict[Any, Any], source: str = str(PARAMS_FILE)) -> type[CommonParams]:
    """The schema that a file's content asks for.

    Raises:
        ConfigError: it names a pipeline that does not exist.
    """
    if PIPELINE not in raw:
        return Params
    if raw[PIPELINE] != VISION:
        meant = suggest(str(raw[PIPELINE]), [VISION])
        raise ConfigError(
            f"{source}: 1 error\n  {PIPELINE}: unknown pipeline {raw[PIPELINE]!r}{meant}; without the key it is the "
            "one for text"
        )
    from pipelines.schema_vision import VisionParams

    return VisionParams


def check_arm(name: str, params: CommonParams) -> None:
    """Refuse an arm that does not exist.

    Raises:
        ConfigError: lists those that do.
    """
    there = list(dict.fromkeys([*params.registry.arms, *params.arms]))
    if name not in there:
        raise ConfigError(f"unknown arm {name!r}{suggest(name, there)}")


def arm_code(arm: str, registry: Registry = Params.registry) -> str:
    """Hash of the code that decides what an arm does, beyond the training path that all share; of no variant."""
    root = Path(__file__).resolve().parents[1]
    parts = [root / part for part in registry.builds_on.get(arm, ())]
    files = [root.joinpath(*registry.arms[arm].split(".")).with_suffix(".py")]
    for part in parts:
        files += [part] if part.is_file() else sorted(part.rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _section(annotation: Any) -> type[BaseModel] | None:
    """The schema of a section that may be None too."""
    options = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _fields_at(location: tuple[int | str, ...], schema: type[BaseModel]) -> list[str]:
    """Names that are allowed beside the unknown key at `location`."""
    model = schema
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        section = _section(field.annotation if field else None)
        if section is None:
            return [name for name in Column.model_fields] if "columns" in location else []
        model = section
    return list(model.model_fields)


def _explain(errors: list[Any], schema: type[CommonParams], prefix: tuple[str, ...] = ()) -> list[str]:
    """One line for each pydantic error.

    Args:
        errors: As pydantic lists them.
        schema: Of the whole file.
        prefix: Where the errors are; with one, they are of an arm's settings.
    """
    lines = []
    for error in errors:
        where = ".".join(map(str, (*prefix, *error["loc"]))) or "params.yaml"
        match error["type"]:
            case "extra_forbidden":
                known = _fields_at(error["loc"], schema.settings_class() if prefix else schema)
                lines.append(f"{where}: unknown key{suggest(str(error['loc'][-1]), known)}")
            case "missing":
                lines.append(f"{where}: missing; {schema.defaults} shows every key with its default")
            case "value_error":
                lines += [f"{where}: {line}" for line in str(error["ctx"]["error"]).splitlines()]
            case _:
                message = error["msg"][0].lower() + error["msg"][1:]
                lines.append(f"{where}: {message}, got {error['input']!r}")
    return lines


def _variants(arms: dict[Any, Any], own_arms: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Variant → the arm that it is one of, and what is wrong with entries that are no arm of their own.

    Args:
        arms: Section arms.
        own_arms: Those that have code of their own.
    """
    found: dict[str, str] = {}
    lines = []
    for arm, own in arms.items():
        of = own.get(VARIANT_OF) if isinstance(own, dict) else None
        if of is None:
            if arm not in own_arms:
                meant = suggest(str(arm), own_arms)
                lines.append(f"arms.{arm}: unknown arm{meant}; a variant of one says {VARIANT_OF}: and its name")
        elif arm in own_arms or arm == BASE_ARM or not _NAME.fullmatch(str(arm)):
            lines.append(
                f"arms.{arm}: expected a variant to have a new name of small letters, digits and _, got {arm!r}"
            )
        elif not isinstance(of, str) or of not in own_arms:
            lines.append(f"arms.{arm}.{VARIANT_OF}: unknown arm {of!r}{suggest(str(of), own_arms)}")
        else:
            found[str(arm)] = str(of)
    return found, lines


def _valid(train: dict[str, Any], settings: type[TrainSettings]) -> bool:
    try:
        settings(**train)
    except ValidationError:
        return False
    return True


def _check_arms(raw: dict[str, Any], schema: type[CommonParams]) -> list[str]:
    """Errors in `arms:` — unknown arms, unknown or wrong overrides, arms of the matrix without an entry."""
    arms, train = raw.get("arms"), raw.get("train")
    if not isinstance(arms, dict):
        return []
    registry, settings = schema.registry, schema.settings_class()
    variants, lines = _variants(arms, registry.arms)
    for arm, overrides in arms.items():
        if not isinstance(overrides, dict):
            if arm in registry.arms:
                lines.append(f"arms.{arm}: expected keys of train: (or {{}}), got {overrides!r}")
            continue
        overrides = {name: value for name, value in overrides.items() if name != VARIANT_OF}
        builds_on = registry.builds_on.get(variants.get(str(arm), str(arm)), ())
        for key, (title, package) in OF_ARMS.items():
            if key in overrides and key in settings.model_fields and package not in builds_on:
                lines.append(f"arms.{arm}.{key}: {arm} does not use {title}; expected no such section")
                overrides = {name: value for name, value in overrides.items() if name != key}
        base = train if isinstance(train, dict) else {}
        try:
            settings(**{**base, **overrides})
        except ValidationError as error:
            # What does not fit together is the arm's fault only where it does fit in section train.
            mine = [e for e in error.errors() if (e["loc"][0] in overrides if e["loc"] else _valid(base, settings))]
            lines += _explain(mine, schema, ("arms", str(arm)))
    matrix = raw.get("matrix")
    wanted = matrix.get("arms") if isinstance(matrix, dict) else None
    if isinstance(wanted, list):
        known = [*registry.arms, *variants]
        lines += [f"matrix.arms: unknown arm {a!r}{suggest(str(a), known)}" for a in wanted if a not in known]
        lines += [
            f"arms.{a}: missing; the matrix names this arm, write `{a}: {{}}` where it sets nothing of its own"
            for a in wanted
            if isinstance(a, str) and a in registry.arms and a not in arms
        ]
    return lines


def parse_params(raw: Any, source: str = str(PARAMS_FILE)) -> "Params | VisionParams":
    """Validated parameters.

    Args:
        raw: What the YAML file holds.
        source: Name used in the error message.

    Raises:
        ConfigError: lists every error of the file, each with its key, what was expected and what came.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: expected sections, got {type(raw).__name__}")
    schema = schema_of(raw, source)
    lines = _check_arms(raw, schema)
    params = None
    try:
        params = schema(**raw)
    except ValidationError as error:
        own = [e for e in error.errors() if e["loc"][:1] != ("arms",) or not isinstance(raw.get("arms"), dict)]
        lines = _explain(own, schema) + lines
    if params is None or lines:
        count = f"{len(lines)} error{'s' if len(lines) != 1 else ''}"
        raise ConfigError(f"{source}: {count}\n" + "\n".join(f"  {line}" for line in lines))
    return cast("Params | VisionParams", params)


def load_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ConfigError: no such file, or no YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; run from the project's folder, or `python -m pipelines.profile tiny`"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None


def load_params(path: Path = PARAMS_FILE) -> "Params | VisionParams":
    """Validated parameters from a file; see `parse_params`."""
    return parse_params(load_yaml(path), str(path))


def for_text(params: CommonParams, what: str) -> Params:
    """The parameters of the pipeline for text.

    Args:
        params: Of any pipeline.
        what: That needs them.

    Raises:
        ConfigError: they are another pipeline's, which has no such thing.
    """
    if not isinstance(params, Params):
        raise ConfigError(f"{what}: only in the pipeline for text; {PARAMS_FILE} says `{PIPELINE}: {VISION}`")
    return params


def main(get: str = "") -> None:
    """Stage check_params: refuse a params.yaml that cannot be used, before any work; --get prints one value."""
    import sys

    try:
        params = load_params()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if get:
        value: Any = params.model_dump()
        for part in get.split("."):
            value = value[part]
        print(value)
        return
    CHECKED.parent.mkdir(exist_ok=True)
    CHECKED.write_text("ok\n", encoding="utf-8")
    CODE.mkdir(exist_ok=True)
    for arm in {*params.registry.arms, *params.arms}:
        (CODE / arm).write_text(f"{arm_code(params.code_of(arm), params.registry)}\n", encoding="utf-8")


if __name__ == "__main__":
    from pipelines.stage import cli

    cli(main)
