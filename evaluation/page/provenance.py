"""Sections about where the numbers come from: samples, runs, packages, starts that failed."""

from __future__ import annotations

from collections import Counter

from db.rows import digest_of
from evaluation.page.blocks import MOST_ROWS, Block, Browser, Cell, Details, Section, Table, Text
from evaluation.page.columns import spread
from evaluation.page.context import Context, arm_cell, verdict_cell
from evaluation.page.samples import DISPUTED
from evaluation.page.words import seeds_text

_SHORT = 12
_MOST_HASHES = 6
_DIRTY = {True: Cell("yes", tone="bad"), False: Cell("no"), None: Cell("unknown")}


def samples(context: Context) -> Section | None:
    """The browser of answers."""
    found = context.samples
    if not found.items:
        return None
    blocks: list[Block] = [
        Text("Prompt, truth, and what each model answered. Models disagree where some are right and some wrong.")
    ]
    if found.in_part:
        blocks.append(
            Text(
                "An answer that is right in part shows its credit, from 0 to 1. Models disagree on it too where the "
                f"best and the worst answer are {DISPUTED} or more apart.",
                "note",
            )
        )
    if found.items < found.found:
        blocks.append(
            Text(
                f"{found.items} of {found.found} items are in this file, those with disagreements first; the database "
                "has all.",
                "note",
            )
        )
    shown, everything = len(context.data.drawn), len(context.data.runs)
    if shown < everything:
        blocks.append(Text(f"Shown are {shown} of {everything} runs, the first seeds of each arm.", "note"))
    return Section("Sample browser", (*blocks, Browser(found.splits, found.tasks, found.seeds, found.one_seed)))


def provenance(context: Context) -> Section:
    """Runs, what they ran on, and starts that did not end well."""
    return Section("Provenance", (*_runs(context), *_attempts(context)))


def _runs(context: Context) -> list[Block]:
    runs = {run.run_key: run for run in context.data.runs}
    rows = []
    packages: dict[str, dict[str, list[int]]] = {}
    for told in context.comparison.runs:
        run = runs[told["run_key"]]
        digest = digest_of(run.params)
        rows.append(
            (
                arm_cell(run.arm, run.seed),
                Cell(run.run_key[:_SHORT], title=run.run_key),
                Cell(digest[:_SHORT], title=digest),
                Cell((run.git_commit or "unknown")[:_SHORT], title=run.git_commit or ""),
                _DIRTY[run.git_dirty],
                Cell(told["backend"], hint=told["serving_mode"]),
                Cell(told["device"]),
                Cell((run.ended or run.started).strftime("%Y-%m-%d %H:%M UTC")),
            )
        )
        text = ", ".join(f"{name} {version}" for name, version in told["packages"].items())
        system = f"Python {told['python'] or 'unknown'} on {told['platform'] or 'unknown'}: {text}"
        packages.setdefault(system, {}).setdefault(run.arm, []).append(run.seed)
    headers = ("Run", "Run key", "Parameters", "Commit", "Dirty", "Backend", "Device", "Evaluated")
    table = Table("Runs; parameters: hash of the resolved settings of all stages", headers, tuple(rows),
                  frozenset(range(1, len(headers))))  # fmt: skip
    listed = tuple(
        Text(f"{', '.join(f'{arm} {seeds_text(seeds)}' for arm, seeds in who.items())}: {text}", "note")
        for text, who in spread(list(packages.items()), MOST_ROWS)
    )
    items = sorted({run.test_items_sha256 for run in context.data.runs})
    blocks: list[Block] = [table]
    kinds = "" if len(items) == 1 else f"{len(items)} different sets, "
    blocks.append(Text(f"Test items: {kinds}sha256 {', '.join(items[:_MOST_HASHES])}.", "note"))
    blocks.append(Details("Packages", listed))
    return blocks


def _attempts(context: Context) -> list[Block]:
    """Starts that crashed or failed; those that ended well as a number."""
    attempts = context.data.attempts
    if not attempts:
        return []
    counts = Counter(attempt.status for attempt in attempts)
    words = ", ".join(f"{counts[word]} {word}" for word in ("finished", "failed", "crashed", "running") if counts[word])
    blocks: list[Block] = [Text(f"Starts of stages on record: {words}.")]
    rows = tuple(
        (
            Cell(attempt.stage + (f" {attempt.arm}" if attempt.arm else "")
                 + (f" · seed {attempt.seed}" if attempt.seed is not None else ""), arm=attempt.arm or ""),
            verdict_cell(attempt.status),
            Cell(attempt.started.strftime("%Y-%m-%d %H:%M UTC")),
            Cell(attempt.host),
            Cell(attempt.error or "its process was gone without a word"),
        )
        for attempt in attempts
        if attempt.status in ("failed", "crashed")
    )  # fmt: skip
    if rows:
        headers = ("Stage", "Ended", "Started", "Machine", "Why")
        blocks.append(Table("Starts that failed or crashed", headers, rows, frozenset(range(1, 5))))
    return blocks
