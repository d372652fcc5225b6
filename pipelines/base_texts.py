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
from tqdm import tqdm

from db.files import artifact, finish_run, hash_inputs, read_jsonl, staged, start_run, write_jsonl
from evaluation import EvaluationError
from evaluation.measure.texts import read_texts, spread
from evaluation.tasks import Item, general
from pipelines.base_model import load_reference
from pipelines.params import ConfigError, StageParams, load_params
from pipelines.prompt import CHAT, Prompt, chat_facts, prompt_text
from pipelines.stage import BASE, DATA, TEXTS, cli, main_for, sees_pictures
from trainers.models import load_base_model, load_tokenizer
from trainers.preserve import batches
from trainers.settings import Section, Seed, TrainSettings

Row = dict[str, Any]
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
    model: Any, tokenizer: Any, section: BaseTexts, chat: tuple[str, str, Sequence[str]] | None
) -> Iterator[Row | None]:
    """Rows sampled at temperature 1, endlessly; `chat`: what stands before and behind a user's turn, and stop words.

    None where the user's turn is empty or comes to no end.
    """
    from transformers import set_seed

    opening, after, stop = chat or ("", "", ())
    eos = model.generation_config.eos_token_id
    known = [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
    ends = {*known, *tokenizer.convert_tokens_to_ids(list(stop))} - {None, tokenizer.unk_token_id}
    # A user's turn ends too where the model goes on with what is behind it, a token of its own or plain text.
    mark = after.strip()
    behind = tokenizer(mark, add_special_tokens=False)["input_ids"][:1]
    turn_ends = ends.union(token for token in behind if token in tokenizer.added_tokens_decoder)
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def go_on(texts: list[str], ends: set[int]) -> Iterator[tuple[str, bool]]:
        """What the model says to each, and whether it came to an end."""
        (batch,) = batches(
            [tokenizer(text)["input_ids"] or [start] for text in texts],
            tokenizer.pad_token_id, model.device, len(texts), left=True,
        )  # fmt: skip
        made = model.generate(
            **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, use_cache=True,
            max_new_tokens=section.max_tokens, pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(ends),
        )  # fmt: skip
        for row in made[:, batch["input_ids"].shape[1] :].tolist():
            length = next((i for i, token in enumerate(row) if token in ends), None)
            yield tokenizer.decode(row[:length], skip_special_tokens=True), length is not None

    set_seed(section.seed)
    while True:
        said = go_on([opening] * _BATCH, turn_ends)
        if chat is None:
            yield from ({"text": text, "ended": ended} for text, ended in said)
            continue
        asked = []
        for text, ended in said:
            turn, closed, _ = text.partition(mark) if mark else (text, "", "")
            if turn.strip() and (ended or closed):
                asked.append(f"{opening}{turn.strip()}{after}")
        for prompt, (text, ended) in zip(asked, go_on(asked, ends) if asked else (), strict=True):
            yield {"text": prompt + text, "ended": ended}
        yield from [None] * (_BATCH - len(asked))


def of_retention(text: str, template: str, asked: Sequence[str]) -> bool:
    """Whether a text holds a question that the retention suite asks, or has the template's form and might be asked."""
    head, tail = template.split("{prompt}")
    questions = re.findall(re.escape(head) + "(.*?)" + (re.escape(tail) or "$"), text, re.DOTALL)
    return any(map(general.is_held_out, questions)) or any(prompt in text for prompt in asked)


def turn_of(template: str, tokenizer: Any) -> tuple[str, str, Sequence[str]]:
    """What stands before and behind a user's turn in the base's chat template, and its stop words."""
    opening, after = template.split("{prompt}")
    if not opening.removeprefix(tokenizer.bos_token or "").strip():
        raise ConfigError(
            "base_texts.text: base: expected the base's chat template to open a user's turn, it has nothing before "
            f"{{prompt}}: {template!r}; name texts of your own (a .txt or .jsonl file, hub:org/name)"
        )
    return opening, after, chat_facts()["stop"]


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
            rows: list[Row] = []
            record.extra = {"left_out": "the base takes pictures; texts alone hold it to nothing that it sees"}
        elif section.text == OWN:
            rows, unused = _of_base(section, params, template, asked)
            record.extra = {"texts": len(rows), "unused": unused}
        else:
            rows = _of_user(section, asked)
            record.extra = {"texts": len(rows)}
        write_jsonl(folder / "texts.jsonl", rows)
        record.artifacts.append(artifact("dataset", folder / "texts.jsonl", TEXTS / "texts.jsonl"))
        finish_run(record, folder)
    print(json.dumps(record.extra))


def _of_base(section: BaseTexts, params: Params, template: str, asked: Sequence[str]) -> tuple[list[Row], int]:
    """Texts of the base without questions that the retention suite asks or might ask, and how many these were."""
    reference, _ = load_reference()
    tokenizer = load_tokenizer(reference)
    chat = turn_of(template, tokenizer) if params.prompt.template == CHAT else None
    model = load_base_model(reference, params.train.model_copy(update={"gradient_checkpointing": False})).eval()
    rows: dict[str, Row] = {}  # each text once, so that none is both learnt from and measured on
    with tqdm(total=section.number, desc="base_texts") as bar:
        for tries, row in enumerate(sampled(model, tokenizer, section, chat), 1):
            if row and row["text"].strip() and not of_retention(row["text"], template, asked):
                rows[row["text"]] = row
                bar.update(len(rows) - bar.n)
            if len(rows) == section.number:
                return [*rows.values()], tries - len(rows)
            if tries == _TRIES * section.number:
                break
    raise EvaluationError(
        f"base_texts.number: expected {section.number} texts, the base wrote {len(rows)} usable in {tries} tries; "
        "lower it, raise base_texts.max_tokens, or name texts of your own in base_texts.text"
    )


def _of_user(section: BaseTexts, asked: Sequence[str]) -> list[Row]:
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
        raise EvaluationError(
            f"base_texts.text: {len(known)} of {len(texts)} texts of {section.text} hold questions of the "
            f"retention suite ({known[0][:60]!r} …), so retention would measure what was learnt; take them out"
        )
    different = [*dict.fromkeys(texts)]
    if len(different) < LEAST:
        raise EvaluationError(
            f"base_texts.text: expected at least {LEAST} different texts in {section.text}, got {len(different)}"
        )
    chosen = spread(different, section.number)
    random.Random(section.seed).shuffle(chosen)  # the first are kept for measuring
    return [{"text": text, "ended": True} for text in chosen]


if __name__ == "__main__":
    cli(lambda: main_for("base_texts", lambda: run(load_params(Params))))
