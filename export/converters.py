"""llama.cpp's converters, from the very source distribution that the installed runtime was built from.

`python -m export.converters` fetches them (`make setup` does). Converter and runtime are so the same llama.cpp.
"""

import hashlib
import multiprocessing
import runpy
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

from db.files import staged
from export import ExportError

PACKAGE = "llama-cpp-python"
# sha256 of the source distributions whose converters were tried out.
KNOWN = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}
# Most of a converter's time are its imports: a fork server makes them once for all that a process converts.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    ["torch", "transformers.models.auto.configuration_auto", "transformers.models.llama.configuration_llama", __name__]
)
_WANTED = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/", "LICENSE")


def folder() -> Path:
    version = metadata.version(PACKAGE)
    return Path(sys.prefix) / "share" / "llama.cpp-converters" / version


def require() -> Path:
    """The folder with the converters, fetched if they are not there. Raises ExportError: they cannot be fetched."""
    place = folder()
    if not (place / "complete").is_file():
        fetch(place)
    return place


def run(script: str, arguments: list[str], made: Path) -> None:
    """Run a converter, which makes a file. Raises ExportError: it refused, with its last words."""
    log = made.with_name(f"{made.name}.log")
    child = _PROCESSES.Process(target=_run, args=(require() / script, arguments, log))
    child.start()
    child.join()
    said = log.read_text(encoding="utf-8", errors="replace").strip() if log.is_file() else "it left no log"
    log.unlink(missing_ok=True)
    if child.exitcode or not made.is_file() or made.stat().st_size == 0:
        raise ExportError(f"llama.cpp's {script} failed (exit {child.exitcode}):\n" + "\n".join(said.splitlines()[-8:]))


def _run(script: Path, arguments: list[str], log: Path) -> None:
    sys.stdout = sys.stderr = log.open("w", encoding="utf-8", buffering=1)  # multiprocessing writes why it ended, too
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def fetch(place: Path) -> None:
    """Download the pinned source distribution with pip, check its hash, unpack the converters to `place`.

    Raises ExportError: unknown version, download failed or hash wrong.
    """
    version = metadata.version(PACKAGE)
    if version not in KNOWN:
        raise ExportError(
            f"expected {PACKAGE} in a version whose converters are known ({', '.join(KNOWN)}), got {version}; "
            "run `make setup`"
        )
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
        done = subprocess.run(
            [*command, f"{PACKAGE}=={version}", "--dest", name], capture_output=True, text=True, check=False
        )
        archives = list(temporary.glob("*.tar.gz"))
        if done.returncode or not archives:
            raise ExportError(
                f"could not download the source of {PACKAGE} {version}: {done.stderr.strip()[-500:]}; check the "
                "network and run `python -m export.converters`"
            )
        got = hashlib.sha256(archives[0].read_bytes()).hexdigest()
        if got != KNOWN[version]:
            raise ExportError(f"{archives[0].name}: expected sha256 {KNOWN[version]}, got {got}; not unpacked")
        unpack(archives[0], place)


def unpack(archive: Path, place: Path) -> None:
    """Put the converters of a source distribution at `place`, whole or not at all."""
    with staged(place) as partial, tarfile.open(archive) as tar:
        for member in tar:
            head, marker, tail = member.name.partition("/vendor/llama.cpp/")
            if marker and "/" not in head and tail.startswith(_WANTED) and member.isfile():
                (partial / tail).parent.mkdir(parents=True, exist_ok=True)
                (partial / tail).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]  # it is a file
        (partial / "complete").write_text("", encoding="utf-8")


if __name__ == "__main__":
    print(require())
