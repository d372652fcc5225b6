"""How a stage reads params.yaml. Unknown keys get a "did you mean", and all mistakes are listed at once.

Each stage's module defines its own section and a view `Params` of everything that it reads; `pipelines.check` combines
the views into the whole file. This module imports no stage, because a stage reruns when code that it imports changes.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import psutil
from joblib import cpu_count  # knows affinity and a container's quota
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from ruamel.yaml import YAML, YAMLError

from db.files import omp_threads
from pipelines import STAGES
from trainers import BASELINE
from trainers import arms as own_arms
from trainers.settings import Positive, Section, Seed
from trainers.words import suggest

PARAMS_FILE = Path("params.yaml")
DEFAULTS = "profiles/tiny.yaml"
VARIANT_OF = "variant_of"
"""In an entry of `arms`: the arm whose code it runs, with its own settings."""
ADAPTER = "adapter"
"""In an entry of `arms`: the folder of an adapter that was trained elsewhere; {seed} is replaced by the seed."""
THEIRS = Path("theirs")
"""Where such folders belong, because DVC watches it."""
INPUTS = Path("inputs")
"""Where files of the user's belong, because DVC watches it."""
STAGE_BYTES, OF_WEIGHTS = 1.5e9, 5
"""Memory of a stage without a model; and as a multiple of the base's 16-bit file, with which export needs most: the
weights of base and merged model in float32, two bytes more each for what they were made of."""
Share = Annotated[float, Field(ge=0.0, le=1.0)]
P = TypeVar("P", bound=BaseModel)


class ConfigError(ValueError):
    """params.yaml cannot be used; the message lists everything that is wrong with it."""


class PipelineError(RuntimeError):
    """Work that failed, or results that are refused, although params.yaml is fine; the message gives the reason."""


def unique(values: list[Any]) -> list[Any]:
    if len(set(values)) != len(values):
        raise ValueError(f"expected no duplicates, got {values}")
    return values


class Matrix(Section):
    arms: list[str] = Field(min_length=1)
    seeds: list[Seed] = Field(min_length=1)

    _each_once = field_validator("arms", "seeds")(unique)


class Evaluate(Section):
    """Section evaluate. Stages export and quantize read some of its keys; `harness*` belong to stage harness."""

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
    """Section probe: thresholds for the verdict on an arm's updates."""

    min_angle: Annotated[float, Field(gt=0, le=90, description="degrees")]
    min_coverage: Share


Cpus = Annotated[float, Field(ge=0.01)]
Amount = Annotated[float, Field(ge=0)]


class Resources(Section):
    """What a stage needs of a node, as Ray counts it."""

    cpus: Cpus
    gpus: Amount  # 0.5: two stages share one
    memory: Amount  # GB
    accelerator: str | None  # Ray's name for a kind of GPU, so that arms are compared on the same kind


class StageResources(Resources):
    cpus: Cpus = 1
    gpus: Amount = 0
    memory: Amount = 0
    accelerator: str | None = None


class Distribute(Resources):
    """Section distribute: what stages need on a Ray cluster."""

    stages: dict[str, StageResources]  # only the keys in which a stage differs

    @field_validator("stages")
    @classmethod
    def _stages_exist(cls, stages: dict[str, StageResources]) -> dict[str, StageResources]:
        if lines := [f"{name}: unknown stage{suggest(name, STAGES)}" for name in stages if name not in STAGES]:
            raise ValueError("\n".join(lines))
        return stages

    def of(self, stage: str) -> dict[str, Any]:
        """Options of a Ray task for a stage; one for the base, such as evaluate_base, needs what the arms' one does."""
        different = self.stages.get(stage if stage in STAGES else stage.removesuffix("_base"))
        needs = self.model_copy(update=different.model_dump(exclude_unset=True) if different else {})
        return {
            "num_cpus": needs.cpus,
            "num_gpus": needs.gpus,
            "accelerator_type": needs.accelerator if needs.gpus else None,
            "memory": int(needs.memory * 1e9) or None,
        }


class StageParams(Section):
    """What every stage may read. A stage adds its sections and ignores the others."""

    model_config = ConfigDict(extra="ignore")

    threads: Literal["auto"] | Positive  # no stage depends on it: it only changes rounding
    matrix: Matrix
    arms: dict[str, dict[str, Any]]

    def code_of(self, arm: str) -> str:
        """The arm whose code runs: the one that `arm` is a variant of, or `arm` itself."""
        entry = self.arms.get(arm, {})
        return str(entry.get(VARIANT_OF) or (BASELINE if ADAPTER in entry else arm))

    def adapter_of(self, arm: str, seed: int) -> Path | None:
        """Folder of the adapter if this arm was trained elsewhere, otherwise None."""
        path = self.arms.get(arm, {}).get(ADAPTER)
        return None if path is None else Path(str(path).replace("{seed}", str(seed)))

    @property
    def first_seed(self) -> int:
        """The seed whose models have names without a tag."""
        return self.matrix.seeds[0]


def env_threads() -> int:
    """OMP_NUM_THREADS, or 0 if it is not set."""
    try:
        return omp_threads()
    except ValueError as error:
        raise ConfigError(f"OMP_NUM_THREADS: expected a whole number of threads ({error})") from error


def threads_for(raw: Any) -> tuple[int, str]:
    """CPU threads of a stage and the reason, for the content of params.yaml.

    A stage that nothing can run beside, as training the base, gets no more: its second thread gains a sixth on two idle
    cores, and beside one busy process, where the threads wait for each other, a step takes 25 times as long.
    """
    if threads := env_threads():
        return threads, "OMP_NUM_THREADS"
    setting = parse(raw, StageParams, str(PARAMS_FILE)).threads
    if setting != "auto":
        return setting, "threads"
    slots = stages_at_once(raw)
    return max(1, cpu_count() // slots), f"auto: {cpu_count()} cores, {slots} stage{'s' * (slots > 1)} at a time"


def stages_at_once(raw: Any) -> int:
    """How many stages to run at a time: one on a GPU, otherwise one a core if there is enough memory.

    Stages side by side with one thread each are as fast as one that uses every core, and unlike it they stay fast on a
    busy machine, whatever the width of the base (docs/log/2026-11-23.md).
    """
    base, threads = raw.get("prepare_base") or {}, env_threads() or raw.get("threads")
    if not isinstance(base, dict):
        raise ConfigError(f"{PARAMS_FILE}: prepare_base: expected keys and values, got {base!r}")
    if list(Path("/dev").glob("nvidia[0-9]*")):
        return 1
    weights = 0 if base.get("source") == "embedded" else weights_bytes(str(base.get("source")), base.get("revision"))
    if weights is None:
        return 1
    fit = int(memory_bytes() / (STAGE_BYTES + OF_WEIGHTS * weights))
    return max(1, min(fit, cpu_count() // (threads if isinstance(threads, int) else 1)))


def weights_bytes(source: str, revision: str | None) -> int | None:
    """Size of a model's weights in a GGUF file, a folder or the hub's cache; None if they are in none of these."""
    from trainers import TrainingError, gguf_file

    folder = Path(source).expanduser()
    if gguf_file.is_gguf(source):
        try:
            return gguf_file.weights_bytes(gguf_file.locate(source))
        except TrainingError:  # stage check explains it
            return None
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(source, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
            return None
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def memory_bytes() -> int:
    """Memory of this machine, or what a container may use of it."""
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    texts = [file.read_text(encoding="utf-8").strip() for file in limits if file.is_file()]
    return min([psutil.virtual_memory().total, *(int(text) for text in texts if text.isdigit())])


def overridden(train: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """Section train updated with an arm's entry; `preserve` is updated key by key."""
    merged = {**train, **{name: value for name, value in entry.items() if name not in (VARIANT_OF, ADAPTER)}}
    if isinstance(train.get("preserve"), dict) and isinstance(entry.get("preserve"), dict):
        merged["preserve"] = {**train["preserve"], **entry["preserve"]}
    return merged


def check_arm(name: str, params: StageParams) -> None:
    """Raises ConfigError for an arm that does not exist or is a variant of one that does not."""
    names = own_arms.names()
    for arm, known in ((name, list(dict.fromkeys([*names, *params.arms]))), (params.code_of(name), names)):
        if arm not in known:
            raise ConfigError(f"unknown arm {arm!r}{suggest(arm, known)}")


def unwatched(files: Iterable[Path], stage: str) -> list[str]:
    """A warning for every file that DVC does not watch."""
    advice = f"after a change, run `dvc repro -f {stage}`"
    outside = [file for file in files if not file.resolve().is_relative_to(INPUTS.resolve())]
    return [f"{file} lies outside {INPUTS}/, where DVC would notice a change; {advice}" for file in outside]


def load_params(schema: type[P], path: Path = PARAMS_FILE) -> P:
    """The part of a settings file that a schema asks for."""
    return parse(load_yaml(path), schema, str(path))


def load_yaml(path: Path) -> Any:
    """The content of a YAML file, by the reader of DVC (YAML 1.2: 1e-05 is a number, 010 is ten, `no` is a text).

    Raises:
        ConfigError: the file is missing or is not YAML.
    """
    try:
        return YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; run this in the project's folder, or `python -m pipelines.profile tiny`"
        ) from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None


def parse(raw: Any, schema: type[P], source: str) -> P:
    """Validated settings; ConfigError lists every mistake in `source` with its key, what was expected and the value."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: expected sections, got {type(raw).__name__}")
    try:
        return schema(**raw)
    except ValidationError as error:
        raise listed(explain(error.errors(), schema), source) from None


def listed(lines: list[str], source: str) -> ConfigError:
    """One error with a line per mistake."""
    count = f"{len(lines)} error{'s' if len(lines) != 1 else ''}"
    return ConfigError(f"{source}: {count}\n" + "\n".join(f"  {line}" for line in lines))


def explain(errors: list[Any], schema: type[BaseModel], *prefix: str) -> list[str]:
    """At least one line per pydantic error; `prefix` is where the schema's keys are in the file."""
    lines = []
    for error in errors:
        where = ".".join(map(str, (*prefix, *error["loc"])))
        match error["type"]:
            case "extra_forbidden":
                lines.append(f"{where}: unknown key{suggest(str(error['loc'][-1]), _keys_at(error['loc'], schema))}")
            case "missing":
                lines.append(f"{where}: missing; {DEFAULTS} shows every key with its default")
            case "value_error":
                lines += [f"{where}: {line}".removeprefix(": ") for line in str(error["ctx"]["error"]).splitlines()]
            case _:
                message = error["msg"][0].lower() + error["msg"][1:]
                lines.append(f"{where}: {message}, got {error['input']!r}")
    return lines


def _keys_at(location: tuple[int | str, ...], schema: type[BaseModel]) -> list[str]:
    """The keys that are allowed where the unknown one at `location` is."""
    for part in location[:-1]:
        field = schema.model_fields.get(str(part))  # None for an index or the tag of a union's member
        schema = (_section(field.annotation) if field else None) or schema
    return list(schema.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The schema inside an annotation such as `Section | None` or `dict[str, str | Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for part in get_args(annotation) if (section := _section(part))), None)


NAME = re.compile("[a-z][a-z0-9_]{0,39}")
"""Arms name folders, and models in Ollama."""
