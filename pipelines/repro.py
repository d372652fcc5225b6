"""`python -m pipelines.repro`: what `dvc repro` does, with independent stages side by side.

DVC decides what has changed and runs every stage; here is only the order, one walk for two executors. `Processes` runs
stages in forks of this process, which has imported what most of them need: that saves each 5 s of CPU time. The other
executor is pipelines.distribute, on a Ray cluster.
"""

import gc
import importlib
import logging
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from db.files import exclusive, read_json, write_json
from pipelines.base_model import base_has_changed
from pipelines.code import note_installed_code
from pipelines.dvc_internals import (
    CHECK,
    changed_entries_only,
    commands_started_by,
    open_repo,
    short_errors,
    stale,
)
from pipelines.params import PARAMS_FILE, StageParams, load_params, load_yaml, stages_at_once
from pipelines.stage import clear_errors, cli, die_with_parent, quiet_libraries, set_threads
from trainers import arms
from trainers.callbacks import duration

LOGS = Path("logs/stages")
TIMES = LOGS / "seconds.json"
"""Seconds that each stage's command took when it last ran."""
EVERY = 30.0
"""Seconds between two lines about a stage that is running."""
PROGRESS = re.compile(r"\d/([2-9]|\d{2,}) \[|step \d+/\d+")
"""How tqdm, over two things or more, and `trainers.callbacks.progress_lines` say how far they are."""
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
FORK = multiprocessing.get_context("fork")
PRELOADED = """dvc.cli.parser dvc.repo.reproduce dvc.stage.run scmrepo.git llama_cpp transformers.trainer
    transformers.models.llama.modeling_llama trl.trainer.sft_trainer matplotlib.figure"""
MODULE = re.compile(r"python -m [\w.]+( [\w.-]+)*")


@dataclass
class Outcome:
    """How a stage ended."""

    failed: str = ""  # the reason; empty if it did not fail
    command_seconds: float = 0.0  # 0 if DVC had the result already


class Executor(Protocol):
    slots: int  # stages at a time

    def start(self, name: str) -> bool:
        """Start a stage, which writes its output to LOGS/<name>.log; returns False if it is only queued."""

    def poll(self) -> Iterator[tuple[str, str | Outcome]]:
        """Wait a moment; yields queued stages that began, with the place where, and stages that ended."""


@dataclass
class Progress:
    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # stage → reason


def without_effect(raw: Any) -> set[str]:
    """Stages that only leave a note under these settings; nobody needs to hear of them."""
    return set() if (raw.get("tune") or {}).get("grid") else {"tune"}


def latest(log: Path) -> str:
    """The last line in a stage's log that says how far it is; empty if there is none."""
    if not log.is_file():
        return ""
    lines = re.split("[\r\n]+", log.read_bytes()[-2000:].decode("utf-8", errors="replace"))
    return next((line.strip()[:100] for line in reversed(lines) if PROGRESS.search(line) and "100%" not in line), "")


def walk(waits: dict[str, set[str]], executor: Executor, progress: Progress) -> None:
    """Run stages, each after those it waits for. A failure stops what depends on it and nothing else."""
    LOGS.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = read_json(TIMES) if TIMES.is_file() else {}
    quiet = {name for name in waits if name.partition("@")[0] in without_effect(load_yaml(PARAMS_FILE))}
    count = len(waits) - len(quiet)
    earlier = [seconds[name] for name in waits if name in seconds]
    at_a_time = f", {executor.slots} at a time" if executor.slots < sys.maxsize else ""
    guess = (
        f", about {duration(sum(earlier) / executor.slots)} last time"
        if at_a_time and len(earlier) == len(waits)
        else ""
    )
    print(f"{count} stages to run{at_a_time}{guess}", flush=True)
    waiting = {name: set(before) for name, before in waits.items()}
    running, began, spoke = set[str](), dict[str, float](), dict[str, float]()
    margin = " " * len(f"[{count}/{count}] ")

    def announce(name: str, place: str = "") -> None:
        began[name] = spoke[name] = time.monotonic()  # again where its worker died
        if name not in quiet:
            print(f"[{len(began.keys() - quiet)}/{count}] {name}{place}", flush=True)

    while running or any(not before for before in waiting.values()):
        free = [name for name, before in waiting.items() if not before]
        for name in free[: executor.slots - len(running)]:
            del waiting[name]
            running.add(name)
            if executor.start(name):
                announce(name)
        for name, event in executor.poll():
            if isinstance(event, str):
                announce(name, f" on {event}")
                continue
            running.remove(name)
            took = duration(time.monotonic() - began.get(name, time.monotonic()))
            if event.failed:
                progress.failed[name] = event.failed
                log = LOGS / f"{name}.log"
                tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:] if log.is_file() else []
                print(f"{margin}{name}: FAILED after {took}; full output: {log}", *tail, sep="\n", flush=True)
                continue
            progress.done.append(name)
            if name not in quiet:
                cached = "" if event.command_seconds else ", from the cache"
                print(f"{margin}{name}: {took}{cached}", flush=True)
            if event.command_seconds:
                seconds[name] = round(event.command_seconds, 1)
                write_json(TIMES, seconds)
            for before in waiting.values():
                before.discard(name)
        for name in sorted(running & spoke.keys()):
            if (now := time.monotonic()) - spoke[name] >= EVERY:
                spoke[name] = now
                how_far = latest(LOGS / f"{name}.log")
                if not how_far and seconds.get(name, 0) > now - began[name]:
                    how_far = f"{duration(seconds[name] - now + began[name])} left if it takes as long as last time"
                print(f"{margin}{name}: {how_far or 'running'}, {duration(now - began[name])} so far", flush=True)


def preload() -> None:
    """Import what stages need. Nothing is computed yet, because a fork keeps only one of its parent's threads."""
    threads = os.environ.get("OMP_NUM_THREADS")
    quiet_libraries()
    set_threads()
    logging.disable(logging.WARNING)
    for name in PRELOADED.split():
        importlib.import_module(name)
    logging.disable(logging.NOTSET)
    if threads is None:
        del os.environ["OMP_NUM_THREADS"]  # stages would take it for the user's choice
    gc.freeze()  # so that garbage collection in a fork copies none of these pages


class Forked:
    """A module that runs as __main__ in a fork of this process."""

    def __init__(self, words: list[str], env: dict[str, str]) -> None:
        def run() -> None:
            die_with_parent()
            os.environ.update(env)
            sys.argv = words
            sys.modules.pop(words[0], None)  # runpy would warn
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)

        self.process = FORK.Process(target=run)
        self.process.start()

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode or 0


def forkable(cmd: str) -> bool:
    """Whether a command may run where other libraries are imported already, which Unsloth has to patch first."""
    if MODULE.fullmatch(cmd) is None:
        return False
    stage, *words = cmd.split()[2:]
    if stage not in ("pipelines.train", "pipelines.tune"):
        return True
    return arms.load(load_params(StageParams).code_of(words[0])).prepare is None


def start_command(cmd: str, **kwargs: Any) -> Any:
    if "torch" in sys.modules and threading.active_count() == 1 and forkable(cmd):
        return Forked(cmd.split()[2:], kwargs["env"])
    return subprocess.Popen(["/bin/sh", "-c", cmd], preexec_fn=die_with_parent, **kwargs)


def run_stage(name: str, seconds: Any) -> None:
    """What the process of a stage does; `seconds`: shared memory for how long its command took."""
    die_with_parent()  # an orphan would hold DVC's lock when the command is started again after kill -9
    with suppress(PermissionError):
        os.setpgid(0, 0)  # Ctrl-C reaches it through `Processes.send`, once
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    with (LOGS / f"{name}.log").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from dvc.cli import main

    with changed_entries_only(), commands_started_by(start_command) as took:
        code = main(["--wait-for-lock", "repro", "--single-item", name])
    seconds.value = sum(took)
    sys.exit(code)


class Processes:
    """Runs stages in forks of this process."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.processes: dict[str, tuple[Any, Any]] = {}  # stage → process, seconds of its command

    def start(self, name: str) -> bool:
        seconds = FORK.Value("d", 0.0)
        process = FORK.Process(target=run_stage, args=(name, seconds))
        # An interruption between the fork and its entry here would leave a process behind that nobody stops, so it is
        # put off. (A signal mask would not do: another thread may receive the signal, and handlers run in this one.)
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        deferred = [number for number, handler in handlers.items() if handler is signal.default_int_handler]
        received: list[int] = []
        for number in deferred:
            signal.signal(number, lambda got, _: received.append(got))
        try:
            process.start()
            self.processes[name] = process, seconds
            with suppress(ProcessLookupError, PermissionError):  # parent and child both try; the first one wins
                os.setpgid(process.pid, process.pid)  # type: ignore[arg-type]  # it was started
        finally:
            for number in deferred:
                signal.signal(number, signal.default_int_handler)
        if received:
            raise KeyboardInterrupt
        return True

    def poll(self) -> Iterator[tuple[str, str | Outcome]]:
        time.sleep(0.05)
        for name, (process, seconds) in list(self.processes.items()):
            if process.exitcode is not None:
                del self.processes[name]
                yield name, Outcome(f"see {LOGS / name}.log" if process.exitcode else "", seconds.value)

    def send(self, number: int) -> None:
        for process, _ in self.processes.values():
            with suppress(ProcessLookupError):  # DVC may be dead while its stage lives
                os.killpg(process.pid, number)

    def stop(self) -> None:
        try:
            self.send(signal.SIGINT)
            for process, _ in self.processes.values():
                process.join()
        except KeyboardInterrupt:  # a second one
            self.send(signal.SIGKILL)
            raise


def run_here(waits: dict[str, set[str]], slots: int, progress: Progress) -> None:
    processes = Processes(slots)
    try:
        walk(waits, processes, progress)
    finally:
        processes.stop()


def take_signals() -> None:
    """Have the signals that end a program raise KeyboardInterrupt."""
    for number in SIGNALS:
        # A shell may have left SIGINT ignored, and stages would then ignore it too; SIGHUP is ignored on purpose.
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def bring_up_to_date(
    command: str, run: Callable[[dict[str, set[str]], Progress], None], remote: Callable[[], str | None] = lambda: None
) -> None:
    """What both commands do around the walk; exit code 1 if a stage failed.

    Args:
        command: its name in messages.
        run: walks over the stages that have changed.
        remote: gives the address of DVC's remote in place of the configured one.
    """
    take_signals()
    with clear_errors(command), exclusive(Path("checkpoints/repro.lock"), "repro"):
        began, progress = time.monotonic(), Progress()
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # stages write to files
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        note_installed_code()
        with short_errors(), open_repo(remote()) as repo:
            # First: refuses bad settings, writes what the others depend on.
            repo.reproduce(CHECK, single_item=True, force=base_has_changed())
            waits = stale(repo)
        if not waits:
            print("everything is up to date")
            return
        run(waits, progress)
        if progress.failed:
            skipped = len(waits) - len(progress.done) - len(progress.failed)
            print(f"\nnot run, because they depend on a failed stage: {skipped}", file=sys.stderr)
            for name, reason in progress.failed.items():
                print(f"failed: {name}: {reason}", file=sys.stderr)
            raise SystemExit(1)
        print(f"done in {duration(time.monotonic() - began)}")


def main(
    workers: Annotated[int, typer.Option(min=0, help="stages at a time; 0: by cores, memory and threads")] = 0,
    profile: Annotated[str, typer.Option(help="choose this profile first, as `grit-lora profile` does")] = "",
) -> None:
    """Bring everything up to date, with independent stages side by side."""
    if profile:
        from pipelines.profile import choose

        with clear_errors("profile", code=2):
            choose(profile)

    def run(waits: dict[str, set[str]], progress: Progress) -> None:
        slots = stages_at_once(load_yaml(PARAMS_FILE))
        if len(waits) > 2 and slots > 1:
            preload()
        run_here(waits, workers or slots, progress)

    from tqdm import tqdm

    tqdm.monitor_interval = 0  # a thread, which forks would lack
    bring_up_to_date("repro", run)


if __name__ == "__main__":
    cli(main)
