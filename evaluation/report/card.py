"""The middle of a model card: the arm's results beside those it is compared with, settings, cost, and the probe."""

from dataclasses import replace

from db.runs import BASE
from evaluation.report.arms import ArmRow
from evaluation.report.blocks import Section, Table, Text
from evaluation.report.comparison import Report
from evaluation.report.cost import training
from evaluation.report.findings import arms_compared
from evaluation.report.markdown import laid_out
from evaluation.report.text import interval, percent
from evaluation.report.training import probes


def as_card(report: Report, row: ArmRow) -> str:
    """Markdown from `## Results` on; it names the sha256 of each seed's adapter. `report` is one with detail."""
    comparison, results = report.comparison, report.results
    beside = {row.arm, row.like, *comparison.references}
    few = replace(comparison, rows=tuple(one for one in comparison.rows if one.arm in beside))
    runs = tuple(run for run in results.runs if run.arm in beside)
    narrow = Report(few, replace(results, chosen={results.task or "": runs}))
    title, base = comparison.primary.title, next((run for run in runs if run.arm == BASE), runs[0])
    items = len(results.answers.get(base.id, ()))
    words = [f"Task {base.task}: {title} on {items} test items (sha256 {base.test_items_sha256})."]
    if kept := row.retention_share_interval:
        words.append(
            f"Of the base's accuracy on general tasks, {row.arm} keeps {interval(kept, unit='%')} (95% interval)."
        )
    seeds = [
        (run.seed, percent(results.metrics.get(run.id, {}).get(("test", run.primary_metric))),
         next((file.sha256 for file in results.artifacts.get(run.id, ()) if file.kind == "adapter"), "–"))
        for run in runs if run.arm == row.arm
    ]  # fmt: skip
    outcome = comparison.outcomes[comparison.trained.index(row)]
    chapters = (
        Section(
            "Results",
            (
                *map(Text, words),
                arms_compared(few),
                *(Text(sentence, "note") for sentence in (outcome, *comparison.notes, *comparison.methods)),
                Table("Seed by seed", ("Seed", f"{title}, %", "sha256 of the adapter"), seeds),
            ),
        ),
        training(narrow),
        probes(narrow),
    )
    return "\n\n".join(laid_out(filter(None, chapters))) + "\n"
