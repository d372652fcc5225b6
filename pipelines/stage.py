"""What all stages share: paths, arguments, and errors that a user can act on."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from threadpoolctl import threadpool_limits

from pipelines.params import PARAMS_FILE, P, load_params, load_yaml, threads_for

DATA = Path("data")
BASE = Path("models/base")
TEXTS = Path("texts")
SPLITS = ("train", "valid", "test", "retention", "paraphrased")
BASE_ARM = "base"
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here, because it is used between fork and exec
SPEED_LOCK = Path("checkpoints/scores/speed.lock")
"""Held while a server times or verifies models: it holds the base once, and unloads it to time loading."""


def run_dir(kind: str, arm: str, seed: int) -> Path:
    return Path(kind) / arm / str(seed)


adapter_dir = partial(run_dir, "adapters")
verdict_dir = partial(run_dir, "verdicts")
gguf_dir = partial(run_dir, "gguf")
verified_dir = partial(run_dir, "verified")
quantized_dir = partial(run_dir, "quantized")
measured_dir = partial(run_dir, "measured")
scores_dir = partial(run_dir, "scores")


def benchmark_dir(task: str, arm: str, seed: int) -> Path:
    return run_dir(f"measured/lm-eval/{task}", arm, seed)  # an arm's name has no -


LEFT_OUT = {
    "export": ("gguf", "llama.cpp supports no adapter on a vision tower, so it could not answer as trained"),
    "verify": ("verified", "nothing is exported, so nothing is served"),
    "quantize": ("quantized", "nothing is exported, so nothing can be quantized"),
    "measure": ("measured", "its texts and prompts have no pictures"),
}
"""Stages without use for a base that takes pictures → the folder they would fill, and why they do not."""


def sees_pictures() -> bool:
    """Whether the base of stage prepare_base takes pictures."""
    from db.files import read_json

    file = BASE / "base.json"
    return file.is_file() and bool(read_json(file).get("pictures"))


def model_name(arm: str, seed: int, first_seed: int) -> str:
    """Name in Ollama; other seeds are tags of the same name."""
    return f"{arm}_model" if arm == BASE_ARM or seed == first_seed else f"{arm}_model:seed{seed}"


def split_files(*splits: str) -> list[Path]:
    """Files that hold the items of some splits, and the hashes of their pictures."""
    return [DATA / f"{split}.jsonl" for split in splits]


# Exceptions defined in these packages, or in the module that runs as a command, are meant for the user.
_OURS = ("__main__", "pipelines", "trainers", "export", "evaluation", "db", "grit", "grit_vlm", "probes")


def die_with_parent() -> None:
    """Have Linux kill this process when its parent dies; other systems cannot."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextmanager
def clear_errors(stage: str, code: int = 1) -> Iterator[None]:
    """Turn errors that a user can act on into one message and an exit code; others keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{stage}: interrupted; run the same command again to continue", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in _OURS:
            raise
        print(f"{stage}: error: {error}", file=sys.stderr)
        raise SystemExit(code) from error


def set_threads() -> None:
    """Make torch and llama.cpp, imported or not, use as many threads as params.yaml says."""
    count, why = threads_for(load_yaml(PARAMS_FILE))
    os.environ["OMP_NUM_THREADS"] = str(count)
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # as fast as long spinning, and easier on a busy machine
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
    threadpool_limits(count, "blas")  # numpy has read the variable if it is imported
    print(f"CPU threads: {count} ({why})")


def quiet_libraries() -> None:
    """Keep other libraries' chatter out of the log; call this before they are imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # seconds between updates of a progress bar
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # A kernel for GPUs, missed at every import on a CPU; special tokens that the model's configuration does not name.
    for name in ("bitsandbytes.backends.cpu.ops", "transformers.trainer_utils"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main_for(stage: str, run: Callable[[], object], arm: str | None = None, seed: int | None = None) -> None:
    """Run a stage from the command line; one without use for this base leaves a folder that says so."""
    quiet_libraries()
    with clear_errors(stage if arm is None else f"{stage} {arm}-{seed}"):
        set_threads()
        if arm is not None and seed is not None and stage in LEFT_OUT and sees_pictures():
            _leave_out(stage, arm, seed)
        else:
            run()


def command(stage: str, schema: type[P], run: Callable[[P, str, int], object]) -> None:
    """Run a stage for one arm and seed from the command line."""

    def main(
        arm: Annotated[str, typer.Argument(help="base, baseline_lora, …")],
        seed: Annotated[int, typer.Argument(help="of the training run; 0 for base")] = 0,
    ) -> None:
        main_for(stage, lambda: run(load_params(schema), arm, seed), arm, seed)

    cli(main)


def _leave_out(stage: str, arm: str, seed: int) -> None:
    from db.files import staged, write_json

    kind, reason = LEFT_OUT[stage]
    with staged(run_dir(kind, arm, seed)) as folder:
        write_json(folder / "left_out.json", {"stage": stage, "arm": arm, "seed": seed, "reason": reason})
    print(f"{stage} {arm}-{seed}: left out, because the base takes pictures: {reason}")


def cli(command: Callable[..., None]) -> None:
    """Run a function as a command with its annotated options and plain tracebacks, for logs.

    --help shows its docstring, or the module's if it has none.
    """
    quiet_libraries()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=command.__doc__ or sys.modules["__main__"].__doc__)(command)
    app()
