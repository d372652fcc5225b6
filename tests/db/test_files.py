"""Output folders are whole or absent."""

import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
from pydantic import ValidationError

from db.files import (
    FileError,
    OutputError,
    exclusive,
    finish_run,
    machine,
    read_record,
    staged,
    start_run,
    write_record,
)
from db.records import MeasuredRecord, RunRecord
from tests.db.conftest import without_rights


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "results" / "0"
    folder.mkdir(parents=True)
    (folder / "old.txt").write_text("old")
    return folder


def test_swaps_the_whole_folder_unless_something_is_raised(target):
    with staged(target) as folder:
        (folder / "new.txt").write_text("new")
        assert content(target) == {"old.txt": "old"}
    assert content(target) == {"new.txt": "new"}
    with pytest.raises(RuntimeError, match="boom"), staged(target) as folder:
        (folder / "newer.txt").write_text("newer")
        raise RuntimeError("boom")
    assert content(target) == {"new.txt": "new"}
    assert [p.name for p in target.parent.iterdir()] == ["0"]


@contextmanager
def process(within="nullcontext()"):
    """A process of its own that waits within a block of `db.files`."""
    script = "import time\nfrom contextlib import nullcontext\nfrom db.files import *\n"
    script += f"with {within}:\n    print(flush=True)\n    time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"\n"
        yield child
    finally:
        child.kill()
        child.wait()


def test_a_kill_leaves_the_old_and_the_next_run_cleans_up(target):
    with process(f"staged(Path({str(target)!r}))"):
        pass
    assert content(target) == {"old.txt": "old"}
    assert len(list(target.parent.iterdir())) == 2
    with staged(target) as folder:
        (folder / "newer.txt").write_text("newer")
    assert content(target) == {"newer.txt": "newer"}
    assert [p.name for p in target.parent.iterdir()] == ["0"]


def test_a_full_disk(target):
    words = r"cannot be written, the disk is full.*Earlier results there are unchanged"
    with pytest.raises(OutputError, match=words), staged(target), open("/dev/full", "w") as file:
        file.write("x")
    assert content(target) == {"old.txt": "old"}


def test_read_only_folder(target, tmp_path):
    refused = pytest.raises(OutputError, match="cannot be written, this user may not write there")
    with without_rights(target.parent, 0o555, tmp_path), refused, staged(target):
        pass
    assert content(target) == {"old.txt": "old"}


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "results").write_text("I am a file")
    with pytest.raises(OutputError, match="a file is where a folder is needed"), staged(tmp_path / "results/0"):
        pass
    assert (tmp_path / "results").read_text() == "I am a file"


def test_two_at_once(tmp_path):
    lock = tmp_path / "x.lock"
    refused = pytest.raises(OutputError, match="train a is already running")
    with process(f"exclusive(Path({str(lock)!r}))"), refused, exclusive(lock, "train a"):
        pass
    with exclusive(lock, "train a"):  # a dead holder's lock is free
        pass


@pytest.mark.parametrize("writer", ["safetensors", "torch"])
def test_a_disk_that_fills_up(small_disk, writer):
    """Libraries report it in types and words of their own."""
    import torch
    from safetensors.torch import save_file

    target = small_disk / "0"
    target.mkdir()
    (target / "old.txt").write_text("old")
    tensor = torch.zeros(100_000)
    write = {
        "safetensors": lambda file: save_file({"a": tensor}, file),
        "torch": lambda file: torch.save(tensor, file),
    }[writer]
    with pytest.raises(OutputError, match="the disk is full"), staged(target) as folder:
        write(folder / "new")
    assert content(target) == {"old.txt": "old"}
    assert [p.name for p in small_disk.iterdir()] == ["0"]


def test_leftovers_of_dead_processes_go_those_of_running_ones_stay(tmp_path):
    """A killed process that nobody has reaped, and one whose number another has by now, are dead."""
    target = tmp_path / "out"
    with process() as dead, process() as running, process() as namesake:
        folders = {p: tmp_path / f"out.{p.pid}.partial" for p in (dead, running, namesake)}
        for folder in folders.values():
            folder.mkdir()
        os.utime(folders[namesake], (1e9, 1e9))  # written long before that process began
        dead.kill()
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        with staged(target) as folder:
            (folder / "x").write_text("1")
        assert [f.exists() for f in folders.values()] == [False, True, False]


MEASURED = {
    "schema": 1, "arm": "a", "seed": 0, "layers": [], "metric_defs": {}, "notes": ["one"], "later": {"x": [1.5]},
    "metrics": [{"name": "m", "split": "s", "value": value, "n": None} for value in (float("nan"),)],
}  # fmt: skip


def test_a_record_is_written_and_read_by_the_same_rules(tmp_path):
    """NaN becomes a word, since JSON has none; keys that the record does not name are kept."""
    file = tmp_path / "measured.json"
    write_record(file, MeasuredRecord.of(MEASURED))
    assert json.loads(file.read_text())["metrics"][0]["value"] == "nan"
    again = read_record(file, MeasuredRecord)
    assert math.isnan(again.metrics[0].value) and again.content()["later"] == {"x": [1.5]}
    assert again.content() == MeasuredRecord.of(again.content()).content()
    with pytest.raises(ValidationError, match="more than once"):
        MeasuredRecord.of({**MEASURED, "metrics": MEASURED["metrics"] * 2})
    file.write_text(json.dumps({**json.loads(file.read_text()), "seed": "0", "arm": ""}))
    with pytest.raises(FileError, match=r"measured\.json: arm: .*; seed: .*got '0'; delete its folder and run"):
        read_record(file, MeasuredRecord)
    with pytest.raises(FileError, match="no such file; run `dvc repro`"):
        read_record(tmp_path / "none.json", MeasuredRecord)


def test_run_json_says_how_a_stage_ran(tmp_path):
    record = start_run("train", params={"rate": 0.1}, inputs={"a": "b"}, arm="a", seed=0, device=machine(None, 2))
    record.extra["loss"] = float("inf")
    finish_run(record, tmp_path)
    again = read_record(tmp_path / "run.json", RunRecord)
    assert (again.status, again.params, again.extra) == ("finished", {"rate": 0.1}, {"loss": "inf"})
    assert again.ended >= again.started == record.started and again.device.device_class == "cpu"
    assert again.packages["pandas"] and set(again.git.content()) == {"commit", "dirty"}
