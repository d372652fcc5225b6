"""Stage compare: the database, whose only writer it is, the reports, the model cards, and what DVC displays."""

from pathlib import Path

from pydantic import field_validator

from db.files import explain_os_error, staged, write_text
from pipelines.params import StageParams, load_params
from pipelines.stage import BASE_ARM, cli, main_for
from trainers.settings import Section

OUTPUTS = Path("outputs")
REPORT = OUTPUTS / "grit_evaluation.md"
PAGE = OUTPUTS / "report.html"


class Compare(Section):
    database: str

    @field_validator("database")
    @classmethod
    def _file(cls, database: str) -> str:
        if "://" in database or Path(database).is_absolute():
            raise ValueError(
                f"expected a file below the project's folder, got {database!r}. For other databases use "
                "`python -m db.cli ingest --db URL`"
            )
        return database


class Params(StageParams):
    compare: Compare


def run(params: Params) -> None:
    from db.ingest import ingest
    from evaluation.report.card import as_card
    from evaluation.report.comparison import load_comparison
    from evaluation.report.data import write_tracked
    from evaluation.report.html import as_page
    from evaluation.report.markdown import as_markdown

    arms = [BASE_ARM, *params.matrix.arms]
    database = params.compare.database
    summary = ingest(Path(), database, arms=arms, seeds=list(params.matrix.seeds))
    print(summary)
    comparison = load_comparison(database, detail=True)
    try:
        write_text(REPORT, as_markdown(comparison))
        write_text(PAGE, as_page(comparison))
        with staged(OUTPUTS / "plots") as plots:
            write_tracked(OUTPUTS / "metrics.json", plots, comparison)
        with staged(OUTPUTS / "cards") as cards:
            for row in comparison.trained:
                (cards / f"{row.arm}.md").write_text(as_card(comparison, row), encoding="utf-8")
    except OSError as error:
        raise explain_os_error(error, OUTPUTS) or error from error


if __name__ == "__main__":
    cli(lambda: main_for("compare", lambda: run(load_params(Params))))
