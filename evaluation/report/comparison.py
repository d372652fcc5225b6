"""All arms side by side with everything that is judged about them: outcomes, criteria, power, and limits.

Chapters and renderers only show what is computed here.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from db import runs as db_runs
from db.errors import DatabaseError
from db.records import Run
from db.runs import BASE, Choice
from db.store import open_session
from evaluation.report.alignment import in_words as alignment_in_words
from evaluation.report.arms import BASELINE, ArmRow, SideBySide, credit_interval, pair, side_by_side
from evaluation.report.criteria import Criterion, judge_arm
from evaluation.report.judgement import compared, contradiction, like_with_like, not_compared
from evaluation.report.results import Results, read
from evaluation.report.serving import PhaseRow, PrecisionRow, ServedRow, phase_rows, precision_rows, served_rows
from evaluation.statistics.differences import SEED_MARGIN, Difference, compare_pairs
from evaluation.statistics.intervals import Interval
from evaluation.statistics.power import PowerRow, power_rows
from trainers.words import suggest


class ChoiceError(ValueError):
    """A name that no run in the database has."""


@dataclass(frozen=True)
class Primary:
    """A task and the metric by which its arms are compared: the mean credit over its test items.

    In words it is the task's title, such as "GSM8K exact match", or its first word where there is little room: Δ GSM8K.
    Keys for programs are `score` and `delta_score`; only the air quality task keeps its older ones.
    """

    task: str
    title: str
    metric: str

    @property
    def air(self) -> bool:
        """Whether this is the air quality task, whose index shares its initials with the alignment index."""
        return self.task == FIRST.task

    @property
    def short(self) -> str:
        return (self.title.split() or [self.title])[0].rstrip(",;:")

    @property
    def long(self) -> str:
        return "AQI category accuracy" if self.air else self.title

    @property
    def key(self) -> str:
        return "aqi_accuracy" if self.air else "score"

    def difference_key(self, against: str = BASE) -> str:
        stem = "aqi" if self.air else "score"
        return f"delta_{stem}" if against == BASE else f"{stem}_against_{against}"


FIRST = Primary("aqi", "AQI accuracy", "aqi_category_accuracy")
"""Of the air quality task; the same as in db.records, which is slow to import."""


@dataclass(frozen=True)
class TaskRow:
    """One arm on a task that was ever scored, or on a benchmark; score in percent."""

    task: str
    title: str
    metric: str
    arm: str
    seeds: tuple[int, ...]
    score: float | None
    interval: Interval | None
    to_base: Difference | None  # difference from the base; None for the base, and where they cannot be compared
    to_baseline: Difference | None  # the same from the arm in `baseline`
    baseline: str
    ended: datetime  # end of the last evaluation, UTC
    current: bool

    @property
    def outcome(self) -> str:
        """Conclusions about the base and the baseline; empty for the base itself."""
        if self.arm == BASE:
            return ""
        against = {BASE: self.to_base}
        if self.baseline not in (BASE, self.arm):
            against[self.baseline] = self.to_baseline
        return "; ".join(
            f"not comparable with {name}" if d is None
            else f"{d.outcome} {'against' if d.outcome == 'undecided' else 'than'} {name}"
            for name, d in against.items()
        )  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    rows: tuple[ArmRow, ...]  # base first, the baseline next
    outcomes: tuple[str, ...]  # conclusion for each arm but the base
    notes: tuple[str, ...]  # limits of the interpretation
    units: Mapping[str, tuple[str, str, str]]  # metric name → (unit, better direction, description)
    runs: tuple[dict[str, Any], ...]  # where each number comes from, one mapping for each run
    precisions: tuple[PrecisionRow, ...] = ()  # each arm's model in other precisions, in the order of `rows`
    served: tuple[ServedRow, ...] = ()
    phases: tuple[PhaseRow, ...] = ()
    criteria: tuple[Criterion, ...] = ()
    # what it would take to see 1, 2 and 3 points, for each arm and what it is compared with
    power: tuple[PowerRow, ...] = ()
    baseline: str = BASELINE  # the arm that the others are compared with besides the base
    filters: str = ""
    primary: Primary = FIRST
    tasks: tuple[TaskRow, ...] = ()  # all tasks in the database, arm by arm; the newest task first
    task_notes: tuple[str, ...] = ()  # which runs of them are left out, and why
    benchmarks: tuple[TaskRow, ...] = ()  # of lm-evaluation-harness, arm by arm; those with credit for each item
    # whether an arm's separation index differs from the base's, a sentence for each arm with a difference
    alignment: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()  # how to read the numbers

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(row.arm for row in self.rows)

    @property
    def trained(self) -> tuple[ArmRow, ...]:
        return tuple(row for row in self.rows if row.arm != BASE)

    @property
    def references(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((BASE, self.baseline)))

    @property
    def pareto(self) -> dict[str, tuple[str, ...]]:
        """Arm → the arms of the Pareto front that have at least its accuracy and retention, and more of one of them.

        By the means alone; an arm on the front has none.
        """
        places = {row.arm: row.place for row in self.rows if row.place}
        above = {
            arm: [name for name, (x, y) in places.items() if x >= own_x and y >= own_y and (x, y) != (own_x, own_y)]
            for arm, (own_x, own_y) in places.items()
        }
        return {arm: tuple(name for name in names if not above[name]) for arm, names in above.items()}

    def has(self, split: str, name: str) -> bool:
        return any((split, name) in row.metrics for row in self.rows)


@dataclass(frozen=True)
class Report:
    comparison: Comparison
    results: Results


def load_report(
    url_or_path: str | Path, choice: Choice | None = None, baseline: str | None = None, *, detail: bool = False
) -> Report:
    """Compare the arms in a database with base and baseline_lora, by default all runs of the task on disk.

    `detail` also reads what only the long reports show: curves, layers, files, answers.

    Raises:
        DatabaseError: No database, or no finished run that was chosen (`missing`).
        DatabaseError: The database cannot be read.
        ChoiceError: No run has a name that was chosen.
    """
    choice = choice or Choice()
    with open_session(url_or_path) as session:
        runs = db_runs.finished_runs(session)
        _check(runs, choice, baseline)
        against = baseline or BASELINE
        if choice.arms:  # the baseline is always included
            choice = replace(choice, arms={*choice.arms, against})
        results = read(session, runs, choice, detail=detail)
    if not results.runs:
        got = "a database without any" if choice == Choice() else "none that fits all filters"
        raise DatabaseError(f"finished runs in {url_or_path}", got, "run `dvc repro`, which makes them", missing=True)
    return Report(compare(results, against, _filters(choice, against)), results)


def _check(runs: Sequence[Run], choice: Choice, baseline: str | None) -> None:
    """Refuse names that no finished run has."""
    tasks = [task.name for task in db_runs.tasks_of(runs)]
    of_task, _ = db_runs.choose(runs, Choice(task=choice.task))
    names: dict[str, tuple[Iterable[str], Iterable[str]]] = {
        "arm": ([*choice.arms, *filter(None, [baseline])], sorted({run.arm for run in of_task})),
        "seed": (map(str, choice.seeds), map(str, sorted({run.seed for run in of_task}))),
        "backend": (choice.backends, sorted({run.backend_name for run in of_task})),
    }
    if tasks and choice.task is not None and choice.task not in tasks:  # then no arm can be checked either
        names = {"task": ([choice.task], tasks)}
    elif not of_task:
        return
    problems = [
        f"expected the {kind} of a finished run, got {name!r}{suggest(name, known)}"
        for kind, (asked, available) in names.items()
        for known in [list(available)]
        for name in dict.fromkeys(asked)
        if name not in known
    ]
    if problems:
        raise ChoiceError("\n".join(problems))


def _filters(choice: Choice, baseline: str) -> str:
    parts = []
    if choice.arms:
        others = sorted({*choice.arms} - {BASE, baseline})
        parts.append("arms " + ", ".join(dict.fromkeys((BASE, baseline, *others))))
    if choice.seeds:
        parts.append(f"seeds {', '.join(map(str, sorted(choice.seeds)))} of the trained arms")
    if choice.backends:
        parts.append(f"backends {', '.join(sorted(choice.backends))}")
    return f"Only {'; '.join(parts)}: other runs are left out" if parts else ""


def compare(results: Results, baseline: str = BASELINE, filters: str = "") -> Comparison:
    """Judge the runs of the chosen task, and score the arms of all other tasks."""
    sides = {task.name: side_by_side(results, results.chosen[task.name], baseline) for task in results.tasks}
    side = sides[results.task or ""]
    by_arm = {row.arm: [run for run in results.runs if run.arm == row.arm] for row in side.rows}
    first = results.runs[0]
    primary = Primary(first.task, first.task_title, first.primary_metric)
    arms = {row.arm: row for row in side.rows}
    left_out = {name: _left_out(name, counts) for name, counts in results.left_out.items()}
    return Comparison(
        rows=side.rows,
        outcomes=tuple(_in_words(row, baseline, primary.title, arms) for row in side.rows if row.arm != BASE),
        notes=(*_notes(side.rows, results, primary), *left_out[primary.task]),
        methods=tuple(_methods(side.rows, results)),
        units=results.units,
        runs=tuple(_provenance(results, run) for runs in by_arm.values() for run in runs),
        precisions=tuple(row for runs in by_arm.values() for row in precision_rows(results, runs)),
        served=tuple(row for runs in by_arm.values() for run in runs for row in served_rows(results, run)),
        phases=tuple(row for runs in by_arm.values() for row in phase_rows(runs, results.timings)),
        criteria=tuple(
            criterion
            for row in side.rows
            if row.arm != BASE
            for criterion in judge_arm(row, baseline, side.changes[row.arm], short=primary.short, title=primary.title)
        ),
        power=tuple(row for (arm, _), pairs in side.pairs.items() for row in power_rows(arm, pairs)),
        baseline=baseline,
        filters=filters,
        primary=primary,
        tasks=tuple(_task_rows(results, sides, baseline)),
        task_notes=tuple(note for notes in left_out.values() for note in notes),
        benchmarks=tuple(_benchmark_rows(results, by_arm, baseline)),
        alignment=tuple(sentence for row in side.rows if (sentence := alignment_in_words(row))),
    )


def _in_words(row: ArmRow, baseline: str, title: str, arms: Mapping[str, ArmRow]) -> str:
    references = dict.fromkeys((BASE, baseline))
    words = [compared([row], against, title) for against in references]
    words += [*like_with_like([row], arms, baseline, title), *not_compared([row], references, arms)]
    return " ".join(filter(None, words))


def _task_rows(results: Results, sides: Mapping[str, SideBySide], baseline: str) -> Iterable[TaskRow]:
    for task in results.tasks:
        name, title, metric = task.name, task.title, task.primary_metric
        for row in sides[name].rows:
            runs = [run for run in results.chosen[name] if run.arm == row.arm]
            score, bounds = row.accuracy, row.accuracy_interval
            yield _task_row(name, title, metric, runs, score, bounds, row.differences, baseline, task.current)


def _benchmark_rows(results: Results, arms: Mapping[str, Sequence[Run]], baseline: str) -> Iterable[TaskRow]:
    """Each benchmark's arms on the items that they share, with Holm's correction over the arms, as for the task."""
    for name, benchmark in results.benchmarks.items():
        title = f"{benchmark.metric} of lm-evaluation-harness"
        pairs = {
            (arm, against): paired
            for against in dict.fromkeys((BASE, baseline))
            for arm, runs in arms.items()
            if arm not in (BASE, against)
            and (paired := pair(runs, against, arms.get(against, ()), benchmark.answers)) is not None
        }
        judged = compare_pairs(pairs)
        for arm, runs in arms.items():
            asked = [run for run in runs if run.id in benchmark.answers]
            if bounds := credit_interval([benchmark.answers[run.id] for run in asked]):
                current = all(run.is_current for run in asked)
                score, differences = bounds.estimate, judged.get(arm, ())
                yield _task_row(name, title, benchmark.metric, asked, score, bounds, differences, baseline, current)


def _task_row(
    task: str, title: str, metric: str, runs: Sequence[Run], score: float | None, bounds: Interval | None,
    differences: Sequence[Difference], baseline: str, current: bool,
) -> TaskRow:  # fmt: skip
    against = {difference.against: difference for difference in differences}
    to_baseline = against.get(baseline) if baseline != BASE else None
    seeds, ended = tuple(run.seed for run in runs), max(run.ended for run in runs)
    to_base = against.get(BASE)
    return TaskRow(
        task, title, metric, runs[0].arm, seeds, score, bounds, to_base, to_baseline, baseline, ended, current
    )


def _provenance(results: Results, run: Run) -> dict[str, Any]:
    place = results.environments[run.environment_id]
    return {
        "arm": run.arm,
        "seed": run.seed,
        "run_key": run.run_key,
        "git_commit": run.git_commit,
        "git_dirty": run.git_dirty,
        "backend": f"{run.backend_name} {run.backend_version}",
        "serving_mode": run.serving_mode,
        "device": f"{run.device_class}: {place.device_name or 'unnamed'}",
        "platform": place.platform,
        "python": place.python,
        "packages": dict(sorted(place.packages.items())),
        "test_items_sha256": run.test_items_sha256,
        "started": run.started.isoformat(),
        "ended": run.ended.isoformat(),
    }


# Notes


def _notes(rows: Sequence[ArmRow], results: Results, shown: Primary) -> Iterable[str]:
    """Limits of what these data can show."""
    if shown.task not in results.on_disk:
        where = f"which are of {' and '.join(results.on_disk)}" if results.on_disk else "of which none is finished"
        yield (
            f"These are not the results on disk, {where}, but the latest finished run of each arm and seed of "
            f"{shown.task} in the database."
        )
    elif len(results.on_disk) > 1:
        yield (
            f"The results on disk are of several tasks ({', '.join(results.on_disk)}), as happens while one replaces "
            f"another; only {shown.task} is shown."
        )
    if any(row.delta_speed is not None and row.delta_speed_interval is None for row in rows if row.arm != BASE):
        yield "Δ speed has no interval: 95% confidence needs at least six paired repetitions."
    differences = [difference for row in rows for difference in row.differences]
    of_one_seed = [difference for difference in differences if difference.level == "items"]
    if of_one_seed:
        exact = all(difference.binary for difference in of_one_seed)
        test = "McNemar's exact test" if exact else "a paired randomization test (signs flipped)"
        yield (
            f"Differences of one seed rest on a bootstrap over items and on {test}. They say nothing about other "
            "seeds. No arm is therefore called better or worse than another arm, nor than the base unless the whole "
            f"interval is more than {SEED_MARGIN:.0f} points from zero."
        )
    if not all(difference.binary for difference in differences):
        yield "Answers get credit from 0 to 1 instead of right or wrong; scores are mean credit in percent."
    if any(difference.seeds == 2 for difference in differences):
        yield "Two seeds barely constrain how much seeds vary, so intervals are wide."
    yield from filter(None, map(contradiction, rows))
    if any(run.git_dirty for run in results.runs):
        yield "Some stages ran with uncommitted changes (dirty), so no commit reproduces their numbers."
    devices = {
        f"{run.device_class} {results.environments[run.environment_id].device_name or ''}".strip()
        for run in results.runs
    }
    if len(devices) > 1:
        yield (
            f"Evaluated on several devices: {', '.join(sorted(devices))}. Speeds are only comparable on one device, "
            "and rounding may change an answer."
        )
    bad = [row.arm for row in rows if any(not math.isfinite(value) for value in row.metrics.values())]
    if bad:
        yield f"Some metrics of {', '.join(bad)} could not be computed (not finite)."


def _methods(rows: Sequence[ArmRow], results: Results) -> Iterable[str]:
    """How to read the numbers."""
    modes = {run.serving_mode for run in results.runs if run.arm != BASE}
    if modes:
        words = "Δ speed: median over the paired repetitions of all seeds, relative to the base in the same process."
        if "merged" in modes:
            words += " Merged models of one shape decode equally fast, so differences between them are noise."
        if "adapter" in modes:
            words += " A separate adapter adds arithmetic to every token, which costs time."
        yield words
    if any(difference.level == "seeds and items" for row in rows for difference in row.differences):
        yield (
            "Differences over several seeds: interval and p-value allow for other seeds and other items (crossed "
            "random effects, Student's t). The interval over items alone takes these seeds as the only ones."
        )


def _left_out(task: str, counts: Mapping[str, int]) -> list[str]:
    if not counts:
        return []
    numbers = ", ".join(f"{count} of {arm}" for arm, count in counts.items())
    return [
        f"Finished runs of {task} left out: {numbers}. Their base model (models/base/base.json: model, place, prompt "
        "template) differs from the newest run's, or their training settings or data from those of the newest run of "
        "their arm, so they are not further seeds of it."
    ]
