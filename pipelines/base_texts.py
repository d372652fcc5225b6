"""Stage base_texts: texts/texts.jsonl, what the base says by itself; arms are held to it, and KL is measured on it.

A base model writes from its first token on; one with a chat template from the opening of a user's turn, and then the
answer to that (Magpie, Xu et al. 2024). Questions that the retention suite might ask are left out.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from db.files import artifact, finish_run, hash_inputs, read_jsonl, staged, start_run, write_jsonl
from evaluation.measure.texts import TextError, read_texts, spread
from evaluation.tasks import Item, general
from pipelines.base_model import load_reference
from pipelines.params import StageParams, load_params
from pipelines.prompt import CHAT, Prompt, prompt_text
from pipelines.stage import BASE, DATA, TEXTS, main_for, sees_pictures
from trainers.models import load_base_model, load_tokenizer
from trainers.settings import Section, Seed, TrainSettings

OWN = "base"
LEAST = 8
_BATCH = 64
_TRIES = 4  # times as many texts as are wanted are sampled before the stage gives up


class BaseTexts(Section):
    text: str
    text_split: str
    text_subset: str | None
    text_column: str
    number: Annotated[int, Field(ge=LEAST, description="texts")]
    max_tokens: Annotated[int, Field(ge=8, description="tokens of a turn that the base writes")]
    seed: Seed


class Params(StageParams):
    base_texts: BaseTexts
    prompt: Prompt
    train: TrainSettings


def sampled(
    model: Any, tokenizer: Any, section: BaseTexts, opening: str | None, after: str
) -> Iterator[dict[str, Any]]:
    """Rows sampled at temperature 1, endlessly; `opening` and `after` stand round the user's turn of a chat model."""
    from transformers import set_seed

    from trainers.preserve import batches

    ends = model.generation_config.eos_token_id
    end = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def go_on(texts: list[str]) -> Iterator[tuple[str, bool]]:
        """What the model says to each, and whether it came to an end."""
        ids = [tokenizer(text)["input_ids"] or [tokenizer.bos_token_id or tokenizer.eos_token_id] for text in texts]
        (batch,) = batches(ids, tokenizer.pad_token_id, model.device, len(ids), left=True)
        made = model.generate(
            **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=section.max_tokens,
            pad_token_id=tokenizer.pad_token_id, use_cache=True,
        )  # fmt: skip
        for row in made[:, batch["input_ids"].shape[1] :].tolist():
            length = next((i for i, token in enumerate(row) if token in end), None)
            yield tokenizer.decode(row[:length], skip_special_tokens=True), length is not None

    set_seed(section.seed)
    while True:
        said = list(go_on([opening or ""] * _BATCH))
        if opening is not None:
            asked = [f"{opening}{text.strip()}{after}" for text, ended in said if ended and text.strip()]
            said = [(prompt + text, ended) for prompt, (text, ended) in zip(asked, go_on(asked), strict=True)]
        yield from ({"text": text, "ended": ended} for text, ended in said)


def question_in(text: str, template: str) -> str | None:
    """What stands in the place of {prompt} where a text has the template's form."""
    head, tail = template.split("{prompt}")
    found = re.match(re.escape(head) + "(.*?)" + (re.escape(tail) or "$"), text, re.DOTALL)
    return found[1] if found else None


def run(params: Params) -> None:
    section = params.base_texts
    own = Path(section.text)
    template = prompt_text(params.prompt)
    asked = [Item.from_json(row).prompt for row in read_jsonl(DATA / "retention.jsonl")]
    files = [own] if own.is_file() else []
    with staged(TEXTS) as folder:
        record = start_run(
            "base_texts",
            params={"base_texts": section.model_dump(), "prompt": params.prompt.model_dump()},
            inputs=hash_inputs(BASE / "base.json", DATA / "retention.jsonl", *files),
            prompt_template=template,
        )
        if sees_pictures():
            rows: list[dict[str, Any]] = []
            record.extra = {"left_out": "the base takes pictures; texts alone hold it to nothing that it sees"}
        elif section.text == OWN:
            rows, unused = _of_base(params, template, asked)
            record.extra = {"texts": len(rows), "unused": unused}
        else:
            rows = _of_user(section, asked)
            record.extra = {"texts": len(rows)}
        write_jsonl(folder / "texts.jsonl", rows)
        record.artifacts.append(artifact("dataset", folder / "texts.jsonl", TEXTS / "texts.jsonl"))
        finish_run(record, folder)
    print(json.dumps(record.extra))


def _of_base(params: Params, template: str, asked: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """Texts of the base without questions that the retention suite asks or might ask, and how many these were."""
    section = params.base_texts
    reference, _ = load_reference()
    model = load_base_model(reference, params.train.model_copy(update={"gradient_checkpointing": False})).eval()
    opening, after = template.split("{prompt}") if params.prompt.template == CHAT else (None, "")
    rows: list[dict[str, Any]] = []
    tries = 0
    for row in sampled(model, load_tokenizer(reference), section, opening, after):
        tries += 1
        question = question_in(row["text"], template)
        held_out = question is not None and general.is_held_out(question)
        if row["text"].strip() and not held_out and not any(prompt in row["text"] for prompt in asked):
            rows.append(row)
        if len(rows) == section.number:
            break
        if tries == _TRIES * section.number:
            raise TextError(
                f"base_texts: expected {section.number} texts, the base said {len(rows)} usable ones in {tries} tries; "
                "lower base_texts.number, or name texts of your own in base_texts.text"
            )
    return rows, tries - len(rows)


def _of_user(section: BaseTexts, asked: Sequence[str]) -> list[dict[str, Any]]:
    texts = read_texts(
        section.text,
        column=section.text_column,
        split=section.text_split,
        subset=section.text_subset,
        section="base_texts",
        own=OWN,
    )
    known = [text for text in texts if any(prompt in text for prompt in asked)]
    if known:
        raise TextError(
            f"base_texts.text: {len(known)} of {len(texts)} texts of {section.text} hold questions of the "
            f"retention suite ({known[0][:60]!r} …), so retention would measure what was learnt; take them out"
        )
    if len(texts) < LEAST:
        raise TextError(f"base_texts.text: expected at least {LEAST} texts in {section.text}, got {len(texts)}")
    chosen = spread(texts, section.number)
    random.Random(section.seed).shuffle(chosen)  # the first are kept for measuring
    return [{"text": text, "ended": True} for text in chosen]


if __name__ == "__main__":
    main_for("base_texts", lambda: run(load_params(Params)))
