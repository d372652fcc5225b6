"""Every start of a stage is on record, and so is how it ended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.attempts import ATTEMPTS, mark_crashed, recorded
from pipelines.stage import main_for

ROOT = Path(__file__).parents[2]
WAITS = """
import sys, time
sys.path.insert(0, {root!r})
from pipelines.stage import main_for
def work():
    print("working", flush=True)
    time.sleep({seconds})
main_for("train", work, "pure_grit", 3)
"""


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def attempts():
    return [json.loads(file.read_text()) for file in sorted(ATTEMPTS.glob("*.json"))]


def start(seconds):
    code = WAITS.format(root=str(ROOT), seconds=seconds)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "working\n"
    return process


def test_a_stage_that_ends_well():
    main_for("evaluate", lambda: None, "pure_grit", 1)
    (attempt,) = attempts()
    assert (attempt["stage"], attempt["arm"], attempt["seed"]) == ("evaluate", "pure_grit", 1)
    assert attempt["status"] == "finished" and attempt["error"] is None
    assert attempt["started"] <= attempt["ended"]
    assert [f.name for f in ATTEMPTS.iterdir()] == [f"{attempt['id']}.json"]  # no lock is left


def test_a_stage_that_fails_says_why():
    def fail():
        raise ValueError("the reason")

    with pytest.raises(ValueError):
        main_for("compare", fail)
    (attempt,) = attempts()
    assert (attempt["status"], attempt["error"], attempt["arm"]) == ("failed", "the reason", None)


def test_an_interrupted_stage_failed():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        main_for("compare", interrupt)
    assert attempts()[0]["error"] == "interrupted"


def test_a_killed_stage_is_marked_at_the_next_start():
    process = start(60)
    assert attempts()[0]["status"] == "running"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert attempts()[0]["status"] == "running"
    main_for("compare", lambda: None)
    killed, other = attempts()
    assert (killed["status"], killed["ended"], other["status"]) == ("crashed", None, "finished")
    assert "without a word" in killed["error"]
    assert mark_crashed() == []


def test_a_running_stage_is_left_alone():
    process = start(60)
    try:
        assert mark_crashed() == []
        main_for("compare", lambda: None)
        assert [a["status"] for a in attempts()] == ["running", "finished"]
    finally:
        process.kill()
        process.wait()
    assert len(mark_crashed()) == 1


def test_its_number_taken_by_another_process_does_not_keep_it_alive():
    process = start(60)
    process.kill()
    process.wait()
    (file,) = ATTEMPTS.glob("*.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "pid": os.getpid(), "host": "elsewhere"}))
    assert mark_crashed() == [file.stem]


def test_a_damaged_file_stops_nothing():
    ATTEMPTS.mkdir()
    (ATTEMPTS / "1-train.json").write_text('{"status": "runn')
    main_for("compare", lambda: None)
    assert (ATTEMPTS / "1-train.json").read_text() == '{"status": "runn'


def test_a_folder_that_cannot_be_made_stops_nothing(capsys):
    ATTEMPTS.write_text("a file")
    done = []
    main_for("compare", lambda: done.append(1))
    assert done == [1] and "not recorded" in capsys.readouterr().err


def test_two_at_once_have_files_of_their_own():
    with recorded("train", "a", 0), recorded("train", "a", 0):
        time.sleep(0)
    assert len(attempts()) == 2 and {a["status"] for a in attempts()} == {"finished"}


def test_a_full_disk_stops_nothing(monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    done = []
    monkeypatch.setattr(Path, "write_text", full)
    main_for("compare", lambda: done.append(1))
    assert done == [1] and "No space left" in capsys.readouterr().err
    assert list(ATTEMPTS.iterdir()) == []
