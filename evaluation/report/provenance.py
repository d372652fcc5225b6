"""Where the numbers come from: the line below the title, and the chapter about runs and packages."""

from db.runs import BASE
from evaluation.report.blocks import Cell, Details, Section, Table, Text, arm_cell
from evaluation.report.comparison import Comparison
from evaluation.report.text import counted, seeds_text

_SHORT = 12
"""Characters of a hash that are shown."""


def byline(comparison: Comparison) -> str:
    runs, rows = comparison.runs, comparison.trained
    arms = counted(len(rows), "arm")
    if len({row.seeds for row in rows}) > 1:
        arms += f": {', '.join(f'{row.arm} ({seeds_text(row.seeds)})' for row in rows)}"
    elif rows:
        arms += f" with {seeds_text(rows[0].seeds)}"
    base = " and the untouched base" if BASE in comparison.arms else ""
    parts = [
        f"{arms}{base}, last evaluated {max(run.ended for run in runs):%Y-%m-%d %H:%M} UTC.",
        f"Task: {comparison.primary.task}, judged by {comparison.primary.long}.",
    ]
    for run in runs:
        if unpacked := run.stages.get("export", {}).get("extra", {}).get("unpacked"):
            parts.append(f"Base: {unpacked['file']}, its weights dequantized from {unpacked['source_precision']}.")
    if comparison.filters:
        parts.append(f"{comparison.filters}; corrections for several arms count only these.")
    if commits := sorted({run.git_commit[:10] for run in runs if run.git_commit}):
        parts.append(f"Commit {', '.join(commits)}.")
    if any(run.git_dirty for run in runs):
        parts.append("Some stages ran with uncommitted changes.")
    return " ".join(parts)


def _hash(digest: str | None) -> Cell:
    return Cell((digest or "unknown")[:_SHORT], title=digest or "")


def provenance(comparison: Comparison) -> Section:
    dirty = {True: Cell("yes", tone="bad"), False: "no", None: "unknown"}
    packages: dict[str, dict[str, list[int]]] = {}
    lines = []
    for run in comparison.runs:
        place = run.place
        lines.append(
            (arm_cell(run.arm, run.seed), _hash(run.run_key), _hash(run.git_commit), dirty[run.git_dirty],
             Cell(f"{run.backend_name} {run.backend_version}", hint="" if run.arm == BASE else run.serving_mode),
             f"{run.device_class}: {place.device_name or 'unnamed'}", f"{run.ended:%Y-%m-%d %H:%M} UTC")
        )  # fmt: skip
        versions = ", ".join(f"{name} {version}" for name, version in sorted(place.packages.items()))
        system = f"Python {place.python or 'unknown'} on {place.platform or 'unknown'}: {versions}"
        packages.setdefault(system, {}).setdefault(run.arm, []).append(run.seed)
    headers = ("Run", "Run key", "Commit", "Dirty", "Backend", "Device", "Evaluated")
    systems = tuple(
        Text(f"{', '.join(f'{arm} {seeds_text(seeds)}' for arm, seeds in runs.items())}: {system}", "note")
        for system, runs in packages.items()
    )
    items = sorted({run.test_items_sha256 for run in comparison.runs})
    kinds = "" if len(items) == 1 else f"{len(items)} different sets, "
    return Section(
        "Where the numbers come from",
        (
            Table("Runs; the run key is a hash of settings, inputs and backend", headers, lines),
            Text(f"Test items: {kinds}sha256 {', '.join(items)}.", "note"),
            Details("Packages", systems),
        ),
    )
