"""A rebuilt database takes the place of whatever lies there: an older one, one in use, a damaged file."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from db import DatabaseError, open_session
from db.cli import app
from db.ingest import ingest, rebuild
from tests.conftest import not_root
from tests.db.result_tree import make_arm, make_tree
from tests.db.workers import content


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    """The second has one arm more."""
    first, second = make_tree(tmp_path / "a"), make_tree(tmp_path / "b")
    make_arm(second, "pure_grit", correct=[True] * 100)
    return first, second


def fresh(tree: Path, path: Path) -> str:
    """What a new database of this tree holds."""
    ingest(tree, path)
    return content(path)


def assert_sound(path: Path) -> None:
    checked = CliRunner().invoke(app, ["check", "--db", str(path)])
    assert checked.exit_code == 0, checked.output


def test_what_is_written_through_a_connection_from_before_a_rebuild_is_not_lost(
    trees: tuple[Path, Path], tmp_path: Path
) -> None:
    """It would be, had a new file taken the old one's name."""
    path = tmp_path / "c.db"
    ingest(trees[0], path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("SELECT count(*) FROM run").fetchone()
        rebuild(trees[1], path)
        with connection:
            connection.execute("UPDATE run SET git_commit = 'mine'")
    with open_session(path) as session:
        assert session.execute(text("SELECT count(*), min(git_commit) FROM run")).one() == (4, "mine")
    assert_sound(path)


def test_rebuild_heals_a_damaged_file_that_ingest_refuses(trees: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    ingest(trees[0], path)
    with path.open("r+b") as file:
        file.seek(8 * 4096)
        file.write(random.Random(0).randbytes(path.stat().st_size - 8 * 4096))
    with pytest.raises(DatabaseError, match=r"malformed.*db\.cli rebuild"):
        ingest(trees[1], path)
    assert CliRunner().invoke(app, ["check", "--db", str(path)]).exit_code == 1
    rebuild(trees[1], path)
    assert content(path) == fresh(trees[1], tmp_path / "fresh.db")
    assert_sound(path)


def test_rebuild_leaves_other_peoples_databases_alone(trees: tuple[Path, Path], tmp_path: Path) -> None:
    foreign(tmp_path / "recipes.db", "CREATE TABLE recipes (id INTEGER)")
    before = (tmp_path / "recipes.db").read_bytes()
    with pytest.raises(DatabaseError, match="other tables .recipes.*name another path"):
        rebuild(trees[0], tmp_path / "recipes.db")
    assert (tmp_path / "recipes.db").read_bytes() == before


def foreign(path: Path, *statements: str) -> Path:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()
    return path


def versioned(version: str) -> tuple[str, ...]:
    return ("CREATE TABLE alembic_version (version_num TEXT)", f"INSERT INTO alembic_version VALUES ('{version}')")


def other_file(kind: str, tree: Path, path: Path) -> None:
    if kind == "text":
        path.write_text("My thesis. " * 1000, encoding="utf-8")
    elif kind == "short":
        path.write_bytes(b"SQLite")
    elif kind == "gguf":
        path.write_bytes(b"GGUF" + random.Random(0).randbytes(9000))
    elif kind == "newer":
        ingest(tree, path)
        foreign(path, "UPDATE alembic_version SET version_num = '9999'")
    else:
        foreign(path, *versioned(kind), "CREATE TABLE run (id)", "CREATE TABLE experiments (id)")


OTHERS = {
    "text": "another kind of file, which begins with b'My thesis",
    "short": "another kind of file",
    "gguf": "another kind of file, which begins with b'GGUF",
    "newer": "version 9999, which this code does not know.*git pull",
    "0001": "other tables .*experiments.*name another path",
    "c48cb773bb87": "other tables .*experiments.*name another path",
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("work", [ingest, rebuild])
def test_what_is_not_ours_stays_byte_by_byte(
    trees: tuple[Path, Path], tmp_path: Path, kind: str, work: Callable[..., object]
) -> None:
    """A name given by mistake must cost nobody his file, and no advice may say to remove it."""
    path = tmp_path / "named-by-mistake"
    other_file(kind, trees[0], path)
    before, names = path.read_bytes(), sorted(p.name for p in tmp_path.iterdir())
    words = OTHERS[kind] if work is rebuild or "kind of file" not in OTHERS[kind] else "an SQLite database file"
    with pytest.raises(DatabaseError, match=words) as refused:
        work(trees[0], path)
    assert path.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == names
    assert "remove" not in refused.value.do


@pytest.mark.parametrize("size", [512, 8192, 65536])
def test_a_database_with_other_pages_is_rebuilt(trees: tuple[Path, Path], tmp_path: Path, size: int) -> None:
    path = foreign(tmp_path / "c.db", f"PRAGMA page_size={size}", "VACUUM")
    ingest(trees[0], path)
    rebuild(trees[1], path)
    assert content(path) == fresh(trees[1], tmp_path / "fresh.db")
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA page_size").fetchone() == (size,)
    assert_sound(path)


@pytest.mark.parametrize("before", ["nothing", "rollback journal"])
def test_a_rebuilt_database_has_the_write_ahead_log(trees: tuple[Path, Path], tmp_path: Path, before: str) -> None:
    """Without it a reader keeps the next writer out."""
    path = tmp_path / "c.db"
    if before != "nothing":
        ingest(trees[0], path)
        foreign(path, "PRAGMA journal_mode=DELETE")
    rebuild(trees[0], path)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with open_session(path) as reader:
        count = reader.scalar(text("SELECT count(*) FROM run"))
        rebuild(trees[1], path)
        assert reader.scalar(text("SELECT count(*) FROM run")) == count


def test_a_database_whose_tables_are_partly_lost_is_healed(trees: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    ingest(trees[0], path)
    foreign(path, "DROP TABLE sample", "DROP TABLE probe")
    rebuild(trees[0], path)
    assert content(path) == fresh(trees[0], tmp_path / "fresh.db")


def test_rebuild_in_a_folder_that_cannot_be_written_says_so(trees: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir()
    path = tmp_path / "locked" / "c.db"
    before = fresh(trees[0], path)
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        for parent in (tmp_path, *tmp_path.parents[:2]):
            parent.chmod(parent.stat().st_mode | 0o055)
        with not_root(), pytest.raises(DatabaseError, match="permission"):
            rebuild(trees[1], path)
    finally:
        path.parent.chmod(0o755)
    assert content(path) == before
