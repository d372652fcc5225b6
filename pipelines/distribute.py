"""`python -m pipelines.distribute`: what `make repro` does, with the stages on the nodes of a Ray cluster.

DVC says what has changed, Ray where a stage runs, and a DVC remote carries results. A node keeps clones of the project;
a stage takes a free one, pulls what it depends on, runs as `dvc repro --single-item` does, and pushes what it made. Its
entry of dvc.lock comes back to this process, which hands it to those that wait for it; at the end this process pulls
everything, and runs stage compare itself: no node touches the database.
"""

import hashlib
import json
import logging
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from db.files import OutputError, exclusive, package_versions, write_json, write_text
from pipelines.params import PARAMS_FILE, Distribute, StageParams, load_params
from pipelines.repro import CHECK, LOGS, TIMES, stale, take_signals, took_before
from pipelines.stage import clear_errors, cli, die_with_parent
from trainers.callbacks import duration

LOCK = Path("dvc.lock")
HERE = Path(".dvc/remote")
"""DVC remote where none is configured: good for one machine."""
SCRATCH = Path(".dvc/tmp/distribute")
HISTORY = Path("logs/distribute.jsonl")
"""A line a stage, of all runs of this command: where it was, its seconds in all and those of its command."""
MARK = Path(".git/distributed")
"""In a clone: the hash of the tree that it was made of."""
USERS = ("inputs", "theirs")
"""What users put into the project; it travels whatever git ignores, and links as what they point to."""
STARTS = 4
"""How often a stage may start whose worker or node dies under it."""


class DistributeError(RuntimeError):
    """Stages cannot be handed out; the message says why."""


class Params(StageParams):
    distribute: Distribute


# What a worker does. It is sent to nodes as it is, so that all of them run the code of this process and of `tree`.


@dataclass
class Task:
    """What a worker has to know of a stage."""

    name: str
    before: list[str]  # stages that it takes files of
    lock: str  # dvc.lock as it is by now
    remote: str | None  # address; None: the one that DVC's own configuration names
    scratch: str
    threads: int
    gpus: float
    versions: dict[str, str]  # of the packages that results depend on, as the head has them
    tree: str  # hash of the packed tree


@dataclass
class Outcome:
    failed: str = ""  # why; empty: it did not
    seconds: float = 0.0  # in all
    own: float = 0.0  # of these, the command's; 0: it came from the run cache
    log: str = ""
    entry: dict[str, Any] = field(default_factory=dict)  # of dvc.lock


def work(task: Task, tree: bytes) -> Iterator[str | Outcome]:
    """Bring a stage up to date in a clone of this node: first where that is, then what came of it."""
    began = time.monotonic()
    logging.getLogger("dvc").setLevel(logging.ERROR)
    own = str(Path(sys.executable).parent)
    if own not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = f"{own}{os.pathsep}{os.environ['PATH']}"
    with free_clone(Path(task.scratch), tree, task.tree) as clone:
        yield clone.name
        if wrong := other_packages(task.versions):  # of a node that joined late
            yield Outcome(failed=f"{clone.name} has other packages than the head: {wrong}")
            return
        write_text(LOCK, task.lock)
        log = Path(f"logs/stages/{task.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        outcome = Outcome()
        try:
            with log.open("wb") as output:
                outcome.own = bring_up_to_date(task, output)
            outcome.entry = read_lock()["stages"][task.name]
        except Exception as error:  # noqa: BLE001  whatever DVC or its remote raise: the other stages go on
            outcome.failed = reasons(error)
        outcome.seconds = time.monotonic() - began
        outcome.log = log.read_text(encoding="utf-8", errors="replace")
        yield outcome


def other_packages(versions: dict[str, str]) -> str:
    """What differs here from these versions, builds such as +cpu aside; empty: nothing."""
    own = package_versions()
    pairs = [(name, own.get(name, "none"), wanted) for name, wanted in versions.items()]
    return ", ".join(f"{n} {is_} for {to}" for n, is_, to in pairs if is_.partition("+")[0] != to.partition("+")[0])


def read_lock() -> dict[str, Any]:
    """dvc.lock by DVC's own reader: YAML 1.2, where `no` is a text."""
    from dvc.utils.serialize import load_yaml

    return dict(load_yaml(LOCK)) if LOCK.is_file() else {"schema": "2.0", "stages": {}}


def reasons(error: BaseException | None) -> str:
    """What an error and those that it comes from say."""
    said = []
    while error is not None:
        said.append(str(error) or type(error).__name__)
        error = error.__cause__ or error.__context__
    return ": ".join(dict.fromkeys(said))


def bring_up_to_date(task: Task, output: Any) -> float:
    """Pull, run, push; returns the seconds that the stage's command took, 0 where it did not run."""
    from dvc.exceptions import UploadError
    from dvc.stage import run
    from dvc.stage.cache import _get_stage_hash

    repo, own = open_repo(task.remote), 0.0

    def command(executable: str, cmd: str, **kwargs: Any) -> None:
        nonlocal own
        began = time.monotonic()
        kwargs["env"]["OMP_NUM_THREADS"] = str(task.threads)
        if not task.gpus:
            kwargs["env"]["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves them all visible
        # exec, or some shells would stand between the stage and the signal that it dies with its worker
        usual(executable, f"exec {cmd}", stdout=output, stderr=subprocess.STDOUT, preexec_fn=die_with_parent, **kwargs)
        own = time.monotonic() - began

    usual, run._run = run._run, command
    try:
        with repo:
            if task.before:
                repo.pull(task.before, force=True)
            (stage,) = repo.stage.collect(task.name)
            stage.save_deps()
            key = _get_stage_hash(stage)
            copy_run_cache(repo, key, to_remote=False)
            repo.stage_cache.pull = lambda remote: []  # it would copy the entries of all stages
            repo.reproduce(task.name, single_item=True, pull=True)
            try:
                repo.push([task.name])
            except UploadError as error:
                raise DistributeError(
                    "it ran, but DVC's remote did not take what it made: is it full, or away?"
                ) from error
            copy_run_cache(repo, key, to_remote=True)
    finally:
        run._run = usual
    return own


def open_repo(remote: str | None) -> Any:
    from dvc.repo import Repo

    ours = {"core": {"remote": "distribute"}, "remote": {"distribute": {"url": remote}}}
    return Repo(config=ours if remote else None)


def copy_run_cache(repo: Any, key: str, to_remote: bool) -> None:
    """Copy a stage's entry unless the other side has one: of two results the first one stays."""
    from dvc.fs import HTTPFileSystem, generic

    own, there = repo.cache.legacy, repo.cloud.get_remote_odb(None, "distribute", hash_name="md5-dos2unix")
    source, target = (own, there) if to_remote else (there, own)
    if isinstance(there.fs, HTTPFileSystem):  # which cannot; a run that is killed then repeats what dvc.lock lacks
        return
    places = [odb.fs.join(odb.path, "runs", key[:2], key) for odb in (source, target)]
    if source.fs.exists(places[0]) and not target.fs.exists(places[1]):
        for file in source.fs.find(places[0]):
            generic.copy(source.fs, file, target.fs, target.fs.join(places[1], source.fs.name(file)))


@contextmanager
def free_clone(scratch: Path, tree: bytes, key: str) -> Iterator[Path]:
    """A clone that no other worker of this node has, brought to `tree` and made the working directory."""
    scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
    with ExitStack() as held:
        for number in range(1000):
            clone = scratch / f"{platform.node()}-{number}"
            with suppress(OutputError):
                held.enter_context(exclusive(Path(f"{clone}.lock"), clone.name))
                break
        else:
            raise DistributeError(f"{scratch}: expected a folder to write to, or fewer than 1,000 stages at once")
        if not (clone / MARK).is_file() or (clone / MARK).read_text() != key:
            unpack(tree, clone)
            (clone / MARK).write_text(key)
        (clone / ".dvc/tmp/rwlock").unlink(missing_ok=True)  # of a worker that was killed while it wrote that
        os.chdir(clone)
        yield clone


def unpack(tree: bytes, clone: Path) -> None:
    """Make a clone out of a packed tree; what is ignored, DVC's cache among it, stays."""
    if not (clone / MARK).is_file():  # none, or not whole
        shutil.rmtree(clone, ignore_errors=True)
        clone.mkdir(mode=0o700)
    else:
        for name in git(clone, "ls-files", "-co", "--exclude-standard", "-z").split("\0"):
            if name:
                (clone / name).unlink(missing_ok=True)
        for folder in (".git", *USERS):
            shutil.rmtree(clone / folder, ignore_errors=True)
    with tarfile.open(fileobj=BytesIO(tree)) as tar:
        tar.extractall(clone, filter="tar")
    git(clone, "reset", "--quiet")
    kept = clone / "checkpoints"  # shared by the clones of a node, or of all where `scratch` lies on a shared disk
    kept.unlink(missing_ok=True)
    (clone.parent / kept.name).mkdir(exist_ok=True)
    kept.symlink_to(clone.parent / kept.name)


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, check=False, capture_output=True, text=True)
    if done.returncode:
        raise DistributeError(f"git {words[0]} in {folder} on {platform.node()}: {done.stderr.strip()}")
    return done.stdout


# What the head does


def pack() -> bytes:
    """The working tree, ignored files aside, with its last commit and outputs/code."""
    root, packed = Path.cwd(), BytesIO()
    listed = git(root, "ls-files", "-co", "--exclude-standard", "-z").split("\0")
    files = [name for name in listed if name and name != str(LOCK) and name.split("/")[0] not in USERS]
    with (
        TemporaryDirectory() as folder,
        tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1, dereference=True) as tar,
    ):
        git(root, "clone", "--quiet", "--depth", "1", "--no-checkout", f"file://{root}", folder)
        tar.add(f"{folder}/.git", ".git")
        for name in [name for name in files if Path(name).is_file()] + ["outputs/code", ".dvc/config.local", *USERS]:
            if Path(name).exists():
                tar.add(name, filter=lambda info: None if "/.cache" in info.name else info)
    return packed.getvalue()


@dataclass
class Running:
    generator: Any  # of Ray
    since: float
    where: str = "waits for a node"
    starts: int = 1


class Head:
    """Hands stages to Ray as what they wait for is done."""

    def __init__(self, waits: dict[str, set[str]], before: dict[str, list[str]], options: dict[str, dict[str, Any]],
                 remote: str | None, scratch: str) -> None:  # fmt: skip
        self.waiting, self.before, self.options = dict(waits), before, options
        self.remote, self.scratch = remote, scratch
        self.total, self.begun, self.running = len(waits), 0, dict[str, Running]()
        self.done, self.failed = dict[str, Outcome](), dict[str, str]()
        self.took = took_before()
        self.lock = read_lock()
        self.versions = package_versions()

    def run(self, show: Callable[["Head"], None], say: Callable[[str], None]) -> None:
        import ray

        tree = pack()
        self.key, self.tree = hashlib.sha256(tree).hexdigest(), ray.put(tree)
        self.call = ray.remote(max_retries=0, num_returns="streaming")(work)
        while self.running or any(not before for before in self.waiting.values()):
            for name in [name for name, before in self.waiting.items() if not before]:
                del self.waiting[name]
                self.start(name)
            refs = {running.generator: name for name, running in self.running.items()}
            ready, _ = ray.wait(list(refs), num_returns=1, timeout=0.5)
            for generator in ready:
                self.hear(refs[generator], say)
            show(self)

    def start(self, name: str, starts: int = 1) -> None:
        from dvc.utils.serialize import dumps_yaml

        options = self.options[name]
        threads, gpus = max(1, int(options["num_cpus"])), options["num_gpus"]
        task = Task(
            name, self.before[name], dumps_yaml(self.lock), self.remote, self.scratch, threads, gpus, self.versions,
            self.key,
        )  # fmt: skip
        generator = self.call.options(name=name, **options).remote(task, self.tree)
        self.running[name] = Running(generator, time.monotonic(), starts=starts)

    def hear(self, name: str, say: Callable[[str], None]) -> None:
        """Take what a stage's worker said."""
        import ray
        from dvc.utils.serialize import dumps_yaml

        running = self.running[name]
        try:
            said = ray.get(next(running.generator))
        except ray.exceptions.RayTaskError as error:  # the worker could not even begin
            said = Outcome(failed=str(error.cause or error))
        except ray.exceptions.RayError as error:
            reason = type(error).__name__
            if running.starts < STARTS:
                say(f"{name}: {running.where}: {reason}; it starts again ({running.starts + 1} of {STARTS})")
                self.start(name, running.starts + 1)
                return
            said = Outcome(failed=f"its worker died {STARTS} times, the last time of {reason}")
        if isinstance(said, str):
            running.where, running.since = said, time.monotonic()
            self.begun += running.starts == 1
            say(f"[{self.begun}/{self.total}] {name} on {said}")
            return
        del self.running[name]
        LOGS.mkdir(parents=True, exist_ok=True)
        log = LOGS / f"{name}.log"
        log.write_text(said.log, encoding="utf-8")
        if said.failed:
            self.failed[name] = said.failed
            tail = "\n".join(said.log.splitlines()[-30:])
            say(f"{name}: FAILED after {duration(said.seconds)}: {said.failed}; the whole output is in {log}\n{tail}")
            return
        self.lock["stages"][name] = said.entry
        write_text(LOCK, dumps_yaml(self.lock))
        if said.own:
            self.took[name] = round(said.own, 1)
            write_json(TIMES, self.took)
        self.done[name] = said
        with HISTORY.open("a", encoding="utf-8") as file:
            facts = {"stage": name, "where": running.where, "starts": running.starts}
            file.write(json.dumps(facts | {"seconds": said.seconds, "own": said.own}) + "\n")
        for before in self.waiting.values():
            before.discard(name)
        say(f"{name}: {duration(said.seconds)}{'' if said.own else ', from the run cache'}")


@contextmanager
def progress() -> Iterator[tuple[Callable[[Head], None], Callable[[str], None]]]:
    """A table that lives on a terminal, lines elsewhere."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield lambda head: None, lambda line: print(line, flush=True)
        return

    def table(head: Head) -> Table:
        left = [head.took[name] for name in head.waiting if name in head.took]
        ahead = f", {duration(sum(left))} of work ahead" if left else ""
        counts = f"{len(head.done)} of {head.total} stages done, {len(head.failed)} failed, {len(head.waiting)} wait"
        table = Table("stage", "where", "since", title=counts + ahead, title_justify="left", box=None)
        for name, running in head.running.items():
            table.add_row(name, running.where, duration(time.monotonic() - running.since))
        return table

    with Live(console=console, refresh_per_second=2) as live:
        yield lambda head: live.update(table(head)), lambda line: live.console.print(line, markup=False)


@contextmanager
def cluster(address: str | None, workers: int) -> Iterator[Any]:
    """Ray, connected to a cluster, or to one of this process's own on the loopback interface."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address:  # nobody else on this machine is to run code here
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    try:
        import ray
    except ImportError:
        raise DistributeError("expected Ray, which is an extra: `make setup EXTRAS=ray`") from None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    own = {"num_cpus": workers or None, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        if address and "://" in address:
            raise ValueError("Ray's client knows no streaming tasks; run this on a node of the cluster, with auto")
        if address and ":" in address:  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        context = ray.init(address or "local", **(quiet if address else quiet | own))
    except (OSError, ValueError, RuntimeError) as error:
        where = f"--address {address}: expected a Ray cluster there" if address else "Ray could not be started"
        raise DistributeError(f"{where}: {error}") from error
    take_signals()  # Ray has its own for SIGTERM, which leaves workers behind
    have, nodes = ray.cluster_resources(), sum(node["Alive"] for node in ray.nodes())
    where = f"; dashboard: http://{context.dashboard_url}" if context.dashboard_url else ""
    cpus, gpus = (f"{have.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))
    print(f"Ray {ray.__version__}: {nodes} node{'s' if nodes > 1 else ''}, {cpus}, {gpus}{where}", flush=True)
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def said_by_dvc() -> Iterator[None]:
    """DVC's errors in a line; a stage that fails here, check or compare, has said why."""
    from dvc.exceptions import DvcException, ReproductionError
    from dvc.stage.exceptions import StageCmdFailedError

    try:
        yield
    except ReproductionError as error:
        if isinstance(error.__cause__, StageCmdFailedError):
            raise SystemExit(1) from None
        raise DistributeError(reasons(error)) from error
    except DvcException as error:
        raise DistributeError(reasons(error)) from error


def check_remote(repo: Any) -> None:
    try:
        there = repo.cloud.get_remote_odb(None, "distribute")
        if not there.fs.exists(there.path) and there.fs.protocol == "local":
            there.fs.makedirs(there.path)
    except Exception as error:
        raise DistributeError(f"DVC's remote does not answer: {reasons(error)}; see `dvc remote list`") from error


def check_cluster(ray: Any, options: dict[str, dict[str, Any]], own: bool, remote: str | None) -> None:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    hosts = {node["NodeManagerHostname"] for node in nodes}
    if remote and hosts != {platform.node()}:
        raise DistributeError(
            f"expected a DVC remote that {', '.join(sorted(hosts))} can reach, found none configured: `dvc remote add "
            "--default shared …` (a folder that all mount, ssh://, s3://, …)"
        )
    for name, wanted in options.items():
        needs = {"CPU": wanted["num_cpus"], "GPU": wanted["num_gpus"], "memory": wanted["memory"]}
        needs |= {f"accelerator_type:{wanted['accelerator_type']}": 0.001} if wanted["accelerator_type"] else {}
        asked = {kind: much for kind, much in needs.items() if much}
        if not any(all(node["Resources"].get(kind, 0) >= much for kind, much in asked.items()) for node in nodes):
            reason = f"distribute: {name} asks for {asked}, and no node has that"
            if own:
                raise DistributeError(reason)
            print(f"{reason} yet; it waits", file=sys.stderr)
    if any(node["Resources"].get("GPU") for node in nodes) and not any(one["num_gpus"] for one in options.values()):
        print("no stage asks for a GPU (distribute.gpus), so all of them run on CPUs", file=sys.stderr)
    ask = ray.remote(num_cpus=0, max_retries=0)(other_packages)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    answers = [ask.options(scheduling_strategy=place).remote(package_versions()) for place in places]
    wrong = []
    for node, answer in zip(nodes, answers, strict=True):
        try:
            found = ray.get(answer)
        except ray.exceptions.RayError as error:  # the project is not there, for one
            found = str(getattr(error, "cause", error))
        if found:
            wrong.append(f"{node['NodeManagerHostname']}: {found}")
    if wrong:
        raise DistributeError("nodes are not set up as this one is: " + "; ".join(wrong))


def main(
    address: Annotated[
        str | None, typer.Option(help="of a Ray cluster, `auto` on one of its nodes; none: one of this machine alone")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="CPUs of this machine to use without --address; 0: all")] = 0,
    scratch: Annotated[
        Path, typer.Option(help="of clones and checkpoints; on a shared disk a stage whose node died goes on elsewhere")
    ] = SCRATCH,
) -> None:
    """Bring everything up to date, with stages on the nodes of a Ray cluster."""
    take_signals()
    with clear_errors("distribute"), exclusive(Path("checkpoints/repro.lock"), "repro"):
        began = time.monotonic()
        from dvc.logger import set_loggers_level

        resources = load_params(Params, PARAMS_FILE).distribute
        with open_repo(None) as repo:
            remote = None if repo.config["core"].get("remote") else str(HERE.resolve())
        with open_repo(remote) as repo, set_loggers_level(logging.CRITICAL), said_by_dvc():
            repo.reproduce(CHECK, single_item=True)
            waits = stale(repo)
            if not waits:
                print("everything is up to date")
                return
            check_remote(repo)
            graph = {stage.addressing: stage for stage in repo.index.graph}
            here = [name for name in waits if not all(out.use_cache for out in graph[name].outs)]
            away = {name: before for name, before in waits.items() if name not in here}
            before = {
                name: [s.addressing for s in repo.index.graph.successors(graph[name]) if s.addressing != CHECK]
                for name in away
            }
            options = {name: resources.of(name.split("@")[0]) for name in away}
            if kept := sorted({name for names in before.values() for name in names} - away.keys()):
                repo.push(kept)  # what is up to date here already
            head = Head(away, before, options, remote, str(scratch.resolve()))
            if away:
                with cluster(address, workers) as ray:
                    check_cluster(ray, options, own=address is None, remote=remote)
                    try:
                        with progress() as (show, say):
                            head.run(show, say)
                    finally:
                        if head.done:
                            repo.pull(list(head.done), force=True)
            for name in here if not head.failed else ():
                repo.reproduce(name, single_item=True)
        if head.failed:
            print(f"\nnot run, since they come after what failed: {len(head.waiting) + len(here)}", file=sys.stderr)
            for name, reason in head.failed.items():
                print(f"failed: {name}: {reason}", file=sys.stderr)
            raise SystemExit(1)
        ran = [outcome.seconds - outcome.own for outcome in head.done.values() if outcome.own]
        beside = f"; beside its command a stage took {sum(ran) / len(ran):.1f} s" if ran else ""
        print(f"done in {duration(time.monotonic() - began)}: {len(ran)} of {head.total} stages ran{beside}")


if __name__ == "__main__":
    cli(main)
