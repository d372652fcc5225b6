"""Stage compare: outputs/centralized.db and outputs/grit_evaluation.md; the only writer of the database."""

import sys
from pathlib import Path

from pipelines.attempts import ATTEMPTS, mark_crashed
from pipelines.config import load_params
from pipelines.outputs import explain_os_error
from pipelines.schema import Params
from pipelines.stage import BASE_ARM, clear_errors, quiet_libraries

REPORT = Path("outputs/grit_evaluation.md")


def run(params: Params) -> None:
    """Ingest what the stages left and write the report."""
    from db.ingest import ingest
    from evaluation.compare_all import load_comparison, write_report

    try:
        mark_crashed()
    except OSError as error:
        print(f"compare: {ATTEMPTS}/ cannot be kept up to date: {error}", file=sys.stderr)
    arms = [BASE_ARM, *params.matrix.arms]
    summary = ingest(Path(), params.compare.database, arms=arms, seeds=list(params.matrix.seeds))
    print(summary)
    comparison = load_comparison(params.compare.database)
    try:
        write_report(REPORT, comparison)
    except OSError as error:
        raise explain_os_error(error, REPORT) or error from error


if __name__ == "__main__":
    # Its own start is not on record: the table of starts would change with every look at the results.
    quiet_libraries()
    with clear_errors("compare"):
        run(load_params())
