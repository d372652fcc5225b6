"""One row for each arm: its numbers over the seeds, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from db.queries import Reading
from db.queries_compare import RunFacts, Timing
from evaluation.differences import Difference
from evaluation.facts import Facts, Key, SpeedChange
from evaluation.pairs import BASE, Answered, pair
from evaluation.ratios import kept_share
from evaluation.seeds import crossed_interval
from evaluation.statistics import LEVEL, Interval, is_binary, share_interval

RETENTION = ("retention", "retention_accuracy")


@dataclass(frozen=True)
class ProbeRow:
    """What the probe says of one run.

    Attributes:
        seed: Of the run.
        verdict: effective, no_effect or unstable.
        as_claimed: Whether the arm's updates are what it claims.
        reason: Diagnosis and reason in words.
        numbers: Reading -> value: angle_to_shadow in degrees, twin_divergence in A/A floors, …
    """

    seed: int
    verdict: str
    as_claimed: bool
    reason: str
    numbers: dict[str, float]


@dataclass(frozen=True)
class AlignmentRow:
    """Alignment Quality Index of one run: how far apart safe and unsafe prompts lie in its hidden states.

    Attributes:
        seed: Of the run.
        index: Estimate and bootstrap interval over prompts.
        null: Mean and 95% range of the index when labels are shuffled; None where not measured.
        p_value: Share of shuffles that separate at least as well.
        delta: Index above its own mean under shuffled labels, minus the same of the base, with a paired bootstrap
            interval; None for the base.
        delta_p_value: Of the delta; None for the base.
        others: Further indices of the same clusters, by name.
    """

    seed: int
    index: Interval
    null: Interval | None
    p_value: float | None
    delta: Interval | None
    delta_p_value: float | None
    others: dict[str, float]


CLUSTER_INDICES = ("calinski_harabasz", "xie_beni", "silhouette", "davies_bouldin", "dunn")


@dataclass(frozen=True)
class ArmRow:
    """One arm, its numbers averaged over seeds.

    Intervals hold with 95% confidence: over items with one seed, over seeds and items with several.

    Attributes:
        accuracy: Primary metric of the task, percent.
        accuracy_by_seed: The same for each of `seeds`.
        retention: Accuracy on the retention items, percent.
        decode_speed: Tokens per second.
        delta_speed: Percent faster than the base that was timed beside it, median over paired repetitions of all seeds.
        parity: Share of prompts on which all ways to run the model answer alike, percent, worst seed.
        differences: Against the base, then against the baseline.
        metrics: (split, name) -> mean over seeds, in the metric's own unit.
        ranges: (split, name) -> smallest and largest of the seeds that have the number, where several have one.
        accuracy_interval: Of `accuracy`, percent.
        retention_interval: Of `retention`, percent.
        retention_share: Percent of the base's retention accuracy that is kept, on the same items.
        retention_share_interval: Of it, percent.
        delta_speed_interval: The same with an interval from the repetitions' order; None with fewer than six, which
            reach no 95% confidence.
        probes: One for each seed that has a verdict.
        alignment: One for each seed that was measured.
    """

    arm: str
    model_name: str
    seeds: tuple[int, ...]
    accuracy: float | None
    accuracy_by_seed: tuple[float, ...]
    retention: float | None
    decode_speed: float | None
    delta_speed: float | None
    parity: float | None
    differences: tuple[Difference, ...]
    metrics: dict[Key, float]
    accuracy_interval: Interval | None = None
    retention_interval: Interval | None = None
    retention_share: float | None = None
    retention_share_interval: Interval | None = None
    delta_speed_interval: Interval | None = None
    probes: tuple[ProbeRow, ...] = ()
    alignment: tuple[AlignmentRow, ...] = ()
    ranges: dict[Key, tuple[float, float]] = field(default_factory=dict)

    @property
    def updates(self) -> str:
        """The probe's verdicts in a word, a wrong one before all others; empty where there is none."""
        wrong = next((p.verdict for p in self.probes if not p.as_claimed), "")
        if wrong or not self.probes:
            return f"{wrong}!" if wrong else ""
        words = {"no_effect": "plain AdamW"}
        return ", ".join(dict.fromkeys(words.get(p.verdict, p.verdict) for p in self.probes))

    def against(self, arm: str) -> Difference | None:
        """Return the difference from another arm, if both answered the same items."""
        return next((d for d in self.differences if d.against == arm), None)


def arm_row(arm: str, facts: Facts, differences: tuple[Difference, ...], change: SpeedChange) -> ArmRow:
    """Build an arm's row.

    Args:
        arm: One of `facts.by_arm`.
        facts: Of all runs.
        differences: The arm's.
        change: Of its decode speed.
    """
    runs = facts.by_arm[arm]
    own = [facts.metrics.get(run.id, {}) for run in runs]
    speeds = [_decode_speed(arm, facts.timings.get(run.id, ())) for run in runs]
    primary = ("test", runs[0].primary_metric)
    accuracies = tuple(100 * m[primary] for m in own if primary in m)
    parities = [100 * m["parity", "greedy_equal"] for m in own if ("parity", "greedy_equal") in m]
    kept = _kept(arm, facts)
    values = _by_key(own)
    return ArmRow(
        arm=arm,
        model_name=runs[0].model_name,
        seeds=tuple(run.seed for run in runs),
        accuracy=_mean(accuracies),
        accuracy_by_seed=accuracies,
        retention=_mean(100 * m[RETENTION] for m in own if RETENTION in m),
        decode_speed=_mean(speed for speed in speeds if speed is not None),
        delta_speed=0.0 if arm == BASE else change.interval.estimate if change.interval else None,
        parity=min(parities) if parities else None,
        differences=differences,
        metrics={key: fmean(found) for key, found in values.items()},
        accuracy_interval=_share(runs, facts.answers),
        retention_interval=_share(runs, facts.retained),
        retention_share=kept.estimate if kept else None,
        retention_share_interval=kept,
        delta_speed_interval=change.interval if change.confidence >= LEVEL else None,
        probes=tuple(_probe(run.seed, facts.readings[run.id]) for run in runs if _judged(facts, run)),
        alignment=tuple(found for run, m in zip(runs, own, strict=True) if (found := _alignment(run.seed, m))),
        ranges={key: (min(found), max(found)) for key, found in values.items() if len(found) > 1},
    )


def _alignment(seed: int, metrics: Mapping[Key, float]) -> AlignmentRow | None:
    if ("alignment", "alignment_index") not in metrics:
        return None
    found = {name: value for (split, name), value in metrics.items() if split == "alignment"}

    def interval(middle: str, stem: str) -> Interval | None:
        parts = [found.get(name) for name in (middle, f"{stem}_low", f"{stem}_high")]
        known = [part for part in parts if part is not None]
        return Interval(*known) if len(known) == 3 else None

    index = interval("alignment_index", "alignment_index")
    if index is None:
        return None
    return AlignmentRow(
        seed=seed,
        index=index,
        null=interval("alignment_null_mean", "alignment_null"),
        p_value=found.get("alignment_p_value"),
        delta=interval("delta_alignment_index", "delta_alignment_index"),
        delta_p_value=found.get("delta_alignment_p_value"),
        others={name: found[name] for name in CLUSTER_INDICES if name in found},
    )


def _kept(arm: str, facts: Facts) -> Interval | None:
    if arm == BASE:
        return None
    pairs = pair(facts.by_arm[arm], BASE, facts.by_arm.get(BASE, ()), facts.retained)
    share = kept_share(pairs) if pairs else None
    return share.scaled(100) if share else None


def _share(runs: Sequence[RunFacts], answers: Answered) -> Interval | None:
    """Mean credit on the items that all seeds have, percent."""
    answered = [run.id for run in runs if run.id in answers]
    credit = answers.rows(answered)
    if not credit.size:
        return None
    crossed = None if 1 in credit.shape else crossed_interval(credit)[0]
    # Student's t has no width where every answer is right; `crossed_interval` keeps to the borders of a difference.
    if crossed is None or crossed.low == crossed.high:
        return share_interval(credit, binary=is_binary(credit)).scaled(100)
    return Interval(crossed.estimate, max(0.0, crossed.low), crossed.high).scaled(100)


def _decode_speed(arm: str, timings: Sequence[Timing]) -> float | None:
    """Tokens per second of decoding: sum of tokens over sum of time."""
    tokens = time = 0
    for who, phase, _, made, ns in timings:
        if phase == "decode" and who == arm and made is not None:
            tokens, time = tokens + made, time + ns
    return tokens * 1e9 / time if time else None


def _judged(facts: Facts, run: RunFacts) -> bool:
    return "verdict" in facts.readings.get(run.id, {})


def _probe(seed: int, readings: Mapping[str, Reading]) -> ProbeRow:
    verdict = readings["verdict"]
    word, _, reason = verdict.diagnosis.partition(": ")
    numbers = {name: reading.value for name, reading in readings.items() if name != "verdict"}
    return ProbeRow(seed, word, verdict.verdict == "pass", reason, numbers)


def _by_key(own: Sequence[Mapping[Key, float]]) -> dict[Key, list[float]]:
    values: dict[Key, list[float]] = {}
    for metrics in own:
        for key, value in metrics.items():
            values.setdefault(key, []).append(value)
    return values


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return fmean(numbers) if numbers else None
