"""Stage compare: the database, the two reports, and the numbers that DVC shows; the only writer of the database."""

import sys
from pathlib import Path

from pipelines.attempts import ATTEMPTS, mark_crashed
from pipelines.config import load_params
from pipelines.outputs import explain_os_error, staged
from pipelines.schema_common import CommonParams
from pipelines.stage import BASE_ARM, clear_errors, quiet_libraries

OUTPUTS = Path("outputs")
REPORT = OUTPUTS / "grit_evaluation.md"
PAGE = OUTPUTS / "report.html"


def run(params: CommonParams) -> None:
    """Ingest what the stages left, compare, and write everything down."""
    from db.ingest import ingest
    from evaluation.compare_all import load_comparison, write_report
    from evaluation.page import write_page
    from evaluation.tracked import write_tracked

    try:
        mark_crashed()
    except OSError as error:
        print(f"compare: {ATTEMPTS}/ cannot be kept up to date: {error}", file=sys.stderr)
    arms = [BASE_ARM, *params.matrix.arms]
    database = params.compare.database
    summary = ingest(Path(), database, arms=arms, seeds=list(params.matrix.seeds))
    print(summary)
    comparison = load_comparison(database)
    try:
        write_report(REPORT, comparison)
        write_page(PAGE, database, comparison)
        with staged(OUTPUTS / "plots") as plots:
            write_tracked(OUTPUTS / "metrics.json", plots, database, comparison)
    except OSError as error:
        raise explain_os_error(error, OUTPUTS) or error from error


if __name__ == "__main__":
    # Its own start is not on record: the table of starts would change with every look at the results.
    quiet_libraries()
    with clear_errors("compare"):
        run(load_params())
