"""Stages on the workers of a Ray cluster of this machine: the same results, and nothing twice when something dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from pipelines.distribute import HISTORY
from pipelines.params import ConfigError, Distribute, parse
from tests.project_clone import ROOT

STAGES = {
    "check": {"cmd": "mkdir -p outputs/code && cp code.txt outputs/code/all", "deps": ["code.txt"],
              "outs": [{"outputs/code": {"cache": False, "persist": True}}]},
    "left": {"cmd": "python stage.py left inputs/mine", "deps": ["outputs/code/all", "inputs"], "outs": ["left"]},
    "right": {"cmd": "python stage.py right outputs/code/all", "deps": ["outputs/code/all"], "outs": ["right"]},
    "after_left": {"cmd": "python stage.py a left", "deps": ["left"], "outs": ["a"]},
    "compare": {"cmd": "cat right a > e", "deps": ["right", "a"], "outs": [{"e": {"cache": False}}]},
}  # fmt: skip
STAGE = """
import os, sys, time
made, read = sys.argv[1:]
marks = os.environ["MARKS"]
with open(f"{marks}/order", "a") as file:
    file.write(f"{made}\\n")
if os.path.exists(f"{marks}/{made}.fails"):
    sys.exit(f"{made} was told to fail")
if os.path.exists(f"{marks}/{made}.waits"):
    open(f"{marks}/{made}.partial", "w").write(str(os.getpid()))
    os.rename(f"{marks}/{made}.partial", f"{marks}/{made}.pid")
while os.path.exists(f"{marks}/{made}.waits"):
    time.sleep(0.05)
open(made, "w").write(open(read).read() + made + os.environ["OMP_NUM_THREADS"])
"""


@pytest.fixture
def project(tmp_path):
    """A DVC project of a few stages in a git repository, and a folder of what its stages did."""
    pytest.importorskip("ray")
    folder, marks = tmp_path / "project", tmp_path / "marks"
    (folder / "inputs").mkdir(parents=True)
    marks.mkdir()
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    (folder / "stage.py").write_text(STAGE)
    (folder / "code.txt").write_text("code ")
    (folder / "inputs/mine").write_text("committed ")
    (folder / ".gitignore").write_text("\n".join(["/outputs/", "/left", "/right", "/a", "/logs/", "/checkpoints/"]))
    shutil.copy(ROOT / "params.yaml", folder)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run(["git", "add", "--all"], cwd=folder, check=True)
    author = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run(["git", *author, "commit", "--quiet", "-m", "all"], cwd=folder, check=True)
    (folder / "inputs/mine").write_text("mine ")  # what is not committed travels too
    return folder, marks


def start(project, *options):
    folder, marks = project
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1", "MARKS": str(marks)}
    command = [sys.executable, "-m", "pipelines.distribute", "--workers", "2", *options]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    return process.communicate(timeout=120)[0], process.returncode


def appears(path):
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.05)
    return path


def running(file):
    process = psutil.Process(int(appears(file).read_text()))
    file.unlink()
    return process


def order(marks):
    return sorted((marks / "order").read_text().split())


@pytest.mark.full
def test_a_worker_and_the_head_die_and_no_finished_stage_runs_twice(project):
    folder, marks = project
    (marks / "left.waits").touch()
    head = start(project)
    first = running(marks / "left.pid")
    worker = next(p for p in first.parents() if "ray::" in " ".join(p.cmdline()))
    worker.kill()
    assert not psutil.wait_procs([first], timeout=10)[1]  # it would go on where another worker may start
    second = running(marks / "left.pid")
    appears(folder / "logs/stages/right.log")
    head.send_signal(signal.SIGKILL)
    assert not psutil.wait_procs([second], timeout=60)[1]
    (marks / "left.waits").unlink()
    said, code = finish(start(project))
    assert code == 0, said
    assert (folder / "e").read_text() == "code right1mine left1a1"
    assert order(marks) == ["a", "left", "left", "left", "right"]
    said, code = finish(start(project))
    assert code == 0 and "everything is up to date" in said
    assert (
        "up to date"
        in subprocess.run(
            [sys.executable, "-m", "dvc", "status"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout
    )
    rows = [json.loads(line) for line in (folder / HISTORY).read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"left", "right", "after_left"}


@pytest.mark.full
def test_a_failure_stops_what_comes_after_it_alone(project):
    folder, marks = project
    (marks / "left.fails").touch()
    said, code = finish(start(project))
    assert (
        code == 1
        and "left was told to fail" in said
        and "depend on a failed stage: 2" in said
        and "failed: left: " in said
    )
    assert (folder / "right").is_file() and order(marks) == ["left", "right"]
    (marks / "left.fails").unlink()
    shutil.rmtree(folder / ".dvc/tmp/distribute")  # other nodes: what is done comes from the remote
    (folder / "code.txt").write_text("other ")
    said, code = finish(start(project))
    assert code == 0 and (folder / "e").read_text() == "other right1mine left1a1"
    (folder / "code.txt").write_text("code ")
    said, code = finish(start(project))
    assert code == 0 and "right: " in said and order(marks).count("right") == 2, said


@pytest.mark.full
def test_what_cannot_be_handed_out_is_said_before_anything_runs(project):
    folder, marks = project
    said, code = finish(start(project, "--address", "127.0.0.1:1"))
    assert code == 1 and "--address 127.0.0.1:1" in said and "Traceback" not in said, said
    remote = ["remote", "add", "--default", "gone", "/proc/nowhere"]
    subprocess.run([sys.executable, "-m", "dvc", *remote], cwd=folder, check=True)
    said, code = finish(start(project))
    assert not (marks / "order").exists()
    assert code == 1 and "/proc/nowhere" in said and "Traceback" not in said, said


def test_needs_of_stages_are_checked_all_at_once():
    own = {"cpus": 1, "gpus": 0, "memory": 0, "accelerator": None}
    wrong = {**own, "stages": {"trian": {}, "train": {"gpus": -1, "cores": 2}}}
    with pytest.raises(ConfigError) as error:
        parse(wrong, Distribute, "params.yaml")
    assert all(word in str(error.value) for word in ("stages.trian", "'train'", "train.gpus", "train.cores"))
    needs = parse({**own, "stages": {"evaluate": {"gpus": 0.5, "memory": 2}}}, Distribute, "params.yaml")
    assert needs.of("evaluate_base")["num_gpus"] == 0.5 and needs.of("evaluate_base")["memory"] == 2_000_000_000
    assert needs.of("prepare_base")["num_gpus"] == 0
