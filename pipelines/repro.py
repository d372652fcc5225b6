"""`python -m pipelines.repro`: what `dvc repro` does, with stages that do not wait for each other side by side.

DVC decides what has changed and runs every stage, as `dvc repro --single-item` in a process of its own; here is only
the order. A stage that fails stops what depends on it and nothing else. Processes are forks of this one, which imports
what most stages need: 5 s of CPU less for each.
"""

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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from db.files import exclusive, read_json, write_json
from pipelines.params import PARAMS_FILE, load_yaml, stages_at_once
from pipelines.stage import clear_errors, cli, quiet_libraries, set_threads
from trainers.callbacks import duration

LOGS = Path("logs/stages")
TIMES = LOGS / "seconds.json"
"""Seconds that each stage took when it last ran."""
CHECK = "check"
UNCHANGED, RESTORED = "didn't change, skipping", "skipping run, checking out outputs"
FORK = multiprocessing.get_context("fork")
NEEDED = """dvc.cli.parser dvc.repo.reproduce dvc.stage.run scmrepo.git llama_cpp transformers.trainer
    transformers.models.llama.modeling_llama trl.trainer.sft_trainer"""
# Not what trains: Unsloth wants to be imported before what it patches.
IN_FORK = re.compile(r"python -m (?!pipelines\.(?:train|tune) )[\w.]+( [\w.-]+)*")
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


def stale(repo: Any) -> dict[str, set[str]]:
    """Stages that have changed or come after one that has, in an order that works → those of them to wait for."""
    from dvc.repo import lock_repo
    from dvc.repo.reproduce import get_active_graph, plan_repro

    with lock_repo(repo):  # else its files are read twice
        graph, changed = get_active_graph(repo.index.graph), repo.status()
    waits: dict[str, set[str]] = {}
    for stage in plan_repro(graph):
        before = {other.addressing for other in graph.successors(stage)} & waits.keys()
        if before or stage.addressing in changed:
            waits[stage.addressing] = before
    return waits


def preload() -> None:
    """Import what stages need. Nothing is computed, since a fork has only one of its parent's threads."""
    own = os.environ.get("OMP_NUM_THREADS")
    quiet_libraries()
    set_threads(alone=False)
    logging.disable(logging.WARNING)
    for name in NEEDED.split():
        importlib.import_module(name)
    logging.disable(logging.NOTSET)
    if own is None:
        del os.environ["OMP_NUM_THREADS"]  # stages would take it for the user's
    gc.freeze()  # so that collecting garbage in a fork copies no page of all this


def dvc(name: str, log: Path) -> None:
    """What the process of a stage does."""
    os.setsid()  # Ctrl-C reaches it through `Running.send`, once
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from dvc.cli import main
    from dvc.stage import run

    usual = run._run

    def command(executable: str, cmd: str, **kwargs: Any) -> None:
        if "torch" not in sys.modules or not IN_FORK.fullmatch(cmd) or threading.active_count() > 1:
            usual(executable, cmd, **kwargs)
            return
        process = FORK.Process(target=module, args=(cmd.split()[2:], kwargs["env"]))
        process.start()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as there: the stage gets it too, and DVC waits
        process.join()
        if process.exitcode:
            raise run.StageCmdFailedError(cmd, process.exitcode)

    run._run = command
    sys.exit(main(["--wait-for-lock", "repro", "--single-item", name]))


def module(words: list[str], env: dict[str, str]) -> None:
    os.environ.update(env)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


class Running:
    """A stage in its process, its output in a file."""

    def __init__(self, name: str) -> None:
        self.log = LOGS / f"{name}.log"
        self.started = time.monotonic()
        self.process = FORK.Process(target=dvc, args=(name, self.log))
        self.process.start()
        while self.process.is_alive() and os.getsid(self.process.pid or 0) != self.process.pid:
            time.sleep(0.001)  # until `send` reaches it

    def outcome(self, seconds: float) -> str:
        said = self.log.read_text(encoding="utf-8", errors="replace")
        if self.process.exitcode:
            tail = "\n".join(said.splitlines()[-30:])
            return f"FAILED after {duration(seconds)}; the whole output is in {self.log}\n{tail}"
        if UNCHANGED in said:
            return "unchanged"
        return f"from DVC's cache, {duration(seconds)}" if RESTORED in said else duration(seconds)

    def send(self, number: int) -> None:
        with suppress(ProcessLookupError):  # DVC may be dead while the stage lives
            os.killpg(self.process.pid, number)  # type: ignore[arg-type]  # it was started


@contextmanager
def held_back() -> Iterator[None]:
    """Signals that interrupt do so when the block has ended."""
    came: list[int] = []
    numbers = [number for number in SIGNALS if signal.getsignal(number) is signal.default_int_handler]
    for number in numbers:
        signal.signal(number, lambda got, _: came.append(got))
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def take_signals() -> None:
    """Have signals that end a program interrupt it."""
    for number in SIGNALS:
        # A shell may have left SIGINT ignored, and stages would then ignore it too; SIGHUP is ignored on purpose.
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def took_before() -> dict[str, float]:
    return dict(read_json(TIMES)) if TIMES.is_file() else {}


def run(waits: dict[str, set[str]], at_once: int) -> list[str]:
    """Run stages, each after those it waits for; returns those that failed."""
    LOGS.mkdir(parents=True, exist_ok=True)
    took = took_before()
    total, started, failed = len(waits), 0, []
    known = [took[name] for name in waits if name in took]
    guess = f", about {duration(sum(known) / at_once)} when they last ran" if len(known) == total else ""
    print(f"{total} stages to run, {at_once} at a time{guess}", flush=True)
    waiting = dict(waits)
    running: dict[str, Running] = {}
    try:
        while running or any(not before for before in waiting.values()):
            for name in [n for n, before in waiting.items() if not before][: at_once - len(running)]:
                del waiting[name]
                with held_back():  # one that is not known would outlive us
                    running[name] = Running(name)
                started += 1
                print(f"[{started}/{total}] {name}", flush=True)
            time.sleep(0.05)
            for name, stage in list(running.items()):
                if stage.process.exitcode is None:
                    continue
                seconds = time.monotonic() - stage.started
                outcome = stage.outcome(seconds)
                print(f"{' ' * len(f'[{total}/{total}]')} {name}: {outcome}", flush=True)
                del running[name]
                if stage.process.exitcode:
                    failed.append(name)
                    continue
                if outcome == duration(seconds):  # it really ran
                    took[name] = round(seconds, 1)
                    write_json(TIMES, took)
                for before in waiting.values():
                    before.discard(name)
    finally:
        try:
            for stage in running.values():
                stage.send(signal.SIGINT)
            for stage in running.values():
                stage.process.join()
        except KeyboardInterrupt:  # a second one
            for stage in running.values():
                stage.send(signal.SIGKILL)
            raise
    if failed and waiting:
        print(f"not run, since they come after what failed: {len(waiting)}")
    return failed


def main(
    at_once: Annotated[int, typer.Option("--workers", min=0, help="stages at a time; 0: by cores and threads")] = 0,
) -> None:
    """Bring everything up to date, stages that do not wait for each other side by side."""
    take_signals()
    with clear_errors("repro"), exclusive(Path("checkpoints/repro.lock"), "repro"):
        began = time.monotonic()
        os.environ.setdefault("TQDM_MININTERVAL", "60")  # what a stage says goes into a file
        from dvc.exceptions import ReproductionError
        from dvc.logger import set_loggers_level
        from dvc.repo import Repo
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # a thread, which forks would lack
        with Repo() as repo:
            try:  # first and alone: it refuses bad settings, and writes what the others depend on
                with set_loggers_level(logging.CRITICAL):  # it says what is wrong itself
                    repo.reproduce(CHECK, single_item=True)
            except ReproductionError:
                raise SystemExit(1) from None
            waits = stale(repo)
        if not waits:
            print("everything is up to date")
            return
        settings = load_yaml(PARAMS_FILE)
        if len(waits) > 2 and stages_at_once(settings) > 1:
            preload()
        if failed := run(waits, at_once or stages_at_once(settings)):
            print(f"failed: {', '.join(failed)}", file=sys.stderr)
            raise SystemExit(1)
        print(f"done in {duration(time.monotonic() - began)}")


if __name__ == "__main__":
    cli(main)
