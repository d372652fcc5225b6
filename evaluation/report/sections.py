"""The contents of the report: its chapters in order, for every renderer. A chapter without data is left out."""

from dataclasses import replace

from evaluation.report.alignment import alignment
from evaluation.report.all_tasks import benchmarks
from evaluation.report.blocks import Section
from evaluation.report.browser import samples
from evaluation.report.comparison import Comparison
from evaluation.report.cost import training
from evaluation.report.criteria import GAIN, criteria
from evaluation.report.every_number import every_number, power
from evaluation.report.findings import findings
from evaluation.report.provenance import provenance
from evaluation.report.retention import retention
from evaluation.report.robustness import robustness
from evaluation.report.serving import precisions, served, speed
from evaluation.report.training import loss, probes, spectra
from evaluation.report.tuning import tuning

TITLE = "Which way of fine-tuning is better, and how sure is that?"
_OPEN = (findings, training, loss, probes, retention, benchmarks)
_FOLDED = (
    every_number, power, tuning, spectra, robustness, alignment, speed, served, precisions, samples,
    provenance,
)  # fmt: skip


def sections(comparison: Comparison) -> tuple[Section, ...]:
    judged = criteria(comparison.criteria, GAIN if comparison.primary.air else "gain")
    folded = (judged, *(chapter(comparison) for chapter in _FOLDED))
    return (
        *filter(None, (chapter(comparison) for chapter in _OPEN)),
        *(replace(section, folded=True) for section in folded if section is not None),
    )
