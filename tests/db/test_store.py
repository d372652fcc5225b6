"""The archive and the database derived from it: whole or absent, and never in the place of another file."""

import os
import random
import shutil
import sqlite3
import subprocess
import time
from collections import Counter
from contextlib import closing

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from db import DatabaseError, FileError
from db.cli import app
from db.ingest import ingest, rebuild
from db.store import open_session
from db.tables import SCHEMA
from tests.db.asking import ask, ask_one, content, forked
from tests.db.conftest import without_rights
from tests.db.result_tree import edit, make_arm, make_full_tree, write


def beside(path):
    return sorted(p.name for p in path.parent.iterdir() if p.name.startswith(path.name))


def test_deleted_and_made_again_it_is_the_same_with_earlier_tasks_and_settings(tree, three):
    """`three` has seen AQI, GSM8K and Alpaca; only the last is on disk."""
    edit(tree / "adapters/pure_grit/0/run.json", params={"train": {"learning_rate": 0.002}})
    ingest(tree, three, seeds=[0])
    before = content(three)
    assert Counter(row["task"] for row in before["run"]) == {"aqi": 3, "gsm8k": 3, "alpaca": 4}
    assert all(before[name] for name in before)
    three.unlink()
    result = CliRunner().invoke(app, ["rebuild", "--db", str(three), "--root", str(tree)])
    assert result.exit_code == 0 and "10 runs in all" in result.output, result.output
    assert content(three) == before
    three.unlink()
    for folder in ("scores", "adapters", "gguf", "verdicts"):  # what `make clean` removes
        (tree / folder).rename(tree / f"{folder}-gone")
    rebuild(tree, three)
    assert content(three) == before


def test_the_same_files_again_change_nothing(tree, path):
    ingest(tree, path)
    rows = content(path)
    written = {p: p.stat().st_mtime_ns for p in (tree / "runs").rglob("*.json*") if p.name != "current.json"}
    assert ingest(tree, path).changed == 0
    assert all(p.stat().st_mtime_ns == moment for p, moment in written.items()) and content(path) == rows


def test_a_changed_setting_is_a_new_run_and_a_repeated_evaluation_replaces_the_old(tree, path):
    ingest(tree, path)
    train = tree / "adapters/baseline_lora/0/run.json"
    edit(train, params={"train": {"learning_rate": 0.002, "steps": 100}})
    summary = ingest(tree, path)
    assert (summary.changed, summary.current, summary.runs) == (1, 3, 4)
    query = "SELECT is_current FROM run WHERE arm = 'baseline_lora' AND seed = 0 ORDER BY id"
    assert sorted(ask(path, query)) == [(0,), (1,)]
    edit(train, params={"train": {"learning_rate": 0.001, "steps": 100}})
    make_arm(tree, "baseline_lora", 0, correct=[i < 80 for i in range(100)])
    summary = ingest(tree, path)
    assert (summary.changed, summary.runs) == (1, 4), "the old experiment is current again, with other answers"
    assert ask(path, "SELECT sum(correct) FROM sample JOIN run ON run.id = run_id WHERE is_current AND seed = 0 "
                     "GROUP BY arm ORDER BY arm") == [(40,), (80,)]  # fmt: skip


def test_faults_of_the_archive_are_named_at_once_and_the_database_stands(tree, path):
    ingest(tree, path)
    before = content(path)
    first, second, third = sorted(p for p in (tree / "runs").iterdir() if p.is_dir())
    next(first.glob("scores/*/*/scores.json")).write_text("{")
    next(second.glob("scores/*/*/samples.jsonl.gz")).write_bytes(b"no gzip")
    for file in sorted(third.glob("scores/*/*/*")):
        file.unlink()
    with pytest.raises(FileError) as refused:
        rebuild(tree, path)
    message = str(refused.value)
    assert "3 problems" in message and all(f"runs/{p.name}" in message for p in (first, second, third)), message
    assert content(path) == before


def test_nothing_archived_and_nothing_scored_replace_no_database(tmp_path, tree, path):
    nothing = r"runs: no archived runs found.*db\.cli ingest"
    with pytest.raises(FileError, match=nothing):
        rebuild(tmp_path, path)
    with pytest.raises(FileError, match="expected the project's folder"):
        ingest(tmp_path / "none", path)
    assert not path.exists() and not (tmp_path / "runs").exists()
    (tmp_path / "empty").mkdir()
    ingest(tree, path)
    before = content(path)
    with pytest.raises(FileError, match=nothing):
        ingest(tmp_path / "empty", path)
    assert content(path) == before


def test_a_run_whose_replacement_was_killed_between_two_renames_comes_back(tree, path):
    ingest(tree, path)
    before = content(path)
    run = next(p for p in (tree / "runs").iterdir() if p.is_dir())
    run.rename(run.with_name(f"{run.name}.999999.old.partial"))
    rebuild(tree, path)
    assert content(path) == before


@pytest.mark.full
def test_several_processes_at_once_end_with_one_whole_database(tree, path):
    ingest(tree, path)
    make_arm(tree, "pure_grit", correct=[True] * 100)
    ingest(tree, path.with_name("new.db"))
    expected = content(path.with_name("new.db"))
    (tree / "runs/current.json").unlink()
    children = [forked(work, tree, path) for work in (ingest, ingest, rebuild)]
    for child in children:
        child.join(timeout=90)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert ask_one(path, "SELECT count(*) FROM sample") == (400,)
    assert beside(path) == [path.name]
    rebuild(tree, path)
    assert content(path) == expected


@pytest.mark.full
def test_a_kill_at_any_moment_leaves_the_old_database_or_the_new(tree, path):
    """SIGKILL after a random time, from before the reading to after the renaming."""
    ingest(tree, path)
    old, kept = content(path), path.read_bytes()
    curve = [{"loss": 1.0 / step, "grad_norm": float(step), "step": step} for step in range(1, 3000)]
    make_arm(tree, "pure_grit", correct=[True] * 100, history=curve)
    began = time.perf_counter()
    forked(ingest, tree, path).join()
    seconds = time.perf_counter() - began
    new = content(path)
    (added,) = [run.parents[1] for run in (tree / "runs").glob("*/scores/pure_grit")]
    found = Counter()
    draw = random.Random(0)
    for _ in range(15):
        path.write_bytes(kept)
        shutil.rmtree(added, ignore_errors=True)
        write(tree / "runs/current.json", {"runs": [row["run_key"] for row in old["run"]]})
        process = forked(ingest, tree, path)
        time.sleep(draw.random() * seconds)
        process.kill()
        process.join()
        left = content(path)
        assert left in (old, new)
        found["old" if left == old else "new"] += 1
        seconds *= 1.0 if left == old else 0.9  # the first time may have met a busy machine
        rebuild(tree, path)
        keys = {row["run_key"] for row in content(path)["run"]}
        assert keys == {row["run_key"] for row in (new if added.exists() else old)["run"]}
        ingest(tree, path)
        assert content(path) == new, "nothing is lost and nothing doubled"
        assert beside(path) == [path.name], "nothing is left beside the database"
    assert found["old"] > 3, f"too few kills met it at work: {found}"


def test_a_reader_keeps_its_content_while_the_database_is_replaced(tree, path):
    ingest(tree, path)
    count = text("SELECT count(*), max(run_id) FROM metric")
    with open_session(path) as reader:
        before = reader.execute(count).one()
        make_arm(tree, "pure_grit", correct=[True] * 100)
        ingest(tree, path)
        assert reader.execute(count).one() == before
    with open_session(path) as reader:
        assert reader.execute(count).one() != before


def test_a_database_that_another_process_is_writing_to_stays(tree, path, monkeypatch):
    ingest(tree, path)
    monkeypatch.setattr("db.store.BUSY_TIMEOUT_S", 0.1)
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("BEGIN IMMEDIATE")
        raw.execute("UPDATE run SET git_commit = 'mine'")
        with pytest.raises(DatabaseError, match="locked.*ait until the other process ends"):
            rebuild(tree, path)
        raw.execute("COMMIT")
    assert ask(path, "SELECT DISTINCT git_commit FROM run") == [("mine",)]


def test_a_full_disk_is_named_and_keeps_the_old_content(tree, small_disk):
    path, small = small_disk / "c.db", tree.parent / "small"
    subprocess.run(["mount", "-o", "remount,size=384k", str(small_disk)], check=True)
    make_arm(small, "base", correct=[True] * 4)
    ingest(small, path)
    before = content(path)
    with (small_disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
        while True:
            file.write(b"x" * 4096)
    with pytest.raises(DatabaseError, match="full"):
        ingest(tree, path)
    assert content(path) == before and beside(path) == ["c.db"]
    (small_disk / "filler").unlink()
    assert ingest(small, path).runs == 1 and content(path) == before


def foreign(path, *statements):
    with closing(sqlite3.connect(path)) as raw, raw:
        for statement in statements:
            raw.execute(statement)


OLD = [f"CREATE TABLE {name} (id)" for name in ("environment", "run", "metric", "metric_def", "sample", "speed")]
OTHERS = {
    "My thesis. " * 1000: "another kind of file, which begins with b'My thesis",
    "SQLite": "another kind of file",
    ("CREATE TABLE recipes (id INTEGER)",): "something else, or of versions 1 to 4.*ame another path",
    ("CREATE TABLE recipes (id INTEGER)", "PRAGMA user_version=8"): "other tables .recipes.*ame another path",
    tuple(OLD): "something else, or of versions 1 to 4.*move the file away",  # the only copy of its runs
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_peoples_files_stay_as_they_are(tree, tmp_path, other):
    """A wrong --db must not cost anybody a file, and no advice may be to remove it."""
    path = tmp_path / "named-by-mistake"
    path.write_text(other) if isinstance(other, str) else foreign(path, *other)
    before = path.read_bytes()
    for work in (ingest, rebuild):
        with pytest.raises(DatabaseError, match=OTHERS[other]) as refused:
            work(tree, path)
        assert path.read_bytes() == before and beside(path) == [path.name] and "remove" not in str(refused.value)
    with pytest.raises(DatabaseError), open_session(path):
        pass


def test_another_schema_number_means_rebuild(tree, path):
    ingest(tree, path)
    before = content(path)
    foreign(path, f"PRAGMA user_version={SCHEMA + 1}")
    with pytest.raises(DatabaseError, match=rf"schema {SCHEMA} in .*db\.cli rebuild"), open_session(path):
        pass
    rebuild(tree, path)
    assert content(path) == before


def test_a_damaged_database_is_named_and_healed(tree, path):
    ingest(tree, path)
    before, size = content(path), path.stat().st_size
    for start in (8 * 4096, 100):
        with path.open("r+b") as file:
            file.seek(start)
            file.write(random.Random(0).randbytes(size - start))
        rebuild(tree, path)
        assert content(path) == before
    foreign(path, "DROP TABLE speed", "DROP TABLE probe")
    rebuild(tree, path)
    assert content(path) == before


def test_a_reader_cannot_write_and_leaves_no_trace(tree, path):
    ingest(tree, path)
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    with pytest.raises(DatabaseError, match="readonly"), open_session(path) as session:
        session.execute(text("DELETE FROM run"))
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before and beside(path) == [path.name]


def test_a_folder_that_cannot_be_written_can_be_read_and_says_so(tree, tmp_path):
    folder = tmp_path / "locked"
    path = folder / "c.db"
    ingest(tree, path)
    for place in (tree, *tree.rglob("*")):
        place.chmod(0o777)
    with without_rights(folder, 0o555, tmp_path):
        assert ask_one(path, "SELECT count(*) FROM run") == (3,)
        with pytest.raises(DatabaseError, match="heck its address, rights|this user may not write|readonly"):
            rebuild(tree, path)
        with pytest.raises(DatabaseError, match="this user may not write there"):
            rebuild(tree, folder / "sub" / "new.db")
    assert beside(path) == ["c.db"]


def test_missing_files_and_bad_addresses_are_named(tmp_path, tree):
    with pytest.raises(DatabaseError, match="no such file.*vc repro"), open_session(tmp_path / "none.db"):
        pass
    with pytest.raises(DatabaseError, match="a folder"), open_session(tmp_path):
        pass
    (tmp_path / "empty.db").touch()
    with pytest.raises(DatabaseError, match="no tables"), open_session(tmp_path / "empty.db"):
        pass
    assert ingest(tree, tmp_path / "empty.db").runs == 3
    for address in ("nonsense://x", "sqlite:://"):
        with pytest.raises(DatabaseError, match="orrect the database's address"), open_session(address):
            pass
    server = "postgresql+psycopg://a:secret@127.0.0.1:9/b"
    with pytest.raises(DatabaseError) as caught, open_session(server):
        pass
    assert "secret" not in str(caught.value) and "tart the server" in str(caught.value)
    with pytest.raises(DatabaseError, match=r"postgresql\+psycopg"):
        ingest(tree, server)
    odd = tmp_path / "a?b#c%20.db"
    ingest(tree, odd)
    assert ask_one(odd, "SELECT count(*) FROM run") == (3,)


def test_commands(tmp_path, monkeypatch):
    tree = make_full_tree(tmp_path / "project")
    monkeypatch.chdir(tree)

    def output(*words, code=0):
        done = CliRunner().invoke(app, list(words))
        assert done.exit_code == code, done.output
        return done.output

    assert "3 runs in the working copy, 3 of them new or changed; 3 runs in all" in output("ingest")
    assert os.listdir("outputs") == ["centralized.db"]
    write(tree / "scores/base/0/scores.json", "{")
    assert "1 problem in the result files" in output("ingest", code=2)
    assert "error: expected a database at none.db" in output("export", "--db", "none.db", "--out", "x", code=1)
