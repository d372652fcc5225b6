"""Stages as forks of a process that has imported DVC, and what most stages need: seconds of CPU less for each."""

import gc
import importlib
import logging
import multiprocessing
import os
import re
import runpy
import signal
import sys
import threading
import time
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from pipelines.stage import quiet_libraries

_FORK = multiprocessing.get_context("fork")
_DVC = ("dvc.cli.parser", "dvc.repo.reproduce", "dvc.stage.run", "scmrepo.git")
_LIBRARIES = (
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "trl.trainer.sft_trainer",
    "llama_cpp",
)
# Not train: Unsloth wants to be imported before what it patches.
_MODULE = re.compile(r"python -m (?!pipelines\.train )[\w.]+( [\w.-]+)*")


def preload(threads: int) -> None:
    """Import what most stages need. Nothing is computed, since a fork has only one of its parent's threads."""
    quiet_libraries()
    own = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # as set_threads does; both are read when OpenMP loads
    os.environ["OMP_NUM_THREADS"] = str(threads)
    logging.disable(logging.WARNING)
    for name in _LIBRARIES:
        importlib.import_module(name)
    logging.disable(logging.NOTSET)
    if own is None:
        del os.environ["OMP_NUM_THREADS"]  # of a user, it would go before what a stage computes for itself
    gc.freeze()  # so that collecting garbage in a fork copies no page of all this


def start(name: str, log: Path) -> ForkProcess:
    """Have DVC bring one stage up to date, in a process group of its own and with its output in a file."""
    for module in _DVC:
        importlib.import_module(module)
    process = _FORK.Process(target=_repro, args=(name, log))
    process.start()
    while process.is_alive() and os.getsid(process.pid or 0) != process.pid:
        time.sleep(0.001)  # until signals reach it
    return process


def _repro(name: str, log: Path) -> None:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from dvc.cli import main
    from dvc.stage import run

    if "torch" in sys.modules:
        run._run = _command(run._run)
    sys.exit(main(["--wait-for-lock", "repro", "--single-item", name]))


def _command(usual: Any) -> Any:
    """What DVC runs a stage's command with; `python -m MODULE ARGUMENTS` becomes a fork."""

    def command(executable: str, cmd: str, **kwargs: Any) -> None:
        from dvc.stage.exceptions import StageCmdFailedError

        if not _MODULE.fullmatch(cmd) or threading.active_count() > 1:
            usual(executable, cmd, **kwargs)
            return
        process = _FORK.Process(target=_run_module, args=(cmd.split()[2:], kwargs["cwd"], kwargs["env"]))
        process.start()
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the stage ends by itself, as in DVC
        process.join()
        signal.signal(signal.SIGINT, handler)
        if process.exitcode:
            raise StageCmdFailedError(cmd, process.exitcode)

    return command


def _run_module(words: list[str], folder: str, env: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
