"""The texts that stage measure takes perplexities of: general ones, and the right answers of test items."""

from collections.abc import Sequence
from typing import Any

from evaluation import texts
from evaluation.hidden import Encoded
from evaluation.tasks import Item, render
from pipelines.runinfo import read_jsonl
from pipelines.schema import Measure
from pipelines.stage import DATA
from trainers.data import encode_example, encode_prompt

RETENTION = "retention"
TEST = DATA / "test.jsonl"


def general_texts(section: Measure, tokenizer: Any, template: str, most: int) -> tuple[list[Encoded], int]:
    """Texts for perplexity and drift, and how many of them were cut or left out.

    Retention items count with their completion only: that is what the base knew. Their questions are random numbers
    in fixed wordings, and no arm's loss was on questions. Of other texts all tokens count but the first.

    Args:
        section: Settings.
        tokenizer: Of the base.
        template: Text round every question.
        most: Tokens of one text; what is beyond is cut off.

    Raises:
        TextError, SourceError: there are none.
        EncodingError: see `encode_example`.
    """
    if section.text == RETENTION:
        rows = texts.spread(read_jsonl(DATA / "retention.jsonl"), section.max_texts)
        made = [_completion(tokenizer, template, Item.from_json(row)) for row in rows]
    else:
        found = texts.read_texts(
            section.text, column=section.text_column, split=section.text_split, subset=section.text_subset
        )
        made = [Encoded(tuple(encode_prompt(tokenizer, text))) for text in texts.spread(found, section.max_texts)]
    kept, cut = _cut(made, most)
    if not kept:
        raise texts.TextError(f"measure.text: no text of {section.text} has a token to score within {most} tokens")
    return kept, cut


def answer_texts(section: Measure, tokenizer: Any, template: str, most: int) -> tuple[list[Encoded], int]:
    """Test items with their right answers, which alone count, and how many of them were cut or left out.

    Args:
        section: Settings; at most `max_answers` items, evenly from the whole; none where that is 0.
        tokenizer: Of the base.
        template: Text round every question.
        most: Tokens of question and answer; what is beyond is cut off.

    Raises:
        TextError: no answer has a token within so many.
        EncodingError: see `encode_example`.
    """
    if not section.max_answers:
        return [], 0
    rows = texts.spread(read_jsonl(TEST), section.max_answers)
    kept, cut = _cut([_completion(tokenizer, template, Item.from_json(row)) for row in rows], most)
    if not kept:
        raise texts.TextError(
            f"measure.max_answers: expected answers that begin within {most} tokens, got none in {len(rows)} items of "
            f"{TEST}; raise measure.max_tokens, or set measure.max_answers to 0"
        )
    return kept, cut


def _completion(tokenizer: Any, template: str, item: Item) -> Encoded:
    """Question, answer and end of sequence; the question does not count."""
    ids, start = encode_example(tokenizer, render(template, item.prompt), item.completion)
    return Encoded(tuple(ids), start)


def _cut(made: Sequence[Encoded], most: int) -> tuple[list[Encoded], int]:
    """What of the texts is within so many tokens, and of how many something is not."""
    kept = [Encoded(text.ids[:most], text.scored_from) for text in made if text.scored_from < min(len(text.ids), most)]
    return kept, sum(len(text.ids) > most or text.scored_from >= len(text.ids) for text in made)
