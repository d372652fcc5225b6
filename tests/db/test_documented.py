"""docs/database.md has every table, view and column, and questions that can be asked."""

import re
from pathlib import Path

from sqlalchemy import text

from db.ingest import ingest
from db.store import open_session
from db.tables import METADATA, VIEWS
from tests.db.asking import ask
from tests.db.result_tree import make_arm

PAGE = (Path(__file__).parents[2] / "docs/database.md").read_text(encoding="utf-8")


def words(name):
    """What stands in backticks in the section of a view, or in the line of a table."""
    pattern = rf"^### {name}\n(.*?)^##" if name in VIEWS else rf"^\| `{name}` \|(.*)$"
    found = re.search(pattern, PAGE, re.M | (re.S if name in VIEWS else 0))
    return {*re.findall(r"`(\w+)`", found[1]), "id", "run_id", "rest"}


def test_every_column_is_documented_and_every_question_has_an_answer(tree, path):
    for seed, some in ((0, 72), (1, 74)):
        make_arm(tree, "pure_grit", seed, correct=[i < some for i in range(100)])
    ingest(tree, path)
    with open_session(path) as session:
        for name in (*METADATA.tables, *VIEWS):
            columns = set(session.execute(text(f"SELECT * FROM {name} WHERE 1 = 0")).keys())
            assert columns <= words(name), name
            if name not in VIEWS:
                assert words(name) - columns <= {"id", "run_id", "rest"}, name
    leads, costs, items = (ask(path, query) for query in re.findall(r"```sql\n(.*?)```", PAGE, re.S))
    assert leads == [("aqi", "pure_grit", 2, 73.0, 3.0, 2.0, 4.0)]
    assert [row[:3] for row in costs] == [("pure_grit", 73, 80), ("baseline_lora", 70, 80), ("base", 40, 80)]
    assert [item for item, *_ in items] == ["aqi-000070", "aqi-000071"]
