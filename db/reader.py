"""From a folder of results to checked records. Collects every problem before it gives up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from db.errors import IngestError, Problem
from db.files import FileReader
from db.reader_optional import OPTIONAL_STAGES, OptionalReader, Serving, TrainingLogs
from db.records import HistoryRecord, ParityRecord, RunRecord, SampleRecord, ScoresRecord
from db.records_logs import AttemptRecord
from db.records_measured import MeasuredRecord
from db.records_verdict import VerdictRecord
from db.staleness import stale_stages
from db.values import SAME_MEAN

__all__ = ["BASE", "OPTIONAL_STAGES", "Bundle", "Results", "Serving", "TrainingLogs", "read_results"]

BASE = "base"
"""The arm that is the untouched model: it has no adapter, and it is read whenever any other is."""


@dataclass(frozen=True)
class Bundle:
    """All that stands on disk about one arm with one seed.

    Attributes:
        stages: Stage name to its record; `train` is absent for the base.
        base_model: The record of `models/base`, for the base only.
        measured: What stage measure found, where it has run.
        logs: What training wrote down step by step.
        source_sha256: Hash of all files read for this bundle.
    """

    arm: str
    seed: int
    stages: dict[str, RunRecord]
    scores: ScoresRecord
    samples: list[SampleRecord]
    history: HistoryRecord | None
    parity: ParityRecord | None
    verdict: VerdictRecord | None
    base_model: RunRecord | None
    source_sha256: str
    serving: Serving = field(default_factory=Serving)
    measured: MeasuredRecord | None = None
    logs: TrainingLogs = field(default_factory=TrainingLogs)

    @property
    def label(self) -> str:
        """Arm and seed, as in the folders."""
        return f"{self.arm}/{self.seed}"


@dataclass(frozen=True)
class Results:
    """All that stands under one folder.

    Attributes:
        bundles: Finished arms and seeds, base first.
        notes: One for each combination that was left out, and other things worth knowing.
        attempts: Every start of a stage that left a file, by id.
    """

    bundles: list[Bundle]
    notes: list[str]
    attempts: list[AttemptRecord]


@dataclass
class _TreeReader(OptionalReader):
    """Reads the folders of one arm with one seed after the other."""

    def exported(self, path: Path) -> bool:
        """Whether stage export belongs to these scores; what is wrong with them is said where they are read."""
        record = FileReader(self.root).record(path, ScoresRecord, hashlib.sha256(), required=False)
        return record is None or record.exported

    def stage(self, folder: str, stage: str, arm: str, seed: int, digest: hashlib._Hash) -> RunRecord | None:
        path = self.root / folder / arm / str(seed) / "run.json"
        # Results from before there were verdicts, precisions or verifications stay readable.
        record = self.record(path, RunRecord, digest, required=stage not in ("probe", *OPTIONAL_STAGES))
        if record is not None:
            if record.stage != stage:
                self.problem(path, "stage", f"expected {stage!r}, came {record.stage!r}")
            self.belongs(path, record.arm, record.seed, arm, seed)
        return record

    def bundle(self, arm: str, seed: int) -> Bundle | None:
        """Read one arm with one seed; None when it is not there yet, not finished, or has problems."""
        label, place = f"{arm}/{seed}", self.root / "scores" / arm / str(seed)
        digest = hashlib.sha256()
        if not (place / "run.json").exists() and not (place / "scores.json").exists():
            self.notes.append(f"{label}: no scores yet")
            return None
        before = len(self.problems)
        folders = {
            "train": "adapters", "probe": "verdicts", "export": "gguf", "quantize": "quantized", "verify": "verified",
            "measure": "measured", "evaluate": "scores",
        }  # fmt: skip
        if arm == BASE:
            del folders["train"], folders["probe"]
        exported = self.exported(place / "scores.json")
        if not exported:
            del folders["export"]
        found = {stage: self.stage(folder, stage, arm, seed, digest) for stage, folder in folders.items()}
        stages = {stage: record for stage, record in found.items() if record is not None}
        for stage, record in list(stages.items()):
            if record.status != "finished":
                why = f": {record.error}" if record.error else ""
                if stage in OPTIONAL_STAGES:
                    self.notes.append(f"{label}: without its stage {stage}, which is {record.status}{why}")
                    del stages[stage]
                    continue
                self.notes.append(f"{label}: skipped, its stage {stage} is {record.status}{why}")
                del self.problems[before:]  # what an unfinished stage left undone is no fault of the files
                return None
        for stage, results in OPTIONAL_STAGES.items():
            file = self.root / results.format(label)
            if file.exists() and not file.with_name("run.json").exists():
                name = file.relative_to(self.root).as_posix()
                self.notes.append(f"{label}: without its stage {stage}, {name} has no run.json; run `dvc repro`")
        if not (place / "scores.json").exists() and len(self.problems) == before:
            self.notes.append(f"{label}: no scores yet")
            return None
        scores = self.record(place / "scores.json", ScoresRecord, digest)
        if scores is not None:
            self.belongs(place / "scores.json", scores.arm, scores.seed, arm, seed)
        samples = self.lines(place / "samples.jsonl", SampleRecord, digest, lambda r: (r.split, r.item_id))
        history = parity = verdict = base_model = None
        logs = TrainingLogs()
        if arm == BASE:
            path = self.root / "models" / "base" / "run.json"
            base_model = self.record(path, RunRecord, digest, required=False)
        else:
            path = self.root / "adapters" / arm / str(seed) / "loss_history.json"
            history = self.record(path, HistoryRecord, digest)
            logs = self.logs(path.parent, digest)
            path = self.root / "gguf" / arm / str(seed) / "parity.json"
            parity = self.record(path, ParityRecord, digest, required=False) if exported else None
            if parity is not None:
                self.belongs(path, parity.arm, parity.seed, arm, seed)
            elif exported and not path.exists():
                self.notes.append(f"{label}: no parity.json, so nothing shows that the export is faithful")
            path = self.root / "verdicts" / arm / str(seed) / "verdict.json"
            verdict = self.record(path, VerdictRecord, digest, required="probe" in stages)
            if verdict is not None:
                self.belongs(path, verdict.arm, verdict.seed, arm, seed)
            elif not path.exists():
                self.notes.append(f"{label}: no verdict.json, so nothing shows what the optimizer did")
        of_base = {} if arm == BASE else self.files_of_base(stages)
        for stage, why in list(stale_stages(stages, of_base)):
            if stage not in OPTIONAL_STAGES:
                if len(self.problems) == before:
                    self.notes.append(f"{label}: skipped, {why}")
                return None
            self.notes.append(f"{label}: without its stage {stage}, {why}")
            del stages[stage]
        serving = self.serving(arm, seed, stages, digest)
        measured = self.measured(arm, seed, digest, scores) if "measure" in stages else None
        if len(self.problems) > before or scores is None:
            return None
        self.agrees(label, scores, samples)
        return Bundle(
            arm, seed, stages, scores, samples, history, parity, verdict, base_model, digest.hexdigest(), serving,
            measured, logs,
        )  # fmt: skip

    def agrees(self, label: str, scores: ScoresRecord, samples: list[SampleRecord]) -> None:
        """The table shows the score and pairs the items, so they had better be the same answers."""
        test = [sample.worth for sample in samples if sample.split == "test"]
        share = sum(test) / len(test) if test else None
        for metric in scores.metrics:
            if (metric.name, metric.split) == (scores.task.primary, "test") and (
                share is None or metric.value is None or abs(share - metric.value) > SAME_MEAN
            ):
                self.notes.append(f"{label}: scores.json says {metric.value}, samples.jsonl says {share}")


def read_results(root: Path, arms: Iterable[str] | None = None, seeds: Iterable[int] | None = None) -> Results:
    """Read everything under a folder, or some arms and seeds and always the base.

    Args:
        root: The folder that holds `scores/`, `gguf/` and `adapters/`.
        arms: Arms to read; None: all that stand in `scores/`.
        seeds: Seeds to read; None: all that stand in `scores/<arm>/`.

    Returns:
        What was found; starts of stages are always all of them.

    Raises:
        IngestError: Files are missing, malformed or cannot be read; names all of them.
    """
    reader = _TreeReader(root)
    wanted = None if arms is None else list(arms)
    numbers = None if seeds is None else list(seeds)
    bundles: list[Bundle] = []
    attempts: list[AttemptRecord] = []
    try:
        combinations = _combinations(root, wanted, numbers, reader.notes)
    except OSError as error:
        reader.unreadable(error)
        combinations = []
    for arm, seed in combinations:
        try:
            bundle = reader.bundle(arm, seed)
        except OSError as error:
            # Whether something is there cannot be told either, so nothing may count as absent.
            reader.unreadable(error)
        else:
            bundles += [] if bundle is None else [bundle]
    try:
        attempts = _attempts(reader)
    except OSError as error:
        reader.unreadable(error)
    if reader.problems:
        raise IngestError(reader.problems)
    if as_trained := [bundle.label for bundle in bundles if not bundle.scores.exported]:
        reader.notes.append(f"{', '.join(as_trained)}: scored as training left them, so there is no export to check")
    return Results(bundles, reader.notes, attempts)


def _attempts(reader: FileReader) -> list[AttemptRecord]:
    """Starts are no results: of one that a crash cut off there is a note, and everything else is read.

    Raises:
        OSError: The folder cannot be listed.
    """
    found = []
    folder = reader.root / "attempts"
    # Not glob, for which a folder that may not be listed is an empty one.
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".json") if folder.exists() else []
    for path in paths:
        content = reader.text(path, hashlib.sha256(), required=False)
        if content is None:
            continue
        doubts = FileReader(reader.root)
        record = doubts.parsed(path, AttemptRecord, content)
        if record is not None and record.id != path.stem:
            doubts.problem(path, "id", f"expected {path.stem!r} as in the file's name, came {record.id!r}")
        if record is not None and not doubts.problems:
            found.append(record)
        reader.notes += [f"without this start: {problem}" for problem in doubts.problems[:1]]
    return found


def _combinations(
    root: Path, arms: Sequence[str] | None, seeds: Sequence[int] | None, notes: list[str]
) -> list[tuple[str, int]]:
    scores = root / "scores"
    if not root.is_dir():
        raise IngestError([Problem(str(root), "", "expected the project's folder, came nothing")])
    names = sorted(p.name for p in scores.iterdir() if p.is_dir()) if scores.is_dir() else []
    found: list[tuple[str, int]] = []
    for arm in dict.fromkeys([BASE, *(names if arms is None else arms)]):
        if seeds is not None and arm != BASE:
            found += [(arm, seed) for seed in dict.fromkeys(seeds)]
            continue
        folder = scores / arm
        inside = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        notes += [f"{arm}/{name}: skipped, the folder's name is no seed" for name in inside if not _seed(name)]
        own = sorted(int(name) for name in inside if _seed(name))
        if not own:
            notes.append(f"{arm}: no scores yet")
        found += [(arm, seed) for seed in own]
    return found


def _seed(name: str) -> bool:
    # `007` would be read from the folder `7`.
    return name.isascii() and name.isdigit() and str(int(name)) == name
