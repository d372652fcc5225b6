"""Which base a run is held against: its own model untouched, asked the same items through the same backend."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, literal, or_, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from db.models import Run
from db.reader import BASE

Key = ColumnElement[str] | InstrumentedAttribute[str]


def reference_id(run: Run, current: Sequence[Run]) -> int | None:
    """The current base with the same task, items, backend and model; the lowest seed, if several.

    Where one of both does not know its model, the other three decide; a base that is known to be the same goes first.
    """
    if run.arm == BASE:
        return None
    fair = [
        base
        for base in current
        if base.arm == BASE
        and _asked(base) == _asked(run)
        and (base.base_key == run.base_key or "" in (base.base_key, run.base_key))
    ]
    return min(fair, key=lambda base: (base.base_key != run.base_key, base.seed)).id if fair else None


def may_be_same(key: Key, other: Key | str) -> ColumnElement[bool]:
    """SQL of two values of `Run.base_key`: the same model, or one is not known."""
    theirs = literal(other) if isinstance(other, str) else other
    return or_(key == theirs, key == "", theirs == "")


def _asked(run: Run) -> tuple[str, str, str]:
    return run.task, run.test_items_sha256, run.backend_name


def relink_retired(session: Session, run_ids: Collection[int]) -> None:
    """Give runs that have just left the disk the latest base that was asked what they were, where they have none.

    As in `reference_id` it is of the same task, items, backend and model. An arm loses its base while the base alone
    has been scored on another task already; once the arm has followed, both belong together again.
    """
    asked = (Run.task, Run.test_items_sha256, Run.backend_name)
    lonely = (Run.id.in_(run_ids), Run.arm != BASE, Run.reference_run_id.is_(None))
    for *values, key in session.execute(select(*asked, Run.base_key).where(*lonely).distinct()).all():
        same = [column == value for column, value in zip(asked, values, strict=True)]
        bases = select(Run.id).where(Run.arm == BASE, Run.status == "finished", may_be_same(Run.base_key, key), *same)
        surest = (Run.base_key == key).desc()
        base = session.scalar(bases.order_by(surest, Run.ended.desc(), Run.id.desc()).limit(1))
        if base is not None:
            mine = update(Run).where(*lonely, Run.base_key == key, *same)
            session.execute(mine.values(reference_run_id=base))
