"""From the files to the tables, in one transaction; reading the same files again changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, delete, select, update
from sqlalchemy.orm import Session

from db.attempts import store_attempts
from db.bulk import insert_rows
from db.engine import resolve_url, sqlite_file
from db.look import look_at, unchanged
from db.models import (
    Artifact,
    Attempt,
    Environment,
    LayerMetric,
    Metric,
    MetricDef,
    Probe,
    Quantization,
    QuantizedSample,
    Run,
    Sample,
    Spectrum,
    Speed,
    Verification,
)
from db.reader import BASE, Bundle, Results, read_results
from db.records_logs import AttemptRecord
from db.references import reference_id, relink_retired
from db.rows import (
    artifact_rows,
    environment_row,
    metric_def_rows,
    metric_rows,
    probe_rows,
    quantization_rows,
    quantized_sample_rows,
    run_row,
    sample_rows,
    speed_rows,
    verification_rows,
)
from db.rows_layers import layer_metric_rows, log_meanings, spectrum_rows
from db.session import open_session
from db.swap import page_size_of, replace_content
from db.tasks import notes_of_change, notes_of_loss, refuse_loss, runs_by_task, tasks_of_runs

_CHILDREN: tuple[tuple[type[Any], Any], ...] = (
    (Metric, metric_rows),
    (Sample, sample_rows),
    (Speed, speed_rows),
    (Artifact, artifact_rows),
    (Probe, probe_rows),
    (Quantization, quantization_rows),
    (QuantizedSample, quantized_sample_rows),
    (Verification, verification_rows),
    (LayerMetric, layer_metric_rows),
    (Spectrum, spectrum_rows),
)


_TRIES = 3


@dataclass(frozen=True)
class IngestSummary:
    """What an ingest did, counted in runs.

    Attributes:
        inserted: New experiments.
        updated: Known experiments whose files or links changed.
        unchanged: Known experiments with the same files.
        retired: Runs that were current and are not any more; their rows stay.
        skipped: A note for each arm and seed that was left out, and other things worth knowing.
    """

    inserted: int
    updated: int
    unchanged: int
    retired: int
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        """One line of counts, then one line for each note."""
        counts = (
            f"{self.inserted} runs inserted, {self.updated} updated, {self.unchanged} unchanged, {self.retired} retired"
        )
        return "\n".join([counts, *(f"note: {note}" for note in self.skipped)])


def ingest(
    root: Path,
    url: str | Path | URL,
    arms: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
) -> IngestSummary:
    """Read the results under a folder into the database.

    Files that change while this waits for another writer are read again once it may write: whoever writes last has
    read last, so no older reading replaces a newer one.

    Args:
        root: The folder that holds `scores/`, `gguf/`, `adapters/` and what else the stages made.
        url: The database, created when absent.
        arms: Arms to read besides the base; None: all.
        seeds: Seeds to read; None: all. Runs of other arms and seeds stay, but are no longer current.

    Returns:
        What changed.

    Raises:
        IngestError: Files are missing or malformed; the database was not opened.
        DatabaseError: The database could not be written; its old content stands.
    """
    root = Path(root)
    arms, seeds = _kept(arms), _kept(seeds)
    look = look_at(root)
    found = read_results(root, arms, seeds)  # files that cannot be read leave the database unopened
    with open_session(url, write=True) as session:
        if not unchanged(root, look):
            found = read_results(root, arms, seeds)
        return store(session, found.bundles, found.notes, found.attempts)


def rebuild(
    root: Path,
    url: str | Path | URL,
    arms: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    *,
    lose_tasks: bool = False,
) -> IngestSummary:
    """Make the database anew from the files alone; superseded runs and starts, which no file describes, go.

    An SQLite database is made in memory and copied over the old one in one transaction, so a reader sees the old
    content or the new one, whatever happens. Files that changed meanwhile are read again. Other databases are emptied
    and filled in one transaction.

    Args:
        root: As in `ingest`.
        url: As in `ingest`.
        arms: As in `ingest`.
        seeds: As in `ingest`.
        lose_tasks: Also where the old database has finished runs of a task that has no results on disk.

    Raises:
        IngestError: Files are missing or malformed; the old database stands.
        TasksLostError: A task would be lost, and that was not asked for; the old database stands.
        DatabaseError: The new database could not be written, another process writes to the old one, or the file is
            no database of this project, or a newer one; then it stands untouched.
    """
    root = Path(root)
    arms, seeds = _kept(arms), _kept(seeds)
    path = sqlite_file(resolve_url(url))
    if path is None:
        read_results(root, arms, seeds)  # files that cannot be read leave the database unopened
        with open_session(url, write=True) as session:
            found = read_results(root, arms, seeds)
            there = {task.name: task.runs for task in tasks_of_runs(session)}
            place = resolve_url(url).render_as_string(hide_password=True)
            notes = _notes_of_rebuild(found, there, place, lose_tasks)
            for table in (Run, Environment, MetricDef, Attempt):
                session.execute(delete(table))
            return store(session, found.bundles, notes, found.attempts)
    there = runs_by_task(path)
    for _ in range(_TRIES):
        look = look_at(root)
        found = read_results(root, arms, seeds)
        notes = _notes_of_rebuild(found, there, str(path), lose_tasks)
        # SQLite copies between pages of one size only, where the log is in use.
        with open_session("sqlite://", write=True, page_size=page_size_of(path)) as session:
            summary = store(session, found.bundles, notes, found.attempts)
            replace_content(session, path)
        if unchanged(root, look):
            return summary
    # Nobody can hold the lock over a copy; with files that never rest, an ingest has the last word, inside its lock.
    ingest(root, path, arms, seeds)
    return summary


def _notes_of_rebuild(found: Results, there: dict[str, int], place: str, lose_tasks: bool) -> list[str]:
    kept = {bundle.scores.task.name for bundle in found.bundles}
    if not lose_tasks:
        refuse_loss(there, kept, place)
    return [*found.notes, *notes_of_loss(there, kept)]


def _kept(wanted: Iterable[Any] | None) -> list[Any] | None:
    """What can be gone through only once, for going through it again."""
    return None if wanted is None else list(wanted)


def store(
    session: Session,
    bundles: list[Bundle],
    notes: Iterable[str] = (),
    attempts: Iterable[AttemptRecord] = (),
) -> IngestSummary:
    """Write bundles and starts into an open database, inside the caller's transaction."""
    rows = [run_row(bundle) for bundle in bundles]
    keys = [row["run_key"] for row in rows]
    known = {run.run_key: run for run in session.scalars(select(Run).where(Run.run_key.in_(keys)))}
    # Before new runs enter: only one run for each arm and seed may be current.
    stale = session.execute(select(Run.id, Run.task).where(Run.is_current, Run.run_key.not_in(keys))).all()
    stale_ids = [run_id for run_id, _ in stale]
    if stale:
        session.execute(update(Run).where(Run.id.in_(stale_ids)).values(is_current=False))
    _store_meanings(session, {**log_meanings(bundles), **metric_def_rows(bundles)})
    store_attempts(session, attempts)

    current: list[Run] = []
    inserted: set[str] = set()
    updated: set[str] = set()
    for bundle, row in zip(bundles, rows, strict=True):
        environments = {
            stage: _environment_id(session, environment_row(record)) for stage, record in bundle.stages.items()
        }
        run = known.get(row["run_key"])
        if run is None:
            run = Run(**row, is_current=True, environment_id=environments["evaluate"])
            session.add(run)
            session.flush()
            inserted.add(run.run_key)
            run.row_counts = _store_children(session, run, bundle)
        elif run.source_sha256 != row["source_sha256"]:
            for column, value in row.items():
                setattr(run, column, value)
            run.environment_id = environments["evaluate"]
            for table, _ in _CHILDREN:
                session.execute(delete(table).where(table.run_id == run.id))
            run.row_counts = _store_children(session, run, bundle)
            updated.add(run.run_key)
        if not run.is_current:
            run.is_current = True
            updated.add(run.run_key)
        current.append(run)
    for run in current:
        reference = reference_id(run, current)
        if run.reference_run_id != reference:
            run.reference_run_id = reference
            updated.add(run.run_key)
    session.flush()
    relink_retired(session, stale_ids)
    updated -= inserted
    lost = [f"{b.label}: no base with the same items and backend and of the same model, so no differences"
            for b, run in zip(bundles, current, strict=True)
            if run.arm != BASE and run.reference_run_id is None]  # fmt: skip
    return IngestSummary(
        len(inserted),
        len(updated),
        len(bundles) - len(inserted) - len(updated),
        len(stale),
        (*notes, *lost, *notes_of_change({bundle.scores.task.name for bundle in bundles}, (task for _, task in stale))),
    )


def _store_children(session: Session, run: Run, bundle: Bundle) -> dict[str, int]:
    """Return table name to number of rows."""
    return {
        table.__tablename__: insert_rows(session, table.__table__, make_rows(bundle), run_id=run.id)
        for table, make_rows in _CHILDREN
    }


def _store_meanings(session: Session, meanings: dict[str, dict[str, Any]]) -> None:
    known = {meaning.name: meaning for meaning in session.scalars(select(MetricDef))}
    for name, row in meanings.items():
        if name not in known:
            session.add(MetricDef(**row))
        else:
            for column, value in row.items():
                if getattr(known[name], column) != value:
                    setattr(known[name], column, value)
    session.flush()


def _environment_id(session: Session, row: dict[str, Any]) -> int:
    found = session.scalars(select(Environment).where(Environment.key == row["key"])).one_or_none()
    if found is None:
        found = Environment(**row)
        session.add(found)
        session.flush()
    return found.id
