"""A model card without its head: results for the hub, and beside those compared with; settings, cost, the probe."""

import math
from dataclasses import replace

from huggingface_hub import EvalResult, ModelCardData

from evaluation.report.arms import RETENTION, TEST, ArmRow
from evaluation.report.blocks import Section, Table, Text
from evaluation.report.comparison import Comparison
from evaluation.report.cost import training
from evaluation.report.findings import arms_compared
from evaluation.report.markdown import laid_out
from evaluation.report.text import interval, percent
from evaluation.report.training import probes


def as_card(comparison: Comparison, row: ArmRow) -> str:
    """Front matter with `model-index`, then Markdown from `## Results` on, with the sha256 of each seed's adapter.

    `comparison` is one with detail.
    """
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
    front = ModelCardData(model_name=row.model_name or row.arm, eval_results=_for_hub(row) or None)
    return f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join(laid_out(filter(None, chapters))) + "\n"


def _for_hub(row: ArmRow) -> list[EvalResult]:
    """Every seed's accuracy on its task and on the general ones, from 0 to 1; `metric_args` has the seed."""
    asked = (((TEST, row.metric), row.task, row.title), (RETENTION, "general tasks", "Retention"))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            dataset_split=key[0],
            metric_type=key[1],
            metric_name=title,
            metric_value=value,
            metric_args={"seed": run.seed},
        )
        for run in row.runs
        for key, task, title in asked
        if math.isfinite(value := run.metrics.get(key, math.nan))
    ]
