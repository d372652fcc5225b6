"""Stages side by side: in DVC's order; a failure stops only what depends on it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from tqdm import tqdm

import pipelines.repro
from db.files import process_runs
from tests.project_clone import ROOT

STAGES = {
    "check": {"cmd": "echo 1 > code", "outs": ["code"]},
    "left": {"cmd": "echo left >> order; cp code left", "deps": ["code"], "outs": ["left"]},
    "right": {"cmd": "python -m right code", "deps": ["code"], "outs": ["right"]},
    "after_left": {"cmd": "echo after_left >> order; cp left a", "deps": ["left"], "outs": ["a"]},
    "end": {"cmd": "echo end >> order; cat right a > e", "deps": ["right", "a"], "outs": ["e"]},
}
RIGHT = """
import os, shutil, sys, time
if __name__ == "__main__":
    print("right", file=open("order", "a"))
    print("torch was there:", "torch" in sys.modules, file=sys.stderr)
    if os.path.exists("stop"):
        os.kill(os.getpid(), 9)
    if os.path.exists("wait"):
        open("started", "w")
        time.sleep(60)
    shutil.copy(sys.argv[1], "right")
"""
"""A stage that is a module: it runs in a preloaded fork where more than two stages are to run."""


@pytest.fixture
def repro(tmp_path):
    """Starts the command in a DVC project of a few stages, each of which adds a line to the file `order`."""
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    (tmp_path / "right.py").write_text(RIGHT)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet", "--no-scm"], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "pipelines.repro", "--workers", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1"}  # else a daemon of its own

    def start():
        return subprocess.Popen(
            command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return start


def test_a_failure_stops_what_depends_on_it_and_the_rest_runs_once(repro, tmp_path):
    (tmp_path / "stop").touch()
    failing = repro()
    output, _ = failing.communicate(timeout=120)
    assert failing.returncode == 1 and "4 stages to run, 2 at a time" in output
    assert "right: FAILED" in output and "torch was there: True" in output and "exited with -9" in output
    assert "depend on a failed stage: 1\nfailed: right: see logs/stages/right.log" in output
    ran = (tmp_path / "order").read_text().split()
    assert sorted(ran) == ["after_left", "left", "right"] and ran.index("left") < ran.index("after_left")

    (tmp_path / "stop").unlink()
    output, _ = repro().communicate(timeout=120)
    assert re.search(r"2 stages to run.*\n\[1/2\] right\n.*right: \d.*\n\[2/2\] end\n", output), output
    assert "torch was there: False" in (tmp_path / "logs/stages/right.log").read_text()
    assert (tmp_path / "order").read_text().split()[3:] == ["right", "end"] and (tmp_path / "e").read_text() == "1\n1\n"
    assert repro().communicate(timeout=120)[0] == "everything is up to date\n"


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_started_twice(repro, tmp_path, number):
    (tmp_path / "wait").touch()
    stages = {**STAGES, "left": {**STAGES["left"], "cmd": "sleep 60; cp code left"}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    first = repro()
    while not (tmp_path / "started").exists():
        assert first.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)  # a shell between two commands may miss the signal
    second = repro()
    assert "already running" in second.communicate(timeout=60)[0] and second.returncode == 1
    first.send_signal(number)
    output, _ = first.communicate(timeout=30)
    assert first.returncode == 130 and "repro: interrupted" in output
    assert not (tmp_path / "right").exists()
    assert not [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(tmp_path)]


def test_an_interruption_while_a_stage_starts_reaches_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    processes, fork = pipelines.repro.Processes(1), pipelines.repro.FORK.Process

    def interrupted(target, args):
        process = fork(target=time.sleep, args=(60,))
        start = process.start
        process.start = lambda: (start(), os.kill(os.getpid(), signal.SIGINT))  # it exists, and nobody knows it yet
        return process

    monkeypatch.setattr(pipelines.repro.FORK, "Process", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            processes.start("train")
    finally:
        signal.signal(signal.SIGINT, before)
    ((process, _),) = processes.processes.values()
    processes.send(signal.SIGKILL)
    process.join(10)
    assert process.exitcode == -signal.SIGKILL


def test_a_stage_whose_dvc_died_is_stopped(monkeypatch):
    dead = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!"], stdout=subprocess.PIPE, start_new_session=True)
    child = int(dead.stdout.readline())
    assert dead.wait() == 0 and process_runs(child, time.time())
    processes = pipelines.repro.Processes(1)
    processes.processes["train"] = dead, None
    processes.send(signal.SIGKILL)
    began = time.monotonic()
    while process_runs(child, time.time()):
        assert time.monotonic() < began + 10
        time.sleep(0.05)
    dead.stdout.close()
    processes.send(signal.SIGINT)  # nothing is left to receive it


def test_the_last_word_on_progress_is_found_in_what_tqdm_and_trainers_write(tmp_path):
    log = tmp_path / "stage.log"
    assert pipelines.repro.latest(log) == ""
    with log.open("w") as file:
        for _ in tqdm(range(3), desc="texts", file=file, mininterval=0):
            pass
        print("{'loss': 1.0}", file=file)
    assert pipelines.repro.latest(log).startswith("texts:  67%") and "2/3 [" in pipelines.repro.latest(log)
    with log.open("a") as file:
        print("train pure_grit-0: step 20/80, loss 1.1, 0.5 s/step, 30 s left\nsaved", file=file)
    assert pipelines.repro.latest(log) == "train pure_grit-0: step 20/80, loss 1.1, 0.5 s/step, 30 s left"
