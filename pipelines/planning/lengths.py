"""How many tokens the longest items have: those of prepared or generated data, or at most max_length."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evaluation.tasks import Item, aqi, general, render
from pipelines.base_model import load_reference
from pipelines.prompt import prompt_text
from pipelines.runinfo import FileError, read_json, read_jsonl
from pipelines.schema import Params
from pipelines.schema_common import CHAT
from pipelines.stage import BASE, DATA
from trainers.data import encode_prompt
from trainers.embedded_base import TOKENIZER_EXAMPLES, tokenizer_texts, train_tokenizer
from trainers.models import load_tokenizer

_SAMPLE = 5_000  # general questions; a few kinds of question in fixed wordings


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest items, end of sequence included.

    Attributes:
        train, valid: Of the items to learn from, and of those of the evaluation loss.
        origin: Where the numbers are from, in words.
        general: Of the questions that the embedded base is trained on; None where there is none, or it is not known.
    """

    train: int
    valid: int
    origin: str
    general: int | None = None


def _longest(tokenizer: Any, texts: Iterable[str], most: int) -> int:
    return max((n for text in texts if (n := len(encode_prompt(tokenizer, text)) + 1) <= most), default=most)


def _most(params: Params) -> int:
    """Tokens of an item that some arm still trains on, at most."""
    return max(params.train_for(arm).max_length for arm in params.matrix.arms)


def general_questions(params: Params, count: int = TOKENIZER_EXAMPLES) -> list[tuple[str, str]]:
    """(rendered prompt, answer) of the first `count` general questions, as stage prepare_base asks them."""
    section, template = params.prepare_base, params.prompt.template
    questions = islice(general.questions(section.seed, held_out=False), min(count, section.examples))
    return [(render(template, prompt), answer) for _, prompt, answer in questions]


def _prepared(params: Params) -> Lengths | None:
    """Of data/ and models/base, if they were made with the very settings that are planned."""
    try:
        same = all(
            read_json(folder / "run.json")["params"][name] == json.loads(getattr(params, name).model_dump_json())
            for folder, name in ((DATA, "prepare_data"), (BASE, "prepare_base"))
        )
        if not same:
            return None
        tokenizer, template = load_tokenizer(load_reference()[0]), prompt_text(params.prompt)
        found = []
        for split in ("train", "valid"):
            items = [Item.from_json(row) for row in read_jsonl(DATA / f"{split}.jsonl")]
            texts = (render(template, item.prompt) + item.completion for item in items)
            found.append(_longest(tokenizer, texts, _most(params)))
        base = params.prepare_base
        asked = (a + b for a, b in general_questions(params, _SAMPLE)) if base.source == "embedded" else iter(())
        of_base = _longest(tokenizer, asked, base.context) if base.source == "embedded" else None
    except (FileError, OSError, ValueError, KeyError):  # not there, or not readable: other ways are left
        return None
    return Lengths(found[0], found[1], "the longest items of data/", of_base)


def generated_items(params: Params) -> dict[str, list[tuple[str, str]]]:
    """Split → (rendered prompt, answer) of the items that stage prepare_data generates."""
    section, template = params.prepare_data, params.prompt.template
    sizes = {"train": section.train_items or 1, "valid": section.valid_items, "test": section.test_items}
    splits = aqi.generate(
        sizes, seed=section.seed, pollutants=section.pollutants, max_pollutants=section.max_pollutants
    )
    return {
        split: [(render(template, item.prompt), item.completion) for item in items] for split, items in splits.items()
    }


def _generated(params: Params) -> Lengths:
    """Of the generated questions, with the tokenizer that stage prepare_base would train."""
    base, splits, questions = params.prepare_base, generated_items(params), general_questions(params)
    with TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(tokenizer_texts(questions), base.vocab_size, Path(folder))
    found = [_longest(tokenizer, (a + b for a, b in splits[split]), _most(params)) for split in ("train", "valid")]
    of_base = _longest(tokenizer, (a + b for a, b in questions[:_SAMPLE]), base.context)
    return Lengths(found[0], found[1], "the longest generated items", of_base)


def lengths_of(params: Params) -> Lengths:
    """Tokens of the longest items that will be trained on."""
    found = _prepared(params)
    if found is not None:
        return found
    section = params.prepare_data
    if section.source == "generated" and params.prepare_base.source == "embedded" and params.prompt.template != CHAT:
        return _generated(params)
    most = _most(params)
    return Lengths(most, most, "at most: train.max_length, since data/ is not prepared with these settings")
