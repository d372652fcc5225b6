"""One row per arm: its credit on a task or a benchmark, its numbers over the seeds, and its differences from others."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple

from sqlalchemy import Row

from db.runs import BASE
from evaluation import knowledge
from evaluation.measure.speed import median_interval
from evaluation.report.results import Key, Probe, ScoredRun
from evaluation.statistics.differences import Difference, Pairs, compare_pairs, kept_share
from evaluation.statistics.intervals import LEVEL, Interval, aligned, is_binary, share_interval
from evaluation.statistics.seeds import crossed_interval

BASELINE = "baseline_lora"
TEST, RETAINED = "test", "retention"
"""Splits of the items that an arm was trained for, and of general ones that no arm was trained for."""
FEWEST_RIGHT = 20
"""Retention items that a pretrained base has to answer right, so that something can be said about what is kept."""
RETENTION = (RETAINED, "retention_accuracy")
LOSS, KL = ("eval", "evaluation_loss"), ("eval", "kl_to_base")
OF_TRAINING = ("training_loss", "inversions", "gpu_memory_bytes")
"""Metrics of split train that say how a training went, as stage train recorded them at its end."""


class SpeedChange(NamedTuple):
    """Decode speed against the base that was timed beside it, over the paired repetitions of all seeds.

    Fewer than six repetitions cannot give 95% confidence.
    """

    interval: Interval | None = None  # of the median, in percent
    confidence: float = 0.0  # of the interval, as a share
    repetitions: int = 0


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One arm on the items of a task or a benchmark.

    Intervals hold with 95% confidence: over items with one seed, over seeds and items with several.
    """

    task: str  # or benchmark
    title: str  # of the metric that is an item's credit
    metric: str
    arm: str
    seeds: tuple[int, ...]
    accuracy: float | None  # mean credit, percent
    accuracy_interval: Interval | None
    differences: tuple[Difference, ...] = ()  # from the base, then from the baseline, then from `ArmRow.like`
    pairs: Mapping[str, Pairs] = field(default_factory=dict, compare=False, repr=False)  # what they were computed from
    runs: tuple[ScoredRun, ...] = field(default=(), compare=False, repr=False)

    def against(self, arm: str) -> Difference | None:
        return next((d for d in self.differences if d.against == arm), None)

    @property
    def current(self) -> bool:
        """Whether these results are in the working copy."""
        return all(run.is_current for run in self.runs)

    def outcome(self, baseline: str) -> str:
        """Conclusions about the base and the baseline in words; empty for the base itself."""
        others = dict.fromkeys(arm for arm in (BASE, baseline) if self.arm not in (BASE, arm))
        differences = {arm: self.against(arm) for arm in others}
        return "; ".join(
            f"not comparable with {arm}" if d is None
            else f"{d.outcome} {'against' if d.outcome == 'undecided' else 'than'} {arm}"
            for arm, d in differences.items()
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ArmRow(Scored):
    """One arm, its numbers averaged over seeds; accuracies and shares in percent."""

    model_name: str = ""
    retention: float | None = None
    retention_interval: Interval | None = None
    retention_kept: Interval | None = None  # share of the base's retention accuracy, on the same items
    retention_kept_by_seed: Mapping[int, float] = field(default_factory=dict)
    decode_speed: float | None = None  # tokens per second
    speed: SpeedChange = field(default_factory=SpeedChange)
    metrics: Mapping[Key, float] = field(default_factory=dict)  # mean over seeds, in the metric's own unit
    ranges: Mapping[Key, tuple[float, float]] = field(default_factory=dict)  # smallest and largest of several seeds
    costs: Mapping[str, float] = field(default_factory=dict)  # mean over seeds: db.records.Costs and seconds_a_step
    probes: tuple[Probe, ...] = ()
    preserve: str = ""  # method and strength that keep it close to its base; empty: none
    library: str = ""  # see `library`
    # The arm with the baseline's method that leaves the fewest causes, if a difference from the baseline has several
    # (another library, or preserved while the baseline is not); empty: there is none. None: it has one cause
    like: str | None = None
    # arm → evaluation loss minus that arm's of the same seed, for each seed that both have, nats per token
    losses: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def place(self) -> tuple[float, float] | None:
        """What was learned and what was kept, in percent; None if either is unknown."""
        x, kept = self.accuracy, self.retention_kept
        return (x, kept.estimate) if x is not None and kept is not None and math.isfinite(x) else None

    @property
    def delta_speed(self) -> float | None:
        """Percent faster than the base that was timed beside it; 0 for the base."""
        if self.arm == BASE:
            return 0.0
        return None if self.speed.interval is None else self.speed.interval.estimate

    @property
    def delta_speed_interval(self) -> Interval | None:
        return self.speed.interval if self.speed.confidence >= LEVEL else None

    @property
    def updates(self) -> str:
        """The probe's verdicts in a word, a wrong one first; empty if there is none."""
        wrong = next((p.verdict for p in self.probes if p.as_claimed is False), "")
        if wrong or not self.probes:
            return f"{wrong}!" if wrong else ""
        words = {"no_effect": "plain AdamW", "not_watched": "not watched"}
        return ", ".join(dict.fromkeys(words.get(p.verdict, p.verdict) for p in self.probes))


def arm_rows(runs: Sequence[ScoredRun], baseline: str) -> tuple[ArmRow, ...]:
    """The arms of one task, base first, the baseline next."""
    arms = grouped(runs, baseline)
    settings = {arm: of_arm[0].settings for arm, of_arm in arms.items()}
    likes = {arm: like_with_like(arm, settings, baseline) for arm in arms}
    pairs, differences = judge(arms, TEST, baseline, likes)
    rows = []
    for arm, arm_runs in arms.items():
        first, base = arm_runs[0], arms.get(BASE, ())
        primary = (TEST, first.primary_metric)
        retained = None if arm == BASE else pair(arm_runs, BASE, base, RETAINED)
        if retained and knowledge.is_asked(first.answers(RETAINED)):
            retained = that_it_knew(retained)
        share = kept_share(retained) if retained else None
        by_seed: dict[int, float] = {}
        if retained and share:
            shares = 100 * retained.credit.mean(axis=1) / retained.reference.mean()
            by_seed = dict(zip(retained.seeds, map(float, shares), strict=True))
        values: dict[Key, list[float]] = {}
        costs: dict[str, list[float]] = {}
        for run in arm_runs:
            for key, value in run.metrics.items():
                values.setdefault(key, []).append(value)
            for name, value in run.costs.items():
                costs.setdefault(name, []).append(value)
            if run.train_seconds and run.steps:
                costs.setdefault("seconds_a_step", []).append(run.train_seconds / run.steps)
        changes = [change for run in arm_runs for change in speed_changes(arm, run.timings)] if arm != BASE else ()
        rows.append(ArmRow(
            task=first.task, title=first.task_title, metric=first.primary_metric,
            arm=arm,
            seeds=tuple(run.seed for run in arm_runs),
            accuracy=_mean(100 * value for value in values.get(primary, ())),
            accuracy_interval=credit_interval([run.answers(TEST) for run in arm_runs]),
            differences=differences.get(arm, ()),
            pairs={against: paired for (name, against), paired in pairs.items() if name == arm},
            runs=tuple(arm_runs),
            model_name=first.model_name,
            retention=_mean(100 * value for value in values.get(RETENTION, ())),
            retention_interval=credit_interval([run.answers(RETAINED) for run in arm_runs]),
            retention_kept=share.scaled(100) if share else None,
            retention_kept_by_seed=by_seed,
            decode_speed=_mean(_decode_speeds(arm_runs)),
            speed=speed_change(changes),
            metrics={key: fmean(of_key) for key, of_key in values.items()},
            ranges={key: (min(some), max(some)) for key, some in values.items() if len(some) > 1},
            costs={name: fmean(of_name) for name, of_name in costs.items()},
            probes=tuple(run.probe for run in arm_runs if run.probe),
            preserve=preserved(settings[arm]), library=library(settings[arm]), like=likes[arm],
            losses={
                against: tuple(run.metrics[LOSS] - other.metrics[LOSS] for run, other in both)
                for against in _references(arm, baseline, likes)
                if (both := [(run, other) for run, other in partners(arm_runs, against, arms.get(against, ()))
                             if LOSS in run.metrics and LOSS in other.metrics])
            },
        ))  # fmt: skip
    return tuple(rows)


def that_it_knew(pairs: Pairs) -> Pairs | None:
    """Pairs on the items that the base has right, since a pretrained one was not taught the suite; None if too few."""
    right = pairs.reference.all(axis=0)
    if right.sum() < FEWEST_RIGHT:
        return None
    return replace(pairs, credit=pairs.credit[:, right], reference=pairs.reference[:, right])


def grouped(runs: Iterable[ScoredRun], baseline: str) -> dict[str, list[ScoredRun]]:
    """Arm → its runs, base first, the baseline next."""
    arms: dict[str, list[ScoredRun]] = {}
    for run in sorted(runs, key=lambda run: (run.arm != BASE, run.arm != baseline, run.arm)):
        arms.setdefault(run.arm, []).append(run)
    return arms


def judge(
    arms: Mapping[str, Sequence[ScoredRun]], split: str, baseline: str, likes: Mapping[str, str | None] | None = None
) -> tuple[dict[tuple[str, str], Pairs], dict[str, tuple[Difference, ...]]]:
    """Pairs by (arm, against) on the items of a split, and each arm's differences, corrected over the arms."""
    references = {arm: _references(arm, baseline, likes or {}) for arm in arms}
    pairs = {
        (arm, against): paired
        for against in dict.fromkeys(chain(*references.values()))
        for arm in arms
        if against in references[arm] and (paired := pair(arms[arm], against, arms.get(against, ()), split)) is not None
    }
    return pairs, compare_pairs(pairs)


def _references(arm: str, baseline: str, likes: Mapping[str, str | None]) -> list[str]:
    """What an arm is compared with."""
    others = dict.fromkeys((BASE, baseline, likes.get(arm)))
    return [] if arm == BASE else [other for other in others if other and other != arm]


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
    train, method = settings[arm], settings[baseline].keys() - {"library"}
    if len(causes(train, settings[baseline])) < 2 or train.keys() - {"library"} == method:
        return None
    same_method = {name: other for name, other in settings.items() if other.keys() - {"library"} == method}
    controls = {name: causes(train, other) for name, other in same_method.items()}
    best = min(controls, key=lambda name: (len(controls[name]), preserved(settings[name]) != preserved(train)))
    return "" if best == baseline else best


def partners(
    runs: Iterable[ScoredRun], against: str, others: Iterable[ScoredRun]
) -> Iterable[tuple[ScoredRun, ScoredRun]]:
    """Each run with its counterpart, where there is one.

    Against the base, it is the run's reference; otherwise it has equal seed, items and backend, since equal seeds share
    the order of the data and the initial weights.
    """

    def key(run: ScoredRun) -> object:
        return run.id if against == BASE else (run.seed, run.test_items_sha256, run.backend_name)

    counterparts = {key(other): other for other in others}
    for run in runs:
        counterpart = counterparts.get(run.reference_run_id if against == BASE else key(run))
        if counterpart:
            yield run, counterpart


def pair(runs: Iterable[ScoredRun], against: str, others: Iterable[ScoredRun], split: str) -> Pairs | None:
    """Pair an arm's runs with another arm's, on the items of a split that all of them answered; None without any."""
    both = [
        (run, other) for run, other in partners(runs, against, others) if run.answers(split) and other.answers(split)
    ]
    credit = aligned([run.answers(split) for side in zip(*both, strict=True) for run in side])
    seeds = tuple(run.seed for run, _ in both)
    return Pairs(against, seeds, credit[: len(seeds)], credit[len(seeds) :]) if credit.size else None


def credit_interval(answers: Iterable[Mapping[str, float]]) -> Interval | None:
    """Mean credit on the items that all seeds answered, in percent."""
    credit = aligned([of_seed for of_seed in answers if of_seed])
    if not credit.size:
        return None
    crossed = None if 1 in credit.shape else crossed_interval(credit)[0]
    # Student's t has no width if every answer is right, and `crossed_interval` clips at the limits of a difference.
    if crossed is None or crossed.low == crossed.high:
        return share_interval(credit, binary=is_binary(credit)).scaled(100)
    return Interval(crossed.estimate, max(0.0, crossed.low), crossed.high).scaled(100)


def _decode_speeds(runs: Iterable[ScoredRun]) -> Iterable[float]:
    """Tokens decoded per second in each timed run: sum of tokens over sum of time."""
    for run in runs:
        decoded = [t for t in run.timings if t.phase == "decode" and t.arm == run.arm and t.tokens is not None]
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
        return SpeedChange()
    median = median_interval(changes, LEVEL)
    points = Interval(median["median"], median["low"], median["high"]).scaled(100)
    return SpeedChange(points, median["confidence"], len(changes))


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return fmean(numbers) if numbers else None
