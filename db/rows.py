"""From checked records to table rows; no database here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from db.columns import FINAL_STEP
from db.reader import BASE, OPTIONAL_STAGES, Bundle
from db.records import AQI, HistoryRecord, RunRecord
from db.schema import NEWEST
from db.values import clean_text, plain, split_value

Row = dict[str, Any]
_BASE_FILE = "models/base/base.json"
"""Names the base model, its revision and fingerprint; read for every arm and for the base by stage export, and where
nothing is exported by stage evaluate."""


def digest_of(content: Any) -> str:
    """Hash a JSON value in its canonical form: sorted keys, no spaces."""
    canonical = json.dumps(plain(content), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def run_key(bundle: Bundle) -> str:
    """Identify the experiment: the same key means that the same thing was run again."""
    backend = bundle.scores.backend
    stages = {stage: record for stage, record in bundle.stages.items() if stage not in OPTIONAL_STAGES}
    task = bundle.scores.task.name
    # Results from before there were tasks keep their identity.
    what = {} if task == AQI.name else {"task": task}
    return digest_of(
        {
            **what,
            "variant": bundle.arm,
            "seed": bundle.seed,
            "params": {stage: record.params for stage, record in stages.items()},
            "inputs": {stage: record.inputs for stage, record in stages.items()},
            "backend": [backend.name, backend.version],
            "device_class": backend.device_class,
        }
    )


def source_key(bundle: Bundle) -> str:
    """Identify the content: the files, and the version of the tables that they were read into."""
    return digest_of([bundle.source_sha256, NEWEST])


def environment_row(record: RunRecord) -> Row:
    """The machine and packages of one stage."""
    row: Row = plain(record.device.model_dump())
    row["device_name"] = row.pop("name")
    row["packages"] = plain(record.packages)
    return {"key": digest_of(row), **row}


def run_row(bundle: Bundle) -> Row:
    """The columns of `run` that the files decide; environment and reference are the database's to link."""
    evaluate, scores = bundle.stages["evaluate"], bundle.scores
    records = bundle.stages.values()
    dirty = [record.git.dirty for record in records]
    templates = [r.prompt_template for r in reversed(list(records)) if r.prompt_template is not None]
    difference = bundle.parity.first_difference if bundle.parity else None
    return {
        "run_key": run_key(bundle),
        "source_sha256": source_key(bundle),
        "arm": clean_text(bundle.arm),
        "seed": bundle.seed,
        "model_name": clean_text(scores.model_name),
        "status": evaluate.status,
        "error": plain(evaluate.error),
        "started": evaluate.started,
        "ended": evaluate.ended,
        "stages": {stage: _stage(record) for stage, record in bundle.stages.items()},
        "params": {stage: plain(record.params) for stage, record in bundle.stages.items()},
        "inputs": {stage: plain(record.inputs) for stage, record in bundle.stages.items()},
        "git_commit": plain(evaluate.git.commit),
        "git_dirty": True if True in dirty else (None if None in dirty else False),
        "prompt_template": clean_text(templates[0]) if templates else None,
        "backend_name": clean_text(scores.backend.name),
        "backend_version": clean_text(scores.backend.version),
        "serving_mode": scores.backend.mode or _serving_mode(bundle),
        "device_class": clean_text(scores.backend.device_class),
        "test_items_sha256": scores.test_items_sha256,
        "parity_first_difference": plain(difference),
        "task": clean_text(scores.task.name),
        "task_title": clean_text(scores.task.title),
        "primary_metric": clean_text(scores.task.primary),
        "base_key": clean_text(bundle.stages.get("export", evaluate).inputs.get(_BASE_FILE) or ""),
        "train_key": _train_key(bundle.stages.get("train")),
    }


def _train_key(record: RunRecord | None) -> str:
    """Runs of an arm with equal keys differ by the seed, which is not among the settings; equal data, equal base."""
    return "" if record is None else digest_of([record.params, record.inputs])


def _serving_mode(bundle: Bundle) -> str:
    """The mode of results that do not say it: transformers had the adapter beside the model, others had it merged."""
    return "adapter" if bundle.scores.backend.name == "hf" and bundle.arm != BASE else "merged"


def _stage(record: RunRecord) -> Row:
    return {
        "started": record.started.isoformat(),
        "ended": record.ended.isoformat() if record.ended else None,
        "git_commit": record.git.commit,
        "git_dirty": record.git.dirty,
        "environment": environment_row(record)["key"],
        "extra": plain(record.extra),
    }


def metric_rows(bundle: Bundle) -> Iterator[Row]:
    """Final scores, parity shares and the training curves."""
    rows: dict[tuple[str, str], Row] = {}

    def add(name: str, split: str, number: float | None, n: int | None) -> None:
        value, kind = split_value(number)
        name, split = clean_text(name), clean_text(split)
        rows[name, split] = {
            "name": name, "split": split, "step": FINAL_STEP, "value": value, "value_kind": kind, "n": n,
        }  # fmt: skip

    for metric in [*bundle.scores.metrics, *(bundle.measured.metrics if bundle.measured else [])]:
        add(metric.name, metric.split, metric.value, metric.n)
    if bundle.parity:
        prompts = bundle.parity.prompts
        add("token_ids_equal", "parity", bundle.parity.token_ids_equal, prompts)
        add("greedy_equal", "parity", bundle.parity.greedy_equal, prompts)
        for pair, share in bundle.parity.pairs.items():
            add(f"pair/{pair}", "parity", share, prompts)
    yield from rows.values()
    if bundle.history:
        yield from _curve_rows(bundle.history)


def _curve_rows(history: HistoryRecord) -> Iterator[Row]:
    """The training curves, one after the other; there may be a million of these rows, hence the care for time.

    A curve's entry with an `eval_…` number belongs to split `eval`, and the prefix goes. When a trainer
    logs the same name twice at one step (its closing summary repeats `epoch`), the later one stays.
    """
    curves: dict[tuple[str, str], dict[int, float | None]] = {}
    targets: dict[tuple[str, ...], list[tuple[str, dict[int, float | None]]]] = {}
    for entry in history.root:
        names = tuple(entry)
        if names not in targets:
            split = "eval" if any(name.startswith("eval_") for name in names) else "train"
            targets[names] = [
                (name, curves.setdefault((clean_text(name.removeprefix("eval_")), split), {}))
                for name in names
                if name != "step"
            ]
        step = int(entry["step"] or 0)
        for name, curve in targets[names]:
            curve[step] = entry[name]
    for (name, split), curve in curves.items():
        for step, number in curve.items():
            value, kind = split_value(number)
            yield {"name": name, "split": split, "step": step, "value": value, "value_kind": kind, "n": None}


def metric_def_rows(bundles: list[Bundle]) -> dict[str, Row]:
    """Meanings by metric name; a later arm's words replace an earlier one's, measurements' those of scores."""
    return {
        clean_text(name): {"name": clean_text(name), **plain(meaning.model_dump())}
        for bundle in bundles
        for source in (bundle.scores, bundle.measured)
        if source is not None
        for name, meaning in source.metric_defs.items()
    }


def sample_rows(bundle: Bundle) -> list[Row]:
    """One row for each answered item."""
    return [{**plain(sample.model_dump()), "credit": sample.worth} for sample in bundle.samples]


def speed_rows(bundle: Bundle) -> list[Row]:
    """One row for each timed phase."""
    return [plain(row.model_dump()) for row in bundle.scores.speed]


def probe_rows(bundle: Bundle) -> list[Row]:
    """The verdict and what it rests on."""
    rows = []
    for reading in bundle.verdict.readings if bundle.verdict else []:
        value, kind = split_value(reading.value)
        rows.append({**plain(reading.model_dump()), "value": value, "value_kind": kind})
    return rows


def quantization_rows(bundle: Bundle) -> list[Row]:
    """One row for each precision."""
    quantized = bundle.serving.quantized
    return [{**plain(row.model_dump()), "credit": row.worth} for row in quantized.rows] if quantized else []


def quantized_sample_rows(bundle: Bundle) -> list[Row]:
    """One row for each test item in each precision."""
    samples = bundle.serving.quantized_samples
    return [{**plain(sample.model_dump()), "credit": sample.worth} for sample in samples]


def verification_rows(bundle: Bundle) -> list[Row]:
    """One row for each backend and mode."""
    verified = bundle.serving.verified
    return [plain(row.model_dump()) for row in verified.rows] if verified else []


def artifact_rows(bundle: Bundle) -> list[Row]:
    """Everything the stages made, and for the base what it was made from."""
    stages = dict(bundle.stages)
    if bundle.base_model is not None:
        stages["prepare_base"] = bundle.base_model
    return [
        {
            "stage": stage,
            "kind": artifact.kind,
            "path": clean_text(artifact.path),
            "sha256": artifact.sha256,
            "bytes": artifact.bytes,
            "parent_sha256": artifact.parent,
        }
        for stage, record in stages.items()
        for artifact in record.artifacts
    ]
