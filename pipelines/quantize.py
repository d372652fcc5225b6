"""Stage quantize: quantized/<arm>/<seed>/ with size, accuracy and agreement with f16 of the model in other precisions.

The files themselves are not kept: what is served has export.quantization. Only one is on disk at a time, beside its
source in f16: the exported file, or a new one where the export kept only another precision. Building that one also
needs room for the merged 16-bit weights.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pydantic import field_validator
from tqdm import tqdm

from db.files import (
    finish_run,
    hash_inputs,
    llama_cpp_device,
    read_jsonl,
    staged,
    start_run,
    write_record,
    write_records,
)
from db.records import QuantizedRecord, QuantizedSampleRecord
from evaluation.measure import answers
from evaluation.tasks import Item
from export import ExportError, gguf
from export.engines.llama_cpp import LlamaCppEngine
from export.modelfile import Serving
from export.served import F16_GGUF, FACTS, SERVED_GGUF
from pipelines.base_model import load_reference
from pipelines.params import ConfigError, Evaluate, StageParams, check_arm
from pipelines.stage import BASE_ARM, DATA, adapter_dir, command, gguf_dir, quantized_dir
from trainers.settings import Section

REFERENCE = "f16"


class Quantize(Section):
    """Section quantize: further precisions to measure; f16 is always measured."""

    types: list[gguf.Precision]

    @field_validator("types")
    @classmethod
    def _unique(cls, types: list[str]) -> list[str]:
        if len(set(types)) != len(types):
            raise ValueError(f"expected each once, got {types}")
        return types


class Params(StageParams):
    quantize: Quantize
    evaluate: Evaluate


Answers = list[dict[str, Any]]


def f16_file(arm: str, seed: int, folder: Path) -> Path:
    """The model in f16: as exported, or rebuilt in `folder` where the export kept only another precision.

    Raises ConfigError: nothing exported.
    """
    place = gguf_dir(arm, seed)
    if (place / F16_GGUF).is_file():
        return place / F16_GGUF
    if not (place / SERVED_GGUF).is_file() or not (place / FACTS).is_file():
        raise ConfigError(f"{place}: expected an exported model, found none; run `dvc repro export`")
    if Serving.read(place / FACTS).quantization == REFERENCE:
        return place / SERVED_GGUF
    reference, _ = load_reference()
    merged = folder / "merged" / "model"  # as in stage export: the converter writes the name into the file
    adapter = None if arm == BASE_ARM else adapter_dir(arm, seed)
    gguf.save_merged(reference.merge_from, adapter, merged, dict(reference.merge_kwargs))
    gguf.convert_model(merged, folder / F16_GGUF, f"{arm}-{seed}")
    shutil.rmtree(merged.parent)
    return folder / F16_GGUF


def answer(section: Any, model: Path, serving: Serving, items: list[Item], label: str) -> Answers:
    """Answers of a GGUF file to the test items, scored: {item_id, answer, correct, credit}, in the items' order."""
    engine = LlamaCppEngine(model, serving.render, num_ctx=serving.num_ctx, parallel=section.parallel)
    with engine, tqdm(total=len(items), desc=label) as bar:
        stop, limit = serving.stop, section.max_tokens
        scored = answers.ask(engine, items, "test", max_tokens=limit, stop=stop, progress=bar.update)
    return [{key: row[key] for key in ("item_id", "answer", "correct", "credit")} for row, _ in scored]


def row_for(name: str, file: gguf.Contents, fallbacks: int, given: Answers, reference: Answers) -> dict[str, Any]:
    correct = sum(a["correct"] for a in given)
    same = sum(a["answer"] == b["answer"] for a, b in zip(given, reference, strict=True))
    return {
        "type": name,
        "bytes": file.size,
        "bits_per_weight": file.bits_per_weight,
        "tensor_types": file.tensor_types,
        "category_accuracy": correct / len(given),
        "credit": sum(a["credit"] for a in given) / len(given),
        "correct": correct,
        "n": len(given),
        "answers_equal_to_f16": same / len(given),
        "fallbacks": fallbacks,
    }


def run(params: Params, arm: str, seed: int) -> None:
    if arm != BASE_ARM:
        check_arm(arm, params)
    out, place = quantized_dir(arm, seed), gguf_dir(arm, seed)
    items = [Item.from_json(row) for row in read_jsonl(DATA / "test.jsonl")]
    evaluate = params.evaluate.model_dump(include={"max_tokens", "parallel"})
    settings = {"quantize": params.quantize.model_dump(), "evaluate": evaluate}
    with staged(out) as folder:
        # Beside the results and not in /tmp, which may be small or in memory.
        with tempfile.TemporaryDirectory(dir=folder) as name:
            temporary = Path(name)
            source = f16_file(arm, seed, temporary)
            exported = gguf.contents(source)
            if exported.tensor_types.keys() - {"F16", "F32"}:
                raise ExportError(f"{source}: expected a model in f16, found {exported.tensor_types}; export again")
            serving = Serving.read(place / FACTS)
            inputs = hash_inputs(DATA / "test.jsonl", place)
            record = start_run(
                "quantize",
                params=settings,
                inputs=inputs,
                arm=arm,
                seed=seed,
                prompt_template=serving.template,
                device=llama_cpp_device(),
            )
            reference = answer(params.evaluate, source, serving, items, f"{arm}-{seed} {REFERENCE}")
            rows = [row_for(REFERENCE, exported, 0, reference, reference)]
            samples = [{"type": REFERENCE, **a} for a in reference]
            for precision in params.quantize.types:
                if precision == REFERENCE:
                    continue
                file = temporary / f"model-{precision}.gguf"
                fallbacks = gguf.quantize(source, file, precision)
                scored = answer(params.evaluate, file, serving, items, f"{arm}-{seed} {precision}")
                rows.append(row_for(precision, gguf.contents(file), fallbacks, scored, reference))
                samples += [{"type": precision, **a} for a in scored]
                file.unlink()
        write_records(folder / "quantized_samples.jsonl", map(QuantizedSampleRecord.of, samples))
        content = {"schema": 1, "arm": arm, "seed": seed, "rows": rows}
        write_record(folder / "quantized.json", QuantizedRecord.of(content))
        finish_run(record, folder)
    shown_rows = {r["type"]: [round(r["bits_per_weight"], 2), round(r["credit"], 4)] for r in rows}
    print(json.dumps({"type: [bits per weight, mean credit]": shown_rows}))


if __name__ == "__main__":
    command("quantize", Params, run)
