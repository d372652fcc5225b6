"""All arms side by side with everything that is judged about them: outcomes, criteria, power, and limits.

Chapters and renderers only show what is computed here.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from sqlalchemy import select

from db import runs as db_runs
from db import tables
from db.errors import DatabaseError
from db.records import AQI, Run
from db.runs import BASE, Choice
from db.store import open_session
from evaluation.measure.lm_harness import SPLIT
from evaluation.report.arms import BASELINE, ArmRow, Scored, arm_rows, credit_interval, grouped, judge
from evaluation.report.criteria import Criterion, judge_arm
from evaluation.report.judgement import compared, contradiction, like_with_like, not_compared
from evaluation.report.results import ScoredRun, read
from evaluation.statistics.differences import SEED_MARGIN
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
        return self.task == AQI.name

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


@dataclass(frozen=True)
class Comparison:
    rows: tuple[ArmRow, ...]  # base first, the baseline next
    primary: Primary
    units: Mapping[str, tuple[str, str, str]]  # metric name → (unit, better direction, description)
    baseline: str = BASELINE  # the arm that the others are compared with besides the base
    filters: str = ""
    tasks: tuple[ArmRow, ...] = ()  # all tasks in the database, arm by arm; the newest task first
    task_notes: tuple[str, ...] = ()  # which runs of them are left out, and why
    benchmarks: tuple[Scored, ...] = ()  # of lm-evaluation-harness, arm by arm; those with credit for each item
    notes: tuple[str, ...] = ()  # limits of the interpretation

    @property
    def runs(self) -> list[ScoredRun]:
        return [run for row in self.rows for run in row.runs]

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(row.arm for row in self.rows)

    @property
    def trained(self) -> tuple[ArmRow, ...]:
        return tuple(row for row in self.rows if row.arm != BASE)

    @property
    def references(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((BASE, self.baseline)))

    @cached_property
    def outcomes(self) -> tuple[str, ...]:
        """The conclusion about each arm but the base."""
        return tuple(self._outcome(row) for row in self.trained)

    def _outcome(self, row: ArmRow) -> str:
        title, arms = self.primary.title, {each.arm: each for each in self.rows}
        words = [compared([row], against, title) for against in self.references]
        words += [*like_with_like([row], arms, self.baseline, title), *not_compared([row], self.references, arms)]
        return " ".join(filter(None, words))

    @cached_property
    def criteria(self) -> tuple[Criterion, ...]:
        short, title = self.primary.short, self.primary.title
        judged = (judge_arm(row, self.baseline, short=short, title=title) for row in self.trained)
        return tuple(criterion for of_arm in judged for criterion in of_arm)

    @cached_property
    def power(self) -> tuple[PowerRow, ...]:
        """What it would take to see 1, 2 and 3 points, for each arm and what it is compared with."""
        references = dict.fromkeys(against for row in self.rows for against in row.pairs)
        named = [(row.arm, row.pairs[against]) for against in references for row in self.rows if against in row.pairs]
        return tuple(each for arm, pairs in named for each in power_rows(arm, pairs))

    @cached_property
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

    @property
    def methods(self) -> list[str]:
        """How to read the numbers."""
        words, modes = [], {run.serving_mode for run in self.runs if run.arm != BASE}
        if modes:
            speed = (
                "Δ speed: median over the paired repetitions of all seeds, relative to the base in the same process."
            )
            if "merged" in modes:
                speed += " Merged models of one shape decode equally fast, so differences between them are noise."
            if "adapter" in modes:
                speed += " A separate adapter adds arithmetic to every token, which costs time."
            words.append(speed)
        if any(difference.level == "seeds and items" for row in self.rows for difference in row.differences):
            words.append(
                "Differences over several seeds: interval and p-value allow for other seeds and other items (crossed "
                "random effects, Student's t)."
            )
        return words

    def has(self, split: str, name: str) -> bool:
        return any((split, name) in row.metrics for row in self.rows)


def load_comparison(
    url_or_path: str | Path, choice: Choice | None = None, baseline: str | None = None, *, detail: bool = False
) -> Comparison:
    """Compare the arms in a database with base and baseline_lora, by default all runs of the task on disk.

    `detail` also reads what only the long reports show: curves, layers, files, answers.

    Raises:
        DatabaseError: No database, or no finished run that was chosen (`missing`).
        DatabaseError: The database cannot be read.
        ChoiceError: No run has a name that was chosen.
    """
    choice, against = choice or Choice(), baseline or BASELINE
    with open_session(url_or_path) as session:
        every = db_runs.finished_runs(session)
        _check(every, choice, baseline)
        if choice.arms:  # the baseline is always included
            choice = replace(choice, arms={*choice.arms, against})
        tasks = db_runs.tasks_of(every)
        chosen = {task: db_runs.choose(every, replace(choice, task=task)) for task in tasks}
        shown = choice.task or db_runs.task_on_disk(every) or ""
        of_task = chosen[shown][0] if shown in chosen else []
        if not of_task:
            got = "a database without any" if choice == Choice() else "none that fits all filters"
            raise DatabaseError(
                f"finished runs in {url_or_path}", got, "run `dvc repro`, which makes them", missing=True
            )
        detailed = [run.id for run in of_task] if detail else []
        runs = read(session, [run for some, _ in chosen.values() for run in some], detailed)
        units = {each.name: (each.unit, each.direction, each.description)
                 for each in session.execute(select(tables.metric_def))}  # fmt: skip
    rows = {task: arm_rows([run for run in runs if run.task == task], against) for task in tasks}
    left_out = {task: _left_out(task, counts) for task, (_, counts) in chosen.items()}
    first = rows[shown][0]
    on_disk = sorted({run.task for run in every if run.is_current})
    return Comparison(
        rows=rows[shown],
        primary=Primary(first.task, first.title, first.metric),
        units=units,
        baseline=against,
        filters=_filters(choice, against),
        tasks=tuple(row for of_task in rows.values() for row in of_task),
        task_notes=tuple(note for notes in left_out.values() for note in notes),
        benchmarks=tuple(_benchmarks(rows[shown], against)),
        notes=(*_notes(rows[shown], on_disk), *left_out[shown]),
    )


def _check(runs: Sequence[Run], choice: Choice, baseline: str | None) -> None:
    """Refuse names that no finished run has."""
    tasks = db_runs.tasks_of(runs)
    of_task, _ = db_runs.choose(runs, Choice(task=choice.task))
    names: dict[str, tuple[Iterable[str], Iterable[str]]] = {
        "arm": ([*choice.arms, *filter(None, [baseline])], sorted({run.arm for run in of_task})),
        "seed": (map(str, choice.seeds), map(str, sorted({run.seed for run in of_task}))),
    }
    if tasks and choice.task is not None and choice.task not in tasks:  # then no arm can be checked either
        names = {"task": ([choice.task], tasks)}
    elif not of_task:
        return
    problems = [
        f"expected the {kind} of a finished run, got {name!r}{suggest(name, available_names)}"
        for kind, (requested, available) in names.items()
        for available_names in [list(available)]
        for name in dict.fromkeys(requested)
        if name not in available_names
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
    return f"Only {'; '.join(parts)}: other runs are left out" if parts else ""


def _benchmarks(rows: Sequence[ArmRow], baseline: str) -> Iterable[Scored]:
    """Each benchmark's arms on the items that they share, with Holm's correction over the arms, as for the task."""
    runs = [run for row in rows for run in row.runs]
    for name, metrics in benchmark_metrics(runs).items():
        if any(len(of_task) > 1 for of_task in metrics.values()):  # a metric is a share for some runs only
            continue
        split = f"{SPLIT}{name}"
        arms = grouped([run for run in runs if run.answers(split)], baseline)
        metric = ", ".join(sorted(set().union(*metrics.values())))
        _, differences = judge(arms, split, baseline)
        for arm, arm_runs in arms.items():
            if bounds := credit_interval([run.answers(split) for run in arm_runs]):
                yield Scored(
                    task=name, title=f"{metric} of lm-evaluation-harness", metric=metric, arm=arm,
                    seeds=tuple(run.seed for run in arm_runs), accuracy=bounds.estimate, accuracy_interval=bounds,
                    differences=differences.get(arm, ()), runs=tuple(arm_runs),
                )  # fmt: skip


def benchmark_metrics(runs: Iterable[ScoredRun]) -> dict[str, dict[str, set[str]]]:
    """Benchmark → task → the metrics that its items were credited by, over all runs; none if no metric is a share."""
    credited: dict[str, dict[str, set[str]]] = {}
    for run in runs:
        for name, record in run.rest.get("benchmarks", {}).items():
            for task, facts in record["tasks"].items():
                credited.setdefault(name, {}).setdefault(task, set()).update(filter(None, [facts["metric"]]))
    return dict(sorted(credited.items()))


# Notes


def _notes(rows: Sequence[ArmRow], on_disk: Sequence[str]) -> Iterable[str]:
    """Limits of what these data can show."""
    task, runs = rows[0].task, [run for row in rows for run in row.runs]
    if task not in on_disk:
        where = f"which are of {' and '.join(on_disk)}" if on_disk else "of which none is finished"
        yield (
            f"These are not the results on disk, {where}, but the latest finished run of each arm and seed of "
            f"{task} in the database."
        )
    elif len(on_disk) > 1:
        yield (
            f"The results on disk are of several tasks ({', '.join(on_disk)}), as happens while one replaces "
            f"another; only {task} is shown."
        )
    if any(row.delta_speed is not None and row.delta_speed_interval is None for row in rows if row.arm != BASE):
        yield "Δ speed has no interval: 95% confidence needs at least six paired repetitions."
    differences = [difference for row in rows for difference in row.differences]
    of_one_seed = [difference for difference in differences if difference.level == "items"]
    if of_one_seed:
        yield (
            "Differences of one seed rest on a bootstrap over items and on an exact or randomization test. They say "
            "nothing about other seeds. No arm is therefore called better or worse than another arm, nor than the "
            f"base unless the whole interval is more than {SEED_MARGIN:.0f} points from zero."
        )
    if not all(difference.binary for difference in differences):
        yield "Answers get credit from 0 to 1 instead of right or wrong; scores are mean credit in percent."
    if any(difference.seeds == 2 for difference in differences):
        yield "Two seeds barely constrain how much seeds vary, so intervals are wide."
    yield from filter(None, map(contradiction, rows))
    if any(run.git_dirty for run in runs):
        yield "Some stages ran with uncommitted changes (dirty), so no commit reproduces their numbers."
    devices = {f"{run.device_class} {run.place.device_name or ''}".strip() for run in runs}
    if len(devices) > 1:
        yield (
            f"Evaluated on several devices: {', '.join(sorted(devices))}. Speeds are only comparable on one device, "
            "and rounding may change an answer."
        )
    bad = [row.arm for row in rows if any(not math.isfinite(value) for value in row.metrics.values())]
    if bad:
        yield f"Some metrics of {', '.join(bad)} could not be computed (not finite)."


def _left_out(task: str, counts: Counter[str]) -> list[str]:
    if not counts:
        return []
    numbers = ", ".join(f"{count} of {arm}" for arm, count in counts.items())
    return [
        f"Finished runs of {task} left out: {numbers}. A newer run of the same arm and seed replaces them, or their "
        "base model (models/base/base.json: model, place, prompt template) differs from the newest run's, or their "
        "training settings or data from those of the newest run of their arm, so they are not further seeds of it."
    ]
