"""Stage quantize: quantized/<arm>/<seed>/ with size, accuracy and agreement with f16 of the model in other precisions.

The files themselves are not kept: what is served is export.quantization's. One is on the disk at a time, beside the
model in f16 that it is made from: the exported one, or where the export kept only another precision, one made anew, for
which the merged weights in 16 bits are there as well until it is written.
"""

import json
import shutil
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluation import scoring
from evaluation.backends.llama_cpp import LlamaCppBackend
from evaluation.tasks import Item
from export import gguf
from export.errors import ExportError
from export.quantization import Contents, contents, quantize
from pipelines.base_model import load_reference
from pipelines.config import ConfigError, check_arm, for_text, load_params
from pipelines.export import F16, SERVED
from pipelines.outputs import staged
from pipelines.runinfo import (
    RunRecord,
    hash_inputs,
    llama_cpp_device,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from pipelines.schema import Params
from pipelines.stage import (
    BASE_ARM,
    DATA,
    ArmOption,
    SeedOption,
    adapter_dir,
    cli,
    gguf_dir,
    main_for,
    quantized_dir,
)

REFERENCE = "f16"
Answers = list[dict[str, Any]]


def f16_file(arm: str, seed: int, folder: Path) -> Path:
    """The model in f16: as exported, or made anew in `folder` where the export kept only another precision.

    Raises:
        ConfigError: nothing exported.
    """
    place = gguf_dir(arm, seed)
    if (place / F16).is_file():
        return place / F16
    if not (place / SERVED).is_file() or not (place / "serving.json").is_file():
        raise ConfigError(f"{place}: expected an exported model, found none; run `dvc repro export`")
    if read_json(place / "serving.json")["quantization"] == REFERENCE:
        return place / SERVED
    reference, _ = load_reference()
    merged = folder / "merged" / "model"  # as in stage export: the converter writes the name into the file
    adapter = None if arm == BASE_ARM else adapter_dir(arm, seed)
    gguf.save_merged(reference.merge_from, adapter, merged, reference.merge_kwargs)
    gguf.convert_model(merged, folder / F16, f"{arm}-{seed}")
    shutil.rmtree(merged.parent)
    return folder / F16


def answer(params: Params, model: Path, facts: dict[str, Any], items: list[Item], label: str) -> Answers:
    """Answers of a GGUF file to the test items, scored: {item_id, answer, correct, credit}, in the items' order."""
    section = params.evaluate
    engine = LlamaCppBackend(
        model, facts["template"], num_ctx=facts["num_ctx"], threads=section.threads, parallel=section.parallel
    )
    with closing(engine), tqdm(total=len(items), desc=label, mininterval=1) as bar:
        stop = facts["stop"]
        scored = scoring.ask(engine, items, "test", max_tokens=section.max_tokens, stop=stop, progress=bar.update)
    return [{key: row[key] for key in ("item_id", "answer", "correct", "credit")} for row, _ in scored]


def row_for(name: str, made: Contents, fallbacks: int, answers: Answers, reference: Answers) -> dict[str, Any]:
    """One precision's entry in quantized.json."""
    correct = sum(a["correct"] for a in answers)
    same = sum(a["answer"] == b["answer"] for a, b in zip(answers, reference, strict=True))
    return {
        "type": name,
        "bytes": made.size,
        "bits_per_weight": made.bits_per_weight,
        "tensor_types": made.tensor_types,
        "category_accuracy": correct / len(answers),
        "credit": sum(a["credit"] for a in answers) / len(answers),
        "correct": correct,
        "n": len(answers),
        "answers_equal_to_f16": same / len(answers),
        "fallbacks": fallbacks,
    }


def run(params: Params, arm: str, seed: int) -> None:
    """Measure one arm with one seed in every precision asked for."""
    if arm != BASE_ARM:
        check_arm(arm, params)
    out, place = quantized_dir(arm, seed), gguf_dir(arm, seed)
    items = [Item.from_json(row) for row in read_jsonl(DATA / "test.jsonl")]
    evaluate = params.evaluate.model_dump(include={"max_tokens", "threads", "parallel"})
    shown = {"quantize": params.quantize.model_dump(), "evaluate": evaluate}
    with staged(out) as folder:
        # Beside the results and not in /tmp, which may be small or in memory.
        with tempfile.TemporaryDirectory(dir=folder) as name:
            temporary = Path(name)
            source = f16_file(arm, seed, temporary)
            exported = contents(source)
            if exported.tensor_types.keys() - {"F16", "F32"}:
                raise ExportError(f"{source}: expected a model in f16, found {exported.tensor_types}; export again")
            facts = read_json(place / "serving.json")
            inputs = hash_inputs(DATA / "test.jsonl", place)
            record = RunRecord(
                "quantize",
                params=shown,
                inputs=inputs,
                arm=arm,
                seed=seed,
                prompt_template=facts["template"],
                device=llama_cpp_device(params.evaluate.threads),
            )
            reference = answer(params, source, facts, items, f"{arm}-{seed} {REFERENCE}")
            rows = [row_for(REFERENCE, exported, 0, reference, reference)]
            samples = [{"type": REFERENCE, **a} for a in reference]
            for precision in params.quantize.types:
                if precision == REFERENCE:
                    continue
                made = temporary / f"model-{precision}.gguf"
                fallbacks = quantize(source, made, precision)
                answers = answer(params, made, facts, items, f"{arm}-{seed} {precision}")
                rows.append(row_for(precision, contents(made), fallbacks, answers, reference))
                samples += [{"type": precision, **a} for a in answers]
                made.unlink()
        write_jsonl(folder / "quantized_samples.jsonl", samples)
        write_json(folder / "quantized.json", {"schema": 1, "arm": arm, "seed": seed, "rows": rows})
        record.write(folder)
    shown_rows = {r["type"]: [round(r["bits_per_weight"], 2), round(r["credit"], 4)] for r in rows}
    print(json.dumps({"type: [bits per weight, mean credit]": shown_rows}))


def main(arm: ArmOption, seed: SeedOption = 0) -> None:
    """Measure one arm with one seed in every precision asked for."""
    main_for("quantize", lambda: run(for_text(load_params(), "stage quantize"), arm, seed), arm, seed)


if __name__ == "__main__":
    cli(main)
