"""run.json: everything that is needed to say how an artefact came about."""

import hashlib
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from export.files import sha256

PACKAGES = (
    "torch transformers trl peft accelerate datasets bitsandbytes tokenizers sentencepiece safetensors "
    "llama-cpp-python gguf ollama unsloth unsloth_zoo dvc sqlalchemy pandas numpy scipy scikit-learn"
).split()

ROOT = Path(__file__).resolve().parents[1]
"""The project's folder, which code runs from."""


class FileError(RuntimeError):
    """A file of an earlier stage that is missing or damaged."""


def now() -> str:
    """This moment in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat()


def key_of(value: Any) -> str:
    """Hash of a JSON-able value, the same for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


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

    Asked from the project's folder, wherever a command runs and whatever other repository the project lies in.
    """
    # The whole project, save what DVC writes.
    where = [".", *(f":(exclude){place}dvc.lock" for place in ("", "vlm/"))]
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", *where],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(status.strip())}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def torch_device() -> dict[str, Any]:
    """The device that torch would use here, and the machine round it."""
    import torch

    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return machine(name, torch.get_num_threads())


def llama_cpp_device(threads: int | None = None) -> dict[str, Any]:
    """The device that llama.cpp uses here; torch is not loaded for it.

    Args:
        threads: CPU threads that it was given; None: llama-cpp-python's default, half of the cores.
    """
    import llama_cpp

    gpu = "GPU of llama.cpp" if llama_cpp.llama_supports_gpu_offload() else None
    return machine(gpu, threads or max((os.cpu_count() or 2) // 2, 1))


def machine(gpu: str | None, threads: int) -> dict[str, Any]:
    """What run.json says of the device, for whoever has not loaded torch.

    Args:
        gpu: Its name; None: the CPU is used.
        threads: CPU threads in use.
    """
    return {
        "class": "cpu" if gpu is None else "cuda",
        "name": gpu or _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": threads,
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def artifact(kind: str, file: Path, path: Path, parent: str | None = None) -> dict[str, Any]:
    """One entry of run.json's artifacts.

    Args:
        kind: adapter, merged_gguf, adapter_gguf, base_gguf, modelfile, base_model or dataset.
        file: Where the file lies now.
        path: Where it will lie when the stage has ended.
        parent: sha256 of the artefact it was made from.
    """
    return {
        "kind": kind,
        "path": path.as_posix(),
        "sha256": sha256(file),
        "bytes": file.stat().st_size,
        "parent": parent,
    }


def hash_inputs(*paths: Path) -> dict[str, str]:
    """Hash of every file; folders count with all files below them, save run.json (it holds times)."""
    hashes: dict[str, str] = {}
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        hashes |= {f.as_posix(): _hash_existing(f) for f in files if f.name != "run.json" and f.suffix != ".pyc"}
    return hashes


def _hash_existing(file: Path) -> str:
    try:
        return sha256(file)
    except FileNotFoundError:
        raise FileError(f"{file}: no such file; run `dvc repro`, which makes it") from None


class RunRecord:
    """Collects what a stage did and writes run.json.

    Attributes:
        artifacts: Entries made by `artifact`.
        extra: Numbers of this stage.
    """

    def __init__(
        self,
        stage: str,
        *,
        params: dict[str, Any],
        inputs: dict[str, str],
        arm: str | None = None,
        seed: int | None = None,
        prompt_template: str | None = None,
        device: dict[str, Any] | None = None,
    ) -> None:
        """Start the clock.

        Args:
            stage: Its name.
            params: Its sections of params.yaml.
            inputs: File → sha256.
            arm: What it is about.
            seed: Of the training run.
            prompt_template: Text round every question.
            device: Default: torch's.
        """
        self.artifacts: list[dict[str, Any]] = []
        self.extra: dict[str, Any] = {}
        self._head = {"schema": 1, "stage": stage, "arm": arm, "seed": seed}
        self._started = now()
        self._body = {
            "params": params,
            "git": git_state(),
            "packages": package_versions(),
            "device": device or torch_device(),
            "inputs": inputs,
            "prompt_template": prompt_template,
        }

    def write(self, folder: Path, *, status: str = "finished", error: str | None = None) -> None:
        """Write `folder`/run.json."""
        content = {
            **self._head,
            "status": status,
            "error": error,
            "started": self._started,
            "ended": now(),
            **self._body,
            "artifacts": self.artifacts,
            "extra": self.extra,
        }
        write_json(folder / "run.json", content)


def write_json(path: Path, content: Any) -> None:
    """Write JSON with a final line break."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        FileError: missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{path}: no such file; run `dvc repro`, which makes it") from None
    except ValueError as error:
        raise FileError(f"{path}: no JSON ({error}); delete its folder and run `dvc repro`") from error


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All objects of a JSON-lines file.

    Raises:
        FileError: missing or damaged.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    except FileNotFoundError:
        raise FileError(f"{path}: no such file; run `dvc repro`, which makes it") from None
    except ValueError as error:
        raise FileError(f"{path}: no JSON lines ({error}); delete its folder and run `dvc repro`") from error
