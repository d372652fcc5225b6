"""What a model says reaches the report as text, never as markup."""

from __future__ import annotations

import html
import math
import re

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from evaluation.report.arms import RETENTION, TEST
from evaluation.report.card import as_card
from evaluation.report.markdown import as_markdown, escaped, grid
from evaluation.report.text import interval, number, significant
from evaluation.statistics.intervals import Interval
from tests.db.result_tree import sha
from tests.evaluation.page_report import report
from tests.evaluation.page_tree import EVIL

SAID = [
    "</s>", "<img onerror=alert(1) src=x>", "[l](javascript:1)", "![l](x)", "[l](https://example.org)",
    "[1](https://example.org)", "[1]: https://example.org", "[l][1]", r"a\|b", "a|b", r"a\\|b", "`code` ``more``",
    "*strong* **x** _y_ __z__ ~~gone~~", "&amp; &lt;b&gt; & <b>", "<|im_end|>", "[INST] x [/INST]",
    "+1.0 [+0.5, +1.5] (x)", "baseline_lora_model",
]  # fmt: skip


@pytest.mark.parametrize("text", SAID)
def test_a_cell_reads_back_unchanged(text: str) -> None:
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    page = markdown.render(grid(["A", "B"], [[text, "after"]]) + f"\n\n- {escaped(text)}\n\n[1] [l]\n")
    assert set(re.findall(r"<(\w+)", page)) == {"table", "thead", "tbody", "tr", "th", "td", "ul", "li", "p"}
    assert [html.unescape(cell) for cell in re.findall("<td>(.*?)</td>", page)] == [text, "after"]
    line = markdown.render(f"- {escaped('note: ' + text)}")
    assert html.unescape(line) == f"<ul>\n<li>note: {text}</li>\n</ul>\n"


def test_names_and_numbers_stay_readable_in_the_file() -> None:
    for text in ("base_model", "baseline_lora_model", "+30.0 [+21.0, +39.0]", "Points [95%]", "q4_K_M"):
        assert escaped(text) == text
    assert escaped("a\n| b\r\n\n# c") == "a \\| b # c"


def test_numbers_have_no_negative_zero_and_may_be_missing_or_not_finite() -> None:
    assert [number(value, sign=True) for value in (-0.04, 0.04, -0.06, None, math.nan)] == [
        "+0.0", "+0.0", "-0.1", "–", "not finite"]  # fmt: skip
    assert interval(Interval(1.0, -0.01, math.inf)) == "1.0 [0.0, not finite]" and interval(None) == "–"
    assert (significant(math.nan), significant(None), significant(0.00123456)) == ("not finite", "–", "0.001235")


def test_no_name_and_no_word_of_a_model_is_markup_in_report_and_card() -> None:
    made = report("evil")
    row = made.comparison.trained[0]
    card = ModelCard(as_card(made.comparison, row)).text
    for text in (card, as_markdown(made.comparison)):
        page = MarkdownIt("commonmark").enable("table").render(text)
        assert not re.search(r"<(img|a|b|s|script)\b", page) and row.arm in html.unescape(page)
    assert EVIL[3] in html.unescape(page), "where the first prompt differs"
    assert sha(f"adapter {row.arm}/0") in card and interval(row.accuracy_interval) in card
    assert escaped(made.comparison.outcomes[0]) in card


def test_the_hub_reads_every_seed_s_results_from_the_card() -> None:
    comparison = report("full").comparison
    row = comparison.trained[0]
    data = ModelCard(as_card(comparison, row)).data
    told = {(r.metric_args["seed"], r.dataset_name, r.metric_name): r.metric_value for r in data.eval_results}
    stored = {(run.seed, row.task, row.title): run.metrics[TEST, row.metric] for run in row.runs}
    kept = {(run.seed, "general tasks", "Retention"): run.metrics[RETENTION] for run in row.runs}
    assert told == stored | kept and data.model_name == row.model_name
