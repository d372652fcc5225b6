"""Reads what results may lack: precisions, verifications, measurements, and the logs of training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from db.files import FileReader
from db.records import RunRecord, ScoresRecord
from db.records_logs import GritRecord, LedgerRecord
from db.records_measured import MeasuredRecord
from db.records_serving import QuantizedRecord, QuantizedSampleRecord, VerifyRecord
from db.staleness import BaseFiles
from db.values import SAME_MEAN

OPTIONAL_STAGES = {
    "quantize": "quantized/{}/quantized.json",
    "verify": "verified/{}/verify.json",
    "measure": "measured/{}/measured.json",
}
"""Stages that measure a finished model, and their results. A run is the same run with, without or with others."""

_BASE = "base/0"


@dataclass(frozen=True)
class Serving:
    """What was measured of the served model; results may lack any of it.

    Attributes:
        quantized_samples: One for each test item and precision.
    """

    quantized: QuantizedRecord | None = None
    quantized_samples: list[QuantizedSampleRecord] = field(default_factory=list)
    verified: VerifyRecord | None = None


@dataclass(frozen=True)
class TrainingLogs:
    """What training wrote down step by step; empty for the base and for results from before there were such files.

    Attributes:
        ledger: Of the probe, a record for each sampled step.
        grit: Of GRIT, where the arm has it.
    """

    ledger: list[LedgerRecord] = field(default_factory=list)
    grit: list[GritRecord] = field(default_factory=list)


@dataclass
class OptionalReader(FileReader):
    """Reads the optional files of one arm with one seed after the other."""

    def belongs(self, path: Path, arm: str | None, seed: int | None, own_arm: str, own_seed: int) -> None:
        """A copied folder must not count as another arm."""
        if (arm, seed) != (own_arm, own_seed):
            self.problem(path, "arm, seed", f"expected {own_arm}/{own_seed} as in the path, came {arm}/{seed}")

    def files_of_base(self, stages: Mapping[str, RunRecord]) -> BaseFiles:
        """The base's files that an arm was verified on and measured against, as they are now.

        What is wrong with them is said where the base is read.

        Args:
            stages: Of the arm.
        """
        found: dict[str, dict[str, tuple[str, str]]] = {}
        if "verify" in stages:
            path = self.root / "gguf" / _BASE / "run.json"
            record = FileReader(self.root).record(path, RunRecord, hashlib.sha256(), required=False)
            artifacts = record.artifacts if record else []
            found["verify"] = {made.path: ("export of the base", made.sha256) for made in artifacts}
        if "measure" in stages:
            used = [name for name in stages["measure"].inputs if name.startswith(f"measured/{_BASE}/")]
            found["measure"] = {
                name: ("measure of the base", hashlib.sha256((self.root / name).read_bytes()).hexdigest())
                for name in used
                if (self.root / name).is_file()
            }
        return found

    def logs(self, folder: Path, digest: hashlib._Hash) -> TrainingLogs:
        """Read the logs in an adapter's folder, where they are."""
        ledger = self.lines(
            folder / "probe_ledger.jsonl", LedgerRecord, digest, lambda r: r.step, named="step", required=False
        )
        return TrainingLogs(ledger, self.lines(folder / "grit_log.jsonl", GritRecord, digest, required=False))

    def measured(
        self, arm: str, seed: int, digest: hashlib._Hash, scores: ScoresRecord | None
    ) -> MeasuredRecord | None:
        """Read what stage measure left; its numbers stand beside those of scores.json, so none may be in both."""
        path = self.root / "measured" / arm / str(seed) / "measured.json"
        record = self.record(path, MeasuredRecord, digest)
        if record is None:
            return None
        self.belongs(path, record.arm, record.seed, arm, seed)
        scored = {(metric.name, metric.split) for metric in scores.metrics} if scores else set()
        for metric in record.metrics:
            if (metric.name, metric.split) in scored:
                self.problem(
                    path, "metrics", f"expected numbers that scores.json has not, came {metric.name} of {metric.split}"
                )
        return record

    def serving(self, arm: str, seed: int, stages: dict[str, RunRecord], digest: hashlib._Hash) -> Serving:
        """Read what the stages quantize and verify left, where they have ended."""
        quantized = verified = None
        samples: list[QuantizedSampleRecord] = []
        if "quantize" in stages:
            path = self.root / "quantized" / arm / str(seed) / "quantized.json"
            quantized = self.record(path, QuantizedRecord, digest)
            path = path.with_name("quantized_samples.jsonl")
            samples = self.lines(path, QuantizedSampleRecord, digest, lambda r: (r.type, r.item_id))
            if quantized is not None:
                self.belongs(path.with_name("quantized.json"), quantized.arm, quantized.seed, arm, seed)
                self.complete(path, quantized, samples)
        if "verify" in stages:
            path = self.root / "verified" / arm / str(seed) / "verify.json"
            verified = self.record(path, VerifyRecord, digest)
            if verified is not None:
                self.belongs(path, verified.arm, verified.seed, arm, seed)
        return Serving(quantized, samples, verified)

    def complete(self, path: Path, quantized: QuantizedRecord, samples: list[QuantizedSampleRecord]) -> None:
        """Every precision answered the same items, as often rightly and with the credit that its row says."""
        answers: dict[str, dict[str, QuantizedSampleRecord]] = {row.type: {} for row in quantized.rows}
        for sample in samples:
            answers.setdefault(sample.type, {})[sample.item_id] = sample
        items = answers[quantized.rows[0].type].keys()
        rows = {row.type: (row.n, row.correct) for row in quantized.rows}
        credits = {row.type: row.worth for row in quantized.rows}
        for name, own in answers.items():
            came = (len(own), sum(sample.correct for sample in own.values()))
            if name not in rows:
                self.problem(path, "", f"expected the types of quantized.json, came {name!r} besides")
            elif came != rows[name]:
                words = "{} items of type {}, {} of them correct"
                expected, found = (words.format(n, name, right) for n, right in (rows[name], came))
                self.problem(path, "", f"expected {expected}, as quantized.json says, came {found}")
            elif own.keys() != items:
                self.problem(path, "", f"expected the same items in every type, {name} has others")
            elif abs((mean := sum(sample.worth for sample in own.values()) / len(own)) - credits[name]) > SAME_MEAN:
                expected = f"a mean credit of {credits[name]} of type {name}"
                self.problem(path, "", f"expected {expected}, as quantized.json says, came {mean}")
