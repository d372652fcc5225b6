"""When files are read: last by who writes last; and what happens to those that may not be read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import db.ingest
from db import IngestError, look, open_session, queries
from db.check import faults
from db.cli import app
from db.ingest import ingest, rebuild
from db.queries_compare import Choice, chosen_runs
from tests.conftest import not_root
from tests.db.result_tree import edit, make_arm
from tests.db.result_tree_layers import make_attempt, make_full_tree
from tests.db.workers import content


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = make_full_tree(tmp_path / "project")
    make_attempt(tree, "one", status="running", ended=None)
    for file in tree.rglob("*.json*"):  # written long ago
        os.utime(file, (1_700_000_000, 1_700_000_000))
    return tree


def grow(tree: Path) -> None:
    """What may happen while a process waits for its turn: a start ends, an arm is scored."""
    make_attempt(tree, "one")
    make_arm(tree, "pure_grit", correct=[True] * 100)


def after_reading(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> list[str]:
    """Do something once, after the first reading; return the list of readings."""
    read, readings = db.ingest.read_results, []

    def wrapped(*args: Any) -> Any:
        found = read(*args)
        readings.append("read")
        if len(readings) == 1:
            act()
        return found

    monkeypatch.setattr(db.ingest, "read_results", wrapped)
    return readings


@pytest.mark.parametrize("work", [ingest, rebuild])
def test_no_older_reading_replaces_a_newer_one(
    tree: Path, path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[..., object]
) -> None:
    """Another process ingests what came after this one had read, and is done before this one writes."""

    def other() -> None:
        grow(tree)
        assert ingest(tree, path).inserted == 4

    after_reading(monkeypatch, other)
    work(tree, path)
    with open_session(path) as session:
        assert [(run.arm, run.seed) for run in chosen_runs(session, Choice())] == [
            ("base", 0), ("baseline_lora", 0), ("baseline_lora", 1), ("pure_grit", 0)]  # fmt: skip
        assert {a.id: a.status for a in queries.attempts(session)}["one"] == "finished"
        assert faults(session) == []
    ingest(tree, path.with_name("fresh.db"))
    if work is rebuild:
        assert content(path) == content(path.with_name("fresh.db"))


@pytest.mark.parametrize("work", [ingest, rebuild])
def test_files_that_rest_are_read_once(
    tree: Path, path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[..., object]
) -> None:
    readings = after_reading(monkeypatch, lambda: None)
    work(tree, path)
    assert readings == ["read"]


def test_files_that_never_rest_are_read_last_under_the_lock(
    tree: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, numbers = db.ingest.replace_content, []

    def restless(*args: Any) -> None:
        store(*args)
        numbers.append(make_attempt(tree, f"more {len(numbers)}")["id"])

    monkeypatch.setattr(db.ingest, "replace_content", restless)
    rebuild(tree, path)
    with open_session(path) as session:
        assert {*numbers, "one", "two"} == {a.id for a in queries.attempts(session)}
    assert 1 < len(numbers) < 10


def test_files_that_become_malformed_leave_the_old_content(
    tree: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(tree, path)
    before = content(path)
    after_reading(monkeypatch, lambda: edit(tree / "scores/base/0/scores.json", schema=9))
    with pytest.raises(IngestError, match="schema"):
        ingest(tree, path)
    assert content(path) == before


def change_content(file: Path) -> None:
    """As many bytes, and the old time put back."""
    status = file.stat()
    file.write_bytes(file.read_bytes().replace(b"1", b"2"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": change_content,
    "time": lambda file: os.utime(file, (1_600_000_000, 1_600_000_000)),
    "gone": lambda file: file.unlink(),
    "another beside": lambda file: file.with_name("other.json").write_text("{}"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("folder", look.FOLDERS)
def test_a_look_notices_changes(tree: Path, change: str, folder: str) -> None:
    first = look.look_at(tree)
    assert first and look.unchanged(tree, first)
    if change == "another beside" and folder == "models/base":
        return  # there is but one result among the model's own files
    CHANGES[change](next(iter(sorted((tree / folder).rglob("*.json")))))
    assert not look.unchanged(tree, first)


def test_a_file_written_a_moment_ago_is_never_taken_for_unchanged(tree: Path) -> None:
    (tree / "attempts/one.json").touch()
    first = look.look_at(tree)
    assert first is None and not look.unchanged(tree, first)


HIDDEN = [
    "scores", "scores/baseline_lora", "scores/baseline_lora/0", "scores/base/0/scores.json", "attempts",
    "attempts/one.json", "measured/baseline_lora/0", "measured/base/0", "measured/base/0/measured.json",
    "quantized/baseline_lora/0", "adapters/baseline_lora/0", "gguf/base/0", "verdicts",
]  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_what_may_not_be_read_is_named_and_never_counts_as_absent(tree: Path, path: Path, name: str) -> None:
    ingest(tree, path)
    before = content(path)
    for parent in (tree.parent, *tree.parent.parents[:2]):
        parent.chmod(parent.stat().st_mode | 0o055)
    hidden = tree / name
    mode = hidden.stat().st_mode
    hidden.chmod(0)
    try:
        with not_root(), pytest.raises(IngestError) as refused:
            ingest(tree, path)
    finally:
        hidden.chmod(mode)
    named = [p for p in refused.value.problems if "Permission denied" in p.message]
    assert named and all(p.file.startswith(name) for p in named), refused.value
    assert len({str(p) for p in named}) == len(named), "each is named once"
    assert content(path) == before
    assert ingest(tree, path).unchanged == 3


def test_a_failing_disk_is_named_too(tree: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.iterdir

    def broken(folder: Path) -> Any:
        if folder.name == "attempts":
            raise OSError(5, "Input/output error", str(folder))
        return real(folder)

    monkeypatch.setattr(Path, "iterdir", broken)
    said = CliRunner().invoke(app, ["ingest", "--root", str(tree), "--db", str(path)])
    assert said.exit_code == 2 and "attempts: expected a file or folder that can be read" in said.output
    assert "Input/output error" in said.output and not path.exists()
