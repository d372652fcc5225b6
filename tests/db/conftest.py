"""What several modules build on: results of three tasks one after the other, a way to ask, and a PostgreSQL."""

import os
import subprocess
from contextlib import contextmanager

import pytest
from sqlalchemy import create_engine, text

from db.ingest import ingest
from tests.db.postgres_server import find_programs, run_server
from tests.db.result_tree import make_full_tree
from tests.evaluation.task_tree import ALPACA, GSM8K, add_precisions, add_task, credits_of

F16, Q8 = credits_of("pure_grit", 0, 0.2), credits_of("pure_grit", 1, 0.1)


def to_gsm8k(tree):
    """Right or wrong; base, baseline_lora and pure_grit with one seed."""
    for folder in ("quantized", "verified", "measured"):
        for file in (tree / folder).rglob("run.json"):
            file.unlink()
            for result in file.parent.glob("*.json*"):
                result.unlink()
    add_task(tree, GSM8K, binary=True, day=22)


def to_alpaca(tree):
    """Credit for parts, and precisions of one arm."""
    add_task(tree, ALPACA, day=23)
    add_precisions(tree, ALPACA, "pure_grit", {"f16": F16, "q8_0": Q8})


@pytest.fixture(scope="session")
def postgres_server():
    """The URL in GRIT_TEST_POSTGRES_URL, of an empty database; else that of a server of our own."""
    given = os.environ.get("GRIT_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    pytest.importorskip("psycopg", reason="expected psycopg, PostgreSQL's driver; install it with `make setup`")
    programs = find_programs()
    if programs is None:
        pytest.skip(
            "NOTHING WAS TESTED ON POSTGRESQL: expected GRIT_TEST_POSTGRES_URL or the server's programs, got neither; "
            "install Debian's package postgresql"
        )
    with run_server(programs) as url:
        yield url


@pytest.fixture
def postgres(postgres_server):
    """The URL of a database without tables, which is left without tables."""
    engine = create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        there = connection.scalar(text("SELECT string_agg(tablename, ', ') FROM pg_tables WHERE schemaname = 'public'"))
        if there:
            pytest.fail(f"expected an empty database in GRIT_TEST_POSTGRES_URL, got one with the tables {there}")
    yield postgres_server
    with engine.connect() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()


@pytest.fixture
def tree(tmp_path):
    """AQI: base, and baseline_lora with seeds 0 and 1."""
    return make_full_tree(tmp_path / "project")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "c.db"


@pytest.fixture
def three(tree, path):
    """AQI, then GSM8K, then Alpaca, each read into the database; seed 1 of AQI stays on disk, but is not asked for."""
    ingest(tree, path)
    for switch in (to_gsm8k, to_alpaca):
        switch(tree)
        ingest(tree, path, seeds=[0])
    return path


@contextmanager
def without_rights(place, mode, above):
    """`place` has that mode, and this process is nobody, who may enter `above`; root may do everything."""
    root, before = os.geteuid() == 0, place.stat().st_mode
    for folder in (above, *above.parents[:3]) if root else ():
        folder.chmod(folder.stat().st_mode | 0o055)
    place.chmod(mode)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        place.chmod(before)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KiB; mounting one needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a test may still stand in it
