"""Chapters about more than the task that is compared: every task in the database, and standard benchmarks."""

from collections.abc import Sequence

from evaluation.report.blocks import Block, Cell, Section, Table, Text
from evaluation.report.comparison import Comparison, Report, TaskRow
from evaluation.report.findings import against_cell
from evaluation.report.text import listed, score, seeds_text


def tasks(comparison: Comparison) -> Section | None:
    """Every task and arm in the database; None where there is only one task."""
    if len({row.task for row in comparison.tasks}) < 2:
        return None
    notes = (Text(note, "note") for note in comparison.task_notes)
    return Section("All data sets in this database", (*all_tasks(comparison), *notes))


def all_tasks(comparison: Comparison) -> tuple[Text, Table]:
    headers = ("Task", *_headers(comparison.references), "Evaluated")
    lines = [
        (
            Cell(row.task, hint=row.title + "\n(on disk)" * row.current),
            *_cells(row, comparison.references),
            Cell(f"{row.ended:%Y-%m-%d}", hint=f"{row.ended:%H:%M} UTC"),
        )
        for row in comparison.tasks
    ]
    words = (
        "Every task with finished runs, including those whose results are no longer on disk: the latest run of each "
        "arm and seed, with the base model and settings of the newest. Intervals and outcomes are as in the table of "
        "one task. Do not compare scores of different tasks."
    )
    caption = "Every task and arm: means over seeds of the task's primary metric"
    return Text(words), Table(caption, headers, lines, headers[-1:])


def benchmarks(report: Report) -> Section | None:
    comparison, measured = report.comparison, report.results.benchmarks
    if not measured:
        return None
    headers = ("Benchmark", *_headers(comparison.references))
    items = {name: len(set().union(*benchmark.answers.values())) for name, benchmark in measured.items()}
    lines = [
        (Cell(row.task, hint=f"{row.metric}\n{items[row.task]:,} items"), *_cells(row, comparison.references))
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
    if plain := [name for name, benchmark in measured.items() if not benchmark.answers]:
        note = f"{listed(plain)}: no metric is a share of each item, so nothing is judged; see Every number."
        blocks.append(Text(note, "note"))
    return Section("Standard benchmarks", tuple(blocks), brief=6)


def _headers(references: Sequence[str]) -> tuple[str, ...]:
    return ("Arm", "Score, % [95%]", *(f"Δ to {arm}, points [95%]" for arm in references), "Outcome")


def _cells(row: TaskRow, references: Sequence[str]) -> tuple[object, ...]:
    return (
        Cell(row.arm, arm=row.arm, hint=seeds_text(row.seeds)),
        score(row.score, row.interval),
        *(against_cell(d, hint=False) for d in [row.to_base, row.to_baseline][: len(references)]),
        row.outcome or "–",
    )
