"""Stages side by side: in DVC's order, and a failure stops no more than what depends on it."""

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

from db.files import process_runs
from pipelines import repro as repro_module
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
"""A stage of its own module: where several are to run, in a fork that finds libraries imported."""


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
    said, _ = failing.communicate(timeout=120)
    assert failing.returncode == 1 and "4 stages to run, 2 at a time" in said
    assert (
        "right: FAILED" in said and "torch was there: True" in said and "python -m right code, exited with -9" in said
    )
    assert "come after what failed: 1" in said and said.endswith("failed: right\n")
    ran = (tmp_path / "order").read_text().split()
    assert sorted(ran) == ["after_left", "left", "right"] and ran.index("left") < ran.index("after_left")

    (tmp_path / "stop").unlink()
    said, _ = repro().communicate(timeout=120)
    assert re.search(r"2 stages to run.*\n\[1/2\] right\n.*right: \d.*\n\[2/2\] end\n", said), said
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
    assert "repro is already running in another process" in second.communicate(timeout=60)[0] and second.returncode == 1
    first.send_signal(number)
    said, _ = first.communicate(timeout=30)
    assert first.returncode == 130 and "repro: interrupted; run the same command again" in said
    assert not (tmp_path / "right").exists()
    left = [p.info for p in psutil.process_iter(["cwd", "cmdline"]) if p.info["cwd"] == str(tmp_path)]
    assert not left


def test_an_interruption_while_a_stage_starts_reaches_it(tmp_path, monkeypatch):
    sent = []

    class Starting:
        def __init__(self, name):
            signal.raise_signal(signal.SIGINT)  # when its process is there and nobody knows it yet
            self.process = repro_module.FORK.Process(target=int)
            self.process.start()

        def send(self, number):
            sent.append(number)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(repro_module, "Running", Starting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            repro_module.run({"train": set()}, 1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sent == [signal.SIGINT]


def test_what_a_dead_dvc_left_running_is_stopped(tmp_path):
    stage = object.__new__(repro_module.Running)
    stage.process = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!"], stdout=subprocess.PIPE, start_new_session=True)
    child = int(stage.process.stdout.readline())
    assert stage.process.wait() == 0 and process_runs(child, time.time())
    stage.send(signal.SIGKILL)
    began = time.monotonic()
    while process_runs(child, time.time()):
        assert time.monotonic() < began + 10
        time.sleep(0.05)
    stage.process.stdout.close()
    stage.send(signal.SIGINT)  # nobody is there
