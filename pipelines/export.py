"""Stage export: gguf/<arm>/<seed>/ with merged GGUF, adapter GGUF, Modelfile and parity.json.

The untouched base is an arm too: it has no adapter, and its f16 GGUF is what adapters are applied to.
"""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from evaluation.backends.hf import HfBackend
from evaluation.backends.llama_cpp import LlamaCppBackend
from evaluation.tasks import Item, render
from export import gguf, parity
from export.errors import ExportError
from export.files import sha256
from export.modelfile import render_modelfile, spec_of
from export.serving import ADAPTER_MODELFILE, REFERENCE, adapter_modelfile, base_file
from pipelines.base_model import load_reference
from pipelines.config import check_arm, for_text, load_params
from pipelines.outputs import staged
from pipelines.prompt import chat_facts, prompt_text
from pipelines.runinfo import RunRecord, artifact, hash_inputs, read_jsonl, write_json, write_jsonl
from pipelines.schema import Params
from pipelines.schema_common import CHAT
from pipelines.stage import (
    BASE,
    BASE_ARM,
    DATA,
    ArmOption,
    FirstSeedOption,
    SeedOption,
    adapter_dir,
    cli,
    gguf_dir,
    main_for,
    model_name,
)
from trainers.models import load_tokenizer
from trainers.settings import BaseReference

GGUF = Path("gguf")
# What is exported first and held against Hugging Face; other precisions are made from it.
F16 = "model-f16.gguf"
UNPACKED = "model-f32.gguf"
SERVED = "model.gguf"
ADAPTER = "adapter.gguf"
PREFIX = 8
"""Tokens that timing puts in front of a question."""
REFERENCES = 20
"""Prompts in reference.jsonl."""


def parity_prompts(count: int) -> list[str]:
    """Questions, test and retention items in turn."""
    test, retention = (read_jsonl(DATA / f"{s}.jsonl") for s in ("test", "retention"))
    step = max(1, len(retention) // max(1, count // 2))  # over all general tasks
    mixed = chain.from_iterable(zip(test, retention[::step], strict=False))
    rows = list(mixed)[:count]
    rows += test[len(rows) // 2 :][: count - len(rows)]
    return [Item.from_json(row).prompt for row in rows]


def rendered(template: str, prompts: list[str]) -> list[str]:
    """The questions as the model gets them."""
    return [render(template, prompt) for prompt in prompts]


def write_references(
    folder: Path, template: str, prompts: list[str], answers: list[dict[str, Any]], tokens: int
) -> None:
    """Hugging Face's answers, which `python -m export.ollama verify` holds a server against."""
    rows = zip(prompts, answers, strict=False)
    write_jsonl(
        folder / REFERENCE,
        [{"prompt": p, "rendered": render(template, p), **answer, "max_tokens": tokens} for p, answer in rows],
    )


def base_answers(reference: BaseReference, template: str, prompts: list[str], tokens: int) -> list[dict[str, Any]]:
    """The untouched base's ids and greedy answers."""
    engine = HfBackend(reference.merge_from, template, load_kwargs=reference.merge_kwargs)
    try:
        ids = [engine.tokenize(text) for text in rendered(template, prompts)]
        return [{"ids": list(x), "answer": engine.detokenize(engine.greedy(x, tokens))} for x in ids]
    finally:
        engine.close()


def serving_facts(params: Params, reference: BaseReference, name: str) -> dict[str, Any]:
    """What a server must know to ask the model as training did."""
    tokenizer = load_tokenizer(reference)
    chat = chat_facts() if params.prompt.template == CHAT else {}
    return {
        "template": prompt_text(params.prompt),
        "stop": chat.get("stop", [tokenizer.eos_token]),
        **{key: chat[key] for key in ("go", "system") if key in chat},
        "model_name": name,
        "quantization": params.export.quantization,
        "license": params.export.license,
        "num_ctx": params.export.num_ctx,
        "adds_bos": tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id],
        "bos_token": tokenizer.bos_token,
    }


def check_room(reference: BaseReference, facts: dict[str, Any], answer: int) -> None:
    """Refuse questions that leave the served model no room for an answer, before anything is made for them.

    Args:
        reference: Whose tokenizer counts.
        facts: serving.json.
        answer: Tokens of the longest answer that any stage asks for.

    Raises:
        ExportError: some do not fit the context; says how many and how long the longest is.
    """
    tokenizer, most = load_tokenizer(reference), int(facts["num_ctx"])
    items = [row for split in ("test", "retention") for row in read_jsonl(DATA / f"{split}.jsonl")]
    lengths = [len(tokenizer(text)["input_ids"]) for text in rendered(facts["template"], [i["prompt"] for i in items])]
    over = [length for length in lengths if length + answer + PREFIX > most]
    if over:
        raise ExportError(
            f"expected every question to leave room for an answer of {answer} tokens within export.num_ctx = {most}, "
            f"got {len(over)} of {len(items)} that do not (the longest has {max(over)}); raise export.num_ctx or lower "
            "prepare_data.max_chars"
        )


def modelfile_text(facts: dict[str, Any]) -> str:
    """Modelfile beside the GGUF."""
    return render_modelfile(spec_of(facts), gguf_adds_bos=facts["adds_bos"], bos_token=facts["bos_token"])


def check_parity(
    params: Params, reference: BaseReference, merge_from: str, arm: str, seed: int, folder: Path
) -> dict[str, Any]:
    """Hugging Face (base + adapter, not merged) against merged GGUF and, where there is one, base + adapter GGUF.

    With `parity_arithmetic: f32` llama.cpp computes in float32, as the reference does: the weights of the f16 files are
    unpacked, which is exact. So what is compared is what the files hold, and no rounding of the engine's own.
    """
    template, section = prompt_text(params.prompt), params.export
    prompts = rendered(template, parity_prompts(section.parity_prompts))
    adapter, exact = adapter_dir(arm, seed), section.parity_arithmetic == "f32"

    def hugging_face() -> parity.Engine:
        # The tokenizer is the one that training used; the export's came with the 16-bit weights.
        return HfBackend(
            merge_from,
            template,
            adapter=adapter,
            load_kwargs=reference.merge_kwargs,
            tokenizer=str(adapter),
        )

    def llama_cpp(model: Path, lora: Path | None = None) -> Callable[[], parity.Engine]:
        def opened() -> parity.Engine:
            if exact:  # one after the other, so that the disk holds one such file at a time
                gguf.quantize(model, folder / UNPACKED, "f32")
            file = folder / UNPACKED if exact else model
            return LlamaCppBackend(file, template, num_ctx=section.num_ctx, adapter=lora, exact_cache=exact)

        return opened

    engines = {
        "hf": hugging_face,
        "merged_gguf": llama_cpp(folder / F16),
    }
    if (folder / ADAPTER).is_file():
        engines["base+adapter_gguf"] = llama_cpp(base_file(GGUF), folder / ADAPTER)
    result = parity.compare(engines, prompts, section.parity_tokens, reference="hf")
    (folder / UNPACKED).unlink(missing_ok=True)
    shown = {"quantization": "f16", "arithmetic": section.parity_arithmetic}
    return {"schema": 1, "arm": arm, "seed": seed, **shown, **result}


def check_quantized(params: Params, folder: Path) -> dict[str, Any]:
    """How often the served precision answers as f16 does; reported, not gated."""
    template, section = prompt_text(params.prompt), params.export

    def opened(file: Path) -> Callable[[], parity.Engine]:
        return lambda: LlamaCppBackend(file, template, num_ctx=section.num_ctx)

    engines: dict[str, Callable[[], parity.Engine]] = {
        "f16": opened(folder / F16),
        section.quantization: opened(folder / SERVED),
    }
    prompts = rendered(template, parity_prompts(section.parity_prompts))
    result = parity.compare(engines, prompts, section.parity_tokens, reference="f16")
    return {"quantization": section.quantization, "greedy_equal_to_f16": result["greedy_equal"]}


def run(params: Params, arm: str, seed: int, first_seed: int = 0) -> None:
    """Export one arm with one seed."""
    if arm != BASE_ARM:
        check_arm(arm, params)
    reference, _ = load_reference()
    merge_from = reference.merge_from
    adapter = None if arm == BASE_ARM else adapter_dir(arm, seed)
    out = gguf_dir(arm, seed)
    inputs = hash_inputs(BASE / "base.json", *([adapter] if adapter else []))
    shown = {"export": params.export.model_dump(), "prompt": params.prompt.model_dump()}
    facts = serving_facts(params, reference, model_name(arm, seed, first_seed))
    modelfile_text(facts)  # what cannot be served is refused before the work
    evaluate = params.evaluate  # no part of the result, so these are no params of the stage
    check_room(reference, facts, max(params.export.parity_tokens, evaluate.max_tokens, evaluate.speed_tokens))
    failed = out.with_name(f"{out.name}.parity-failed.json")
    with staged(out) as folder:
        record = RunRecord("export", params=shown, inputs=inputs, arm=arm, seed=seed, prompt_template=facts["template"])
        merged = folder / "merged" / "model"  # a fixed name: the converter writes it into the file
        gguf.save_merged(merge_from, adapter, merged, reference.merge_kwargs)
        lost = gguf.losses(adapter) if adapter else []
        with ThreadPoolExecutor(1) as pool:  # each converter is a process of its own, most of its time imports
            converted = pool.submit(gguf.convert_model, merged, folder / F16, f"{arm}-{seed}")
            if adapter and not lost:
                gguf.convert_adapter(adapter, merged, folder / ADAPTER)
            converted.result()
        quantization = params.export.quantization
        if quantization != "f16":
            gguf.quantize(folder / F16, folder / SERVED, quantization)
        if adapter:
            if lost:
                record.extra["only_merged"] = lost
                print(f"export {arm}-{seed}: no GGUF adapter, it would lose {'; '.join(lost)}; the merged model has it")
            result = check_parity(params, reference, merge_from, arm, seed, folder)
            if quantization != "f16":
                result["served"] = check_quantized(params, folder)
            answers = result.pop("answers")
            write_json(folder / "parity.json", result)
            record.extra["parity"] = {k: result[k] for k in ("token_ids_equal", "greedy_equal", "prompts")}
            difference = parity.verdict(result, params.export.min_greedy_equal)
            if difference:
                write_json(failed, result)
                raise ExportError(f"{out}: the export is not what was trained ({failed}). {difference}")
            failed.unlink(missing_ok=True)
        else:
            answers = base_answers(
                reference, facts["template"], parity_prompts(REFERENCES), params.export.parity_tokens
            )
        prompts = parity_prompts(params.export.parity_prompts if adapter else REFERENCES)[:REFERENCES]
        write_references(folder, facts["template"], prompts, answers, params.export.parity_tokens)
        if quantization == "f16":
            (folder / F16).rename(folder / SERVED)
        elif adapter:
            (folder / F16).unlink()
        shutil.rmtree(merged.parent)
        (folder / "Modelfile").write_text(modelfile_text(facts), encoding="utf-8")
        write_json(folder / "serving.json", facts)
        parent = sha256(adapter / "adapter_model.safetensors") if adapter else None
        kind = "merged_gguf" if adapter else "base_gguf"
        record.artifacts.append(artifact(kind, folder / SERVED, out / SERVED, parent))
        if not adapter and quantization != "f16":  # what adapters are made for
            record.artifacts.append(artifact(kind, folder / F16, out / F16, parent))
        if (folder / ADAPTER).is_file():
            record.artifacts.append(artifact("adapter_gguf", folder / ADAPTER, out / ADAPTER, parent))
            text = adapter_modelfile(facts, out, base_file(GGUF))
            (folder / ADAPTER_MODELFILE).write_text(text, encoding="utf-8")
            place = out / ADAPTER_MODELFILE
            record.artifacts.append(artifact("modelfile", folder / ADAPTER_MODELFILE, place))
        record.artifacts.append(artifact("modelfile", folder / "Modelfile", out / "Modelfile"))
        record.write(folder)
    print(json.dumps({"gguf": str(out / SERVED), **record.extra}))


def main(arm: ArmOption, seed: SeedOption = 0, first_seed: FirstSeedOption = 0) -> None:
    """Export one arm with one seed."""
    main_for("export", lambda: run(for_text(load_params(), "stage export"), arm, seed, first_seed), arm, seed)


if __name__ == "__main__":
    cli(main)
