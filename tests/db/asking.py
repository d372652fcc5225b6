"""Questions to a database, answered in plain rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import select, text

from db import open_session
from db.tables import VIEWS, Base


def ask(url: Path | str, query: str, **values: Any) -> list[tuple[Any, ...]]:
    with open_session(url) as session:
        return [tuple(row) for row in session.execute(text(query), values)]


def ask_one(url: Path | str, query: str, **values: Any) -> tuple[Any, ...]:
    (row,) = ask(url, query, **values)
    return row


def shown(url: Path | str, view: str) -> list[dict[str, Any]]:
    with open_session(url) as session:
        return [dict(row) for row in session.execute(text(f"SELECT * FROM {view}")).mappings()]


def content(url: Path | str) -> dict[str, list[dict[str, Any]]]:
    """Table or view -> its rows, in the order of the key."""
    found: dict[str, list[dict[str, Any]]] = {}
    with open_session(url) as session:
        for table in Base.metadata.sorted_tables:
            rows = session.execute(select(table).order_by(*table.primary_key.columns))
            found[table.name] = [dict(row) for row in rows.mappings()]
    return found | {name: sorted(shown(url, name), key=repr) for name in VIEWS}
