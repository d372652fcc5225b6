"""Stage base_texts: texts/texts.jsonl, samples of the base, which arms are held to and KL is measured on.

A base model writes from its first token on. A chat model first writes a user's turn and then answers it (Magpie, Xu et
al. 2024). Texts with questions that the retention suite might ask are left out.
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
from evaluation.measure.texts import read_texts, spread, without_control
from evaluation.tasks import Item, general
from pipelines.base_model import load_reference, resolved
from pipelines.params import ConfigError, StageParams, load_params
from pipelines.prompt import CHAT, Prompt, chat_facts, prompt_text
from pipelines.stage import BASE, DATA, TEXTS, cli, main_for, sees_pictures
from trainers.encode import control_tokens
from trainers.keeper import batches
from trainers.models import load_base_model, load_tokenizer
from trainers.settings import Section, Seed, TrainSettings

Row = dict[str, Any]
FROM_BASE = "base"
"""As base_texts.text: sample the base."""
MIN_TEXTS = 8
_BATCH = 64
_TRIES = 4  # samples per wanted text before the stage gives up


class BaseTexts(Section):
    text: str
    text_split: str
    text_subset: str | None
    text_column: str
    number: Annotated[int, Field(ge=MIN_TEXTS, description="texts")]
    max_tokens: Annotated[int, Field(ge=8, description="tokens per turn that the base writes")]
    seed: Seed


class Params(StageParams):
    base_texts: BaseTexts
    prompt: Prompt
    train: TrainSettings


def sampled(
    model: Any, tokenizer: Any, section: BaseTexts, chat: tuple[str, str, Sequence[str]] | None
) -> Iterator[Row | None]:
    """Endless samples at temperature 1; None for a user's turn that is empty or does not end.

    Args:
        chat: text before a user's turn, text after it, and stop words; None for a base model.
    """
    import torch
    from transformers import StoppingCriteriaList, set_seed

    opening, after, stop = chat or ("", "", ())
    eos = model.generation_config.eos_token_id
    eos_ids = [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
    ends = {*eos_ids, *tokenizer.convert_tokens_to_ids(list(stop))} - {None, tokenizer.unk_token_id}
    # A user's turn also ends where the model goes on with the text after it, be that a special token or plain text.
    mark = after.strip()
    first = tokenizer(mark, add_special_tokens=False)["input_ids"][:1]
    turn_ends = ends.union(token for token in first if token in tokenizer.added_tokens_decoder)
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def complete(texts: list[str], ends: set[int]) -> Iterator[tuple[str, bool]]:
        """The model's continuation of each text, and whether it ended."""
        (batch,) = batches(
            [tokenizer(text)["input_ids"] or [start] for text in texts],
            tokenizer.pad_token_id, model.device, len(texts), left=True,
        )  # fmt: skip
        goes_on = torch.zeros(len(texts), dtype=torch.bool, device=model.device)
        with tqdm(total=section.max_tokens, desc=f"tokens of {len(texts)} texts", leave=False, delay=10) as bar:

            def count(*_: Any, **__: Any) -> Any:
                """A stopping criterion that stops nothing: a batch of a large base takes minutes."""
                bar.update()
                return goes_on

            generated = model.generate(
                **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, use_cache=True,
                max_new_tokens=section.max_tokens, pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(ends),
                stopping_criteria=StoppingCriteriaList([count]),
            )  # fmt: skip
        for row in generated[:, batch["input_ids"].shape[1] :].tolist():
            length = next((i for i, token in enumerate(row) if token in ends), None)
            yield tokenizer.decode(row[:length], skip_special_tokens=True), length is not None

    set_seed(section.seed)
    while True:
        texts = complete([opening] * _BATCH, turn_ends)
        if chat is None:
            yield from ({"text": text, "ended": ended} for text, ended in texts)
            continue
        prompts = []
        for text, ended in texts:
            turn, closed, _ = text.partition(mark) if mark else (text, "", "")
            if turn.strip() and (ended or closed):
                prompts.append(f"{opening}{turn.strip()}{after}")
        for prompt, (text, ended) in zip(prompts, complete(prompts, ends) if prompts else (), strict=True):
            yield {"text": prompt + text, "ended": ended}
        yield from [None] * (_BATCH - len(prompts))


def touches_retention(text: str, template: str, prompts: Sequence[str]) -> bool:
    """Whether a text holds a prompt of the retention suite, or one in the template's form that it might ask."""
    head, tail = template.split("{prompt}")
    questions = re.findall(re.escape(head) + "(.*?)" + (re.escape(tail) or "$"), text, re.DOTALL)
    return any(map(general.is_held_out, questions)) or any(prompt in text for prompt in prompts)


def turn_of(template: str, tokenizer: Any) -> tuple[str, str, Sequence[str]]:
    """Text before and after a user's turn in the base's chat template, and its stop words."""
    opening, after = template.split("{prompt}")
    if not opening.removeprefix(tokenizer.bos_token or "").strip():
        raise ConfigError(
            "base_texts.text: base: expected a chat template that opens a user's turn, got nothing before {prompt} in "
            f"{template!r}; use your own texts (a .txt or .jsonl file, hub:org/name)"
        )
    return opening, after, chat_facts()["stop"]


def run(params: Params) -> None:
    section = params.base_texts
    template = prompt_text(params.prompt)
    prompts = [Item.from_json(row).prompt for row in read_jsonl(DATA / "retention.jsonl")]
    user_files = [file] if (file := Path(section.text)).is_file() else []
    with staged(TEXTS) as folder:
        record = start_run(
            "base_texts",
            params={"base_texts": section.model_dump(), "prompt": params.prompt.model_dump()},
            inputs=hash_inputs(BASE / "base.json", DATA / "retention.jsonl", *user_files),
            prompt_template=template,
        )
        if sees_pictures():
            rows: list[Row] = []
            record.extra = {"left_out": "the base takes pictures; texts alone hold it to nothing that it sees"}
        elif section.text == FROM_BASE:
            rows, unused = _sample_base(section, params, template, prompts)
            record.extra = {"texts": len(rows), "unused": unused}
        else:
            rows = _read_user_texts(section, prompts)
            record.extra = {"texts": len(rows)}
        write_jsonl(folder / "texts.jsonl", rows)
        record.artifacts.append(artifact("dataset", folder / "texts.jsonl", TEXTS / "texts.jsonl"))
        finish_run(record, folder)
    print(json.dumps(record.extra))


def _sample_base(section: BaseTexts, params: Params, template: str, prompts: Sequence[str]) -> tuple[list[Row], int]:
    """Different texts of the base without retention questions, and how many samples were unused."""
    reference, _ = load_reference()
    tokenizer = load_tokenizer(reference)
    chat = turn_of(template, tokenizer) if params.prompt.template == CHAT else None
    settings = resolved(params.train).model_copy(update={"gradient_checkpointing": False})
    model = load_base_model(reference, settings).eval()
    if settings.precision == "bf16" and settings.quantize_base == "none":
        model = model.bfloat16()  # 1.5 times as fast as float32 with SmolLM2 on a CPU
    rows: dict[str, Row] = {}  # by text: none may be both trained and measured on
    with tqdm(total=section.number, desc="base_texts") as bar:
        for tries, row in enumerate(sampled(model, tokenizer, section, chat), 1):
            if row and row["text"].strip() and not touches_retention(row["text"], template, prompts):
                rows[row["text"]] = row
                bar.update(len(rows) - bar.n)
            if len(rows) == section.number:
                return [*rows.values()], tries - len(rows)
            if tries == _TRIES * section.number:
                break
    raise EvaluationError(
        f"base_texts.number: expected {section.number} texts, got {len(rows)} usable ones in {tries} samples of the "
        "base; lower it, raise base_texts.max_tokens, or name your own texts in base_texts.text"
    )


def _read_user_texts(section: BaseTexts, prompts: Sequence[str]) -> list[Row]:
    texts = read_texts(
        section.text,
        column=section.text_column,
        split=section.text_split,
        subset=section.text_subset,
        section="base_texts",
        own=FROM_BASE,
    )
    texts = without_control(texts, control_tokens(load_tokenizer(load_reference()[0])))
    leaks = [text for text in texts if any(prompt in text for prompt in prompts)]
    if leaks:
        raise EvaluationError(
            f"base_texts.text: {len(leaks)} of {len(texts)} texts of {section.text} contain questions of the retention "
            f"suite ({leaks[0][:60]!r} …), which would then measure what was trained on; take them out"
        )
    different = [*dict.fromkeys(texts)]
    if len(different) < MIN_TEXTS:
        raise EvaluationError(
            f"base_texts.text: expected at least {MIN_TEXTS} different texts in {section.text}, got {len(different)}"
        )
    chosen = spread(different, section.number)
    random.Random(section.seed).shuffle(chosen)  # the first ones are kept for measuring
    return [{"text": text, "ended": True} for text in chosen]


if __name__ == "__main__":
    cli(lambda: main_for("base_texts", lambda: run(load_params(Params))))
