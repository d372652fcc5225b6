"""Stages on a Ray cluster of this machine: the same results, and no finished stage runs twice if something dies."""

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
from pipelines.params import Distribute, parse
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
output, source = sys.argv[1:]
marks = os.environ["MARKS"]
with open(f"{marks}/order", "a") as file:
    file.write(f"{output}\\n")
if os.path.exists(f"{marks}/{output}.fails"):
    sys.exit(f"{output} fails on purpose")
if os.path.exists(f"{marks}/{output}.waits"):
    open(f"{marks}/{output}.partial", "w").write(str(os.getpid()))
    os.rename(f"{marks}/{output}.partial", f"{marks}/{output}.pid")
while os.path.exists(f"{marks}/{output}.waits"):
    time.sleep(0.05)
open(output, "w").write(open(source).read() + output + os.environ["OMP_NUM_THREADS"])
"""


@pytest.fixture
def project(tmp_path):
    """A DVC project of a few stages in a git repository, and a folder in which its stages leave marks."""
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
    (folder / "inputs/mine").write_text("mine ")  # uncommitted changes travel too
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
        assert time.monotonic() < until, f"{path} did not appear"
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
    assert not psutil.wait_procs([first], timeout=10)[1]  # otherwise it would go on beside the next one
    second = running(marks / "left.pid")
    appears(folder / "logs/stages/right.log")
    head.send_signal(signal.SIGKILL)
    assert not psutil.wait_procs([second], timeout=60)[1]
    (marks / "left.waits").unlink()
    output, code = finish(start(project))
    assert code == 0, output
    assert (folder / "e").read_text() == "code right1mine left1a1"
    assert order(marks) == ["a", "left", "left", "left", "right"]
    output, code = finish(start(project))
    assert code == 0 and "everything is up to date" in output
    status = subprocess.run(
        [sys.executable, "-m", "dvc", "status"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert "up to date" in status.stdout
    rows = [json.loads(line) for line in (folder / HISTORY).read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"left", "right", "after_left"}


@pytest.mark.full
def test_a_failure_stops_only_what_depends_on_it(project):
    folder, marks = project
    (marks / "left.fails").touch()
    output, code = finish(start(project))
    assert code == 1 and all(text in output for text in ("left fails on purpose", "failed stage: 2", "failed: left: "))
    assert (folder / "right").is_file() and order(marks) == ["left", "right"]
    (marks / "left.fails").unlink()
    shutil.rmtree(folder / ".dvc/tmp/distribute")  # other nodes: what is done comes from the remote
    (folder / "code.txt").write_text("other ")
    output, code = finish(start(project))
    assert code == 0 and (folder / "e").read_text() == "other right1mine left1a1"
    (folder / "code.txt").write_text("code ")
    output, code = finish(start(project))
    assert code == 0 and "right: " in output and order(marks).count("right") == 2, output


@pytest.mark.full
def test_a_missing_cluster_is_an_error_before_anything_runs(project):
    _, marks = project
    output, code = finish(start(project, "--address", "127.0.0.1:1"))
    assert code == 1 and "--address 127.0.0.1:1" in output and "Traceback" not in output, output
    assert not (marks / "order").exists()


def test_a_stage_for_the_base_needs_what_the_arms_one_does():
    section = {
        "cpus": 1,
        "gpus": 0,
        "memory": 0,
        "accelerator": None,
        "stages": {"evaluate": {"gpus": 0.5, "memory": 2}},
    }
    needs = parse(section, Distribute, "params.yaml")
    assert (needs.of("evaluate_base")["num_gpus"], needs.of("evaluate_base")["memory"]) == (0.5, 2_000_000_000)
    assert needs.of("prepare_base")["num_gpus"] == 0
