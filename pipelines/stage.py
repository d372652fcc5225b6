"""What all stages share: paths, arguments, and errors that a user can act on."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

DATA = Path("data")
BASE = Path("models/base")
SPLITS = ("train", "valid", "test", "retention")
BASE_ARM = "base"
TRAINERS_CODE = Path(__file__).resolve().parents[1] / "trainers"


class VerdictError(RuntimeError):
    """An arm whose updates are not what it claims.

    Defined here, since a module that runs as a command is called __main__, and so are its errors.
    """


def adapter_dir(arm: str, seed: int) -> Path:
    """Where stage train writes."""
    return Path("adapters") / arm / str(seed)


def gguf_dir(arm: str, seed: int) -> Path:
    """Where stage export writes."""
    return Path("gguf") / arm / str(seed)


def verdict_dir(arm: str, seed: int) -> Path:
    """Where stage probe writes."""
    return Path("verdicts") / arm / str(seed)


def quantized_dir(arm: str, seed: int) -> Path:
    """Where stage quantize writes."""
    return Path("quantized") / arm / str(seed)


def verified_dir(arm: str, seed: int) -> Path:
    """Where stage verify writes."""
    return Path("verified") / arm / str(seed)


def measured_dir(arm: str, seed: int) -> Path:
    """Where stage measure writes."""
    return Path("measured") / arm / str(seed)


def scores_dir(arm: str, seed: int) -> Path:
    """Where stage evaluate writes."""
    return Path("scores") / arm / str(seed)


def model_name(arm: str, seed: int, first_seed: int) -> str:
    """Name in Ollama; further seeds become tags of the same name."""
    return f"{arm}_model" if arm == BASE_ARM or seed == first_seed else f"{arm}_model:seed{seed}"


def manifest(split: str) -> Path:
    """Where items have pictures: the hash of every one of a split, as `sha256sum --check` reads it in data/."""
    return DATA / f"images.{split}.sha256"


def split_files(*splits: str) -> list[Path]:
    """Files that hold the items of some splits: where items have pictures, also what tells whether one has changed."""
    pictures = [file for split in splits if (file := manifest(split)).is_file()]
    return [*(DATA / f"{split}.jsonl" for split in splits), *pictures]


@contextmanager
def clear_errors(stage: str) -> Iterator[None]:
    """Turn the errors that a user can act on into one message and exit code 1; others keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{stage}: interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if getattr(type(error), "__module__", "").split(".")[0] not in _OURS:
            raise
        print(f"{stage}: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


# Exceptions defined in these packages are meant for the user.
_OURS = ("pipelines", "trainers", "export", "evaluation", "db", "grit", "grit_vlm", "probes")


def quiet_libraries() -> None:
    """Settings that keep other libraries' chatter out of the log; call before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


ArmOption = Annotated[str, typer.Option(help="base, baseline_lora, …")]
SeedOption = Annotated[int, typer.Option(help="seed of the training run; 0 for base")]
FirstSeedOption = Annotated[int, typer.Option(help="the seed whose model gets the name without a tag")]


def main_for(stage: str, run: Callable[[], None], arm: str | None = None, seed: int | None = None) -> None:
    """Run a stage from the command line; its start and end are recorded in `attempts/`.

    Args:
        stage: Its name.
        run: The work.
        arm: What it is about.
        seed: Of the training run.
    """
    from pipelines.attempts import recorded

    quiet_libraries()
    with clear_errors(stage if arm is None else f"{stage} {arm}-{seed}"), recorded(stage, arm, seed):
        run()


def cli(command: Callable[..., None]) -> None:
    """Run a function as a command with its annotated options; tracebacks stay plain, for logs."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()
