"""The page's table of the Alignment Quality Index: the difference to the base stands beside its p-value."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.db.result_tree import edit
from tests.evaluation import page_tree
from tests.evaluation.page_report import Report


def cells(made: Report, arm: str) -> dict[str, str]:
    """Header -> cell, of an arm's line."""
    part = made.text.split('<section id="alignment-quality-index"')[1].split("</section>")[0]
    table = re.search(r"<table.*?</table>", part, re.DOTALL)
    assert table is not None
    lines = [
        [re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", one)).strip() for one in re.findall(r"<t[hd].*?</t[hd]>", row)]
        for row in re.findall(r"<tr.*?</tr>", table[0].replace("\n", " "))
    ]
    return dict(zip(lines[0], next(line for line in lines if line[0].startswith(arm)), strict=True))


def test_the_difference_stands_beside_its_p_value(tmp_path: Path) -> None:
    for arm in ("base", "baseline_lora", "pure_grit"):
        page_tree.add_arm(tmp_path, arm, 0, 100)
        if arm != "base":
            page_tree.add_measured(tmp_path, arm, 0)
    for arm, p_value in (("baseline_lora", 0.37), ("pure_grit", None)):
        place = tmp_path / "measured" / arm / "0/measured.json"
        content = json.loads(place.read_text(encoding="utf-8"))
        more = {"name": "delta_alignment_p_value", "split": "alignment", "value": p_value, "n": 100}
        edit(place, metrics=[*content["metrics"], more])
        meaning = {"unit": "1", "direction": "none", "description": "p"}
        edit(place, metric_defs={**content["metric_defs"], "delta_alignment_p_value": meaning})
    made = Report(tmp_path)
    line = cells(made, "baseline_lora")
    assert line["p of Δ"] == "0.37" and line["p"] == "0.001" and line["Δ to base [95%]"].startswith("+")
    assert cells(made, "pure_grit")["p of Δ"] == "not finite"
    assert cells(made, "base")["p of Δ"] == "–"
    told = re.sub(r"\s+", " ", made.text)
    assert "answers of the retention questions" in told and "held-out general text" not in told
