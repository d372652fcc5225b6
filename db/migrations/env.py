"""Alembic's entry: runs migrations on the connection that `db.schema.upgrade` hands over."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from db import models


def _run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=models.Run.metadata,
        render_as_batch=True,  # SQLite changes a column by copying its table
        transactional_ddl=True,  # our connections put table changes into the transaction on SQLite too
    )
    with context.begin_transaction():
        context.run_migrations()


_run(context.config.attributes["connection"])
