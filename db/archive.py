"""From folders of results to checked records: the working copy's, and those that `compare` archived in runs/.

The archive is a copy of the JSON of every finished run, in the same places below `runs/<run_key>/` (JSON lines
compressed), since the next task or setting overwrites the working copy. `runs/current.json` lists what the last compare
found there. All problems are collected before anything is refused.
"""

import gzip
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from db.errors import Problem, refuse
from db.files import clear_leftovers, read_json, reasons, sha256, staged, write_json
from db.records import (
    AQI,
    SAME_MEAN,
    GritRecord,
    HarnessRecord,
    HistoryRecord,
    LedgerRecord,
    MeasuredRecord,
    QuantizedRecord,
    QuantizedSampleRecord,
    RunRecord,
    SampleRecord,
    ScoresRecord,
    VerdictRecord,
    VerifyRecord,
    plain,
)
from db.runs import BASE

FOLDERS = {
    "train": "adapters", "probe": "verdicts", "export": "gguf", "quantize": "quantized", "verify": "verified",
    "measure": "measured", "evaluate": "scores",
}  # fmt: skip
"""Stage → the folder of its results."""

OPTIONAL_STAGES = ("quantize", "verify", "measure")
"""Stages that measure a finished model. They are not part of a run's identity."""

BENCHMARKS = "measured/lm-eval"
"""Folder of what stage harness makes: <task>/<arm>/<seed>. Each task is a stage harness/<task> of an arm's run."""

LEDGER, GRIT_LOG = "probe_ledger.jsonl", "grit_log.jsonl"
RUNS = "runs"
_CURRENT = "current.json"
_KEY = re.compile(r"[0-9a-f]{64}")
_NOTHING = "no archived runs found; run `dvc repro` or `python -m db.cli ingest`"
_MISSING = "expected this file beside the others, got nothing"
_NO_SCORES = ScoresRecord.model_construct(metrics=[])  # while the other files of a faulty run are read
AnyRecord = TypeVar("AnyRecord", bound=BaseModel)


def digest_of(content: object) -> str:
    canonical = json.dumps(plain(content), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


@dataclass
class Bundle:
    """All results of one arm with one seed; empty where a stage has not run."""

    arm: str
    seed: int
    stages: dict[str, RunRecord]  # without train for the base
    scores: ScoresRecord
    samples: list[SampleRecord]
    history: HistoryRecord | None = None
    verdict: VerdictRecord | None = None
    base_model: RunRecord | None = None  # of models/base, for the base only
    measured: MeasuredRecord | None = None
    quantized: QuantizedRecord | None = None
    quantized_samples: list[QuantizedSampleRecord] = field(default_factory=list)
    verified: VerifyRecord | None = None
    benchmarks: dict[str, tuple[HarnessRecord, list[SampleRecord]]] = field(default_factory=dict)
    ledger: list[LedgerRecord] = field(default_factory=list)  # the probe's sampled steps
    grit: list[GritRecord] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.arm}/{self.seed}"

    @property
    def key(self) -> str:
        """Identity of the experiment: equal keys mean that the same experiment was run again."""
        backend, task = self.scores.backend, self.scores.task.name
        stages = {stage: record for stage, record in self.stages.items() if not _optional(stage)}
        return digest_of(
            {
                # Results from before there were other tasks keep their key.
                **({} if task == AQI.name else {"task": task}),
                "variant": self.arm,
                "seed": self.seed,
                "params": {stage: record.params for stage, record in stages.items()},
                "inputs": {stage: record.inputs for stage, record in stages.items()},
                "backend": [backend.name, backend.version],
                "device_class": backend.device_class,
            }
        )

    @property
    def disagreement(self) -> str | None:
        """How the score, which tables show, differs from the mean of the items, on which intervals rest."""
        test = [sample.credit for sample in self.samples if sample.split == "test"]
        share = sum(test) / len(test) if test else math.nan
        primary = (self.scores.task.primary, "test")
        score = next((m.value for m in self.scores.metrics if (m.name, m.split) == primary), share)
        if score is not None and abs(share - score) <= SAME_MEAN:
            return None
        return f"{self.label}: scores.json says {score}, samples.jsonl says {share}"


@dataclass
class Reader:
    """Reads one run after the other, and collects what is wrong (`problems`) or worth knowing (`notes`)."""

    root: Path  # the project's folder, which messages name paths from
    place: Path  # the same, or the folder of one archived run
    arm: str = BASE
    seed: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def problem(self, path: Path, key: str, message: str) -> None:
        self.problems.append(Problem(path.relative_to(self.root).as_posix(), key, message))

    def note(self, words: str) -> None:
        self.notes.append(f"{self.arm}/{self.seed}: {words}")

    def path(self, stage: str, name: str) -> Path:
        return self.place / FOLDERS[stage] / self.arm / str(self.seed) / name

    def content(self, path: Path, *, required: bool) -> bytes | None:
        """A file's bytes; a missing file is a problem only if it is required, an unreadable one ends the reading."""
        packed = path.with_name(path.name + ".gz")
        try:
            content = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
        except FileNotFoundError:
            if required:
                self.problem(path, "", _MISSING)
            return None
        except (EOFError, gzip.BadGzipFile) as error:
            self.problem(packed, "", f"expected a file that gzip can unpack, got: {error}")
            return None
        self.files[path.relative_to(self.place).as_posix()] = content
        return content

    def record(self, path: Path, form: type[AnyRecord], *, required: bool = True) -> AnyRecord | None:
        """A JSON file as a record, or None with its problems reported.

        One that names an arm must name that of its folder, and the seed, so that a copied folder passes for no other.
        """
        content = self.content(path, required=required)
        try:
            record = None if content is None else form.model_validate_json(content)
        except ValidationError as error:
            for key, words in reasons(error):
                self.problem(path, key, words)
            return None
        arm, seed = getattr(record, "arm", None), getattr(record, "seed", None)
        if arm is not None and (arm, seed) != (self.arm, self.seed):
            self.problem(path, "arm, seed", f"expected {self.arm}/{self.seed} as in the path, got {arm}/{seed}")
        return record

    def lines(
        self, path: Path, form: type[AnyRecord], unique: Sequence[str] = (), *, required: bool = True
    ) -> list[AnyRecord]:
        """A JSON-lines file as records, no two alike in `unique`."""
        content = self.content(path, required=required) or b""
        records: list[AnyRecord] = []
        seen: set[tuple[Any, ...]] = set()
        for number, line in enumerate(content.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                record = form.model_validate_json(line)
            except ValidationError as error:
                where, words = reasons(error)[0]
                self.problem(path, ".".join(filter(None, [f"line {number}", where])), words)
                continue
            key = tuple(getattr(record, name) for name in unique)
            if unique and key in seen:
                what = unique[-1].removesuffix("_id")
                self.problem(path, f"line {number}", f"{what} {key[-1]} given more than once")
            seen.add(key)
            records.append(record)
        return records

    def bundle(self) -> Bundle | None:
        """All results of the run; None if it has not been scored, is stale, or has problems."""
        before, self.files = len(self.problems), {}
        scores_file = self.path("evaluate", "scores.json")
        if not scores_file.exists():
            self.note("no scores yet")
            return None
        scores = self.record(scores_file, ScoresRecord) or _NO_SCORES
        stages = self.stages(scores.exported)
        samples = self.lines(scores_file.with_name("samples.jsonl"), SampleRecord, ("split", "item_id"))
        bundle = Bundle(self.arm, self.seed, stages, scores, samples)
        if self.arm == BASE:
            bundle.base_model = self.record(self.place / "models/base/run.json", RunRecord, required=False)
        else:
            self.read_training(bundle)
        if (why := self.drop_stale(stages)) is not None:
            if len(self.problems) == before:
                self.note(f"skipped, {why}")
            return None
        self.read_optional(bundle)
        if len(self.problems) > before:
            return None
        left_out = tuple(f"{FOLDERS[stage]}/{self.arm}/" for stage in OPTIONAL_STAGES if stage not in stages)
        left_out += tuple(f"{BENCHMARKS}/{task}/" for task in self.benchmarks() if f"harness/{task}" not in stages)
        bundle.files = {name: text for name, text in self.files.items() if not name.startswith(left_out)}
        if bundle.disagreement:
            self.notes.append(bundle.disagreement)
        return bundle

    def stages(self, exported: bool) -> dict[str, RunRecord]:
        """The records of the stages that have run: a folder appears whole, when its stage has finished."""
        without = {*(("train", "probe") if self.arm == BASE else ()), *(() if exported else ("export",))}
        optional = {*OPTIONAL_STAGES, "probe"}  # results that are older than stage probe stay readable
        files = {
            stage: (self.path(stage, "run.json"), stage not in optional) for stage in FOLDERS if stage not in without
        } | {f"harness/{task}": (place / "run.json", False) for task, place in self.benchmarks().items()}
        finished: dict[str, RunRecord] = {}
        for stage, (file, required) in files.items():
            if (record := self.record(file, RunRecord, required=required)) is not None:
                finished[stage] = record
                if record.stage != stage.split("/")[0]:
                    self.problem(file, "stage", f"expected {stage!r}, got {record.stage!r}")
        return finished

    def benchmarks(self) -> dict[str, Path]:
        """Task → folder of each benchmark that the run was scored on."""
        return {place.parts[-3]: place for place in sorted((self.place / BENCHMARKS).glob(f"*/{self.arm}/{self.seed}"))}

    def read_training(self, bundle: Bundle) -> None:
        bundle.history = self.record(self.path("train", "loss_history.json"), HistoryRecord)
        bundle.ledger = self.lines(self.path("train", LEDGER), LedgerRecord, ("step",), required=False)
        bundle.grit = self.lines(self.path("train", GRIT_LOG), GritRecord, required=False)
        if "probe" in bundle.stages:
            bundle.verdict = self.record(self.path("probe", "verdict.json"), VerdictRecord)

    def drop_stale(self, stages: dict[str, RunRecord]) -> str | None:
        """Drop optional stages that used other files than those on disk; returns why the run itself is stale, if so."""
        outputs = {file.path: file.sha256 for record in stages.values() for file in record.artifacts}
        base_files = {} if self.arm == BASE else self.files_of_base()
        inputs = {
            path: sha
            for stage in ("export", "evaluate")
            if stage in stages
            for path, sha in stages[stage].inputs.items()
        }
        for stage, record in list(stages.items()):
            is_benchmark = stage.startswith("harness/")  # may have left params.yaml, and then nothing runs it again
            now = (inputs | outputs) if is_benchmark else (base_files | outputs) if _optional(stage) else outputs
            stale = next((path for path, sha in record.inputs.items() if now.get(path, sha) != sha), None)
            if stale is None:
                continue
            why = f"its stage {stage} used an older {stale} than there is now; run `dvc repro`"
            if not _optional(stage):
                return why
            remedy = f", or remove {BENCHMARKS}/{stage.removeprefix('harness/')}" if is_benchmark else ""
            self.note(f"without its stage {stage}, {why}{remedy}")
            del stages[stage]
        return None

    def files_of_base(self) -> dict[str, str]:
        """The base's files that stages of an arm use, as they are now: path → sha256."""
        reader = Reader(self.root, self.place, BASE)  # problems are reported where the base is read
        export = reader.record(reader.path("export", "run.json"), RunRecord, required=False)
        measured = reader.path("measure", "measured.json")
        files = {file.path: file.sha256 for file in (export.artifacts if export else [])}
        return files | ({measured.relative_to(self.place).as_posix(): sha256(measured)} if measured.is_file() else {})

    def read_optional(self, bundle: Bundle) -> None:
        if "measure" in bundle.stages:
            bundle.measured = self.record(self.path("measure", "measured.json"), MeasuredRecord)
        if "quantize" in bundle.stages:
            bundle.quantized = self.record(self.path("quantize", "quantized.json"), QuantizedRecord)
            path = self.path("quantize", "quantized_samples.jsonl")
            bundle.quantized_samples = self.lines(path, QuantizedSampleRecord, ("type", "item_id"))
        if "verify" in bundle.stages:
            bundle.verified = self.record(self.path("verify", "verify.json"), VerifyRecord)
        for task, place in self.benchmarks().items():
            if f"harness/{task}" in bundle.stages:
                record = self.record(place / "harness.json", HarnessRecord)
                samples = self.lines(place / "samples.jsonl", SampleRecord, ("split", "item_id"))
                splits = {f"harness/{record.benchmark}" if record else "", *(sample.split for sample in samples)}
                if record is not None and splits != {f"harness/{task}"}:
                    words = f"expected items of harness/{task} as in the path, got {', '.join(sorted(splits))}"
                    self.problem(place / "harness.json", "benchmark", words)
                elif record is not None:
                    bundle.benchmarks[task] = record, samples


def _optional(stage: str) -> bool:
    return stage in OPTIONAL_STAGES or stage.startswith("harness/")


def read_results(
    root: Path, arms: Iterable[str] | None = None, seeds: Iterable[int] | None = None
) -> tuple[list[Bundle], list[str]]:
    """The finished runs of the working copy, always with the base, which is first; and notes on what was left out."""
    reader = Reader(root, root)
    bundles: list[Bundle] = []
    combinations = _combinations(reader, arms, seeds)
    for reader.arm, reader.seed in combinations:
        if (bundle := reader.bundle()) is not None:
            bundles.append(bundle)
    if reader.problems:
        raise refuse(reader.problems)
    if as_trained := [bundle.label for bundle in bundles if not bundle.scores.exported]:
        reader.notes.append(f"{', '.join(as_trained)}: scored as training left them, so there is no export to check")
    if len(tasks := {bundle.scores.task.name for bundle in bundles}) > 1:
        names = ", ".join(sorted(tasks))
        reader.notes.append(
            f"results of several tasks are on disk ({names}), of which one is compared; run `dvc repro`"
        )
    return bundles, reader.notes


def _combinations(reader: Reader, arms: Iterable[str] | None, seeds: Iterable[int] | None) -> list[tuple[str, int]]:
    """The arms and seeds that were asked for or, where none were, that have scores."""
    scores = reader.place / FOLDERS["evaluate"]
    names = sorted(place.name for place in scores.iterdir() if place.is_dir()) if scores.is_dir() else []
    chosen = None if seeds is None else list(dict.fromkeys(seeds))
    runs: list[tuple[str, int]] = []
    for arm in dict.fromkeys([BASE, *(names if arms is None else arms)]):
        inside = (scores / arm).iterdir() if (scores / arm).is_dir() else ()
        of_arm = sorted(int(place.name) for place in inside if _seed(place.name))
        if not of_arm and (chosen is None or arm == BASE):
            reader.notes.append(f"{arm}: no scores yet")
        runs += [(arm, seed) for seed in (of_arm if chosen is None or arm == BASE else chosen)]
    return runs


def _seed(name: str) -> bool:
    # `007` would be read as the folder `7`.
    return name.isascii() and name.isdigit() and str(int(name)) == name


def archive(root: Path, bundles: list[Bundle]) -> int:
    """Copy runs into runs/ and list them as the current ones; returns how many are new or changed.

    Every folder appears whole, and the list last: after a kill the old list is intact, and so are all of its runs.
    """
    changed = 0
    keys = []
    for bundle in bundles:
        keys.append(bundle.key)
        target = root / RUNS / bundle.key
        packed = {
            (f"{name}.gz", gzip.compress(content, mtime=0)) if name.endswith(".jsonl") else (name, content)
            for name, content in bundle.files.items()
        }
        existing = {(p.relative_to(target).as_posix(), p.read_bytes()) for p in target.rglob("*") if p.is_file()}
        if packed == existing:
            continue
        changed += 1
        with staged(target) as folder:
            for name, content in packed:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
    write_json(root / RUNS / _CURRENT, {"runs": keys})
    return changed


def require_archive(root: Path) -> None:
    """Refuse a folder without an archive: a mistyped path must not get one."""
    if not (root / RUNS).is_dir():
        raise refuse([Problem(RUNS if root.is_dir() else str(root), "", _NOTHING)])


def read_archive(root: Path) -> tuple[dict[str, Bundle], set[str]]:
    """All archived runs by key, and the keys of the current ones; FileError names everything that is wrong."""
    require_archive(root)
    runs = root / RUNS
    reader = Reader(root, root)
    bundles: dict[str, Bundle] = {}
    for moved in runs.glob("*.old.partial"):  # after a kill between two renames
        clear_leftovers(runs / moved.name.split(".")[0])
    folders = sorted(path for path in runs.iterdir() if _KEY.fullmatch(path.name))
    if not folders and not reader.problems:  # an empty database would replace a full one
        reader.problem(runs, "", _NOTHING)
    for reader.place in folders:
        inside = [path for path in reader.place.glob("scores/*/*") if _seed(path.name)]
        before, bundle = len(reader.problems), None
        if len(inside) == 1:
            reader.arm, reader.seed = inside[0].parent.name, int(inside[0].name)
            bundle = reader.bundle()
        if bundle is not None:
            bundles[reader.place.name] = bundle
        elif len(reader.problems) == before:
            reader.problem(reader.place, "", "expected the files of one finished run; remove the folder")
    if reader.problems:
        raise refuse(reader.problems)
    current = read_json(runs / _CURRENT)["runs"] if (runs / _CURRENT).exists() else []  # the last compare's
    return bundles, set(current)
