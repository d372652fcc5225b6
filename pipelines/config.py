"""The schema of params.yaml: one section per stage, unknown keys refused, every error listed at once."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from evaluation.epa import POLLUTANTS
from trainers import ARMS
from trainers.embedded_base import EmbeddedSettings
from trainers.settings import Section
from trainers.settings import TrainSettings as Train

PARAMS_FILE = Path("params.yaml")
# Always the same content: stages depend on it, so that the check comes first, and do not rerun because of it.
CHECKED = Path("outputs/params.checked")

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class ConfigError(ValueError):
    """params.yaml cannot be used; the message lists everything that is wrong with it."""


class Matrix(Section):
    """What is trained: every arm with every seed."""

    arms: list[str] = Field(min_length=1)
    seeds: list[Seed] = Field(min_length=1)

    @field_validator("arms")
    @classmethod
    def _known(cls, arms: list[str]) -> list[str]:
        unknown = [f"unknown arm {arm!r}{_suggest(arm, ARMS)}" for arm in arms if arm not in ARMS]
        if unknown:
            raise ValueError("; ".join(unknown))
        return arms

    @field_validator("arms", "seeds")
    @classmethod
    def _unique(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) != len(values):
            raise ValueError(f"expected each once, got {values}")
        return values


class Prompt(Section):
    """The text round every question."""

    template: str

    @field_validator("template")
    @classmethod
    def _one_slot(cls, template: str) -> str:
        if template.count("{prompt}") != 1:
            raise ValueError(f"expected exactly one {{prompt}}, got {template.count('{prompt}')}")
        if "{{" in template or "}}" in template:
            raise ValueError("'{{' and '}}' cannot be told from Ollama's template commands; use other signs")
        return template


class Column(Section):
    """A column of the user's file and the unit it is in."""

    column: str
    unit: str | None = None


class PrepareData(Section):
    """Section prepare_data."""

    source: str
    hub_split: str
    hub_subset: str | None
    delimiter: Annotated[str, Field(min_length=1, max_length=1)]
    columns: dict[str, str | Column]
    trust_given_aqi: bool
    seed: Seed
    train_items: Positive
    valid_items: Positive
    test_items: Positive
    pollutants: list[str] = Field(min_length=1)
    max_pollutants: Positive
    retention_items_per_task: Positive

    @field_validator("pollutants")
    @classmethod
    def _pollutants(cls, keys: list[str]) -> list[str]:
        unknown = [f"unknown pollutant {k!r}{_suggest(k, POLLUTANTS)}" for k in keys if k not in POLLUTANTS]
        if unknown:
            raise ValueError("; ".join(unknown))
        return keys

    @model_validator(mode="after")
    def _mapping(self) -> "PrepareData":
        if self.source != "generated" and not self.columns:
            raise ValueError("columns: a source of your own needs a mapping, e.g. {pm25: PM2.5_ugm3}")
        return self


class PrepareBase(EmbeddedSettings):
    """Section prepare_base: where the base comes from, and the shape of the embedded one."""

    source: str
    revision: str | None
    merge_source: str | None
    trust_remote_code: bool
    min_tasks_above_80: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _shape(self) -> "PrepareBase":
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size: expected a multiple of 2·heads = {2 * self.heads}, got {self.hidden_size}")
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % 32:
                raise ValueError(
                    f"{name}: expected a multiple of 32 (GGUF's quantization block), got {getattr(self, name)}"
                )
        return self


class Export(Section):
    """Section export."""

    quantization: Literal["f16", "q8_0", "q4_K_M"]
    num_ctx: Annotated[int, Field(ge=32, description="tokens")]
    parity_prompts: Positive
    parity_tokens: Positive
    min_greedy_equal: Share


class Evaluate(Section):
    """Section evaluate."""

    backend: Literal["auto", "ollama", "llama_cpp", "hf"]
    max_tokens: Positive
    threads: Annotated[int, Field(ge=0)]
    speed_repetitions: Positive
    speed_prompts: Positive
    speed_tokens: Positive


class Compare(Section):
    """Section compare."""

    database: str

    @field_validator("database")
    @classmethod
    def _file(cls, database: str) -> str:
        if "://" in database or Path(database).is_absolute():
            raise ValueError(
                f"expected a file below the project's folder, got {database!r}; for other databases there is "
                "`python -m db.cli ingest --db URL`"
            )
        return database


class Params(Section):
    """The whole of params.yaml."""

    profile: str
    matrix: Matrix
    arms: dict[str, dict[str, Any]]
    prompt: Prompt
    prepare_data: PrepareData
    prepare_base: PrepareBase
    train: Train
    export: Export
    evaluate: Evaluate
    compare: Compare

    def train_for(self, arm: str) -> Train:
        """Section train with the overrides of one arm."""
        return Train(**{**self.train.model_dump(), **self.arms.get(arm, {})})


def _suggest(word: str, known: Any) -> str:
    """The end of an error message: what may have been meant, and what there is."""
    names = [str(k) for k in known]
    close = difflib.get_close_matches(word, names, n=1)
    return (f"; did you mean {close[0]!r}?" if close else ".") + f" Available: {', '.join(names)}"


def check_arm(name: str) -> None:
    """Refuse an arm that does not exist.

    Raises:
        ConfigError: lists those that do.
    """
    if name not in ARMS:
        raise ConfigError(f"unknown arm {name!r}{_suggest(name, ARMS)}")


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Names that are allowed beside the unknown key at `location`."""
    model: type[BaseModel] = Params
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return [name for name in Column.model_fields] if "columns" in location else []
        model = annotation
    return list(model.model_fields)


def _explain(errors: list[Any], prefix: tuple[str, ...] = (), fields: list[str] | None = None) -> list[str]:
    """One line for each pydantic error."""
    lines = []
    for error in errors:
        where = ".".join(map(str, (*prefix, *error["loc"]))) or "params.yaml"
        match error["type"]:
            case "extra_forbidden":
                known = fields if fields is not None else _fields_at(error["loc"])
                lines.append(f"{where}: unknown key{_suggest(str(error['loc'][-1]), known)}")
            case "missing":
                lines.append(f"{where}: missing; profiles/tiny.yaml shows every key with its default")
            case "value_error":
                lines.append(f"{where}: {error['ctx']['error']!s}")
            case _:
                message = error["msg"][0].lower() + error["msg"][1:]
                lines.append(f"{where}: {message}, got {error['input']!r}")
    return lines


def _check_arms(raw: dict[str, Any]) -> list[str]:
    """Errors in `arms:` — unknown arms, unknown or wrong overrides, arms of the matrix without an entry."""
    arms, train = raw.get("arms"), raw.get("train")
    if not isinstance(arms, dict):
        return []
    lines = [f"arms.{arm}: unknown arm{_suggest(str(arm), ARMS)}" for arm in arms if arm not in ARMS]
    for arm, overrides in arms.items():
        if not isinstance(overrides, dict):
            if arm in ARMS:
                lines.append(f"arms.{arm}: expected keys of train: (or {{}}), got {overrides!r}")
            continue
        base = train if isinstance(train, dict) else {}
        try:
            Train(**{**base, **overrides})
        except ValidationError as error:
            mine = [e for e in error.errors() if e["loc"] and e["loc"][0] in overrides]
            lines += _explain(mine, ("arms", str(arm)), list(Train.model_fields))
    matrix = raw.get("matrix")
    wanted = matrix.get("arms") if isinstance(matrix, dict) else None
    if isinstance(wanted, list):
        lines += [
            f"arms.{a}: missing; the matrix names this arm, write `{a}: {{}}` where it sets nothing of its own"
            for a in wanted
            if a in ARMS and a not in arms
        ]
    return lines


def parse_params(raw: Any, source: str = str(PARAMS_FILE)) -> Params:
    """Validated parameters.

    Args:
        raw: What the YAML file holds.
        source: Name used in the error message.

    Raises:
        ConfigError: lists every error of the file, each with its key, what was expected and what came.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: expected sections, got {type(raw).__name__}")
    lines = _check_arms(raw)
    params = None
    try:
        params = Params(**raw)
    except ValidationError as error:
        own = [e for e in error.errors() if e["loc"][:1] != ("arms",) or not isinstance(raw.get("arms"), dict)]
        lines = _explain(own) + lines
    if params is None or lines:
        count = f"{len(lines)} error{'s' if len(lines) != 1 else ''}"
        raise ConfigError(f"{source}: {count}\n" + "\n".join(f"  {line}" for line in lines))
    return params


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


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Validated parameters from a file; see `parse_params`."""
    return parse_params(load_yaml(path), str(path))


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


if __name__ == "__main__":
    from pipelines.stage import cli

    cli(main)
