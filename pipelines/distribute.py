"""`python -m pipelines.distribute`: what `make repro` does, with the stages on the nodes of a Ray cluster.

DVC decides what has changed, Ray where a stage runs, and a DVC remote carries the results. Each node keeps clones of
the project; a stage takes a free one, pulls its dependencies, runs there, and pushes its outputs. Its entry of dvc.lock
comes back to this process, which sends it along with the stages that depend on it. At the end this process pulls
everything and runs stage compare itself: no node touches the database.
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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from db.errors import OutputError
from db.files import exclusive, package_versions, write_text
from pipelines import dvc_internals
from pipelines.dvc_internals import (
    CHECK,
    LOCK,
    check_remote,
    commands_started_by,
    lock_text,
    open_repo,
    read_lock,
    reasons,
    reproduce_through_remote,
    short_errors,
)
from pipelines.params import Distribute, PipelineError, StageParams, load_params
from pipelines.repro import LOGS, Outcome, Progress, bring_up_to_date, run_here, take_signals, walk
from pipelines.stage import cli, die_with_parent

LOCAL_REMOTE = Path(".dvc/remote")
"""DVC remote if none is configured: enough for one machine."""
SCRATCH = Path(".dvc/tmp/distribute")
HISTORY = Path("logs/distribute.jsonl")
"""One line per stage, over all runs of this command: where it ran, its seconds in total and those of its command."""
MARK = Path(".git/distributed")
"""In a clone: hash of the tree that it was made from."""
USER_FOLDERS = ("inputs", "theirs")
"""What users put into the project; it travels even if git ignores it, with links replaced by what they point to."""
MAX_STARTS = 4
"""How many times a stage may start if its worker or node dies."""


class Params(StageParams):
    distribute: Distribute


# --- What a worker does. Ray sends this code to the nodes, so that all of them run the same version. ---


@dataclass
class Task:
    """What a worker needs to know about a stage."""

    name: str
    dependencies: list[str]  # stages whose outputs it reads
    lock: str  # current text of dvc.lock
    remote: str | None  # address; None: the one in DVC's configuration
    scratch: str
    threads: int
    gpus: float
    versions: dict[str, str]  # packages that results depend on, as installed on the head
    tree_hash: str


@dataclass
class Result:
    failed: str = ""  # the reason; empty if it did not fail
    seconds: float = 0.0
    command_seconds: float = 0.0  # of these, the stage's own command; 0 if its result was in the run cache
    log: str = ""
    entry: dict[str, Any] = field(default_factory=dict)  # of dvc.lock


def work(task: Task, tree: bytes) -> Iterator[str | Result]:
    """Bring a stage up to date in a clone on this node; yields the name of the clone, then the result."""
    began = time.monotonic()
    logging.getLogger("dvc").setLevel(logging.ERROR)
    binaries = str(Path(sys.executable).parent)
    if binaries not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    with free_clone(Path(task.scratch), tree, task.tree_hash) as clone:
        yield clone.name
        result = Result()
        if difference := other_packages(task.versions):  # on a node that joined late
            result.failed = f"{clone.name} has other packages than the head: {difference}"
            yield result
            return
        write_text(LOCK, task.lock)
        log = LOGS / f"{task.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)

        def start(cmd: str, env: dict[str, str], **kwargs: Any) -> subprocess.Popen[bytes]:
            env["OMP_NUM_THREADS"] = str(task.threads)
            if not task.gpus:
                env["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves all of them visible
            # exec: some shells would stay between the stage and the signal that ends it with its worker
            command = ["/bin/sh", "-c", f"exec {cmd}"]
            kwargs |= {"env": env, "stdout": output, "stderr": subprocess.STDOUT}
            return subprocess.Popen(command, preexec_fn=die_with_parent, **kwargs)

        try:
            with log.open("wb") as output, commands_started_by(start) as seconds, open_repo(task.remote) as repo:
                reproduce_through_remote(repo, task.name, task.dependencies)
            result.command_seconds = sum(seconds)
            result.entry = read_lock()["stages"][task.name]
        except Exception as error:  # noqa: BLE001  whatever DVC or its remote raise: the other stages go on
            result.failed = reasons(error)
        result.seconds = time.monotonic() - began
        result.log = log.read_text(encoding="utf-8", errors="replace")
        yield result


def other_packages(versions: dict[str, str]) -> str:
    """How the packages here differ from these versions, builds such as +cpu aside; empty if they do not."""
    here = package_versions()
    pairs = [(name, here.get(name, "none"), version) for name, version in versions.items()]
    return ", ".join(f"{n} {a} instead of {b}" for n, a, b in pairs if a.partition("+")[0] != b.partition("+")[0])


@contextmanager
def free_clone(scratch: Path, tree: bytes, tree_hash: str) -> Iterator[Path]:
    """A clone that no other worker on this node uses, updated to `tree` and made the working directory."""
    scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
    with ExitStack() as stack:
        for number in range(1000):
            clone = scratch / f"{platform.node()}-{number}"
            with suppress(OutputError):
                stack.enter_context(exclusive(Path(f"{clone}.lock"), clone.name))
                break
        else:
            raise PipelineError(f"{scratch}: expected a writable folder and fewer than 1,000 stages at once")
        if not (clone / MARK).is_file() or (clone / MARK).read_text() != tree_hash:
            unpack(tree, clone)
            (clone / MARK).write_text(tree_hash)
        (clone / ".dvc/tmp/rwlock").unlink(missing_ok=True)  # left by a worker that was killed while writing it
        os.chdir(clone)
        yield clone


def unpack(tree: bytes, clone: Path) -> None:
    """Turn a packed tree into a clone; ignored files, DVC's cache among them, stay."""
    if not (clone / MARK).is_file():  # there is none, or only part of one
        shutil.rmtree(clone, ignore_errors=True)
        clone.mkdir(mode=0o700)
    else:
        for name in git(clone, "ls-files", "-co", "--exclude-standard", "-z").split("\0"):
            if name:
                (clone / name).unlink(missing_ok=True)
        for folder in (".git", *USER_FOLDERS):
            shutil.rmtree(clone / folder, ignore_errors=True)
    with tarfile.open(fileobj=BytesIO(tree)) as tar:
        tar.extractall(clone, filter="tar")
    git(clone, "reset", "--quiet")
    checkpoints = clone / "checkpoints"  # shared by the clones of a node, or of all nodes if `scratch` is shared
    checkpoints.unlink(missing_ok=True)
    (clone.parent / checkpoints.name).mkdir(exist_ok=True)
    checkpoints.symlink_to(clone.parent / checkpoints.name)


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, check=False, capture_output=True, text=True)
    if done.returncode:
        raise PipelineError(f"git {words[0]} in {folder} on {platform.node()}: {done.stderr.strip()}")
    return done.stdout


# --- What the head does ---


def pack() -> bytes:
    """The working tree without ignored files, with its last commit and outputs/code."""
    root, packed = Path.cwd(), BytesIO()
    listed = git(root, "ls-files", "-co", "--exclude-standard", "-z").split("\0")
    files = [name for name in listed if name and name != str(LOCK) and name.split("/")[0] not in USER_FOLDERS]
    with (
        TemporaryDirectory() as folder,
        tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1, dereference=True) as tar,
    ):
        git(root, "clone", "--quiet", "--depth", "1", "--no-checkout", f"file://{root}", folder)
        tar.add(f"{folder}/.git", ".git")
        files = [name for name in files if Path(name).is_file()]
        for name in [*files, "outputs/code", ".dvc/config.local", *USER_FOLDERS]:
            if Path(name).exists():
                tar.add(name, filter=lambda info: None if "/.cache" in info.name else info)
    return packed.getvalue()


@dataclass
class Running:
    generator: Any  # of Ray
    place: str = ""  # the clone it runs in, once it has one
    starts: int = 1


class Workers:
    """Runs stages on Ray's workers."""

    slots = sys.maxsize  # Ray queues what no node has room for

    def __init__(self, dependencies: dict[str, list[str]], options: dict[str, dict[str, Any]], remote: str | None,
                 scratch: Path) -> None:  # fmt: skip
        import ray

        ray.cloudpickle.register_pickle_by_value(dvc_internals)
        tree = pack()
        self.dependencies, self.options, self.remote = dependencies, options, remote
        self.scratch, self.lock, self.versions = str(scratch.resolve()), read_lock(), package_versions()
        self.tree_hash, self.tree = hashlib.sha256(tree).hexdigest(), ray.put(tree)
        self.call = ray.remote(max_retries=0, num_returns="streaming")(work)
        self.running: dict[str, Running] = {}
        self.overheads: list[float] = []  # seconds that stages took beside their command

    def start(self, name: str, starts: int = 1) -> bool:
        options = self.options[name]
        task = Task(
            name, self.dependencies[name], lock_text(self.lock), self.remote, self.scratch,
            max(1, int(options["num_cpus"])), options["num_gpus"], self.versions, self.tree_hash,
        )  # fmt: skip
        generator = self.call.options(name=name, **options).remote(task, self.tree)
        self.running[name] = Running(generator, starts=starts)
        return False

    def poll(self) -> Iterator[tuple[str, str | Outcome]]:
        import ray

        names = {running.generator: name for name, running in self.running.items()}
        ready, _ = ray.wait(list(names), num_returns=1, timeout=0.5)
        for generator in ready:
            name, running = names[generator], self.running[names[generator]]
            message: Any
            try:
                message = ray.get(next(generator))  # type: ignore[arg-type]  # streaming
            except ray.exceptions.RayTaskError as error:  # the worker could not even begin
                message = Result(str(error.cause or error))
            except ray.exceptions.RayError as error:
                reason = type(error).__name__
                if running.starts < MAX_STARTS:
                    again = f"it starts again ({running.starts + 1} of {MAX_STARTS})"
                    print(f"{name}: {running.place or 'its worker'} died: {reason}; {again}", flush=True)
                    self.start(name, running.starts + 1)
                    continue
                message = Result(f"its worker died {MAX_STARTS} times, the last time of {reason}")
            if isinstance(message, str):
                running.place = message
                yield name, message
            else:
                self.take(name, message)
                yield name, Outcome(message.failed, message.command_seconds)

    def take(self, name: str, result: Result) -> None:
        """Keep a stage's log, its entry of dvc.lock and a line of history."""
        running = self.running.pop(name)
        (LOGS / f"{name}.log").write_text(result.log, encoding="utf-8")
        if result.failed:
            return
        self.lock["stages"][name] = result.entry
        write_text(LOCK, lock_text(self.lock))
        if result.command_seconds:
            self.overheads.append(result.seconds - result.command_seconds)
        with HISTORY.open("a", encoding="utf-8") as file:
            facts = {"stage": name, "where": running.place, "starts": running.starts}
            file.write(json.dumps(facts | {"seconds": result.seconds, "own": result.command_seconds}) + "\n")


@contextmanager
def cluster(address: str | None, workers: int) -> Iterator[Any]:
    """Ray, connected to a cluster, or to a new one of this machine on the loopback interface."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address:  # nobody else on this machine may run code here
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    try:
        import ray
    except ImportError:
        raise PipelineError("Ray is missing. It is an extra: `make setup EXTRAS=ray`") from None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    local = {"num_cpus": workers or None, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        if address and "://" in address:
            raise ValueError("Ray's client has no streaming tasks; run this on a node of the cluster, with auto")
        if address and ":" in address:  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        context = ray.init(address or "local", **(quiet if address else quiet | local))
    except (OSError, ValueError, RuntimeError) as error:
        where = f"--address {address}: expected a Ray cluster there" if address else "Ray could not be started"
        raise PipelineError(f"{where}: {error}") from error
    take_signals()  # Ray's own handler of SIGTERM leaves workers behind
    resources, nodes = ray.cluster_resources(), sum(node["Alive"] for node in ray.nodes())
    where = f"; dashboard: http://{context.dashboard_url}" if context.dashboard_url else ""
    cpus, gpus = (f"{resources.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))
    print(f"Ray {ray.__version__}: {nodes} node{'s' if nodes > 1 else ''}, {cpus}, {gpus}{where}", flush=True)
    try:
        yield ray
    finally:
        ray.shutdown()


def check_cluster(ray: Any, options: dict[str, dict[str, Any]], local: bool, remote: str | None) -> None:
    """Raises PipelineError for a cluster that cannot do the work; `local`: no node can join it later."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    hosts = {node["NodeManagerHostname"] for node in nodes}
    if remote and hosts != {platform.node()}:
        raise PipelineError(
            f"expected a DVC remote that {', '.join(sorted(hosts))} can reach, found none configured: `dvc remote add "
            "--default shared …` (a folder that all mount, ssh://, s3://, …)"
        )
    for name, wanted in options.items():
        needs = {"CPU": wanted["num_cpus"], "GPU": wanted["num_gpus"], "memory": wanted["memory"]}
        needs |= {f"accelerator_type:{wanted['accelerator_type']}": 0.001} if wanted["accelerator_type"] else {}
        needs = {kind: amount for kind, amount in needs.items() if amount}
        if not any(all(node["Resources"].get(kind, 0) >= n for kind, n in needs.items()) for node in nodes):
            reason = f"distribute: {name} asks for {needs}, and no node has that"
            if local:
                raise PipelineError(reason)
            print(f"{reason} yet; it waits", file=sys.stderr)
    if any(node["Resources"].get("GPU") for node in nodes) and not any(one["num_gpus"] for one in options.values()):
        print("no stage asks for a GPU (distribute.gpus), so all of them run on CPUs", file=sys.stderr)
    ask = ray.remote(num_cpus=0, max_retries=0)(other_packages)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    answers = [ask.options(scheduling_strategy=place).remote(package_versions()) for place in places]
    problems = []
    for node, answer in zip(nodes, answers, strict=True):
        try:
            difference = ray.get(answer)
        except ray.exceptions.RayError as error:  # the project is not installed there, for one
            difference = str(getattr(error, "cause", error))
        if difference:
            problems.append(f"{node['NodeManagerHostname']}: {difference}")
    if problems:
        raise PipelineError("nodes are not set up like this one: " + "; ".join(problems))


def main(
    address: Annotated[
        str | None, typer.Option(help="of a Ray cluster, `auto` on one of its nodes; none: a new one of this machine")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="CPUs of this machine to use without --address; 0: all")] = 0,
    scratch: Annotated[
        Path, typer.Option(help="for clones and checkpoints; on a shared disk a stage resumes although its node died")
    ] = SCRATCH,
) -> None:
    """Bring everything up to date, with stages on the nodes of a Ray cluster."""

    def remote() -> str | None:
        with open_repo() as repo:
            return None if repo.config["core"].get("remote") else str(LOCAL_REMOTE.resolve())

    def run(waits: dict[str, set[str]], progress: Progress) -> None:
        resources, address_of_remote = load_params(Params).distribute, remote()
        with short_errors(), open_repo(address_of_remote) as repo:
            check_remote(repo)
            graph = {stage.addressing: stage for stage in repo.index.graph}
            here = {name for name in waits if not all(out.use_cache for out in graph[name].outs)}
            away = {name: before for name, before in waits.items() if name not in here}
            dependencies = {
                name: [s.addressing for s in repo.index.graph.successors(graph[name]) if s.addressing != CHECK]
                for name in away
            }
            options = {name: resources.of(name.split("@")[0]) for name in away}
            if current := sorted({name for names in dependencies.values() for name in names} - away.keys()):
                repo.push(current)
            if away:
                with cluster(address, workers) as ray:
                    check_cluster(ray, options, local=address is None, remote=address_of_remote)
                    executor = Workers(dependencies, options, address_of_remote, scratch)
                    try:
                        walk(away, executor, progress)
                    finally:
                        if progress.done:
                            repo.pull(progress.done, force=True)
                if executor.overheads:
                    mean = sum(executor.overheads) / len(executor.overheads)
                    print(f"{len(executor.overheads)} stages ran; overhead beside their commands: {mean:.1f} s each")
        if here and not progress.failed:
            run_here({name: waits[name] & here for name in waits if name in here}, 1, progress)

    bring_up_to_date("distribute", run, remote)


if __name__ == "__main__":
    cli(main)
