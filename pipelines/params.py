"""What a stage reads of params.yaml. Unknown keys get a "did you mean", and every mistake is listed at once.

Each stage's module has the section that belongs to it and a view `Params` of all that it reads; `pipelines.check` puts
the views together into the whole file. This module imports no stage: what a stage imports decides when DVC reruns it.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from db.files import omp_threads
from pipelines import STAGES
from trainers import BASELINE
from trainers import arms as own_arms
from trainers.settings import Positive, Section, Seed
from trainers.words import suggest

PARAMS_FILE = Path("params.yaml")
DEFAULTS = "profiles/tiny.yaml"
VARIANT_OF = "variant_of"
"""In an entry of arms: the arm whose code it runs, with settings of its own."""
ADAPTER = "adapter"
"""In an entry of arms: the folder of an adapter that was trained elsewhere; {seed} stands for each of the matrix."""
THEIRS = Path("theirs")
"""Where such folders lie: DVC watches it."""
SMALL = 256
"""Width of hidden layers up to which two stages with one thread each beat one with two (benchmarks/threads.py)."""
Share = Annotated[float, Field(ge=0.0, le=1.0)]
P = TypeVar("P", bound=BaseModel)


class ConfigError(ValueError):
    """params.yaml cannot be used; the message lists everything that is wrong with it."""


class PipelineError(RuntimeError):
    """Work that failed, or results that are refused, although params.yaml is fine; the message gives the reason."""


def unique(values: list[Any]) -> list[Any]:
    if len(set(values)) != len(values):
        raise ValueError(f"expected each once, got {values}")
    return values


class Matrix(Section):
    arms: list[str] = Field(min_length=1)
    seeds: list[Seed] = Field(min_length=1)

    _each_once = field_validator("arms", "seeds")(unique)


class Evaluate(Section):
    """Section evaluate, of which export and quantize read some keys too; those of stage harness begin with its name."""

    backend: Literal["auto", "ollama", "llama_cpp", "hf"]
    max_tokens: Positive
    parallel: Annotated[int, Field(ge=1, le=256, description="sequences at once")]
    speed_repetitions: Positive
    speed_prompts: Positive
    speed_tokens: Positive
    harness: list[Annotated[str, Field(pattern=r"^\w[\w.-]*$", description="a name in folders and commands")]]
    harness_limit: Positive | None

    _each_once = field_validator("harness")(unique)


class Probe(Section):
    """Section probe: how a verdict on an arm's updates is reached."""

    twin_steps: Annotated[int, Field(ge=5, description="optimizer steps of each twin")]
    min_angle: Annotated[float, Field(gt=0, le=90, description="degrees")]
    min_coverage: Share


class Resources(Section):
    """What a stage needs of a node, as Ray counts it."""

    cpus: Annotated[float, Field(ge=0.01)]
    gpus: Annotated[float, Field(ge=0)]  # 0.5: two stages share one
    memory: Annotated[float, Field(ge=0, description="GB")]
    accelerator: str | None  # a name of Ray's, so that arms are compared on one kind of GPU


class Distribute(Resources):
    """Section distribute: what a stage needs on a Ray cluster."""

    stages: dict[str, dict[str, Any]]  # stage → what it needs otherwise

    @model_validator(mode="after")
    def _known(self) -> "Distribute":
        lines = [f"stages.{name}: unknown stage{suggest(name, STAGES)}" for name in self.stages if name not in STAGES]
        for name in self.stages:
            try:
                self._of(name)
            except ValidationError as error:
                lines += explain(error.errors(), Resources, "stages", name)
        if lines:
            raise ValueError("\n".join(lines))
        return self

    def _of(self, stage: str) -> Resources:
        return Resources(**{**self.model_dump(exclude={"stages"}), **self.stages.get(stage, {})})

    def of(self, stage: str) -> dict[str, Any]:
        """Options of a Ray task for a stage, those of an arm for its counterpart of the base."""
        needs = self._of(stage if stage in STAGES else stage.removesuffix("_base"))
        given = {
            "num_cpus": needs.cpus,
            "num_gpus": needs.gpus,
            "accelerator_type": needs.accelerator if needs.gpus else None,
        }
        return given | {"memory": int(needs.memory * 1e9) or None}


class StageParams(Section):
    """What every stage may read; a stage adds its sections and ignores the others."""

    model_config = ConfigDict(extra="ignore")

    threads: Literal["auto"] | Positive  # no stage depends on it: it changes no more than roundings
    matrix: Matrix
    arms: dict[str, dict[str, Any]]

    def code_of(self, arm: str) -> str:
        """The arm whose code runs: that which `arm` is a variant of, or itself."""
        own = self.arms.get(arm, {})
        return str(own.get(VARIANT_OF) or (BASELINE if ADAPTER in own else arm))

    def adapter_of(self, arm: str, seed: int) -> Path | None:
        """Where the adapter lies that this arm is; None: it is trained here."""
        path = self.arms.get(arm, {}).get(ADAPTER)
        return None if path is None else Path(str(path).replace("{seed}", str(seed)))

    @property
    def first_seed(self) -> int:
        """The seed whose models get names without a tag."""
        return self.matrix.seeds[0]


def own_threads() -> int:
    """OMP_NUM_THREADS; 0: not set."""
    try:
        return omp_threads()
    except ValueError as error:
        raise ConfigError(f"OMP_NUM_THREADS: expected a whole number of threads ({error})") from error


def threads_for(raw: Any, alone: bool = False) -> tuple[int, str]:
    """CPU threads of a stage for the content of params.yaml, and why so many; `alone`: no stage can run beside it."""
    if own := own_threads():
        return own, "OMP_NUM_THREADS"
    asked = parse(raw, StageParams, str(PARAMS_FILE)).threads
    if asked != "auto":
        return asked, "threads"
    if stages_at_once(raw) > 1 and not alone:
        return 1, "auto: narrow layers gain more from stages side by side"
    return len(os.sched_getaffinity(0)), "auto: one a core"


def stages_at_once(raw: Any) -> int:
    """How many stages to run side by side: as many as there are cores for where the base is small, one on a GPU."""
    base, threads = raw.get("prepare_base") or {}, own_threads() or raw.get("threads")
    if not isinstance(base, dict):
        raise ConfigError(f"{PARAMS_FILE}: prepare_base: expected keys and values, got {base!r}")
    width, each = base.get("hidden_size"), threads if isinstance(threads, int) else 1
    if base.get("source") != "embedded" or not isinstance(width, int) or width > SMALL:
        return 1
    return 1 if list(Path("/dev").glob("nvidia[0-9]*")) else max(1, len(os.sched_getaffinity(0)) // each)


def overridden(train: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Section train with an arm's entry over it, and key by key over `preserve`."""
    found = {**train, **{name: value for name, value in own.items() if name not in (VARIANT_OF, ADAPTER)}}
    both = (train.get("preserve"), own.get("preserve"))
    if all(isinstance(part, dict) for part in both):
        found["preserve"] = {**train["preserve"], **own["preserve"]}
    return found


def check_arm(name: str, params: StageParams) -> None:
    """Refuse an arm that does not exist, or is a variant of none, with a ConfigError that lists those that do."""
    own = own_arms.names()
    for word, there in ((name, list(dict.fromkeys([*own, *params.arms]))), (params.code_of(name), own)):
        if word not in there:
            raise ConfigError(f"unknown arm {word!r}{suggest(word, there)}")


def load_params(schema: type[P], path: Path = PARAMS_FILE) -> P:
    """The part of a parameter file that a schema asks for; ConfigError with every error of it."""
    return parse(load_yaml(path), schema, str(path))


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


def parse(raw: Any, schema: type[P], source: str) -> P:
    """Checked settings; ConfigError lists every error of `source`, with its key, what was expected and what came."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: expected sections, got {type(raw).__name__}")
    try:
        return schema(**raw)
    except ValidationError as error:
        raise listed(explain(error.errors(), schema), source) from None


def listed(lines: list[str], source: str) -> ConfigError:
    """One error with a line for each mistake."""
    count = f"{len(lines)} error{'s' if len(lines) != 1 else ''}"
    return ConfigError(f"{source}: {count}\n" + "\n".join(f"  {line}" for line in lines))


def explain(errors: list[Any], schema: type[BaseModel], *prefix: str) -> list[str]:
    """One line or more for each pydantic error; `prefix` is where the schema's own keys stand in the file."""
    lines = []
    for error in errors:
        where = ".".join(map(str, (*prefix, *error["loc"]))) or str(PARAMS_FILE)
        match error["type"]:
            case "extra_forbidden":
                lines.append(f"{where}: unknown key{suggest(str(error['loc'][-1]), _keys_at(error['loc'], schema))}")
            case "missing":
                lines.append(f"{where}: missing; {DEFAULTS} shows every key with its default")
            case "value_error":
                lines += [f"{where}: {line}" for line in str(error["ctx"]["error"]).splitlines()]
            case _:
                message = error["msg"][0].lower() + error["msg"][1:]
                lines.append(f"{where}: {message}, got {error['input']!r}")
    return lines


def _keys_at(location: tuple[int | str, ...], schema: type[BaseModel]) -> list[str]:
    """The keys that are allowed beside the unknown one at `location`."""
    for part in location[:-1]:
        field = schema.model_fields.get(str(part))  # else an index or the tag of a union's member
        schema = (_section(field.annotation) if field else None) or schema
    return list(schema.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The schema within an annotation such as `Section | None` or `dict[str, str | Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section(part))), None)


NAME = re.compile("[a-z][a-z0-9_]{0,39}")
"""Names of arms are names of folders and of models in Ollama."""
