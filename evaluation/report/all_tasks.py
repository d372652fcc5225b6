"""Chapters about more than the task that is compared: every task in the database, and standard benchmarks."""

from collections.abc import Sequence

from evaluation.measure.lm_harness import SPLIT
from evaluation.report.arms import Scored
from evaluation.report.blocks import Block, Cell, Section, Table, Text
from evaluation.report.comparison import Comparison, benchmark_metrics
from evaluation.report.findings import against_cell
from evaluation.report.text import listed, score, seeds_text


def all_tasks(comparison: Comparison) -> tuple[Text, Table]:
    headers = ("Task", *_headers(comparison.references), "Evaluated")
    lines = [
        (
            Cell(row.task, hint=row.title + "\n(on disk)" * row.current),
            *_cells(row, comparison),
            Cell(f"{ended:%Y-%m-%d}", hint=f"{ended:%H:%M} UTC"),
        )
        for row in comparison.tasks
        for ended in [max(run.ended for run in row.runs)]
    ]
    words = (
        "Every task with finished runs, including those whose results are no longer on disk: the latest run of each "
        "arm and seed, with the base model and settings of the newest. Intervals and outcomes are as in the table of "
        "one task. Do not compare scores of different tasks."
    )
    caption = "Every task and arm: means over seeds of the task's primary metric"
    return Text(words), Table(caption, headers, lines, headers[-1:])


def benchmarks(comparison: Comparison) -> Section | None:
    measured = benchmark_metrics(comparison.runs)
    if not measured:
        return None
    headers = ("Benchmark", *_headers(comparison.references))
    items: dict[str, set[str]] = {name: set() for name in measured}
    for row in comparison.benchmarks:
        items[row.task].update(*(run.answers(f"{SPLIT}{row.task}") for run in row.runs))
    lines = [
        (Cell(row.task, hint=f"{row.metric}\n{len(items[row.task]):,} items"), *_cells(row, comparison))
        for row in comparison.benchmarks
    ]
    words = (
        "Benchmarks of lm-evaluation-harness with its defaults: none of our prompt templates, and the task's own "
        "few-shot examples. A score is the mean over items of a task's first metric that is a share; a group pools "
        "the items of its tasks. Differences are paired by item, with intervals and Holm's correction over arms as for "
        "the test items; nothing corrects for several benchmarks. lm-eval's own figures are under Every number."
    )
    caption = "Standard benchmarks: means over seeds with 95% intervals in brackets"
    blocks: list[Block] = [Text(words), *([Table(caption, headers, lines, headers[-1:])] if lines else [])]
    if plain := [name for name in measured if not items[name]]:
        note = f"{listed(plain)}: no metric is a share of each item, so nothing is judged; see Every number."
        blocks.append(Text(note, "note"))
    return Section("Standard benchmarks", tuple(blocks), brief=6)


def _headers(references: Sequence[str]) -> tuple[str, ...]:
    return ("Arm", "Score, % [95%]", *(f"Δ to {arm}, points [95%]" for arm in references), "Outcome")


def _cells(row: Scored, comparison: Comparison) -> tuple[object, ...]:
    return (
        Cell(row.arm, arm=row.arm, hint=seeds_text(row.seeds)),
        score(row.accuracy, row.accuracy_interval),
        *(against_cell(row.against(arm), hint=False) for arm in comparison.references),
        row.outcome(comparison.baseline) or "–",
    )
