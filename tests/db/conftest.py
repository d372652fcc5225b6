"""What several modules build on: results of three tasks one after the other, a way to ask, and a PostgreSQL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from db.ingest import ingest
from tests.db.postgres_server import find_programs, install, run_server
from tests.db.result_tree import make_full_tree
from tests.db.task_switches import to_alpaca, to_gsm8k


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL in GRIT_TEST_POSTGRES_URL, of an empty database; else that of a server of our own."""
    given = os.environ.get("GRIT_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    pytest.importorskip("psycopg", reason="expected psycopg, PostgreSQL's driver; install it with `make setup`")
    programs = find_programs()
    if programs is None:
        why = install()
        programs = find_programs()
        if programs is None:
            pytest.skip(
                "NOTHING WAS TESTED ON POSTGRESQL: expected GRIT_TEST_POSTGRES_URL or the server's programs, came "
                f"neither; install Debian's package postgresql ({why})"
            )
    with ExitStack() as stack:
        try:
            url = stack.enter_context(run_server(programs))
        except (RuntimeError, OSError) as error:
            # Programs that are there and do not run are a fault to be seen, not a reason to skip.
            pytest.fail(f"PostgreSQL does not start: {error}")
        yield url


@pytest.fixture
def postgres(postgres_server: str) -> Iterator[str]:
    """The URL of a database without tables, which is left without tables."""
    engine = create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        there = connection.scalar(text("SELECT string_agg(tablename, ', ') FROM pg_tables WHERE schemaname = 'public'"))
        if there:
            pytest.fail(f"expected an empty database in GRIT_TEST_POSTGRES_URL, came one with the tables {there}")
    yield postgres_server
    with engine.connect() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """AQI: base, and baseline_lora with seeds 0 and 1."""
    return make_full_tree(tmp_path / "project")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c.db"


@pytest.fixture
def three(tree: Path, path: Path) -> Path:
    """AQI, then GSM8K, then Alpaca, each read into the database; seed 1 of AQI stays on disk, but is not asked for."""
    ingest(tree, path)
    for switch in (to_gsm8k, to_alpaca):
        switch(tree)
        ingest(tree, path, seeds=[0])
    return path
