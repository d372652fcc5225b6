"""Writing files and folders as a whole, reading and writing records, and the run.json of a stage.

Everything is written beside its place and then renamed: an exception or a kill leaves what was there before.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import psutil
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from db.errors import FileError, OutputError
from db.records import ArtifactRecord, Record, RunRecord

PACKAGES = (
    "torch transformers trl peft accelerate datasets bitsandbytes tokenizers sentencepiece safetensors "
    "llama-cpp-python gguf ollama unsloth unsloth_zoo dvc sqlalchemy pandas numpy scipy scikit-learn"
).split()

ROOT = Path(__file__).resolve().parents[1]
"""The folder that the code runs from."""

AnyRecord = TypeVar("AnyRecord", bound=BaseModel)


_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space (`dvc gc -w` removes unused results)",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "the file size limit is reached (`ulimit -f`)",
    errno.EROFS: "the file system is read-only: choose a writable folder",
    errno.EACCES: "this user may not write there: check the folder's owner and rights",
    errno.EPERM: "this user may not write there: check the folder's owner and rights",
    errno.ENOTDIR: "a file is where a folder is needed: move it away",
    errno.EEXIST: "a file is where a folder is needed: move it away",
}


def explain_os_error(error: OSError, target: Path) -> OutputError | None:
    """A clear error if `error` is about writing to `target`; None for any other OSError."""
    advice = _ADVICE.get(error.errno or 0)
    if advice is None:
        return None
    return OutputError(f"{target}: cannot be written, {advice}. Earlier results there are unchanged. ({error})")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder that replaces `target` when the block ends without an exception; OutputError if it cannot."""
    with _beside(target) as partial:
        partial.mkdir()
        yield partial
        _swap(partial, target)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A path for a new file that replaces `target` when the block ends without an exception; errors as for `staged`."""
    with _beside(target) as partial:
        yield partial
        partial.replace(target)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(target)
            yield partial
        except OSError as error:
            clear = explain_os_error(error, target) if _ours(error, target) else None
            if clear is None:
                raise
            raise clear from error
        except Exception as error:
            # safetensors, torch and llama.cpp report a full disk in their own words and types
            if not _full_disk(error, target.parent):
                raise
            cause = OSError(errno.ENOSPC, str(error))
            raise explain_os_error(cause, target) or error from error
    finally:
        _remove(partial, ignore_errors=True)


def clear_leftovers(target: Path) -> None:
    """Remove leftovers of killed processes beside `target`; restore what one of them had just moved away."""
    for stale in target.parent.glob(f"{target.name}.*.partial"):
        if _alive(stale):
            continue
        if stale.name.endswith(".old.partial") and not target.exists():
            stale.rename(target)
        else:
            _remove(stale)


def _ours(error: OSError, target: Path) -> bool:
    """Whether the error is about the output, and not, say, an unreadable input."""
    if error.filename is None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    place, about = target.parent.absolute(), Path(os.fsdecode(error.filename)).absolute()
    return about.is_relative_to(place) or place.is_relative_to(about)


def _full_disk(error: Exception, folder: Path) -> bool:
    if "No space left on device" in str(error) or "os error 28" in str(error):
        return True
    return folder.is_dir() and shutil.disk_usage(folder).free < 4096


def _remove(path: Path, *, ignore_errors: bool = False) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    elif path.exists() or path.is_symlink():
        path.unlink()


def _alive(partial: Path) -> bool:
    """Whether the process that writes `partial` still runs."""
    pid = partial.name.removesuffix(".old.partial").removesuffix(".partial").rsplit(".", 1)[-1]
    try:
        return process_runs(int(pid), partial.lstat().st_mtime)
    except (ValueError, FileNotFoundError):
        return False


def process_runs(pid: int, since: float) -> bool:
    """Whether a process runs and began before a moment (seconds since the epoch).

    A zombie does not count, nor does a later process with the same id.
    """
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= since + 1
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _swap(partial: Path, target: Path) -> None:
    old = target.with_name(f"{target.name}.{os.getpid()}.old.partial")
    if target.exists() or target.is_symlink():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _remove(old)


@contextmanager
def exclusive(lock: Path, what: str | None = None) -> Iterator[None]:
    """Hold a lock file while the block runs; wait for another process, or where `what` is given raise OutputError."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    except OSError as error:
        clear = explain_os_error(error, lock)
        if clear is None:
            raise
        raise clear from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if what else 0))
        except BlockingIOError:
            raise OutputError(f"{what} is already running in another process; wait for it or stop it") from None
        yield


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, all or nothing; line breaks are kept."""
    with staged_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with staged_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_record(path: Path, record: Record) -> None:
    write_json(path, record.content())


def write_records(path: Path, records: Iterable[Record]) -> None:
    write_jsonl(path, (record.content() for record in records))


def read_json(path: Path) -> Any:
    """Content of a JSON file; FileError if it is missing or damaged."""
    try:
        return json.loads(_content(path))
    except ValueError as error:
        raise FileError(f"{path}: no JSON ({error}); delete its folder and run `dvc repro`") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All objects of a JSON-lines file; errors as for `read_json`."""
    try:
        return [json.loads(line) for line in _content(path).splitlines() if line.strip()]
    except ValueError as error:
        raise FileError(f"{path}: no JSON lines ({error}); delete its folder and run `dvc repro`") from error


def read_record(path: Path, form: type[AnyRecord]) -> AnyRecord:
    """A JSON file as a record; FileError if it is missing or damaged, naming everything that is wrong."""
    try:
        return form.model_validate_json(_content(path))
    except ValidationError as error:
        wrong = "; ".join(f"{key + ': ' if key else ''}{words}" for key, words in reasons(error))
        raise FileError(f"{path}: {wrong}; delete its folder and run `dvc repro`") from error


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileError(f"{path}: no such file; run `dvc repro`, which makes it") from None


def reasons(error: ValidationError) -> list[tuple[str, str]]:
    """(Dotted key, what was expected and what was found) for every mistake in a file."""
    return [(".".join(map(str, detail["loc"])), _words(detail)) for detail in error.errors(include_url=False)]


def _words(detail: ErrorDetails) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] in ("missing", "value_error", "json_invalid"):
        return message
    value = detail["input"]
    content = repr(value[:80]) if isinstance(value, str) else json.dumps(value, default=str)[:80]
    return f"{message}, got {content}"


def start_run(
    stage: str,
    *,
    params: dict[str, Any],
    inputs: dict[str, str],
    arm: str | None = None,
    seed: int | None = None,
    prompt_template: str | None = None,
    device: dict[str, Any] | None = None,
) -> RunRecord:
    """Start the clock of a stage. The device is torch's unless another is given."""
    task = {"stage": stage, "arm": arm, "seed": seed, "params": params, "inputs": inputs}
    place = {"git": git_state(), "packages": package_versions(), "device": device or torch_device()}
    state = {"schema": 1, "status": "running", "started": datetime.now(UTC).isoformat(), "ended": None, "artifacts": []}
    return RunRecord.of({**task, **place, **state, "prompt_template": prompt_template})


def finish_run(record: RunRecord, folder: Path) -> None:
    """Stop the clock and write `folder`/run.json."""
    # A clock that was set back must not leave a file that ends before it starts.
    ended = max(record.started, datetime.now(UTC))
    done = record.model_copy(update={"status": "finished", "ended": ended})
    write_record(folder / "run.json", RunRecord.of(done.content()))


def key_of(value: Any) -> str:
    """Hash of a JSON-able value, the same for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_inputs(*paths: Path) -> dict[str, str]:
    """Hash of every file; folders count with all files below them except run.json, which holds times."""
    hashes: dict[str, str] = {}
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            if file.name == "run.json" or file.suffix == ".pyc":
                continue
            try:
                hashes[file.as_posix()] = sha256(file)
            except FileNotFoundError:
                raise FileError(f"{file}: no such file; run `dvc repro`, which makes it") from None
    return hashes


def artifact(kind: str, file: Path, path: Path, parent: str | None = None) -> ArtifactRecord:
    """An entry of run.json for `file`, which will lie at `path` when the stage has ended."""
    content = {"kind": kind, "path": path.as_posix(), "sha256": sha256(file), "bytes": file.stat().st_size}
    return ArtifactRecord.of({**content, "parent": parent})


@cache
def package_versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_state() -> dict[str, Any]:
    """Commit and whether tracked files of the code differ from it; None for both outside a git checkout.

    Asks about the folder of the code, wherever a command runs and whatever repository surrounds it.
    """

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.strip()

    # The whole project except what profiles and runs rewrite: settings are in every record, so they are not code.
    where = [".", ":(exclude)dvc.lock", ":(exclude)params.yaml"]
    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", *where))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def torch_device() -> dict[str, Any]:
    """The device that torch would use here, and the machine around it."""
    import torch

    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return machine(name, torch.get_num_threads())


def llama_cpp_device() -> dict[str, Any]:
    """The device that llama.cpp uses here, without loading torch; by default it takes half of the cores."""
    import llama_cpp

    gpu = "GPU of llama.cpp" if llama_cpp.llama_supports_gpu_offload() else None
    return machine(gpu, omp_threads() or max((os.cpu_count() or 2) // 2, 1))


def omp_threads() -> int:
    """OMP_NUM_THREADS, or the first number if it is a list; 0: not set."""
    return int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0] or 0)


def machine(gpu: str | None, threads: int) -> dict[str, Any]:
    """What run.json says about the device; without the name of a GPU the CPU is used."""
    return {
        "class": "cpu" if gpu is None else "cuda",
        "name": gpu or _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": threads,
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
