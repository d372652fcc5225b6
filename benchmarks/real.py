"""What a real base, SmolLM2-135M-Instruct, learns and keeps: a table of finished runs of profile smollm2.

Each argument is the folder of a project that `make repro PROFILE=smollm2` (or classify+smollm2, gsm8k+smollm2, …) has
finished. Rows of tasks that are not among them stay as they are in results/real.json. Run as
`python -m benchmarks.real FOLDER…`.
"""

import argparse
import json
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks._harness import RESULTS, show, write
from db.runs import BASE
from evaluation.report.arms import KL, LOSS
from evaluation.report.comparison import load_comparison
from evaluation.statistics.intervals import Interval

FILE = RESULTS / "real.json"


def three(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [round(x, 3) for x in (interval.estimate, interval.low, interval.high)]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """A row per arm: accuracies and what is kept in percent, loss and KL in nats per token, parity as a share."""
    rows = []
    for row in load_comparison(folder / "outputs/centralized.db").rows:
        rendered = [v.counted for run in row.runs for v in run.verifications if v.form == "rendered"]
        loss, kl = row.metrics.get(LOSS), row.metrics.get(KL)
        seconds = row.costs.get("seconds_a_step")
        rows.append({
            "task": row.task, "arm": row.arm, "seeds": list(row.seeds),
            "score": three(row.accuracy_interval),
            "kept": [100.0, 100.0, 100.0] if row.arm == BASE else three(row.retention_kept),
            "loss": loss and round(loss, 4), "kl": kl and round(kl, 4),
            "seconds_a_step": seconds and round(seconds, 3),
            "parity": round(fmean(rendered), 4) if rendered else None,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="projects with outputs/centralized.db")
    folders = parser.parse_args().folders
    rows = [row for folder in folders for row in rows_of(folder)]
    tasks = {row["task"] for row in rows}
    before = json.loads(FILE.read_text(encoding="utf-8"))["rows"] if FILE.is_file() else []
    rows = [row for row in before if row["task"] not in tasks] + rows
    title = "SmolLM2-135M-Instruct: what was learned and kept"
    show(title, {name: itemgetter(name) for name in rows[0]}, rows, width=170)
    write("real", title, rows=rows)


if __name__ == "__main__":
    main()
