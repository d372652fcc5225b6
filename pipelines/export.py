"""Stage export: gguf/<arm>/<seed>/ with merged GGUF, adapter GGUF, Modelfile and parity.json.

The untouched base is an arm too: it has no adapter, and its f16 GGUF is what adapters are applied to.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from db.files import (
    artifact,
    finish_run,
    hash_inputs,
    read_json,
    read_jsonl,
    sha256,
    staged,
    start_run,
    write_json,
    write_record,
)
from evaluation.paraphrase import SPLIT
from evaluation.tasks import Item
from export import ExportError, MergedOnlyError, gguf
from export.engines.engine import LocalEngine, Message, asked_for, conversation, fill
from export.engines.hf import HfEngine
from export.engines.llama_cpp import LlamaCppEngine
from export.gguf_base import prove_ids
from export.go import go_of_turns
from export.modelfile import Serving
from export.proof import Checked, problems, prove, verify_record
from export.served import (
    ADAPTER_GGUF,
    ADAPTER_MODELFILE,
    F16_GGUF,
    FACTS,
    MODELFILE,
    PARITY,
    SERVED_GGUF,
    Served,
    base_file,
    make_references,
    modelfile_text,
    write_references,
)
from pipelines.base_model import load_reference
from pipelines.params import Evaluate, Share, StageParams, check_arm
from pipelines.prompt import CHAT, Form, Prompt, chat_facts, prompt_text
from pipelines.stage import BASE, BASE_ARM, DATA, adapter_dir, command, gguf_dir, model_name
from trainers.encode import control_tokens, encode_prompt
from trainers.models import load_tokenizer
from trainers.settings import BaseReference, Positive, Section

GGUF = Path("gguf")
UNPACKED = "model-f32.gguf"
PARALLEL = 16
"""Prompts that Hugging Face answers at once."""
PREFIX = 8
"""Tokens that timing puts in front of a question."""
REFERENCES = 20
"""Prompts in reference.jsonl, each in three forms."""


class Export(Section):
    quantization: gguf.Precision
    num_ctx: Annotated[int, Field(ge=32, description="tokens")]
    license: str | None
    parity_prompts: Positive
    parity_tokens: Positive
    parity_arithmetic: Literal["f32", "f16"]
    min_greedy_equal: Share


class Params(StageParams):
    export: Export
    prompt: Prompt
    evaluate: Evaluate  # the length of answers, which must have room beside every question


def parity_items(count: int) -> list[Item]:
    """Test and retention items in turn."""
    test, retention = (read_jsonl(DATA / f"{s}.jsonl") for s in ("test", "retention"))
    step = max(1, len(retention) // max(1, count // 2))  # spread over all general tasks
    mixed = chain.from_iterable(zip(test, retention[::step], strict=False))
    rows = list(mixed)[:count]
    rows += test[len(rows) // 2 :][: count - len(rows)]
    return [Item.from_json(row) for row in rows]


def serving_facts(params: Params, reference: BaseReference, name: str) -> Serving:
    """What a server needs to prompt the model as in training. Raises ExportError if a Modelfile cannot express it."""
    tokenizer = load_tokenizer(reference)
    chat = chat_facts() if params.prompt.template == CHAT else {}
    template, turns = prompt_text(params.prompt), {}
    if not chat and any("turns" in row or "system" in row for row in read_jsonl(DATA / "test.jsonl")):
        turns = {"go": go_of_turns(template, tokenizer.eos_token)}  # otherwise only the last question is rendered
    serving = Serving(
        template=template,
        stop=chat.get("stop", [tokenizer.eos_token]),
        **{key: chat[key] for key in ("go", "system") if key in chat},
        **turns,
        model_name=name,
        quantization=params.export.quantization,
        license=params.export.license,
        num_ctx=params.export.num_ctx,
        adds_bos=tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id],
        bos_token=tokenizer.bos_token,
        control=control_tokens(tokenizer),
    )
    serving.check()
    return serving


def asked_items() -> list[Item]:
    rows = (row for split in ("test", "retention", SPLIT) for row in read_jsonl(DATA / f"{split}.jsonl"))
    return [Item.from_json(row) for row in rows]


def check_texts(serving: Serving, form: Form) -> None:
    """Raises ExportError, which shows the first such item, if the TEMPLATE renders one differently from training."""
    for item in asked_items():
        if (text := serving.render(asked_for(item))) != (trained := form.asked(item)):
            raise ExportError(
                f"{item.id}: expected the prompt of training, {trained!r}, got {text!r} from the TEMPLATE"
            )


def check_room(reference: BaseReference, serving: Serving, answer: int) -> None:
    """Check, before anything is exported, that every question leaves room for `answer` tokens.

    Raises ExportError if some do not; it has their number and the longest length.
    """
    tokenizer, most = load_tokenizer(reference), serving.num_ctx
    items = asked_items()
    lengths = [len(encode_prompt(tokenizer, serving.render(asked_for(item)))) for item in items]
    over = [length for length in lengths if length + answer + PREFIX > most]
    if over:
        raise ExportError(
            f"expected every question to leave room for an answer of {answer} tokens within export.num_ctx = {most}, "
            f"got {len(over)} of {len(items)} that do not (the longest has {max(over)}); raise export.num_ctx or lower "
            "prepare_data.max_chars"
        )


def hugging_face(reference: BaseReference, template: str, arm: str, seed: int) -> LocalEngine:
    """The model as trained. An arm has the tokenizer of training, because the export's came with the weights."""
    adapter, base = None if arm == BASE_ARM else adapter_dir(arm, seed), reference.merge_from
    kwargs, tokenizer = dict(reference.merge_kwargs), str(adapter) if adapter else None
    return HfEngine(base, template, adapter=adapter, load_kwargs=kwargs, tokenizer=tokenizer, parallel=PARALLEL)


def conversation_text(params: Params, serving: Serving, tokenizer: Any, messages: list[Message]) -> str:
    """A conversation as rendered in training; only its last question if the model was trained on single ones."""
    if not serving.converses:
        return fill(serving.template, messages)
    if params.prompt.template != CHAT:
        *earlier, last = [message["content"] for message in messages]
        return Form(serving.template).asked(
            Item("", "", last, "", turns=tuple(zip(earlier[::2], earlier[1::2], strict=True)))
        )
    system = conversation("", params.prompt.system)[:-1]
    text = tokenizer.apply_chat_template([*system, *messages], tokenize=False, add_generation_prompt=True)
    return str(text).removeprefix(tokenizer.bos_token if serving.adds_bos else "")


def prove_files(
    params: Params, reference: BaseReference, forms: list[Served], folder: Path
) -> tuple[list[Checked], dict[str, Mapping[str, Any]]]:
    """Hugging Face (base + adapter, not merged) against the merged GGUF and, where there is one, base + adapter GGUF.

    With `parity_arithmetic: f32` llama.cpp computes in float32, as the reference does: the weights of the f16 files are
    unpacked, which is exact. So what is compared is what the files hold, and no rounding of the engine's own.
    """
    section, one = params.export, forms[0]
    prompts = list(map(Form(params.prompt.template).asked, parity_items(section.parity_prompts)))
    exact = section.parity_arithmetic == "f32"

    def llama_cpp(form: Served) -> LlamaCppEngine:
        if exact:  # one after the other, so that the disk holds one such file at a time
            gguf.quantize(form.gguf, folder / UNPACKED, "f32")
        file, template = folder / UNPACKED if exact else form.gguf, form.serving.template
        return LlamaCppEngine(file, template, num_ctx=section.num_ctx, adapter=form.adapter, exact_cache=exact)

    trained = partial(hugging_face, reference, one.serving.template, one.arm, one.seed)
    proof = prove(trained, llama_cpp, forms, prompts, section.parity_tokens)
    (folder / UNPACKED).unlink(missing_ok=True)
    return proof


def run(params: Params, arm: str, seed: int) -> None:
    if arm != BASE_ARM:
        check_arm(arm, params)
    section = params.export
    reference, _ = load_reference()
    adapter = None if arm == BASE_ARM else adapter_dir(arm, seed)
    out = gguf_dir(arm, seed)
    inputs = hash_inputs(BASE / "base.json", *([adapter] if adapter else []))
    settings = {"export": section.model_dump(), "prompt": params.prompt.model_dump()}
    serving = serving_facts(params, reference, model_name(arm, seed, params.first_seed))
    template = serving.template
    evaluate = params.evaluate  # does not affect the result, so not among the params of the stage
    check_texts(serving, Form(params.prompt.template))
    kwargs = dict(reference.merge_kwargs)
    gguf.check_context(reference.merge_from, kwargs, section.num_ctx)
    check_room(reference, serving, max(section.parity_tokens, evaluate.max_tokens, evaluate.speed_tokens))
    failed = out.with_name(f"{out.name}.parity-failed.json")
    with staged(out) as folder:
        record = start_run("export", params=settings, inputs=inputs, arm=arm, seed=seed, prompt_template=template)
        merged = folder / "merged" / "model"  # a fixed name: the converter writes it into the file
        gguf.save_merged(reference.merge_from, adapter, merged, kwargs)
        gguf.convert_model(merged, folder / F16_GGUF, f"{arm}-{seed}")
        if not adapter:  # before anything is built on it
            asked = dict.fromkeys(serving.render(asked_for(item)) for item in asked_items())
            record.extra["unpacked"] = read_json(BASE / "base.json").get("gguf")
            record.extra["prompts_with_equal_ids"] = prove_ids(folder / F16_GGUF, load_tokenizer(reference), [*asked])
        if adapter:
            try:
                gguf.convert_adapter(adapter, reference.merge_from, folder / ADAPTER_GGUF, kwargs)
            except MergedOnlyError as error:
                record.extra["only_merged"] = str(error)
                print(f"export {arm}-{seed}: no GGUF adapter: {error}; the merged model has all of it")
        quantized = section.quantization != "f16"
        if quantized:
            gguf.quantize(folder / F16_GGUF, folder / SERVED_GGUF, section.quantization)
        answers: dict[str, Mapping[str, Any]] = {}
        if adapter:
            forms = [Served(str(serving.model_name), arm, seed, folder, folder / F16_GGUF, None, serving)]
            if (folder / ADAPTER_GGUF).is_file():
                forms.append(replace(forms[0], gguf=base_file(GGUF), adapter=folder / ADAPTER_GGUF))
            rows, answers = prove_files(params, reference, forms, folder)
            content = verify_record(arm, seed, str(serving.model_name), rows)
            write_record(folder / PARITY, content)
            # Without a server's and the engine's rounding, a tie is a difference like any other.
            strict = [row.model_copy(update={"tied": None}) for row in rows]
            if wrong := problems(strict, section.min_greedy_equal):
                write_record(failed, content)
                raise ExportError(f"{out}: the export is not what was trained ({failed}). {' '.join(wrong)}")
            failed.unlink(missing_ok=True)
        questions = (item for item in parity_items(section.parity_prompts if adapter else REFERENCES) if not item.whole)
        prompts = [item.prompt for item in islice(questions, REFERENCES)]
        chat = partial(conversation_text, params, serving, load_tokenizer(reference))
        with hugging_face(reference, template, arm, seed) as engine:
            write_references(folder, make_references(engine, serving, prompts, section.parity_tokens, chat, answers))
        if not quantized:
            (folder / F16_GGUF).rename(folder / SERVED_GGUF)
        elif adapter:
            (folder / F16_GGUF).unlink()
        shutil.rmtree(merged.parent)
        (folder / MODELFILE).write_text(modelfile_text(serving, out), encoding="utf-8")
        write_json(folder / FACTS, serving.as_json())
        parent = sha256(adapter / "adapter_model.safetensors") if adapter else None
        files = [("merged_gguf" if adapter else "base_gguf", SERVED_GGUF, parent)]
        if quantized and not adapter:  # the base that adapters were trained on
            files.append(("base_gguf", F16_GGUF, parent))
        if (folder / ADAPTER_GGUF).is_file():
            text = modelfile_text(serving, out, base_file(GGUF))
            (folder / ADAPTER_MODELFILE).write_text(text, encoding="utf-8")
            files += [("adapter_gguf", ADAPTER_GGUF, parent), ("modelfile", ADAPTER_MODELFILE, None)]
        files.append(("modelfile", MODELFILE, None))
        record.artifacts += [artifact(kind, folder / name, out / name, parent) for kind, name, parent in files]
        finish_run(record, folder)
    print(json.dumps({"gguf": str(out / SERVED_GGUF), **record.extra}))


if __name__ == "__main__":
    command("export", Params, run)
