"""What a verdict is based on: the ledger of a run, medians over its judged samples, and counts over all its steps."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from probes.geometry import Record
from probes.probe import EVENTS, Probe
from probes.tally import COLUMNS, OFF, ROUNDING, TURNED


@dataclass(frozen=True)
class Thresholds:
    # Degrees between Δθ and the shadow above which an update counts as different. Plain AdamW of torch equals its
    # shadow to the bit on bfloat16 weights and within 1e-4 on float32 ones; every layer of the fault catalogue's
    # effective runs is above 5.
    min_angle: float = OFF
    min_gradient_angle: float = 5 * TURNED  # between raw and preconditioned gradient, where one may be a copy
    min_coverage: float = 0.9  # share of the tensors that an effect must reach
    min_steps: float = 0.95  # share of the steps, from the first that it reaches
    late: float = 0.75  # share of the run by which preconditioning must have begun
    traces: float = 0.05  # of the entries (tensors times steps) below which there is no effect
    stuck: float = 0.25  # share of the steps in which a tensor may stay unchanged
    swamped: float = 10.0  # λ over the mean eigenvalue above which damping is most of the preconditioner
    scalar: float = 0.01  # distance from a multiple of the identity below which a preconditioner is just a scalar
    lost: float = 0.2  # share of a gradient's entries turned to zero above which it was lost
    stale_after: int = 100  # steps with the same matrices if their refresh interval is unknown (else three intervals)
    blow_up: float = 0.25  # rise of the loss, relative to its start, above which training diverges
    often: float = 0.1  # share of the steps in which something must happen to count


def median(values: Iterable[float | None]) -> float | None:
    numbers = sorted(v for v in values if v is not None and math.isfinite(v))
    if not numbers:
        return None
    middle = len(numbers) // 2
    return numbers[middle] if len(numbers) % 2 else (numbers[middle - 1] + numbers[middle]) / 2


@dataclass
class Evidence:
    records: list[Record]
    events: dict[str, int]
    claims: bool
    watched: bool
    tally: dict[str, dict[str, float]]  # tensor → `probes.tally.COLUMNS`
    thresholds: Thresholds = field(default_factory=Thresholds)

    @classmethod
    def of(cls, probe: Probe) -> "Evidence":
        return cls(probe.records, dict(probe.events), probe.claims, probe.watched, probe.tally.table())

    @classmethod
    def read(cls, file: str | Path, thresholds: Thresholds | None = None) -> "Evidence":
        """Read a `probes.callback.LedgerFile`; ValueError names the line that does not belong."""
        records: list[Record] = []
        summary: dict[str, Any] | None = None
        for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), start=1):
            try:
                entry = json.loads(line)
                if "events" in entry:
                    summary = {key: entry[key] for key in ("claims", "watched")}
                    summary["events"] = {**dict.fromkeys(EVENTS, 0), **entry["events"]}
                    summary["tally"] = {n: {c: row[c] for c in COLUMNS} for n, row in entry["tally"].items()}
                else:
                    records.append({"step": entry["step"], "units": dict(entry["units"]), **entry})
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}: line {number}: expected a record of a probe, got {line[:60]!r}") from error
        if summary is None:
            raise ValueError(f"{file}: expected a last line with the probe's events, got none: the run did not end")
        return cls(records, **summary, thresholds=thresholds or Thresholds())

    @cached_property
    def judged(self) -> list[Record]:
        """Samples that count: from where the preconditioner is ready, else without the first tenth; no cold ones."""
        warm = [record for record in self.records if not record.get("cold")]
        for place, record in enumerate(warm):
            if any(e.get("reading", {}).get("ready") for e in record["units"].values()):
                return warm[place:]
        return warm[-(-len(warm) // 10) :] or warm

    @property
    def steps(self) -> int:
        return self.events["steps"]

    @cached_property
    def units(self) -> list[str]:
        return list(dict.fromkeys(n for r in self.judged for n, e in r["units"].items() if "norm_raw" in e))

    def values(self, unit: str, key: str) -> list[Any]:
        return [r["units"][unit].get(key) for r in self.judged if unit in r["units"]]

    def of_all(self, key: str) -> list[Any]:
        return [value for unit in self.units for value in self.values(unit, key)]

    def per_unit(self, key: str) -> dict[str, float | None]:
        return {unit: median(self.values(unit, key)) for unit in self.units}

    def readings(self) -> list[dict[str, Any]]:
        return [e["reading"] for r in self.judged for e in r["units"].values() if "reading" in e]

    def reading_median(self, prefix: str) -> float | None:
        return median(v for r in self.readings() for k, v in r.items() if k.startswith(prefix))

    @cached_property
    def angles(self) -> dict[str, float | None]:
        """Degrees between Δθ and the shadow for each layer, of parameters or ΔW, whichever is more informative."""
        plain, weights = self.per_unit("angle"), self.per_unit("angle_weights")
        return {u: max((a for a in (plain[u], weights[u]) if a is not None), default=None) for u in self.units}

    @cached_property
    def rotates(self) -> bool:
        """Whether the preconditioner works in eigenbases, so that gradients reach the optimizer unchanged."""
        return any("basis_rotation" in reading for reading in self.readings())

    @cached_property
    def effect(self) -> str:
        """Which part of the tally must show an effect: the gradient that is read, or the update."""
        if not self.claims or self.rotates:
            return "off"
        expected = self.watched or any(k.startswith("anisotropy") for r in self.readings() for k in r)
        return "turned" if expected or any(self.share(name, "turned") > 0.02 for name in self.tally) else "off"

    @cached_property
    def tensors(self) -> dict[str, bool]:
        """Tensor → whether an effect reaches it and, where it is claimed, comes from the preconditioner.

        An effect is a layer's update that is off plain AdamW's (as one vector: a learning rate of its own for B turns
        it), in the median of the samples or in more than a few steps. What a preconditioner does is seen tensor by
        tensor, of those that it is claimed for.
        """
        effects = {}
        left_to_adamw = {u for u in self.units if self.claims and any(c is False for c in self.values(u, "claimed"))}
        for unit in [u for u in self.units if u not in left_to_adamw] or self.units:
            rounding = ROUNDING if (median(self.values(unit, "bits")) or 32) < 32 else 1.0
            turned_away = (self.angles[unit] or 0.0) > self.thresholds.min_angle * rounding
            for name in (n for n in self.tally if n.rpartition(".")[0] == unit):
                row = self.tally[name]
                # Not only at the very start, where a different place of ε is enough.
                often_off = self.counts_off and self.share(name, "off") > 0.02 and max(row["off"], row["off_last"]) >= 5
                claimed = not self.claims or self.share(name, self.effect) > (self.effect == "off") * 0.02
                effects[name] = (turned_away or often_off) and claimed
        return effects

    @property
    def counts_off(self) -> bool:
        """Whether the tally uses the requested threshold; if that is higher, the samples alone decide."""
        return self.thresholds.min_angle <= OFF

    def share(self, tensor: str, column: str) -> float:
        """Share of the counted steps of a tensor."""
        row = self.tally[tensor]
        return row[column] / row["steps"] if row["steps"] else 0.0

    @property
    def reached(self) -> list[str]:
        return [name for name, reached in self.tensors.items() if reached]

    @cached_property
    def step_share(self) -> float:
        """Share of the steps in which the reached tensors see the effect, from the first that does."""
        return sum(self.step_shares.values()) / len(self.step_shares) if self.step_shares else float(bool(self.reached))

    @cached_property
    def step_shares(self) -> dict[str, float]:
        """The same for each of these tensors."""
        rows = {name: self.tally[name] for name in self.reached}
        since = f"{self.effect}_since"
        return {name: row[self.effect] / row[since] for name, row in rows.items() if row[since]}

    @property
    def coverage(self) -> float:
        """Share of the tensors in which an effect reaches the weights."""
        return sum(self.tensors.values()) / len(self.tensors) if self.tensors else 0.0

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Entries of each tensor."""
        sides: dict[str, int] = {}
        for record in self.records:
            for unit, entry in record["units"].items():
                sides |= {f"{unit}.{side}": size for side, size in entry.get("sizes", {}).items()}
        return sides
