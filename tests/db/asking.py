"""Questions to a database, answered in plain rows; and writers in processes of their own."""

import multiprocessing

from sqlalchemy import select, text

from db.store import open_session
from db.tables import METADATA, VIEWS


def ask(url, query, **values):
    with open_session(url) as session:
        return [tuple(row) for row in session.execute(text(query), values)]


def ask_one(url, query, **values):
    (row,) = ask(url, query, **values)
    return row


def shown(url, view):
    with open_session(url) as session:
        return [dict(row) for row in session.execute(text(f"SELECT * FROM {view}")).mappings()]


def forked(work, *args):
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    return process


def content(url):
    """Table or view -> its rows, in the order of the key."""
    found = {}
    with open_session(url) as session:
        for table in METADATA.sorted_tables:
            rows = session.execute(select(table).order_by(*table.primary_key.columns))
            found[table.name] = [dict(row) for row in rows.mappings()]
    return found | {name: sorted(shown(url, name), key=repr) for name in VIEWS}
