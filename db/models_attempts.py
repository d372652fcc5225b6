"""The table of starts: what was tried, and how it ended. Crashed runs leave no results, but they leave a row here."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import CheckConstraint
from sqlalchemy.orm import Mapped, mapped_column

from db.columns import Base, count_rule


class Attempt(Base):
    """One start of one stage. Belongs to no run: a stage that crashed may never have become part of one."""

    __tablename__ = "attempt"
    __table_args__ = (
        CheckConstraint("id <> '' AND stage <> '' AND arm <> '' AND host <> ''", name="named"),
        CheckConstraint("status IN ('running', 'finished', 'failed', 'crashed')", name="status"),
        CheckConstraint("status <> 'running' OR ended IS NULL", name="running_has_no_end"),
        CheckConstraint("status NOT IN ('finished', 'failed') OR ended IS NOT NULL", name="ended_has_end"),
        CheckConstraint("ended >= started", name="ended_after_start"),
        count_rule("seed"),
        count_rule("pid"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, comment="name of the file under attempts/, without .json")
    stage: Mapped[str]
    arm: Mapped[str | None] = mapped_column(comment="NULL: a stage for all arms, such as prepare_data")
    seed: Mapped[int | None]
    status: Mapped[str] = mapped_column(comment="crashed: its process was gone without a word, noticed later")
    error: Mapped[str | None] = mapped_column(comment="why it failed")
    started: Mapped[datetime] = mapped_column(comment="UTC")
    ended: Mapped[datetime | None] = mapped_column(comment="UTC; of a crash NULL or when it was noticed")
    host: Mapped[str] = mapped_column(comment="a process id means something on its own machine only")
    pid: Mapped[int] = mapped_column(comment="process id")
    git_commit: Mapped[str | None] = mapped_column(comment="commit at the start")
