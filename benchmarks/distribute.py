"""`python -m pipelines.distribute` beside `dvc repro`: the same results, also when a worker and the head are killed?

Clones of the project with the smoke profile and so many seeds; a Ray cluster of two nodes of one core each on this
machine. Hashes of adapters and GGUF files, accuracies and verdicts are held against those of `dvc repro` with one
thread. With --reference a finished folder takes the place of `dvc repro`, with its settings, data and base.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import yaml

from benchmarks import _harness
from db.files import read_jsonl
from pipelines.distribute import HISTORY
from pipelines.dvc_internals import LOCK
from pipelines.repro import TIMES

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
       "OLLAMA_HOST": "127.0.0.1:9", "DVC_NO_ANALYTICS": "1"}  # fmt: skip
SAME = {
    "accuracies": "select arm, seed, score from evaluation_results order by 1, 2",
    "verdicts": "select arm, seed, probe.verdict, diagnosis from probe join run on run.id = run_id "
    "where probe.name = 'verdict' and is_current order by 1, 2",
    "hashes": "select arm, seed, kind, artifact.sha256 from artifact join run on run.id = run_id where is_current and "
    "(kind like '%adapter%' or kind like '%gguf%') order by 1, 2, 3, 4",
}


def run(folder: Path, *command: str) -> float:
    started = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} in {folder}: exit {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return time.monotonic() - started


def clone(folder: Path, seeds: int, reference: Path | None) -> Path:
    run(folder.parent, "git", "clone", "--quiet", str(ROOT), str(folder))
    if reference:
        own, theirs = (yaml.safe_load((place / "params.yaml").read_text()) for place in (folder, reference))
        (folder / "params.yaml").write_text(yaml.safe_dump(own | theirs, sort_keys=False))
        run(folder, "python", "-m", "pipelines.check")
        kept = ("prepare_data", "prepare_base", "base_texts")
        run(folder, "dvc", "config", "--local", "cache.dir", str(reference / ".dvc/cache"))
        stages = yaml.safe_load((reference / LOCK).read_text())["stages"]
        locked = {"schema": "2.0", "stages": {name: stages[name] for name in kept}}
        (folder / LOCK).write_text(yaml.safe_dump(locked, sort_keys=False))
        run(folder, "dvc", "checkout", *kept)
        run(folder, "dvc", "config", "--local", "--unset", "cache.dir")  # workers would find everything there
        run(folder, "dvc", "commit", "--force", *kept)
        return folder
    run(folder, "python", "-m", "pipelines.profile", "smoke", "--force")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["matrix"]["seeds"] = list(range(seeds))
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return folder


def results(folder: Path) -> dict[str, list[Any]]:
    with sqlite3.connect(f"file:{folder / 'outputs/centralized.db'}?mode=ro", uri=True) as connection:
        return {name: connection.execute(query).fetchall() for name, query in SAME.items()}


def differ(ours: dict[str, list[Any]], theirs: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {
        name: sorted(set(ours[name]) ^ set(theirs[name]), key=str)[:6] for name in SAME if ours[name] != theirs[name]
    }


class Distributed:
    """The command, in a clone."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.said = folder, folder / "said.txt"
        command = [sys.executable, "-m", "pipelines.distribute", "--address", address]
        with self.said.open("a") as output:
            self.process = subprocess.Popen(command, cwd=folder, env=ENV, stdout=output, stderr=subprocess.STDOUT)

    def wait(self) -> None:
        if self.process.wait():
            sys.exit(f"distribute in {self.folder} failed\n{self.said.read_text()[-4000:]}")


def kill_worker_in_training() -> str:
    """Kill the Ray worker that has a training under it; returns what trained."""
    while True:
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or ())
            worker = next((p for p in process.parents() if "ray::" in " ".join(p.cmdline())), None)
            if worker and "pipelines.train" in line:
                time.sleep(5)
                worker.send_signal(signal.SIGKILL)
                return line.rsplit("pipelines.train ", 1)[1]
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="of each of three arms; 4: 95 stages (default)")
    parser.add_argument("--reference", type=Path, help="a folder in which the pipeline has run")
    parser.add_argument("--no-kills", action="store_true", help="leave out the run in which processes are killed")
    args = parser.parse_args()
    from ray.cluster_utils import Cluster

    top = Path(tempfile.mkdtemp(prefix="distribute-"))
    finished: Path | None = args.reference.resolve() if args.reference else None
    if reference := finished:
        serial = None
        of_stages = sum(json.loads((reference / TIMES).read_text()).values())
        print(f"stages of the reference: {of_stages:.0f} s, if none of them was restored", flush=True)
    else:
        reference = clone(top / "repro", args.seeds, None)
        serial = run(reference, "dvc", "repro")
        print(f"dvc repro: {serial:.0f} s", flush=True)
    wanted = results(reference)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)

    folder = clone(top / "plain", args.seeds, finished)
    started = time.monotonic()
    Distributed(folder, cluster.address).wait()
    wall = time.monotonic() - started
    differences = differ(results(folder), wanted)
    rows = [row for row in read_jsonl(folder / HISTORY) if row["own"]]
    overheads = [row["seconds"] - row["own"] for row in rows]
    again = run(folder, sys.executable, "-m", "pipelines.distribute", "--address", cluster.address)
    print(f"distribute: {wall:.0f} s, {len(rows)} stages, beside its command one took {median(overheads):.2f} s; "
          f"again: {again:.1f} s; differences: {differences or 'none'}", flush=True)  # fmt: skip
    facts: dict[str, Any] = {
        "stages": len(rows), "serial_seconds": serial, "seconds_of_stages": sum(row["own"] for row in rows),
        "distributed_seconds": wall, "second_run_seconds": again,
        "overhead_seconds_a_stage": median(overheads), "overheads": overheads, "same_results": not differences,
        "differences": differences, "profile": yaml.safe_load((folder / "params.yaml").read_text())["profile"],
    }  # fmt: skip
    if not args.no_kills:
        facts |= with_kills(clone(top / "kills", args.seeds, finished), cluster.address, len(rows), wanted)
    cluster.shutdown()
    file = _harness.RESULTS / "distribute.json"
    runs = json.loads(file.read_text())["profiles"] if file.is_file() else {}
    runs[facts["profile"]] = runs.get(facts["profile"], {}) | facts  # what --no-kills leaves out stays
    _harness.write(
        "distribute",
        "dvc repro and two Ray nodes of one core each",
        same_results=all(one["same_results"] for one in runs.values()),
        same_after_kills=all(kills)
        if (kills := [one["same_after_kills"] for one in runs.values() if "killed" in one])
        else None,
        overhead_seconds_a_stage=max(one["overhead_seconds_a_stage"] for one in runs.values()),
        profiles=runs,
    )
    shutil.rmtree(top)


def with_kills(folder: Path, address: str, stages: int, wanted: dict[str, list[Any]]) -> dict[str, Any]:
    head = Distributed(folder, address)
    killed = kill_worker_in_training()
    while not (folder / HISTORY).is_file() or len(read_jsonl(folder / HISTORY)) < stages // 2:
        if head.process.poll() is not None:
            sys.exit(f"distribute ended early\n{head.said.read_text()[-4000:]}")
        time.sleep(0.2)
    head.process.kill()
    head.process.wait()
    Distributed(folder, address).wait()
    said = head.said.read_text()
    starts = re.findall(r"^\[\d+/\d+\] (\S+) on ", said, re.MULTILINE)
    restored = re.findall(r"^ *(\S+): .*from the cache$", said, re.MULTILINE)
    runs = {name: starts.count(name) - restored.count(name) for name in starts}
    twice = sorted(name for name, count in runs.items() if count > 1)
    differences = differ(results(folder), wanted)
    print(f"killed: the worker of {killed} and the head; ran twice: {twice}; differences: {differences or 'none'}")
    return {
        "same_after_kills": not differences,
        "ran_twice": twice,
        "killed": killed,
        "differences_after_kills": differences,
    }


if __name__ == "__main__":
    main()
