"""Stage compare: outputs/centralized.db and outputs/grit_evaluation.md; the only writer of the database."""

from pathlib import Path

from pipelines.config import load_params
from pipelines.outputs import explain_os_error
from pipelines.schema import Params
from pipelines.stage import BASE_ARM, main_for

REPORT = Path("outputs/grit_evaluation.md")


def run(params: Params) -> None:
    """Ingest what the stages left and write the report."""
    from db.ingest import ingest
    from evaluation.compare_all import load_comparison, write_report

    arms = [BASE_ARM, *params.matrix.arms]
    summary = ingest(Path(), params.compare.database, arms=arms, seeds=list(params.matrix.seeds))
    print(summary)
    comparison = load_comparison(params.compare.database)
    try:
        write_report(REPORT, comparison)
    except OSError as error:
        raise explain_os_error(error, REPORT) or error from error


if __name__ == "__main__":
    main_for("compare", lambda: run(load_params()))
