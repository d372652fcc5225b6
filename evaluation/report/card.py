"""The middle of a model card: the arm's results beside those it is compared with, settings, cost, and the probe."""

from dataclasses import replace

from evaluation.report.arms import TEST, ArmRow
from evaluation.report.blocks import Section, Table, Text
from evaluation.report.comparison import Comparison
from evaluation.report.cost import training
from evaluation.report.findings import arms_compared
from evaluation.report.markdown import laid_out
from evaluation.report.text import interval, percent
from evaluation.report.training import probes


def as_card(comparison: Comparison, row: ArmRow) -> str:
    """Markdown from `## Results` on; it names the sha256 of each seed's adapter. `comparison` is one with detail."""
    beside = {row.arm, row.like, *comparison.references}
    narrow = replace(comparison, rows=tuple(one for one in comparison.rows if one.arm in beside))
    title, first = comparison.primary.title, narrow.runs[0]
    words = [f"Task {row.task}: {title} on {len(first.answers(TEST))} test items (sha256 {first.test_items_sha256})."]
    if row.retention_kept:
        kept = interval(row.retention_kept, unit="%")
        words.append(f"Of the base's accuracy on general tasks, {row.arm} keeps {kept} (95% interval).")
    seeds = [
        (run.seed, percent(run.metrics.get((TEST, run.primary_metric))),
         next((file.sha256 for file in run.artifacts if file.kind == "adapter"), "–"))
        for run in row.runs
    ]  # fmt: skip
    outcome = comparison.outcomes[comparison.trained.index(row)]
    chapters = (
        Section(
            "Results",
            (
                *map(Text, words),
                arms_compared(narrow),
                *(Text(sentence, "note") for sentence in (outcome, *comparison.notes, *comparison.methods)),
                Table("Seed by seed", ("Seed", f"{title}, %", "sha256 of the adapter"), seeds),
            ),
        ),
        training(narrow),
        probes(narrow),
    )
    return "\n\n".join(laid_out(filter(None, chapters))) + "\n"
