"""llama.cpp's converters without starting Python anew for each: nine tenths of their time are imports.

They run in children of multiprocessing's fork server, which has them made; `as_the_project_does` is the other way.
"""

import multiprocessing
import runpy
import sys
from pathlib import Path

from export import ExportError, converters, gguf

as_the_project_does = gguf._convert
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "transformers.models.llama.configuration_llama", "tests.export.fast_convert"])


def _run(script: str, arguments: list[str], log: str) -> None:
    with open(log, "w", encoding="utf-8", buffering=1) as file:
        sys.stdout = sys.stderr = file
        sys.argv = [script, *arguments]
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")


def convert(script: str, arguments: list[str], made: Path) -> None:
    """In place of `export.gguf._convert`."""
    log = made.with_suffix(".log")
    child = _context.Process(target=_run, args=(str(converters.require() / script), arguments, str(log)))
    child.start()
    child.join()
    if child.exitcode or not made.is_file():
        raise ExportError(f"llama.cpp's {script} failed (exit {child.exitcode}):\n{log.read_text()[-600:]}")
