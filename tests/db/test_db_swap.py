"""A rebuilt database takes the place of whatever lies there: an older one, one in use, a damaged file."""

from __future__ import annotations

import random
import sqlite3
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
    foreign = sqlite3.connect(tmp_path / "recipes.db")
    foreign.execute("CREATE TABLE recipes (id INTEGER)")
    foreign.close()
    before = (tmp_path / "recipes.db").read_bytes()
    with pytest.raises(DatabaseError, match="other tables .recipes.*name another path"):
        rebuild(trees[0], tmp_path / "recipes.db")
    assert (tmp_path / "recipes.db").read_bytes() == before


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
