"""Results of one task take the place of another's, and all that a comparison reads of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from db import queries_compare as compared
from db.ingest import IngestSummary, ingest
from db.queries_compare import Choice
from tests.evaluation.task_tree import ALPACA, GSM8K, add_precisions, add_task, credits_of

F16, Q8 = credits_of("pure_grit", 0, 0.2), credits_of("pure_grit", 1, 0.1)


def to_gsm8k(tree: Path) -> None:
    """Right or wrong; base, baseline_lora and pure_grit with one seed."""
    for folder in ("quantized", "verified", "measured"):
        for file in (tree / folder).rglob("run.json"):
            file.unlink()
            for result in file.parent.glob("*.json*"):
                result.unlink()
    add_task(tree, GSM8K, binary=True, day=22)


def to_alpaca(tree: Path) -> None:
    """Credit for parts, and precisions of one arm."""
    add_task(tree, ALPACA, day=23)
    add_precisions(tree, ALPACA, "pure_grit", {"f16": F16, "q8_0": Q8})


def read(tree: Path, path: Path | str) -> IngestSummary:
    """What stage compare reads: seed 1 of AQI stays on disk, but is of no matrix any more."""
    first = json.loads((tree / "scores/base/0/scores.json").read_text(encoding="utf-8"))
    return ingest(tree, path, seeds=None if "task" not in first else [0])


def make_three(tree: Path, path: Path) -> Path:
    """AQI, then GSM8K, then Alpaca, each read into the database."""
    read(tree, path)
    to_gsm8k(tree)
    read(tree, path)
    to_alpaca(tree)
    read(tree, path)
    return path


def everything(session: Session, choice: Choice) -> dict[str, Any]:
    """All that a comparison reads; rows as text."""
    rows = {
        "quantizations": compared.quantizations(session, choice),
        "verifications": compared.verifications(session, choice),
    }
    return {
        "runs": compared.chosen_runs(session, choice),
        "values": compared.final_values(session, choice),
        "answers": compared.answers(session, choice, "test"),
        "retained": compared.answers(session, choice, "retention"),
        "timings": {run: sorted(own) for run, own in compared.timings(session, choice).items()},
        "readings": compared.readings(session, choice),
        "quantized": compared.quantized_answers(session, choice),
        "names": compared.names_of_runs(session, choice.task),
        **{name: {run: [row.type if name == "quantizations" else (row.backend, row.mode) for row in own]
                  for run, own in found.items()} for name, found in rows.items()},
    }  # fmt: skip
