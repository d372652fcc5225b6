"""The contents of the report: its chapters in order, for every renderer. A chapter without data is left out."""

from dataclasses import replace

from db.runs import BASE
from evaluation.report.alignment import alignment
from evaluation.report.all_tasks import benchmarks, tasks
from evaluation.report.blocks import Section
from evaluation.report.browser import samples
from evaluation.report.comparison import Report
from evaluation.report.cost import training
from evaluation.report.criteria import GAIN, criteria
from evaluation.report.every_number import every_number, power
from evaluation.report.findings import findings
from evaluation.report.provenance import files, provenance
from evaluation.report.retention import retention
from evaluation.report.robustness import robustness
from evaluation.report.serving import precisions, served, speed
from evaluation.report.training import loss, probes, spectra
from evaluation.report.tuning import tuning

TITLE = "Which way of fine-tuning is better, and how sure is that?"


def sections(report: Report) -> tuple[Section, ...]:
    comparison, results = report.comparison, report.results
    primary = comparison.primary
    modes = {run.arm: run.serving_mode for run in results.runs if run.arm != BASE}
    open_chapters = (
        findings(comparison), training(report), loss(report), probes(report), retention(report), benchmarks(report)
    )  # fmt: skip
    folded = (
        criteria(comparison.criteria, GAIN if primary.air else "gain"),
        every_number(comparison),
        power(comparison.power),
        tuning(report),
        spectra(report),
        robustness(report),
        alignment(comparison.rows, comparison.alignment, air=primary.air),
        speed(comparison.phases, comparison.rows, modes),
        served(comparison.served, comparison.trained, results.runs),
        precisions(comparison.precisions, primary.title),
        tasks(comparison),
        samples(report),
        files(report),
        provenance(report),
    )
    return (*filter(None, open_chapters), *(replace(section, folded=True) for section in folded if section is not None))
