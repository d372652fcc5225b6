"""Every part of DVC that the project uses beyond its commands, each with the reason why no command will do.

Nothing else imports DVC. tests/pipelines/test_dvc_internals.py checks names and behavior, so that it fails first when
an upgrade of DVC changes one of them.
"""

import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from db.files import write_text
from pipelines.params import PipelineError

LOCK = Path("dvc.lock")
CHECK = "check"


def open_repo(remote: str | None = None) -> Any:
    """The project of the working folder; `remote`: address of the remote in place of the configured one."""
    from dvc.repo import Repo

    ours = {"core": {"remote": "distribute"}, "remote": {"distribute": {"url": remote}}}
    return Repo(config=ours if remote else None)


def stale(repo: Any) -> dict[str, set[str]]:
    """Stages to run, in a valid order → those of them that each has to wait for.

    `dvc status` names the stages that have changed, but neither those downstream of them nor the graph as data.
    """
    from dvc.repo import lock_repo
    from dvc.repo.reproduce import get_active_graph, plan_repro

    with lock_repo(repo):  # otherwise DVC reads its files twice
        graph, changed = get_active_graph(repo.index.graph), repo.status()
    waits: dict[str, set[str]] = {}
    for stage in plan_repro(graph):
        before = {other.addressing for other in graph.successors(stage)} & waits.keys()
        if before or stage.addressing in changed:
            waits[stage.addressing] = before
    return waits


@contextmanager
def commands_started_by(start: Callable[..., Any]) -> Iterator[list[float]]:
    """Have `start(cmd, cwd=…, env=…)` start the commands of stages; yields the list of seconds that each one took.

    It returns what has `wait() -> exit code`. DVC itself can only start a shell: neither a preloaded fork nor a process
    that dies with its Ray worker.
    """
    from dvc.stage import run

    original, seconds = run._run, list[float]()

    def run_command(executable: str, cmd: str, **kwargs: Any) -> None:
        began = time.monotonic()
        process = start(cmd, **kwargs)
        # As in DVC: Ctrl-C reaches the command too, and DVC waits for it to clean up.
        in_main = threading.current_thread() is threading.main_thread()
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
        try:
            code = process.wait()
        finally:
            if in_main:
                signal.signal(signal.SIGINT, handler)
        if code:
            raise run.StageCmdFailedError(cmd, code)
        seconds.append(time.monotonic() - began)

    run._run = run_command
    try:
        yield seconds
    finally:
        run._run = original


@contextmanager
def changed_entries_only() -> Iterator[None]:
    """Have DVC write only the entries of dvc.lock that changed, as the same text.

    DVC parses and writes the whole file in pure Python after every stage, which takes 1.6 s with 90 stages.
    """
    from dvc import dvcfile
    from dvc.utils.serialize import dumps_yaml, load_yaml

    whole_file = dvcfile.modify_yaml

    @contextmanager
    def modify(path: str, fs: Any = None) -> Iterator[Any]:
        file = Path(path)
        head, *blocks = re.split(r"^(?=  \S)", file.read_text(encoding="utf-8") if file.is_file() else "", flags=re.M)
        before = load_yaml(path) if file.name == LOCK.name and head.endswith("\nstages:\n") else {}
        stages = before.get("stages") or {}
        if head != "schema: '2.0'\nstages:\n" or len(stages) != len(blocks):
            with whole_file(path, fs=fs) as data:
                yield data
            return
        after = deepcopy(before)
        yield after
        entries = dict(zip(stages, blocks, strict=True))
        for name, entry in after["stages"].items():
            if entry != stages.get(name):
                entries[name] = str(dumps_yaml({"stages": {name: entry}})).removeprefix("stages:\n")
        write_text(file, head + "".join(entries.values()))

    dvcfile.modify_yaml = modify
    try:
        yield
    finally:
        dvcfile.modify_yaml = whole_file


def reproduce_through_remote(repo: Any, name: str, dependencies: list[str]) -> None:
    """Pull what a stage depends on, bring it up to date, push its outputs and its entry of the run cache.

    `dvc repro --pull` and `dvc push --run-cache` copy the run-cache entries of all stages each time: with thousands of
    stages that is thousands of requests to the remote per stage.
    """
    from dvc.exceptions import UploadError
    from dvc.repo import lock_repo
    from dvc.stage.cache import RunCacheNotFoundError, _get_stage_hash

    if dependencies:
        repo.pull(dependencies, force=True)
    (stage,) = repo.stage.collect(name)
    stage.save_deps()
    key = _get_stage_hash(stage)
    _copy_run_cache(repo, key, to_remote=False)
    with suppress(RunCacheNotFoundError), lock_repo(repo):
        repo.stage_cache.restore(stage, pull=True)
    repo.reproduce(name, single_item=True)
    try:
        repo.push([name])
    except UploadError as error:
        raise PipelineError("it ran, but DVC's remote did not take its outputs: is it full or unreachable?") from error
    _copy_run_cache(repo, key, to_remote=True)


def _copy_run_cache(repo: Any, key: str, to_remote: bool) -> None:
    """Copy one stage's entry unless the other side has one: of two results the first one stays."""
    from dvc.fs import HTTPFileSystem, generic

    local, remote = repo.cache.legacy, repo.cloud.get_remote_odb(None, "distribute", hash_name="md5-dos2unix")
    source, target = (local, remote) if to_remote else (remote, local)
    if isinstance(remote.fs, HTTPFileSystem):  # has no run cache; after a kill, what dvc.lock lacks runs again
        return
    places = [odb.fs.join(odb.path, "runs", key[:2], key) for odb in (source, target)]
    if source.fs.exists(places[0]) and not target.fs.exists(places[1]):
        for file in source.fs.find(places[0]):
            generic.copy(source.fs, file, target.fs, target.fs.join(places[1], source.fs.name(file)))


def check_remote(repo: Any) -> None:
    """Raises PipelineError where the remote does not answer; makes the folder of a local one."""
    try:
        remote = repo.cloud.get_remote_odb(None, "distribute")
        if not remote.fs.exists(remote.path) and remote.fs.protocol == "local":
            remote.fs.makedirs(remote.path)
    except Exception as error:
        raise PipelineError(f"DVC's remote does not answer: {reasons(error)}; see `dvc remote list`") from error


def read_lock() -> dict[str, Any]:
    """dvc.lock by DVC's own reader: YAML 1.2, where `no` is a string."""
    from dvc.utils.serialize import load_yaml

    return dict(load_yaml(LOCK)) if LOCK.is_file() else {"schema": "2.0", "stages": {}}


def lock_text(content: dict[str, Any]) -> str:
    from dvc.utils.serialize import dumps_yaml

    return str(dumps_yaml(content))


def reasons(error: BaseException | None) -> str:
    """The messages of an error and of its causes; DVC's own often hold only the stage's name."""
    messages = []
    while error is not None:
        messages.append(str(error) or type(error).__name__)
        error = error.__cause__ or error.__context__
    return ": ".join(dict.fromkeys(messages))


@contextmanager
def short_errors() -> Iterator[None]:
    """Turn DVC's errors into one line; SystemExit where a stage's command failed, which has explained itself."""
    from dvc.exceptions import DvcException, ReproductionError
    from dvc.logger import set_loggers_level
    from dvc.stage.exceptions import StageCmdFailedError

    try:
        with set_loggers_level(logging.CRITICAL):
            yield
    except ReproductionError as error:
        if isinstance(error.__cause__, StageCmdFailedError):
            raise SystemExit(1) from None
        raise PipelineError(reasons(error)) from error
    except DvcException as error:
        raise PipelineError(reasons(error)) from error
