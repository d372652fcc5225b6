"""One row per arm of a task: its numbers over the seeds, with intervals and differences from other arms."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, NamedTuple

from sqlalchemy import Row

from db.records import Run, join_value
from db.runs import BASE
from evaluation.measure.speed import median_interval
from evaluation.report.results import Key, Results
from evaluation.statistics.differences import Difference, Pairs, compare_pairs, kept_share
from evaluation.statistics.intervals import LEVEL, Interval, aligned, is_binary, share_interval
from evaluation.statistics.seeds import crossed_interval

BASELINE = "baseline_lora"
RETENTION = ("retention", "retention_accuracy")
LOSS, KL = ("eval", "evaluation_loss"), ("eval", "kl_to_base")
OF_TRAINING = ("training_loss", "inversions", "gpu_memory_bytes")
"""Metrics of split train that say how a training went, as stage train recorded them at its end."""
CLUSTER_INDICES = ("calinski_harabasz", "xie_beni", "silhouette", "davies_bouldin", "dunn")


@dataclass(frozen=True)
class ProbeRow:
    seed: int
    verdict: str  # effective, no_effect, unstable or not_watched
    as_claimed: bool | None  # whether the arm's updates are what it claims; None: not watched
    reason: str
    numbers: dict[str, float]  # reading → value: angle_to_shadow in degrees, twin_divergence in A/A floors, …


@dataclass(frozen=True)
class AlignmentRow:
    """Separation index of one run: how far apart safe and unsafe prompts lie in its hidden states."""

    seed: int
    index: Interval  # estimate and bootstrap interval over prompts
    null: Interval | None  # mean and 95% range of the index when labels are shuffled; None where not measured
    p_value: float | None  # share of shuffles that separate at least as well
    # index above its own mean under shuffled labels, minus the same of the base, with a paired bootstrap interval; None
    # for the base, as is its p-value
    delta: Interval | None
    delta_p_value: float | None
    others: dict[str, float]


@dataclass(frozen=True)
class ArmRow:
    """One arm, its numbers averaged over seeds; accuracies, shares and parity in percent.

    Intervals hold with 95% confidence: over items with one seed, over seeds and items with several.
    """

    arm: str
    model_name: str
    seeds: tuple[int, ...]
    accuracy: float | None  # primary metric of the task, and for each of `seeds` in `accuracy_by_seed`
    accuracy_by_seed: tuple[float, ...]
    retention: float | None
    decode_speed: float | None  # tokens per second
    # percent faster than the base that was timed beside it, median over paired repetitions of all seeds; fewer than six
    # cannot reach 95% confidence, so they have no interval
    delta_speed: float | None
    parity: float | None  # share of prompts on which all ways to run the model answer alike, worst seed
    differences: tuple[Difference, ...]  # from the base, then from the baseline, then from `like`
    metrics: dict[Key, float]  # mean over seeds, in the metric's own unit
    accuracy_interval: Interval | None = None
    retention_interval: Interval | None = None
    retention_share: float | None = None  # what is kept of the base's retention accuracy, on the same items
    retention_share_interval: Interval | None = None
    delta_speed_interval: Interval | None = None
    probes: tuple[ProbeRow, ...] = ()
    alignment: tuple[AlignmentRow, ...] = ()
    # smallest and largest value over the seeds, for metrics that several seeds have
    ranges: dict[Key, tuple[float, float]] = field(default_factory=dict)
    kept_by_seed: dict[int, float] = field(default_factory=dict)  # `retention_share` of each seed
    preserve: str = ""  # method and strength that keep it close to its base; empty: none
    library: str = ""  # see `library`
    # The arm with the baseline's method that leaves the fewest causes, if a difference from the baseline has several
    # (another library, or preserved while the baseline is not); empty: there is none. None: it has one cause
    like: str | None = None
    # arm → evaluation loss minus that arm's of the same seed, for each seed that both have, nats per token
    losses: dict[str, tuple[float, ...]] = field(default_factory=dict)
    costs: dict[str, float] = field(
        default_factory=dict
    )  # of training, mean over seeds: db.records.Costs and seconds_a_step

    @property
    def place(self) -> tuple[float, float] | None:
        """Accuracy and retention_share: what was learned and what was kept; None if either is unknown."""
        x, y = self.accuracy, self.retention_share
        return (x, y) if x is not None and y is not None and math.isfinite(x) else None

    @property
    def updates(self) -> str:
        """The probe's verdicts in a word, a wrong one first; empty if there is none."""
        wrong = next((p.verdict for p in self.probes if p.as_claimed is False), "")
        if wrong or not self.probes:
            return f"{wrong}!" if wrong else ""
        words = {"no_effect": "plain AdamW", "not_watched": "not watched"}
        return ", ".join(dict.fromkeys(words.get(p.verdict, p.verdict) for p in self.probes))

    def against(self, arm: str) -> Difference | None:
        return next((d for d in self.differences if d.against == arm), None)


class SpeedChange(NamedTuple):
    """Decode speed against the base over paired repetitions, percent; confidence of the interval as a share."""

    interval: Interval | None
    confidence: float
    repetitions: int


class SideBySide(NamedTuple):
    """The arms of one task, base first, the baseline next; pairs go by (arm, against)."""

    rows: tuple[ArmRow, ...]
    pairs: dict[tuple[str, str], Pairs]
    changes: dict[str, SpeedChange]


def side_by_side(results: Results, runs: Sequence[Run], baseline: str) -> SideBySide:
    by_arm: dict[str, list[Run]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)
    arms = sorted(by_arm, key=lambda arm: (arm != BASE, arm != baseline, arm))
    settings = {arm: of_arm[0].settings for arm, of_arm in by_arm.items()}
    likes = {arm: like_with_like(arm, settings, baseline) for arm in arms}
    compared = [
        (arm, against)
        for against in dict.fromkeys((BASE, baseline, *filter(None, likes.values())))
        for arm in arms
        if arm not in (BASE, against) and against in (BASE, baseline, likes[arm])
    ]
    pairs = {
        (arm, against): paired
        for arm, against in compared
        if (paired := pair(by_arm[arm], against, by_arm.get(against, ()), results.answers)) is not None
    }
    loss = {run_id: metrics[LOSS] for run_id, metrics in results.metrics.items() if LOSS in metrics}
    losses: dict[str, dict[str, tuple[float, ...]]] = {arm: {} for arm in arms}
    for arm, against in compared:
        if partners := _partners(by_arm[arm], against, by_arm.get(against, ()), loss):
            losses[arm][against] = tuple(loss[run] - loss[partner] for _, run, partner in partners)
    differences = compare_pairs(pairs)
    changes = {BASE: speed_change(())}
    for arm in (arm for arm in arms if arm != BASE):
        timings = (results.timings.get(run.id, ()) for run in by_arm[arm])
        changes[arm] = speed_change([change for of_run in timings for change in speed_changes(arm, of_run)])
    base = by_arm.get(BASE, ())
    rows = (_row(by_arm[arm], base, results, differences.get(arm, ()), changes[arm]) for arm in arms)
    described = tuple(
        replace(row, preserve=preserved(train), library=library(train), like=likes[row.arm], losses=losses[row.arm])
        for row in rows
        for train in [settings[row.arm]]
    )
    return SideBySide(described, pairs, changes)


def preserved(settings: Mapping[str, Any]) -> str:
    """What keeps an arm close to its base, according to its section train; empty: nothing."""
    preserve = settings.get("preserve") or {}
    if preserve.get("method", "none") == "none":
        return ""
    strength = f"strength {preserve['strength']:g}" if preserve["kl"] is None else f"KL {preserve['kl']:g}"
    return f"{preserve['method']}, {strength}"


def library(settings: Mapping[str, Any]) -> str:
    """What an arm trains with besides PEFT and TRL ("unsloth"); empty: nothing else."""
    return str(settings.get("library", ""))


def causes(settings: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """What an arm has that could explain a difference from another: its method, its library, its preserve method.

    Arms whose settings have the same names run the same method.
    """
    method, other = (each.keys() - {"library"} for each in (settings, reference))
    preserve = (settings.get("preserve") or {}).get("method", "none")
    return [
        *(["method"] if method != other else []),
        *(["library"] if library(settings) not in ("", library(reference)) else []),
        *(["preserve"] if preserve not in ("none", (reference.get("preserve") or {}).get("method", "none")) else []),
    ]


def like_with_like(arm: str, settings: Mapping[str, Mapping[str, Any]], baseline: str) -> str | None:
    """See `ArmRow.like`."""
    if baseline not in settings:
        return None
    own, method = settings[arm], settings[baseline].keys() - {"library"}
    if len(causes(own, settings[baseline])) < 2 or own.keys() - {"library"} == method:
        return None
    controls = {name: causes(own, theirs) for name, theirs in settings.items() if theirs.keys() - {"library"} == method}
    best = min(controls, key=lambda name: (len(controls[name]), preserved(settings[name]) != preserved(own)))
    return "" if best == baseline else best


def pair(
    runs: Sequence[Run], against: str, others: Sequence[Run], answers: Mapping[int, Mapping[str, float]]
) -> Pairs | None:
    """Pair an arm's runs with another arm's, on the items that all of them answered.

    Against the base, every run is paired with its reference; otherwise runs with equal seed, items and backend are
    paired, since equal seeds share the order of the data and the initial weights. None if no run with answers has a
    partner with answers, or if the pairs share no item.
    """
    partners = _partners(runs, against, others, answers)
    if not partners:
        return None
    seeds, run_ids, partner_ids = zip(*partners, strict=True)
    credit = aligned([answers[run_id] for run_id in (*run_ids, *partner_ids)])
    return Pairs(against, seeds, credit[: len(seeds)], credit[len(seeds) :]) if credit.size else None


def _partners(
    runs: Sequence[Run], against: str, others: Sequence[Run], known: Collection[int]
) -> list[tuple[int, int, int]]:
    """(seed, run, partner) of the known runs with a known partner."""

    def key(run: Run, *, partner: bool = False) -> object:
        if against == BASE:
            return run.id if partner else run.reference_run_id
        return run.seed, run.test_items_sha256, run.backend_name

    partners = {key(other, partner=True): other.id for other in others if other.id in known}
    return [(run.seed, run.id, partners[key(run)]) for run in runs if run.id in known and key(run) in partners]


def _row(
    runs: Sequence[Run], base: Sequence[Run], results: Results, differences: tuple[Difference, ...],
    change: SpeedChange,
) -> ArmRow:  # fmt: skip
    arm = runs[0].arm
    by_run = [results.metrics.get(run.id, {}) for run in runs]
    primary = ("test", runs[0].primary_metric)
    accuracies = tuple(100 * m[primary] for m in by_run if primary in m)
    parities = [100 * m["parity", "greedy_equal"] for m in by_run if ("parity", "greedy_equal") in m]
    retained = None if arm == BASE else pair(runs, BASE, base, results.retained)
    share = kept_share(retained) if retained else None
    kept = share.scaled(100) if share else None
    by_seed: dict[int, float] = {}
    if retained and share:
        shares = 100 * retained.credit.mean(axis=1) / retained.reference.mean()
        by_seed = dict(zip(retained.seeds, shares.tolist(), strict=True))
    spent: dict[str, list[float]] = {}
    for run in runs:
        for name, value in run.costs.items():
            spent.setdefault(name, []).append(value)
        if run.train_seconds and run.steps:
            spent.setdefault("seconds_a_step", []).append(run.train_seconds / run.steps)
    values: dict[Key, list[float]] = {}
    for metrics in by_run:
        for key, value in metrics.items():
            values.setdefault(key, []).append(value)
    return ArmRow(
        arm=arm,
        model_name=runs[0].model_name,
        seeds=tuple(run.seed for run in runs),
        accuracy=_mean(accuracies),
        accuracy_by_seed=accuracies,
        retention=_mean(100 * m[RETENTION] for m in by_run if RETENTION in m),
        decode_speed=_mean(_decode_speeds(arm, (results.timings.get(run.id, ()) for run in runs))),
        delta_speed=0.0 if arm == BASE else change.interval.estimate if change.interval else None,
        parity=min(parities) if parities else None,
        differences=differences,
        metrics={key: fmean(over_seeds) for key, over_seeds in values.items()},
        accuracy_interval=credit_interval([results.answers[run.id] for run in runs if run.id in results.answers]),
        retention_interval=credit_interval([results.retained[run.id] for run in runs if run.id in results.retained]),
        retention_share=kept.estimate if kept else None,
        retention_share_interval=kept,
        delta_speed_interval=change.interval if change.confidence >= LEVEL else None,
        probes=tuple(
            _probe(run.seed, readings) for run in runs if "verdict" in (readings := results.readings.get(run.id, {}))
        ),
        alignment=tuple(index for run, m in zip(runs, by_run, strict=True) if (index := _alignment(run.seed, m))),
        ranges={key: (min(some), max(some)) for key, some in values.items() if len(some) > 1},
        kept_by_seed=by_seed,
        costs={name: fmean(over_seeds) for name, over_seeds in spent.items()},
    )


def credit_interval(answers: Sequence[Mapping[str, float]]) -> Interval | None:
    """Mean credit on the items that all seeds answered, in percent."""
    credit = aligned(answers)
    if not credit.size:
        return None
    crossed = None if 1 in credit.shape else crossed_interval(credit)[0]
    # Student's t has no width if every answer is right, and `crossed_interval` clips at the limits of a difference.
    if crossed is None or crossed.low == crossed.high:
        return share_interval(credit, binary=is_binary(credit)).scaled(100)
    return Interval(crossed.estimate, max(0.0, crossed.low), crossed.high).scaled(100)


def _decode_speeds(arm: str, of_runs: Iterable[Sequence[Row[Any]]]) -> Iterable[float]:
    """Tokens decoded per second in each timed run: sum of tokens over sum of time."""
    for timings in of_runs:
        decoded = [t for t in timings if t.phase == "decode" and t.arm == arm and t.tokens is not None]
        if time := sum(t.nanoseconds for t in decoded):
            yield sum(t.tokens or 0 for t in decoded) * 1e9 / time


def speed_changes(arm: str, timings: Sequence[Row[Any]]) -> list[float]:
    """Decode speed over that of the base in the same repetition, minus 1, for each repetition of one run."""
    rates: dict[str, dict[int, float]] = {BASE: {}, arm: {}}
    for t in timings:
        if t.phase == "decode" and t.tokens and t.nanoseconds and t.arm in rates:
            rates[t.arm][t.repetition] = t.tokens / t.nanoseconds
    tuned, base = rates[arm], rates[BASE]
    return [tuned[k] / base[k] - 1 for k in sorted(tuned.keys() & base.keys())]


def speed_change(changes: Sequence[float]) -> SpeedChange:
    """Median over the repetitions of all seeds, with an interval from order statistics, so outliers have no effect."""
    if not changes:
        return SpeedChange(None, 0.0, 0)
    median = median_interval(changes, LEVEL)
    points = Interval(median["median"], median["low"], median["high"]).scaled(100)
    return SpeedChange(points, median["confidence"], len(changes))


def _probe(seed: int, readings: Mapping[str, Row[Any]]) -> ProbeRow:
    verdict = readings["verdict"]
    word, _, reason = verdict.diagnosis.partition(": ")
    numbers = {n: join_value(row.value, row.value_kind) for n, row in readings.items() if n != "verdict"}
    return ProbeRow(
        seed, word, {"pass": True, "fail": False}.get(verdict.verdict), reason.removeprefix("none: "), numbers
    )


def _alignment(seed: int, metrics: Mapping[Key, float]) -> AlignmentRow | None:
    numbers = {name: value for (split, name), value in metrics.items() if split == "alignment"}

    def bounded(middle: str, stem: str) -> Interval | None:
        names = (middle, f"{stem}_low", f"{stem}_high")
        return Interval(*(numbers[name] for name in names)) if all(name in numbers for name in names) else None

    index = bounded("alignment_index", "alignment_index")
    if index is None:
        return None
    return AlignmentRow(
        seed=seed,
        index=index,
        null=bounded("alignment_null_mean", "alignment_null"),
        p_value=numbers.get("alignment_p_value"),
        delta=bounded("delta_alignment_index", "delta_alignment_index"),
        delta_p_value=numbers.get("delta_alignment_p_value"),
        others={name: numbers[name] for name in CLUSTER_INDICES if name in numbers},
    )


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return fmean(numbers) if numbers else None
