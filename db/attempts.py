"""Starts of stages: known ones are brought up to date, new ones enter, those without a file stay."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.models import Attempt
from db.records_logs import AttemptRecord
from db.rows_layers import attempt_row


def store_attempts(session: Session, records: Iterable[AttemptRecord]) -> int:
    """Write starts into an open database, inside the caller's transaction.

    A start that was running when it was last read has ended by now, or crashed. Files may be removed to save space;
    what they told stays until the database is rebuilt.

    Returns:
        The number of rows that are new or changed.
    """
    known = {attempt.id: attempt for attempt in session.scalars(select(Attempt))}
    touched = 0
    for row in map(attempt_row, records):
        attempt = known.get(row["id"])
        if attempt is None:
            session.add(Attempt(**row))
            touched += 1
            continue
        changes = {column: value for column, value in row.items() if getattr(attempt, column) != value}
        for column, value in changes.items():
            setattr(attempt, column, value)
        touched += bool(changes)
    session.flush()
    return touched
