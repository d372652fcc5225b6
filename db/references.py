"""Which base a run is held against: the one that was asked the same items through the same backend."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from db.models import Run
from db.reader import BASE


def reference_id(run: Run, current: Sequence[Run]) -> int | None:
    """The current base with the same task, items and backend; the lowest seed, if several."""
    if run.arm == BASE:
        return None
    fair = [base for base in current if base.arm == BASE and _asked(base) == _asked(run)]
    return min(fair, key=lambda base: base.seed).id if fair else None


def _asked(run: Run) -> tuple[str, str, str]:
    return run.task, run.test_items_sha256, run.backend_name


def relink_retired(session: Session, run_ids: Collection[int]) -> None:
    """Give runs that have just left the disk the latest base of their task, items and backend, where they have none.

    An arm loses its base while the base alone has been scored on another task already; once the arm has followed,
    both belong together again.
    """
    asked = (Run.task, Run.test_items_sha256, Run.backend_name)
    alone = select(*asked).where(Run.id.in_(run_ids), Run.arm != BASE, Run.reference_run_id.is_(None)).distinct()
    for values in session.execute(alone).all():
        same = [column == value for column, value in zip(asked, values, strict=True)]
        bases = select(Run.id).where(Run.arm == BASE, Run.status == "finished", *same)
        base = session.scalar(bases.order_by(Run.ended.desc(), Run.id.desc()).limit(1))
        if base is not None:
            mine = update(Run).where(Run.id.in_(run_ids), Run.arm != BASE, Run.reference_run_id.is_(None), *same)
            session.execute(mine.values(reference_run_id=base))
