"""From folders of results to checked records: the working copy's, and those that `compare` archived in runs/.

The archive is a copy of the JSON of every finished run, in the same places below `runs/<run_key>/` (lines compressed),
since the next task or setting overwrites the working copy. `runs/current.json` lists what the last compare found there.
Every problem is collected before anything is refused.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from db.errors import Problem, refuse
from db.files import clear_leftovers, reasons, sha256, staged, write_json
from db.records import (
    AQI,
    SAME_MEAN,
    GritRecord,
    HarnessRecord,
    HistoryRecord,
    LedgerRecord,
    MeasuredRecord,
    ParityRecord,
    QuantizedRecord,
    QuantizedSampleRecord,
    Record,
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
"""Stage to the folder of what it makes."""

OPTIONAL_STAGES = {"quantize": "quantized.json", "verify": "verify.json", "measure": "measured.json"}
"""Stages that measure a finished model, and their results. A run is the same run with, without or with others."""

BENCHMARKS = "measured/lm-eval"
"""Folder of what stage harness makes: <task>/<arm>/<seed>. Its runs are the stages harness/<task> of an arm's run."""

LEDGER, GRIT_LOG = "probe_ledger.jsonl", "grit_log.jsonl"
RUNS = "runs"
_CURRENT = "current.json"
_LINES_SHOWN = 5
_KEY = re.compile(r"[0-9a-f]{64}")
_NOTHING = "expected runs that were archived, got nothing; run `dvc repro` or `python -m db.cli ingest`"
_NO_SCORES = ScoresRecord.model_construct(metrics=[])  # while the other files of a faulty run are read
AnyRecord = TypeVar("AnyRecord", bound=BaseModel)


def digest_of(content: object) -> str:
    canonical = json.dumps(plain(content), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


@dataclass
class Bundle:
    """All that one arm with one seed left: what a stage that has not run would have left is empty."""

    arm: str
    seed: int
    stages: dict[str, RunRecord]  # without train for the base
    scores: ScoresRecord
    samples: list[SampleRecord]
    history: HistoryRecord | None = None
    parity: ParityRecord | None = None
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
        """Identity of the experiment: equal keys mean that the same thing was run again."""
        backend, task = self.scores.backend, self.scores.task.name
        stages = {stage: record for stage, record in self.stages.items() if not _optional(stage)}
        return digest_of(
            {
                **({} if task == AQI.name else {"task": task}),  # results from before there were tasks keep theirs
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
        """Where the score, which tables show, is not the mean of the items, on which intervals rest."""
        test = [sample.credit for sample in self.samples if sample.split == "test"]
        share = sum(test) / len(test) if test else None
        for metric in self.scores.metrics:
            if (metric.name, metric.split) == (self.scores.task.primary, "test") and (
                share is None or metric.value is None or not abs(share - metric.value) <= SAME_MEAN
            ):
                return f"{self.label}: scores.json says {metric.value}, samples.jsonl says {share}"
        return None


@dataclass
class Reader:
    """Reads one run and notes what is wrong or worth knowing."""

    root: Path  # the project's folder, which messages name paths from
    place: Path  # it, or the folder of one archived run
    arm: str = BASE
    seed: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def problem(self, path: Path, key: str, message: str) -> None:
        self.problems.append(Problem(path.relative_to(self.root).as_posix(), key, message))

    def note(self, words: str) -> None:
        self.notes.append(f"{self.arm}/{self.seed}: {words}")

    def unreadable(self, error: OSError) -> None:
        """Note a file or folder that the system does not let us read, once."""
        path = Path(error.filename or self.place)
        own = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)
        found = Problem(own, "", f"expected a file or folder that can be read, got: {error.strerror or error}")
        if found not in self.problems:
            self.problems.append(found)

    def path(self, stage: str, name: str) -> Path:
        return self.place / FOLDERS[stage] / self.arm / str(self.seed) / name

    def content(self, path: Path, *, required: bool) -> bytes | None:
        """A file's bytes; a missing file is a problem only when it is required."""
        packed = path.with_name(path.name + ".gz")
        try:
            content = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
        except FileNotFoundError:
            if required:
                self.problem(path, "", "expected this file beside the others, got nothing")
            return None
        except (EOFError, gzip.BadGzipFile) as error:
            self.problem(packed, "", f"expected a file that gzip can unpack, got: {error}")
            return None
        except OSError as error:
            self.unreadable(error)
            return None
        self.files[path.relative_to(self.place).as_posix()] = content
        return content

    def record(self, path: Path, form: type[AnyRecord], *, required: bool = True) -> AnyRecord | None:
        """A JSON file as a record, or None with its problems noted."""
        content = self.content(path, required=required)
        try:
            return None if content is None else form.model_validate_json(content)
        except ValidationError as error:
            for key, words in reasons(error):
                self.problem(path, key, words)
        return None

    def own(self, stage: str, name: str, form: type[AnyRecord], *, required: bool = True) -> AnyRecord | None:
        return self.of_run(self.path(stage, name), form, required=required)

    def of_run(self, path: Path, form: type[AnyRecord], *, required: bool = True) -> AnyRecord | None:
        """A file as a record, which must name the arm and seed of its folder: a copied folder is no other."""
        record = self.record(path, form, required=required)
        got = (getattr(record, "arm", self.arm), getattr(record, "seed", self.seed))
        if record is not None and got != (self.arm, self.seed):
            expected = f"expected {self.arm}/{self.seed} as in the path"
            self.problem(path, "arm, seed", f"{expected}, got {got[0]}/{got[1]}")
        return record

    def lines(
        self, path: Path, form: type[AnyRecord], unique: Sequence[str] = (), *, required: bool = True
    ) -> list[AnyRecord]:
        """A JSON-lines file as records, no two alike in `unique`; of many bad lines the first few are named."""
        content = self.content(path, required=required) or b""
        records: list[AnyRecord] = []
        seen: set[tuple[Any, ...]] = set()
        bad = 0
        for number, line in enumerate(content.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                record = form.model_validate_json(line)
            except ValidationError as error:
                bad += 1
                if bad <= _LINES_SHOWN:
                    where, words = reasons(error)[0]
                    self.problem(path, ".".join(filter(None, [f"line {number}", where])), words)
                continue
            key = tuple(getattr(record, name) for name in unique)
            if unique and key in seen:
                what = unique[-1].removesuffix("_id")
                self.problem(path, f"line {number}", f"{what} {key[-1]} given more than once")
            seen.add(key)
            records.append(record)
        if bad > _LINES_SHOWN:
            self.problem(path, "", f"{bad - _LINES_SHOWN} more lines cannot be read")
        return records

    def bundle(self) -> Bundle | None:
        """All that the run left; None when it is not there yet, not finished, or has problems."""
        before = len(self.problems)
        scores_file = self.path("evaluate", "scores.json")
        scored = scores_file.exists()
        if not scored and not scores_file.with_name("run.json").exists():
            self.note("no scores yet")
            return None
        scores = self.own("evaluate", "scores.json", ScoresRecord, required=False)
        exported = scores is None or scores.exported
        stages = self.stages(exported)
        if stages is None:
            del self.problems[before:]  # what an unfinished stage left undone is no fault of the files
            return None
        if not scored and len(self.problems) == before:
            self.note("no scores yet")
            return None
        if not scored:
            self.problem(scores_file, "", "expected this file beside the others, got nothing")
        samples = self.lines(scores_file.with_name("samples.jsonl"), SampleRecord, ("split", "item_id"))
        bundle = Bundle(self.arm, self.seed, stages, scores or _NO_SCORES, samples)
        if self.arm == BASE:
            bundle.base_model = self.record(self.place / "models/base/run.json", RunRecord, required=False)
        else:
            self.training(bundle, exported)
        if (why := self.stale(stages)) is not None:
            if len(self.problems) == before:
                self.note(f"skipped, {why}")
            return None
        self.optional(bundle)
        if len(self.problems) > before:
            return None
        left_out = tuple(f"{FOLDERS[stage]}/{self.arm}/" for stage in OPTIONAL_STAGES if stage not in stages)
        left_out += tuple(f"{BENCHMARKS}/{task}/" for task in self.benchmarks() if f"harness/{task}" not in stages)
        bundle.files = {name: text for name, text in self.files.items() if not name.startswith(left_out)}
        if bundle.disagreement:
            self.notes.append(bundle.disagreement)
        return bundle

    def stages(self, exported: bool) -> dict[str, RunRecord] | None:
        """The records of the stages that have finished; None where one has not that must have."""
        without = {*(("train", "probe") if self.arm == BASE else ()), *(() if exported else ("export",))}
        found: dict[str, RunRecord] = {}
        for stage in (stage for stage in FOLDERS if stage not in without):
            made = OPTIONAL_STAGES.get(stage)
            # Results from before there were verdicts, precisions or verifications stay readable.
            record = self.own(stage, "run.json", RunRecord, required=not made and stage != "probe")
            if record is None:
                if made and self.path(stage, made).exists():
                    name = self.path(stage, made).relative_to(self.root).as_posix()
                    self.note(f"without its stage {stage}, {name} has no run.json; run `dvc repro`")
                continue
            if record.stage != stage:
                self.problem(self.path(stage, "run.json"), "stage", f"expected {stage!r}, got {record.stage!r}")
            if record.status == "finished":
                found[stage] = record
                continue
            words = f"without its stage {stage}, which" if made else f"skipped, its stage {stage}"
            self.note(f"{words} is {record.status}" + (f": {record.error}" if record.error else ""))
            if not made:
                return None
        for task, place in self.benchmarks().items():
            record = self.of_run(place / "run.json", RunRecord, required=False)
            if record is not None and record.status == "finished":
                found[f"harness/{task}"] = record
            else:
                self.note(f"without its stage harness/{task}, which has not finished")
        return found

    def benchmarks(self) -> dict[str, Path]:
        """Task → folder of each benchmark that the run was asked."""
        return {place.parts[-3]: place for place in sorted((self.place / BENCHMARKS).glob(f"*/{self.arm}/{self.seed}"))}

    def training(self, bundle: Bundle, exported: bool) -> None:
        bundle.history = self.record(self.path("train", "loss_history.json"), HistoryRecord)
        bundle.ledger = self.lines(self.path("train", LEDGER), LedgerRecord, ("step",), required=False)
        bundle.grit = self.lines(self.path("train", GRIT_LOG), GritRecord, required=False)
        if exported:
            bundle.parity = self.own("export", "parity.json", ParityRecord, required=False)
            if not self.path("export", "parity.json").exists():
                self.note("no parity.json, so nothing shows that the export is faithful")
        bundle.verdict = self.own("probe", "verdict.json", VerdictRecord, required="probe" in bundle.stages)
        if not self.path("probe", "verdict.json").exists():
            self.note("no verdict.json, so nothing shows what the optimizer did")

    def stale(self, stages: dict[str, RunRecord]) -> str | None:
        """Drop optional stages that used other files than those that now lie there; why, where another stage did."""
        made = {a.path: (stage, a.sha256) for stage, record in stages.items() for a in record.artifacts}
        read = {
            path: (stage, used or "")
            for stage in ("export", "evaluate")
            if stage in stages
            for path, used in stages[stage].inputs.items()
        }
        for stage, record in list(stages.items()):
            known = {**made, **(self.files_of_base(stage, record) if self.arm != BASE else {})}
            asked = stage.startswith("harness/")  # may have left params.yaml, and then nobody makes it anew
            known = {**read, **made} if asked else known
            for path, used in record.inputs.items():
                maker, now = known.get(path, (stage, used))
                if maker != stage and now != used:
                    verb = "did" if asked and path not in made else "made"
                    why = f"its stage {stage} used an older {path} than {maker} {verb}; run `dvc repro`"
                    if not _optional(stage):
                        return why
                    gone = f", or remove {BENCHMARKS}/{stage.removeprefix('harness/')}" if asked else ""
                    self.note(f"without its stage {stage}, {why}{gone}")
                    del stages[stage]
                    break
        return None

    def files_of_base(self, stage: str, record: RunRecord) -> Mapping[str, tuple[str, str]]:
        """The base's files that a stage of an arm used, as they are now: path to (maker, sha256)."""
        if stage == "verify":
            # What is wrong with it is said where the base is read.
            reader = Reader(self.root, self.place)
            base = reader.record(reader.path("export", "run.json"), RunRecord, required=False)
            return {made.path: ("export of the base", made.sha256) for made in (base.artifacts if base else [])}
        used = [self.place / name for name in record.inputs if name.startswith(f"measured/{BASE}/0/")]
        return {
            file.relative_to(self.place).as_posix(): ("measure of the base", sha256(file))
            for file in used
            if stage == "measure" and file.is_file()
        }

    def optional(self, bundle: Bundle) -> None:
        if "measure" in bundle.stages:
            bundle.measured = self.own("measure", "measured.json", MeasuredRecord)
            scored = {(metric.name, metric.split) for metric in bundle.scores.metrics}
            for metric in bundle.measured.metrics if bundle.measured else []:
                if (metric.name, metric.split) in scored:
                    words = f"expected numbers that scores.json has not, got {metric.name} of {metric.split}"
                    self.problem(self.path("measure", "measured.json"), "metrics", words)
        if "quantize" in bundle.stages:
            bundle.quantized = self.own("quantize", "quantized.json", QuantizedRecord)
            path = self.path("quantize", "quantized_samples.jsonl")
            bundle.quantized_samples = self.lines(path, QuantizedSampleRecord, ("type", "item_id"))
            if bundle.quantized is not None:
                for words in _disagreements(bundle.quantized, bundle.quantized_samples):
                    self.problem(path, "", words)
        if "verify" in bundle.stages:
            bundle.verified = self.own("verify", "verify.json", VerifyRecord)
        for task, place in self.benchmarks().items():
            if f"harness/{task}" in bundle.stages:
                record = self.of_run(place / "harness.json", HarnessRecord)
                samples = self.lines(place / "samples.jsonl", SampleRecord, ("split", "item_id"))
                got = {f"harness/{record.benchmark}" if record else "", *(sample.split for sample in samples)}
                if record is not None and got != {f"harness/{task}"}:
                    words = f"expected items of harness/{task} as in the path, got {', '.join(sorted(got))}"
                    self.problem(place / "harness.json", "benchmark", words)
                elif record is not None:
                    bundle.benchmarks[task] = record, samples


def _optional(stage: str) -> bool:
    return stage in OPTIONAL_STAGES or stage.startswith("harness/")


def _disagreements(quantized: QuantizedRecord, samples: list[QuantizedSampleRecord]) -> Iterator[str]:
    """Every precision answered the same items, as often rightly and with the credit that its row says."""
    answers: dict[str, dict[str, QuantizedSampleRecord]] = {row.type: {} for row in quantized.rows}
    for sample in samples:
        answers.setdefault(sample.type, {})[sample.item_id] = sample
    items = answers[quantized.rows[0].type].keys()
    rows = {row.type: row for row in quantized.rows}
    for name, own in answers.items():
        if name not in rows:
            yield f"expected the types of quantized.json, got {name!r} besides"
            continue
        row = rows[name]
        wanted, got = (row.n, row.correct), (len(own), sum(sample.correct for sample in own.values()))
        if got != wanted:
            words = "{} items of type {}, {} of them correct"
            expected, found = (words.format(n, name, right) for n, right in (wanted, got))
            yield f"expected {expected}, as quantized.json says, got {found}"
        elif own.keys() != items:
            yield f"expected the same items in every type, {name} has others"
        elif abs((mean := sum(sample.credit for sample in own.values()) / len(own)) - row.credit) > SAME_MEAN:
            yield f"expected a mean credit of {row.credit} of type {name}, as quantized.json says, got {mean}"


def read_results(
    root: Path, arms: Iterable[str] | None = None, seeds: Iterable[int] | None = None
) -> tuple[list[Bundle], list[str]]:
    """The finished runs of the working copy, base first, and notes on what was left out; the base is always read."""
    reader = Reader(root, root)
    bundles: list[Bundle] = []
    try:
        combinations = _combinations(reader, arms, seeds)
    except OSError as error:
        reader.unreadable(error)
        combinations = []
    for reader.arm, reader.seed in combinations:
        if (bundle := _collected(reader)) is not None:
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


def _collected(reader: Reader) -> Bundle | None:
    reader.files = {}
    try:
        return reader.bundle()
    except OSError as error:
        # Whether something is there cannot be told either, so nothing may count as absent.
        reader.unreadable(error)
        return None


def _combinations(reader: Reader, arms: Iterable[str] | None, seeds: Iterable[int] | None) -> list[tuple[str, int]]:
    scores = reader.place / FOLDERS["evaluate"]
    names = sorted(p.name for p in scores.iterdir() if p.is_dir()) if scores.is_dir() else []
    wanted = None if seeds is None else list(dict.fromkeys(seeds))
    found: list[tuple[str, int]] = []
    for arm in dict.fromkeys([BASE, *(names if arms is None else arms)]):
        if wanted is not None and arm != BASE:
            found += [(arm, seed) for seed in wanted]
            continue
        folder = scores / arm
        inside = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        reader.notes += [f"{arm}/{name}: skipped, the folder's name is no seed" for name in inside if not _seed(name)]
        own = sorted(int(name) for name in inside if _seed(name))
        if not own:
            reader.notes.append(f"{arm}: no scores yet")
        found += [(arm, seed) for seed in own]
    return found


def _seed(name: str) -> bool:
    # `007` would be read from the folder `7`.
    return name.isascii() and name.isdigit() and str(int(name)) == name


class CurrentRecord(Record):
    """`runs/current.json`: the keys of the runs that the last compare found in the working copy."""

    runs: list[str]


def archive(root: Path, bundles: list[Bundle]) -> int:
    """Copy runs into runs/ and name them the current ones; the number of those that are new or changed.

    Every folder appears whole, and only then the list: after a kill the old list stands, of runs that are all there.
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
        there = {(p.relative_to(target).as_posix(), p.read_bytes()) for p in target.rglob("*") if p.is_file()}
        if packed == there:
            continue
        changed += 1
        with staged(target) as folder:
            for name, content in packed:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
    write_json(root / RUNS / _CURRENT, {"runs": keys})
    return changed


def require_archive(root: Path) -> None:
    """Make sure that there is an archive, or a wrong folder would get one."""
    if not (root / RUNS).is_dir():
        raise refuse([Problem(RUNS if root.is_dir() else str(root), "", _NOTHING)])


def read_archive(root: Path) -> tuple[dict[str, Bundle], set[str]]:
    """All archived runs by their keys, and the keys of the current ones; FileError names all that is wrong."""
    require_archive(root)
    runs = root / RUNS
    reader = Reader(root, root)
    found: dict[str, Bundle] = {}
    try:
        for moved in runs.glob("*.old.partial"):  # after a kill between two renames
            clear_leftovers(runs / moved.name.split(".")[0])
        folders = sorted(path for path in runs.iterdir() if _KEY.fullmatch(path.name))
    except OSError as error:
        reader.unreadable(error)
        folders = []
    if not folders and not reader.problems:  # an empty database would take the place of a full one
        reader.problem(runs, "", _NOTHING)
    for reader.place in folders:
        inside = [path for path in reader.place.glob("scores/*/*") if _seed(path.name)]
        before, bundle = len(reader.problems), None
        if len(inside) == 1:
            reader.arm, reader.seed = inside[0].parent.name, int(inside[0].name)
            bundle = _collected(reader)
        if bundle is not None:
            found[reader.place.name] = bundle
        elif len(reader.problems) == before:
            reader.problem(reader.place, "", "expected the files of one finished run; remove the folder")
    reader.place = root
    current = reader.record(runs / _CURRENT, CurrentRecord, required=False)
    if reader.problems:
        raise refuse(reader.problems)
    return found, set(current.runs if current else [])
