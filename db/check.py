"""What can be wrong in a database that its own rules let pass: rows lost, links wrong, views gone."""

from __future__ import annotations

from sqlalchemy import and_, func, inspect, not_, or_, select, text
from sqlalchemy.orm import Session, aliased

from db.columns import FINAL_STEP, Base
from db.models import Metric, Quantization, QuantizedSample, Run, Sample
from db.queries import VIEWS
from db.references import may_be_same
from db.values import SAME_MEAN


def faults(session: Session) -> list[str]:
    """Return what is wrong, a sentence for each fault; an empty list for a sound database."""
    missing = _missing_views(session)
    return [
        *_integrity(session),
        *missing,
        *_wrong_references(session),
        *_lost_references(session),
        *_empty_runs(session),
        *_lost_rows(session),
        *_lost_samples(session),
        *_other_samples(session),
        *_lost_quantized_samples(session),
    ]


def _integrity(session: Session) -> list[str]:
    """Other databases than SQLite keep their own integrity."""
    if session.get_bind().dialect.name != "sqlite":
        return []
    lines = [str(row[0]) for row in session.execute(text("PRAGMA integrity_check"))]
    found = [line for line in lines if line != "ok"]
    links = session.execute(text("PRAGMA foreign_key_check"))
    return found + [f"row {row[1]} of {row[0]} points to a missing {row[2]}" for row in links]


def _missing_views(session: Session) -> list[str]:
    """Tools that copy tables leave views behind."""
    there = set(inspect(session.connection()).get_view_names())
    return [f"the view {name} is missing" for name in VIEWS if name not in there]


def _label(arm: str, seed: int, run_id: int) -> str:
    return f"run {run_id} ({arm}/{seed})"


def _wrong_references(session: Session) -> list[str]:
    """Differences from such a run would compare other questions, other backends, or an arm with an arm."""
    base = aliased(Run)
    unfair = or_(
        base.arm != "base",
        # A run that is not on disk any more keeps the base of its time.
        and_(Run.is_current, base.is_current.is_(False)),
        base.task != Run.task,
        base.test_items_sha256 != Run.test_items_sha256,
        base.backend_name != Run.backend_name,
        not_(may_be_same(base.base_key, Run.base_key)),
    )
    columns = (Run.is_current, Run.arm, Run.seed, Run.id, base.arm, base.seed, base.id)
    query = select(*columns).join(base, Run.reference_run_id == base.id).where(unfair)
    return [
        f"{_label(*row[1:4])} is held against {_label(*row[4:])}, which is no {'current ' if row[0] else ''}base with "
        "the same items and backend and of the same model"
        for row in session.execute(query.order_by(Run.id))
    ]


def _lost_references(session: Session) -> list[str]:
    """Deleting a base run takes the links to it along."""
    base = aliased(Run)
    fair = select(base.id).where(
        base.arm == "base",
        base.is_current,
        base.task == Run.task,
        base.test_items_sha256 == Run.test_items_sha256,
        base.backend_name == Run.backend_name,
        may_be_same(base.base_key, Run.base_key),
    )
    query = select(Run.arm, Run.seed, Run.id).where(
        Run.is_current, Run.arm != "base", Run.reference_run_id.is_(None), fair.exists()
    )
    return [
        f"{_label(*row)} is held against no base, though there is one with the same items and backend"
        for row in session.execute(query.order_by(Run.id))
    ]


def _empty_runs(session: Session) -> list[str]:
    """A run enters in one transaction with its rows; without them it would count as finished and say nothing."""
    found = []
    for table in (Metric, Sample):
        none = ~select(table.id).where(table.run_id == Run.id).exists()
        query = select(Run.arm, Run.seed, Run.id).where(Run.status == "finished", none).order_by(Run.id)
        found += [
            f"{_label(*row)} is finished and has no row in {table.__tablename__}" for row in session.execute(query)
        ]
    return found


def _lost_rows(session: Session) -> list[str]:
    """Each run knows how many rows it was written with."""
    runs = session.execute(select(Run.id, Run.arm, Run.seed, Run.row_counts).order_by(Run.id)).all()
    found = []
    for table in Base.metadata.sorted_tables:
        if "run_id" not in table.columns:
            continue
        own = table.columns["run_id"]
        there = {run_id: number for run_id, number in session.execute(select(own, func.count()).group_by(own))}
        for run_id, arm, seed, counts in runs:
            written, left = (counts or {}).get(table.name), there.get(run_id, 0)
            if written is not None and written != left:
                found.append(f"{_label(arm, seed, run_id)} was written with {written} rows in {table.name}, has {left}")
    return found


def _lost_samples(session: Session) -> list[str]:
    """A final number of a split cannot rest on more items than the split has, where it has any."""
    items = select(Sample.run_id, Sample.split, func.count().label("items")).group_by(Sample.run_id, Sample.split)
    counted = items.subquery()
    query = (
        select(Run.arm, Run.seed, Run.id, Metric.name, Metric.split, Metric.n, counted.c["items"])
        .join(Metric, Metric.run_id == Run.id)
        .join(counted, (counted.c.run_id == Run.id) & (counted.c.split == Metric.split))
        .where(Metric.step == FINAL_STEP, Metric.n > counted.c["items"])
        .order_by(Run.id, Metric.split, Metric.name)
    )
    return [
        f"{_label(*row[:3])}: {row[3]} of split {row[4]} rests on {row[5]} items, sample has {row[6]} of them"
        for row in session.execute(query)
    ]


def _other_samples(session: Session) -> list[str]:
    """The table shows the score, the intervals come from the items: they had better be the same answers."""
    right = select(
        Sample.run_id,
        func.count().label("items"),
        func.count().filter(Sample.correct).label("correct"),
        func.count().filter(Sample.credit.not_in((0.0, 1.0))).label("partly"),
        func.avg(Sample.credit).label("credit"),
    ).where(Sample.split == "test")
    counted = right.group_by(Sample.run_id).subquery()
    own = counted.c
    query = (
        select(Run.arm, Run.seed, Run.id, Metric.name, Metric.value, own["items"], own.correct, own.partly, own.credit)
        .join(Metric, Metric.run_id == Run.id)
        .join(counted, own.run_id == Run.id)
        .where(Metric.step == FINAL_STEP, Metric.split == "test", Metric.name == Run.primary_metric)
        .order_by(Run.id)
    )
    found = []
    for arm, seed, run_id, name, value, items, correct, partly, credit in session.execute(query):
        label = _label(arm, seed, run_id)
        if not partly and (value is None or abs(value - correct / items) > SAME_MEAN):
            found.append(f"{label}: its accuracy is {value}, but {correct} of its {items} test items are correct")
        elif value is None or abs(value - credit) > SAME_MEAN:
            found.append(f"{label}: {name} is {value}, but the mean credit of its {items} test items is {credit:.6g}")
    return found


def _lost_quantized_samples(session: Session) -> list[str]:
    """Every precision answered the items that its row counts."""
    per_type = select(
        QuantizedSample.run_id,
        QuantizedSample.type,
        func.count().label("items"),
        func.count().filter(QuantizedSample.correct).label("correct"),
        func.avg(QuantizedSample.credit).label("credit"),
    )
    counted = per_type.group_by(QuantizedSample.run_id, QuantizedSample.type).subquery()
    same = (counted.c.run_id == Quantization.run_id) & (counted.c.type == Quantization.type)
    items, correct = func.coalesce(counted.c["items"], 0), func.coalesce(counted.c.correct, 0)
    query = (
        select(Run.arm, Run.seed, Run.id, Quantization, correct, items, counted.c.credit)
        .join(Quantization, Quantization.run_id == Run.id)
        .outerjoin(counted, same)
        .order_by(Run.id, Quantization.id)
    )
    found = []
    for arm, seed, run_id, row, right, number, credit in session.execute(query):
        label = f"{_label(arm, seed, run_id)}: {row.type} has"
        if (row.correct, row.n) != (right, number):
            found.append(f"{label} {row.correct} of {row.n} items correct, quantized_sample {right} of {number}")
        elif number and abs(row.credit - credit) > SAME_MEAN:
            found.append(f"{label} a mean credit of {row.credit:.6g}, quantized_sample {credit:.6g}")
    return found
