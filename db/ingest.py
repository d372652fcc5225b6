"""From runs/ to the tables: the database is derived, made anew each time, and put in place as a whole."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, func, insert, inspect, select, text
from sqlalchemy.orm import Session

from db import records, tables
from db.errors import IngestError, Problem
from db.files import exclusive
from db.records import FINAL_STEP, HistoryRecord, Record, RunRecord, clean_text, plain, split_value
from db.results import BASE, RUNS, Bundle, archive, digest_of, read_archive, read_results, require_archive
from db.store import in_memory, open_session, replaced
from db.tables import VIEWS, Base, Environment, MetricDef, Run

Row = dict[str, Any]
_BASE_FILE = "models/base/base.json"
"""Names the base model, its revision and fingerprint; read for every arm and for the base by stage export, and where
nothing is exported by stage evaluate."""


def _numbers(form: type[Record]) -> dict[str, tuple[str, str, str]]:
    """What a log's record has for each layer and step: key there -> name in the tables, unit, meaning."""
    return {
        key: (field.title or key, str(field.json_schema_extra["unit"]), field.description or "")
        for key, field in form.model_fields.items()
        if isinstance(field.json_schema_extra, dict)
    }


_FINAL = {
    "evaluation_loss": ("final_eval_loss", "eval", "nats per token", "Loss on the held-out items"),
    "kl_to_base": ("final_kl", "eval", "nats per token", "KL(base ‖ tuned) on texts of the base that no loss sees"),
    "training_loss": ("final_loss", "train", "nats per token", "Last training loss that was logged"),
    "inversions": ("grit.inversions", "train", "count", "Times that GRIT has refreshed its curvature"),
    "gpu_memory_bytes": ("peak_gpu_memory_bytes", "train", "bytes", "Peak of what torch had allocated on the GPU"),
}
"""Name in the tables -> where the record of stage train has it, split, unit, meaning."""
_LOWER = {"relative_change", *_FINAL} - {"inversions"}
"""Of what logs hold, the numbers of which less is better."""

PROBE_NUMBERS, GRIT_NUMBERS = _numbers(records.UnitRecord), _numbers(records.GritLayer)
"""Those of GRIT's kind final, field `ranks`, have step -1."""

_SINGULAR = 1e20
"""Condition numbers from here on are infinite: the log divides by 1e-38 where the smallest eigenvalue is zero, and in
float64 none that can be told from zero gives more than 1e17."""

_WRAPPERS = re.compile(r"^base_model\.model\.(model\.)?")


@dataclass(frozen=True)
class IngestSummary:
    """Counts of runs: new or changed and all of the working copy, all of the database."""

    changed: int
    current: int
    runs: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        counts = (
            f"{self.current} runs in the working copy, {self.changed} of them new or changed; {self.runs} runs in all"
        )
        return "\n".join([counts, *(f"note: {note}" for note in self.notes)])


def ingest(
    root: Path, url: str | Path | URL, arms: Iterable[str] | None = None, seeds: Iterable[int] | None = None
) -> IngestSummary:
    """Archive the runs of the working copy, which are the current ones from now on, and make the database anew.

    Raises:
        IngestError: files are missing or malformed; nothing was written.
        DatabaseError: the database could not be written; its old content stands.
    """
    if not root.is_dir():
        raise IngestError([Problem(str(root), "", "expected the project's folder, came nothing")])
    with exclusive(root / RUNS / ".lock"):
        bundles, notes = read_results(root, arms, seeds)  # whoever writes last has read last
        changed = archive(root, bundles)
        return _rebuild(root, url, changed, notes)


def rebuild(root: Path, url: str | Path | URL) -> IngestSummary:
    """Make the database anew from `root`/runs/ alone; errors as of `ingest`."""
    require_archive(root)
    with exclusive(root / RUNS / ".lock"):
        return _rebuild(root, url, 0, [])


def _rebuild(root: Path, url: str | Path | URL, changed: int, notes: Iterable[str]) -> IngestSummary:
    runs, current = read_archive(root)
    with replaced(url) as session:
        lonely = fill(session, runs, current)
    return IngestSummary(changed, len(current), len(runs), (*notes, *lonely))


def fill(session: Session, runs: Mapping[str, Bundle], current: set[str]) -> list[str]:
    """Write runs into empty tables, the oldest first; returns a note for each current run without a base."""
    places: dict[str, int] = {}
    meanings: dict[str, Row] = {}
    rows: list[Row] = []
    children: dict[type[Base], list[Row]] = {table: [] for table, _ in _CHILDREN}
    for number, (key, bundle) in enumerate(sorted(runs.items(), key=_order), start=1):
        for record in bundle.stages.values():
            own = environment_row(record)  # the last one is that of the evaluation
            if own["key"] not in places:
                places[own["key"]] = len(places) + 1
                session.execute(insert(Environment), {"id": places[own["key"]], **own})
        mine = {"id": number, "run_key": key, "is_current": key in current, "environment_id": places[own["key"]]}
        rows.append({**mine, **run_row(bundle)})
        for table, make in _CHILDREN:
            children[table] += [{"run_id": number, **_row(table, made)} for made in make(bundle)]
        for benchmark, _ in bundle.benchmarks.values():  # where lm-eval has a name of ours, ours stays
            meanings = _defined(benchmark.metric_defs) | meanings
        meanings |= _log_meanings(bundle)
        meanings |= _meanings(bundle)
    _link(rows)
    for table, found in children.items():
        children[table] = [{"id": number, **row} for number, row in enumerate(found, start=1)]
    written: list[tuple[type[Base], list[Row]]] = [(Run, rows), (MetricDef, list(meanings.values())), *children.items()]
    for table, found in written:
        if found:
            # Past the ORM, which takes twice as long.
            session.execute(insert(Base.metadata.tables[table.__tablename__]), found)
    return [
        f"{row['arm']}/{row['seed']}: no base with the same items and backend and of the same model, so no differences"
        for row in rows
        if row["is_current"] and row["arm"] != BASE and row["reference_run_id"] is None
    ]


def _order(run: tuple[str, Bundle]) -> tuple[Any, ...]:
    key, bundle = run
    return bundle.stages["evaluate"].ended, bundle.arm != BASE, bundle.arm, bundle.seed, key


def _link(rows: Sequence[Row]) -> None:
    """Set what depends on the other runs: which base one is held against, and which is the latest of its kind."""
    bases = [row for row in rows if row["arm"] == BASE]
    for row in rows:
        row["reference_run_id"] = _reference(row, bases)
        row["is_latest"] = False
    for task in {row["task"] for row in rows}:
        newest = [row for row in reversed(rows) if row["task"] == task]
        base = next((row["base_key"] for row in newest if row["base_key"]), "")
        settings: dict[str, str] = {}
        seen: set[tuple[str, int]] = set()
        for row in newest:
            if row["base_key"] in (base, "") and row["train_key"] == settings.setdefault(row["arm"], row["train_key"]):
                row["is_latest"] = (row["arm"], row["seed"]) not in seen
                seen.add((row["arm"], row["seed"]))


def _reference(row: Row, bases: list[Row]) -> int | None:
    """The base of the same items, backend and model (where both know it); an earlier run has the one of its time."""
    fair = [
        base
        for base in bases
        if row["arm"] != BASE
        and all(base[name] == row[name] for name in ("task", "test_items_sha256", "backend_name"))
        and (base["base_key"] == row["base_key"] or "" in (base["base_key"], row["base_key"]))
        and (base["is_current"] or not row["is_current"])
    ]

    def fits(base: Row) -> tuple[bool, bool, int]:
        return base["base_key"] == row["base_key"], base["ended"] <= row["ended"], base["id"]

    return max(fair, key=fits)["id"] if fair else None


def _row(table: type[Base], made: Row | Record) -> Row:
    """A record's fields in the table's columns, the others in `rest`; rows as they are."""
    if not isinstance(made, Record):
        return made
    content, columns = plain(made.model_dump()), set(table.__table__.columns.keys())
    if "credit" in columns:
        content["credit"] = getattr(made, "worth")  # noqa: B009  results from before there was credit have none
    if "value_kind" in columns:
        content |= _number(getattr(made, "value"))  # noqa: B009
    return {
        **{name: value for name, value in content.items() if name in columns},
        "rest": {name: value for name, value in content.items() if name not in columns},
    }


def environment_row(record: RunRecord) -> Row:
    row: Row = plain({name: getattr(record.device, name) for name in type(record.device).model_fields})
    row["device_name"] = row.pop("name")
    row["packages"] = plain(record.packages)
    return {"key": digest_of(row), **row}


def run_row(bundle: Bundle) -> Row:
    """The columns of `run` that the run's own files decide."""
    evaluate, scores = bundle.stages["evaluate"], bundle.scores
    ran = list(bundle.stages.values())
    dirty = [record.git.dirty for record in ran]
    templates = [r.prompt_template for r in reversed(ran) if r.prompt_template is not None]
    trained = bundle.stages.get("train")
    told = trained.extra if trained else {}
    # Results that do not say it: transformers had the adapter beside the model, others had it merged.
    mode = "adapter" if scores.backend.name == "hf" and bundle.arm != BASE else "merged"
    row = plain(
        {
            "arm": bundle.arm,
            "seed": bundle.seed,
            "model_name": scores.model_name,
            "status": evaluate.status,
            "stages": {stage: _stage(record) for stage, record in bundle.stages.items()},
            "params": {stage: record.params for stage, record in bundle.stages.items()},
            "inputs": {stage: record.inputs for stage, record in bundle.stages.items()},
            "git_commit": evaluate.git.commit,
            "git_dirty": True if True in dirty else (None if None in dirty else False),
            "prompt_template": templates[0] if templates else None,
            "backend_name": scores.backend.name,
            "backend_version": scores.backend.version,
            "serving_mode": scores.backend.mode or mode,
            "device_class": scores.backend.device_class,
            "test_items_sha256": scores.test_items_sha256,
            "parity_first_difference": bundle.parity.first_difference if bundle.parity else None,
            "task": scores.task.name,
            "task_title": scores.task.title,
            "primary_metric": scores.task.primary,
            "base_key": bundle.stages.get("export", evaluate).inputs.get(_BASE_FILE) or "",
            # Runs of an arm with equal keys differ by the seed, which is not among the settings.
            "train_key": "" if trained is None else digest_of([trained.params, trained.inputs]),
            **{name: told.get(name) for name in ("steps", "trained_parameters")},
            "peak_memory_bytes": None if "trained" in told else told.get("peak_memory_bytes"),
            "train_seconds": told.get("train_seconds") if told.get("resumed_from_step") is None else None,
            "saved_parameters": told.get("saved_parameters", told.get("trainable_parameters")),
            "rest": _rest(bundle),
        }
    )
    return {**row, "started": evaluate.started, "ended": evaluate.ended}


def _rest(bundle: Bundle) -> Row:
    tables = {"metrics", "metric_defs", "speed", "layers", "readings", "first_difference"}
    files = {
        "scores": bundle.scores, "parity": bundle.parity, "verdict": bundle.verdict, "measured": bundle.measured,
    }  # fmt: skip
    found: Row = {name: record.model_dump(exclude=tables) for name, record in files.items() if record is not None}
    asked = {task: record.model_dump(exclude=tables) for task, (record, _) in bundle.benchmarks.items()}
    return found | ({"benchmarks": asked} if asked else {})


def _stage(record: RunRecord) -> Row:
    return {
        "started": record.started,
        "ended": record.ended,
        "git_commit": record.git.commit,
        "git_dirty": record.git.dirty,
        "environment": environment_row(record)["key"],
        "extra": record.extra,
    }


def _number(number: float | None) -> Row:
    value, kind = split_value(number)
    return {"value": value, "value_kind": kind}


def _metrics(bundle: Bundle) -> Iterator[Row]:
    numbers = [(m.name, m.split, m.value, m.n) for m in bundle.scores.metrics]
    numbers += [(m.name, m.split, m.value, m.n) for m in (bundle.measured.metrics if bundle.measured else [])]
    numbers += [(m.name, m.split, m.value, m.n) for record, _ in bundle.benchmarks.values() for m in record.metrics]
    if parity := bundle.parity:
        pairs = {f"pair/{pair}": share for pair, share in parity.pairs.items()}
        shares = {"token_ids_equal": parity.token_ids_equal, "greedy_equal": parity.greedy_equal, **pairs}
        numbers += [(name, "parity", share, parity.prompts) for name, share in shares.items()]
    told = bundle.stages["train"].extra if "train" in bundle.stages else {}
    for name, (place, split, *_) in _FINAL.items():
        outer, _, inner = place.partition(".")
        number = (told.get(outer) or {}).get(inner) if inner else told.get(outer)
        numbers += [] if number is None else [(name, split, float(number), None)]
    # By their cleaned names, which may be the same; then the later one stays.
    final = {(clean_text(name), clean_text(split)): (number, n) for name, split, number, n in numbers}
    for (name, split), (number, n) in final.items():
        yield {"name": name, "split": split, "step": FINAL_STEP, **_number(number), "n": n}
    if bundle.history:
        yield from _curves(bundle.history)


def _curves(history: HistoryRecord) -> Iterator[Row]:
    """The training curves, one after the other.

    An entry with an `eval_…` number belongs to split `eval`, and the prefix goes. When a trainer logs the same name
    twice at one step (its closing summary repeats `epoch`), the later one stays.
    """
    curves: dict[tuple[str, str], dict[int, float | None]] = {}
    for entry in history.root:
        split = "eval" if any(name.startswith("eval_") for name in entry) else "train"
        for name, number in entry.items():
            if name != "step":
                curve = curves.setdefault((clean_text(name.removeprefix("eval_")), split), {})
                curve[int(entry["step"] or 0)] = number
    for (name, split), curve in curves.items():
        for step, number in curve.items():
            yield {"name": name, "split": split, "step": step, **_number(number), "n": None}


def _meanings(bundle: Bundle) -> dict[str, Row]:
    """By metric name; newer words replace older ones, measurements' those of scores."""
    sources = (bundle.scores, bundle.measured)
    return {k: row for source in sources if source is not None for k, row in _defined(source.metric_defs).items()}


def _defined(found: Mapping[str, records.MetricDefRecord]) -> dict[str, Row]:
    return {
        clean_text(name): plain({"name": name, **meaning.model_dump(include=set(records.MetricDefRecord.model_fields))})
        for name, meaning in found.items()
    }


def _log_meanings(bundle: Bundle) -> dict[str, Row]:
    last = [(name, unit, words) for name, (_, _, unit, words) in _FINAL.items() if bundle.history]
    kept = [*last, *(PROBE_NUMBERS.values() if bundle.ledger else ()), *(GRIT_NUMBERS.values() if bundle.grit else ())]
    return {
        name: {
            "name": name, "unit": unit, "direction": "lower" if name in _LOWER else "none",
            "description": words,
        }
        for name, unit, words in kept
    }  # fmt: skip


def _artifacts(bundle: Bundle) -> Iterator[Row]:
    """Everything the stages made, and for the base what it was made from."""
    prepared = {"prepare_base": bundle.base_model} if bundle.base_model else {}
    for stage, record in {**bundle.stages, **prepared}.items():
        for made in record.artifacts:
            row = {"stage": stage, "kind": made.kind, "path": clean_text(made.path), "sha256": made.sha256}
            yield {**row, "bytes": made.bytes, "parent_sha256": made.parent}


def layer_name(name: str) -> str:
    """A layer's name without what PEFT and transformers wrap round it: layers.0.self_attn.q_proj.

    Logs have the wrapped model's names, measurements the model's own; a reader wants to join both.
    """
    return clean_text(_WRAPPERS.sub("", name, count=1).removeprefix("model."))


def _layer_metrics(bundle: Bundle) -> Iterator[Row]:
    """Measurements after training, and what the probe and GRIT logged; of two records of one step the later stays."""
    rows: dict[tuple[str, str, str, int], Row] = {}

    def add(name: str, split: str, layer: str, step: int, number: float | None) -> None:
        own = (clean_text(name), clean_text(split), layer_name(layer), step)
        rows[own] = {"name": own[0], "split": own[1], "layer": own[2], "step": step, **_number(number)}

    def add_all(numbers: Mapping[str, tuple[str, str, str]], split: str, layer: str, step: int, entry: Record) -> None:
        for key, (name, _, _) in numbers.items():
            if (number := getattr(entry, key)) is not None:
                singular = key.startswith("condition") and number > _SINGULAR
                add(name, split, layer, step, math.inf if singular else number)

    for row in bundle.measured.layers if bundle.measured else []:
        add(row.name, row.split, row.layer, FINAL_STEP, row.value)
    for sampled in bundle.ledger:
        for layer, unit in sampled.units.items():
            add_all(PROBE_NUMBERS, "probe", layer, sampled.step or 0, unit)
    for step, layer, entry in _grit_layers(bundle):
        add_all(GRIT_NUMBERS, "grit", layer, step, entry)
    yield from rows.values()


def _spectra(bundle: Bundle) -> Iterator[Row]:
    """Eigenvalues of the Fisher factors, largest first; of two records of one step the later stays."""
    rows: dict[tuple[str, str, int], Row] = {}
    for step, layer, entry in _grit_layers(bundle):
        for factor, values in (("a", entry.eigenvalues_a), ("g", entry.eigenvalues_g)):
            if values:
                name, ordered = layer_name(layer), sorted(values, key=lambda v: (math.isnan(v), -v))
                row = {"layer": name, "factor": factor, "step": step}
                rows[name, factor, step] = {**row, "eigenvalues": plain(ordered)}
    yield from rows.values()


def _grit_layers(bundle: Bundle) -> Iterator[tuple[int, str, records.GritLayer]]:
    """(step, layer, numbers): those of `ranks` belong to the finished run, those of the rest to the record's step."""
    for record in bundle.grit:
        for step, layers in ((record.step, record.layers), (record.step, record.spectra), (FINAL_STEP, record.ranks)):
            for layer, entry in (layers or {}).items():
                yield step, layer, entry


_CHILDREN: tuple[tuple[type[Base], Callable[[Bundle], Iterable[Row | Record]]], ...] = (
    (tables.Metric, _metrics),
    (tables.Sample, lambda b: [*b.samples, *(item for _, items in b.benchmarks.values() for item in items)]),
    (tables.Speed, lambda b: b.scores.speed),
    (tables.Artifact, _artifacts),
    (tables.Probe, lambda b: b.verdict.readings if b.verdict else []),
    (tables.Quantization, lambda b: b.quantized.rows if b.quantized else []),
    (tables.QuantizedSample, lambda b: b.quantized_samples),
    (tables.Verification, lambda b: b.verified.rows if b.verified else []),
    (tables.LayerMetric, _layer_metrics),
    (tables.Spectrum, _spectra),
)


def check(url: str | Path | URL, root: Path) -> tuple[dict[str, int], list[str]]:
    """Hold a database against runs/: rows of each table, and a sentence for each fault."""
    runs, current = read_archive(root)
    faults = [bundle.disagreement for bundle in runs.values() if bundle.disagreement]
    with open_session(url) as session, in_memory() as derived:
        fill(derived, runs, current)
        if session.get_bind().dialect.name == "sqlite":
            lines = [str(row[0]) for row in session.execute(text("PRAGMA integrity_check"))]
            faults += [line for line in lines if line != "ok"]
        there = set(inspect(session.connection()).get_view_names())
        faults += [f"the view {name} is missing" for name in VIEWS if name not in there]
        counts = {}
        for table in Base.metadata.sorted_tables:
            counts[table.name] = session.scalar(select(func.count()).select_from(table)) or 0
            query = select(table).order_by(*table.primary_key.columns)
            wanted, found = ([tuple(row) for row in own.execute(query)] for own in (derived, session))
            if wanted != found:
                same = set(map(repr, found))
                lost = sum(repr(row) not in same for row in wanted)
                faults.append(f"{table.name}: expected the {len(wanted)} rows that runs/ gives, came {len(found)}, "
                              f"{lost} of the expected ones missing or changed")  # fmt: skip
    return counts, faults
